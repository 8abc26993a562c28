"""Assignments: pixels to prototypes in equal shares (Sinkhorn), detections to ground-truth boxes one to one.

Axes: q prototype · p pixel · m detection · g ground truth.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import box_iou

from misa.ops.affinity import check_finite, promote
from misa.ops.axes import check_shapes
from misa.ops.transfer import to_device


def balanced(scores: Float[Tensor, "q p"], *, epsilon: float = 0.05, rounds: int = 3) -> Float[Tensor, "q p"]:
    """Return a soft assignment of pixels to prototypes of nearly equal total shares; each column sums to 1.

    Sinkhorn-Knopp on exp(scores / epsilon): `rounds` times, scale the rows to sum to 1/q, then the columns to 1/p
    (Caron et al. 2020; SIM, Li et al. 2023). Equal scores give 1/q everywhere. No gradient.
    Raises ValueError: the shape is not (q, p), or a constant is not positive; NotFinite: NaN or Inf, on the CPU only.
    """
    if scores.dim() != 2 or scores.shape[0] == 0:
        raise ValueError(f"balanced needs scores of shape (q, p) with a prototype or more: {tuple(scores.shape)}.")
    if not epsilon > 0 or rounds < 1:
        raise ValueError(f"balanced needs a positive epsilon and a round or more: they are {epsilon} and {rounds}.")
    check_finite("balanced: scores", scores)
    q, p = scores.shape
    if p == 0:
        return promote(scores.detach())
    # Subtracting each row's maximum avoids overflow and rows of 0; the first normalization cancels it.
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
    """Return the prototype of every pixel.

    "official" is SIM's published code: a Gumbel-max sample with the shares as logits. Shares lie in [0, 1], so among
    ten prototypes even a share of 1 is drawn with probability e / (e + 9) = 0.23 only: nearly at random. "intended" is
    the argmax. `generator` (on the CPU) makes the sample reproducible.
    """
    if form == "intended":
        return shares.argmax(dim=0)
    if form != "official":
        raise ValueError(f"hard_assignment knows the forms 'official' and 'intended', not {form!r}.")
    uniform = torch.rand(shares.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    gumbel = -(-uniform.log()).clamp(min=1e-300).log()
    return (shares + to_device(gumbel.to(shares.dtype), shares.device)).argmax(dim=0)


def greedy_boxes(
    boxes: Float[Tensor, "m 4"], scores: Float[Tensor, " m"], truth: Float[Tensor, "g 4"], *, iou: float = 0.5
) -> Int[Tensor, " g"]:
    """Return the index of the detection matched to every ground-truth box, −1 for none; on the host.

    Greedy matching: detections by descending score (stable sort) take the unmatched box of the highest IoU, if that is
    `iou` or more; classes are not compared (BoxTeacher, Cheng et al. 2023). Boxes are (x1, y1, x2, y2). The published
    code tests > 0 instead of ≥ 0 and so lets others take the box matched to detection 0; here it stays matched.
    Raises ValueError: shapes do not fit.
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
