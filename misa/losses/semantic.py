"""The semantic teacher's own objectives (facts of §3.1 that the paper leaves open): from boxes, or from label maps.

Axes: b image · n instance (box) · c category · e class, background included · h row · w column.

From boxes, the student's objectives in semantic form; only telling instances apart is left out. A box b of class c
says: outside all boxes is background, what is an object in b is c, and c reaches all four sides of b. Other boxes of
the same class are merged: q, the probability of c wherever some box of c allows it, is one map for all of them, and b
looks at q through its own window. That holds for the union as for the instance: the object in b touches b's sides.
On top of that the network may learn from itself: where it is sure, its own answer among what the boxes allow counts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.experiment import Affinity
from misa.losses.inputs import Batch
from misa.losses.pairwise import pairwise_loss
from misa.losses.projection import projection_loss
from misa.ops.axes import check_shapes

VOID = 255


class Boxes(NamedTuple):
    """The boxes of a batch at the resolution of the losses; the host reads `labels` and `image`, and has them."""

    masks: Bool[Tensor, "n h w"]
    labels: Int[Tensor, " n"]
    image: Int[Tensor, " n"]  # which image of the batch


def label_map_loss(logits: Float[Tensor, "b e h w"], labels: Int[Tensor, "b H W"]) -> Float[Tensor, ""]:
    """Cross-entropy at the labels' resolution, averaged over pixels that are not void (255); 0 where all are."""
    sharp = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    known = (labels != VOID).sum().clamp(min=1)
    return F.cross_entropy(sharp, labels, ignore_index=VOID, reduction="sum") / known


def allowed_classes(
    boxes: Boxes, shape: tuple[int, int], *, images: int, classes: int, background: int
) -> Bool[Tensor, "{images} {classes} h w"]:
    """Which classes the boxes allow at each pixel: the background everywhere, a category inside its own boxes."""
    allowed = torch.zeros((images, classes, *shape), dtype=torch.bool, device=boxes.masks.device)
    rows = _rows(boxes.labels, background)
    for mask, row, image in zip(boxes.masks, rows, boxes.image, strict=True):
        allowed[image, row] |= mask
    allowed[:, background] = True
    return allowed


def outside_loss(
    logits: Float[Tensor, "b e h w"], allowed: Bool[Tensor, "b e h w"], valid: Bool[Tensor, "b h w"], background: int
) -> Float[Tensor, ""]:
    """The cross-entropy to the background outside all boxes, averaged over these pixels; 0 where there are none."""
    region = valid & (allowed.sum(dim=1) == 1)
    loss = logits.logsumexp(dim=1) - logits[:, background]
    return (loss * region).sum() / region.sum().clamp(min=1)


def class_loss(
    logits: Float[Tensor, "b e h w"], allowed: Bool[Tensor, "b e h w"], valid: Bool[Tensor, "b h w"], background: int
) -> Float[Tensor, ""]:
    """−log Σ_{c allowed} p(c | not background) inside boxes, averaged over these pixels; 0 where there are none.

    The semantic form of the student's classification loss: if a pixel in a box of c is an object, it is c. It moves
    the categories against each other only; where the object ends is left to projection and propagation.
    """
    region = valid & (allowed.sum(dim=1) > 1)
    objects = logits.clone()
    objects[:, background] = -torch.inf
    # Outside boxes nothing is allowed: any finite number will do there, the region leaves it out.
    kept = objects.masked_fill(~allowed & region[:, None], -torch.inf)
    loss = objects.logsumexp(dim=1) - kept.logsumexp(dim=1)
    return (loss * region).sum() / region.sum().clamp(min=1)


def sure_loss(
    logits: Float[Tensor, "b e h w"],
    allowed: Bool[Tensor, "b e h w"],
    valid: Bool[Tensor, "b h w"],
    threshold: float = 0.7,
) -> Float[Tensor, ""]:
    """Cross-entropy to the network's own answer inside boxes, where it is sure of it; 0 where it nowhere is.

    The answer is the most probable allowed class, sure where its share among the allowed ones is over `threshold`:
    what is an object is then of the box's class, which the network alone may have taken for another.
    """
    shares = (logits.detach().softmax(dim=1) * allowed).clamp(min=1e-8)
    share, answer = (shares / shares.sum(dim=1, keepdim=True)).max(dim=1)
    region = valid & (allowed.sum(dim=1) > 1) & (share > threshold)
    loss = F.cross_entropy(logits, answer, reduction="none")
    return (loss * region).sum() / region.sum().clamp(min=1)


@dataclass(frozen=True)
class SemanticTerms:
    """The weights of what a semantic network learns from boxes, and its pairwise affinity (None: no pairwise loss)."""

    outside_weight: float = 1.0
    class_weight: float = 1.0
    projection_weight: float = 3.0
    sure_weight: float = 0.0
    affinity: Affinity | None = None


def semantic_objectives(
    logits: Float[Tensor, "b e h w"], boxes: Boxes, batch: Batch, terms: SemanticTerms, *, background: int
) -> dict[str, Tensor]:
    """The weighted losses of class scores at the resolution of `boxes` and `batch`, by name.

    outside · L_outside + class · L_class + sure · L_sure + projection · L_projection(q, b), and L_pairwise(q) (Eq. 15).
    Without boxes L_outside alone is not zero.
    """
    check_shapes("semantic_objectives", logits=(logits, "b e h w"), images=(batch.images, "b 3 h w"))
    b, classes, h, w = logits.shape
    logits = logits.float()
    allowed = allowed_classes(boxes, (h, w), images=b, classes=classes, background=background)
    losses = {
        "loss_outside": terms.outside_weight * outside_loss(logits, allowed, batch.valid, background),
        "loss_class": terms.class_weight * class_loss(logits, allowed, batch.valid, background),
    }
    if terms.sure_weight:
        losses["loss_sure"] = terms.sure_weight * sure_loss(logits, allowed, batch.valid)
    rows = _rows(boxes.labels, background)
    where = [index.to(logits.device, non_blocking=True) for index in (boxes.image, rows)]
    merged = logits.softmax(dim=1)[where[0], where[1]] * allowed[where[0], where[1]]
    projection = projection_loss(merged * boxes.masks, boxes.masks)
    losses["loss_projection"] = terms.projection_weight * projection.sum() / max(len(projection), 1)
    if terms.affinity is not None:
        losses |= pairwise_loss(
            merged,
            boxes.masks,
            batch.images,
            boxes.image,
            affinity=terms.affinity,
            labels=boxes.labels,
            valid=batch.valid,
        )
    return losses


def _rows(labels: Int[Tensor, " n"], background: int) -> Int[Tensor, " n"]:
    """The classifier's row of each category: the background's row is skipped."""
    return labels + (labels >= background).long()
