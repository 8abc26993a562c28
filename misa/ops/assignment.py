"""Who belongs to whom: pixels to prototypes in equal shares, detections to boxes one to one.

Axes: q prototype · p pixel · m detection · g ground truth.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import box_iou

from misa.ops.affinity import check_finite, promote
from misa.ops.axes import check_shapes
from misa.ops.sent import sent


def balanced(scores: Float[Tensor, "q p"], *, epsilon: float = 0.05, rounds: int = 3) -> Float[Tensor, "q p"]:
    """The shares of every pixel in the prototypes, so that all prototypes get nearly as much; a column sums to 1.

    Sinkhorn and Knopp on exp(scores / epsilon): `rounds` times rows to 1/q, then columns to 1/p (Caron et al. 2020;
    SIM, Li et al. 2023). Equal scores give 1/q everywhere. No gradient.

    Raises:
        ValueError: the shape is not (q, p), or constants that are not positive.
        NotFinite: NaN or Inf, on the CPU only.
    """
    if scores.dim() != 2 or scores.shape[0] == 0:
        raise ValueError(f"balanced needs scores of shape (q, p) with a prototype or more: {tuple(scores.shape)}.")
    if not epsilon > 0 or rounds < 1:
        raise ValueError(f"balanced needs a positive epsilon and a round or more: they are {epsilon} and {rounds}.")
    check_finite("balanced: scores", scores)
    q, p = scores.shape
    if p == 0:
        return promote(scores.detach())
    # A row's maximum is taken out first: exp cannot overflow, no row becomes 0, and the first round divides it anyway.
    logits = promote(scores.detach()) / epsilon
    shares = (logits - logits.amax(dim=1, keepdim=True)).exp()
    for _ in range(rounds):
        shares = shares / (shares.sum(dim=1, keepdim=True) * q)
        shares = shares / (shares.sum(dim=0, keepdim=True) * p).clamp(min=torch.finfo(shares.dtype).tiny)
    return shares * p


def hard_assignment(
    shares: Float[Tensor, "q p"],
    *,
    form: Literal["official", "intended"] = "official",
    generator: torch.Generator | None = None,
) -> Int[Tensor, " p"]:
    """The prototype of every pixel.

    "official" is SIM's published code: a Gumbel draw with the shares as logits. Shares lie in [0, 1], so even a share
    of 1 among ten prototypes is drawn with e / (e + 9) = 0.23 only: nearly at random. "intended" takes the largest.
    `generator` (on the CPU) makes the draw repeatable.
    """
    if form == "intended":
        return shares.argmax(dim=0)
    if form != "official":
        raise ValueError(f"hard_assignment knows the forms 'official' and 'intended', not {form!r}.")
    uniform = torch.rand(shares.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    gumbel = -(-uniform.log()).clamp(min=1e-300).log()
    return (shares + sent(gumbel.to(shares.dtype), shares.device)).argmax(dim=0)


def greedy_boxes(
    boxes: Float[Tensor, "m 4"], scores: Float[Tensor, " m"], truth: Float[Tensor, "g 4"], *, iou: float = 0.5
) -> Int[Tensor, " g"]:
    """The detection of every ground-truth box, −1 where there is none; on the host.

    Detections by descending score (equal ones by their number) take the free box of the highest IoU, if that is `iou`
    or more; classes are not compared (BoxTeacher, Cheng et al. 2023). Boxes are (x1, y1, x2, y2). The published code
    leaves a box that the very first detection took open to others, by a > 0 for ≥ 0; here it is taken.

    Raises:
        ValueError: shapes do not fit.
    """
    check_shapes("greedy_boxes", boxes=(boxes, "m 4"), scores=(scores, "m"), truth=(truth, "g 4"))
    taken = torch.full((len(truth),), -1)
    if len(truth) == 0 or len(scores) == 0:
        return taken
    overlap = box_iou(boxes.detach().float(), truth.detach().float()).cpu()
    for i in scores.detach().cpu().argsort(descending=True, stable=True).tolist():
        free = overlap[i].masked_fill(taken >= 0, -1)
        best = int(free.argmax())
        if free[best] >= iou:
            taken[best] = i
    return taken
