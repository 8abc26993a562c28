"""The semantic teacher's own objectives (facts of §3.1 that the paper leaves open): from boxes, or from label maps.

Axes: b image · n instance (box) · c category · e class, background included · h row · w column.

From boxes, the student's objectives in semantic form; only telling instances apart is left out. A box b of class c
says: outside the boxes of c no pixel is c, and c reaches all four sides of b. Other boxes of the same class are
merged: q, the probability of c wherever some box of c allows it, is one map for all of them, and b looks at q through
its own window. Both terms hold for the union as for the instance: the object in b touches b's sides by itself.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.losses.inputs import Batch
from misa.losses.pairwise import pairwise_loss
from misa.losses.projection import projection_loss

VOID = 255


class Boxes(NamedTuple):
    """The boxes of a batch at the resolution of the losses."""

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
    logits: Float[Tensor, "b e h w"], allowed: Bool[Tensor, "b e h w"], valid: Bool[Tensor, "b h w"]
) -> Float[Tensor, ""]:
    """−log Σ_{e allowed} p_e over the valid pixels: the mean outside all boxes plus the mean inside.

    Outside all boxes that is the cross-entropy to the background; inside a box of c it rules out other classes. One
    mean over both would hardly see the classes: most pixels are outside.
    """
    kept = logits.masked_fill(~allowed, -torch.inf)  # the background is always left
    loss = logits.logsumexp(dim=1) - kept.logsumexp(dim=1)
    inside = allowed.sum(dim=1) > 1
    regions = (valid & ~inside, valid & inside)
    means = [(loss * region).sum() / region.sum().clamp(min=1) for region in regions]
    return means[0] + means[1]


def semantic_objectives(
    logits: Float[Tensor, "b e h w"],
    boxes: Boxes,
    batch: Batch,
    *,
    background: int,
    outside_weight: float = 1.0,
    projection_weight: float = 3.0,
    affinity: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """The weighted losses of class scores at the resolution of `boxes` and `batch`, by name.

    outside · −log Σ allowed + projection · L_projection(q, b) + L_pairwise(q) inside b (Eq. 15). `affinity` holds the
    arguments of `pairwise_loss`; None leaves it out. Zero with a gradient where there are no boxes.
    """
    if logits.dim() != 4 or logits.shape[-2:] != batch.images.shape[-2:]:
        raise ValueError(
            f"semantic_objectives needs logits (b, e, h, w) at the size of the images {tuple(batch.images.shape[-2:])}:"
            f" they are {tuple(logits.shape)}."
        )
    b, classes, h, w = logits.shape
    logits = logits.float()
    allowed = allowed_classes(boxes, (h, w), images=b, classes=classes, background=background)
    losses = {"loss_outside": outside_weight * outside_loss(logits, allowed, batch.valid)}
    rows = _rows(boxes.labels, background)
    merged = logits.softmax(dim=1)[boxes.image, rows] * allowed[boxes.image, rows]
    projection = projection_loss(merged * boxes.masks, boxes.masks)
    losses["loss_projection"] = projection_weight * projection.sum() / max(len(projection), 1)
    if affinity is not None:
        losses |= pairwise_loss(
            merged, boxes.masks, batch.images, boxes.image, labels=boxes.labels, valid=batch.valid, **affinity
        )
    return losses


def _rows(labels: Int[Tensor, " n"], background: int) -> Int[Tensor, " n"]:
    """The classifier's row of each category: the background's row is skipped."""
    return labels + (labels >= background).long()
