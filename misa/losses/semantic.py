"""Training losses of the semantic teacher (§3.1 leaves them open): from boxes, or from label maps.

Axes: b image · n instance (box) · c category · e class, background included · h row · w column.

From boxes they are the student's objectives in semantic form, without separating instances. A box b of class c
implies: pixels outside all boxes are background, an object pixel in b is c, and c reaches all four sides of b. Boxes of
one class are merged: q, the probability of c inside any box of c, is one map for all of them, and b uses q within b.
This is exact for the union as for the instance: the object in b touches b's sides. Self-training is optional: where
the network is confident, its own prediction among the allowed classes is the target.
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
    """The boxes of a batch at the resolution of the losses; `labels` and `image` stay on the host, which reads them."""

    masks: Bool[Tensor, "n h w"]
    labels: Int[Tensor, " n"]
    image: Int[Tensor, " n"]  # which image of the batch


def label_map_loss(logits: Float[Tensor, "b e h w"], labels: Int[Tensor, "b H W"]) -> Float[Tensor, ""]:
    """Return the cross-entropy at the labels' resolution, averaged over all but void pixels (255); 0 without any."""
    sharp = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    known = (labels != VOID).sum().clamp(min=1)
    return F.cross_entropy(sharp, labels, ignore_index=VOID, reduction="sum") / known


def allowed_classes(
    boxes: Boxes, shape: tuple[int, int], *, images: int, classes: int, background: int
) -> Bool[Tensor, "{images} {classes} h w"]:
    """Return which classes the boxes allow at each pixel: background everywhere, a category inside its own boxes."""
    allowed = torch.zeros((images, classes, *shape), dtype=torch.bool, device=boxes.masks.device)
    rows = _rows(boxes.labels, background)
    for mask, row, image in zip(boxes.masks, rows, boxes.image, strict=True):
        allowed[image, row] |= mask
    allowed[:, background] = True
    return allowed


def outside_loss(
    logits: Float[Tensor, "b e h w"], allowed: Bool[Tensor, "b e h w"], valid: Bool[Tensor, "b h w"], background: int
) -> Float[Tensor, ""]:
    """Return the cross-entropy with the background outside all boxes, averaged over these pixels; 0 without any."""
    region = valid & (allowed.sum(dim=1) == 1)
    loss = logits.logsumexp(dim=1) - logits[:, background]
    return (loss * region).sum() / region.sum().clamp(min=1)


def class_loss(
    logits: Float[Tensor, "b e h w"], allowed: Bool[Tensor, "b e h w"], valid: Bool[Tensor, "b h w"], background: int
) -> Float[Tensor, ""]:
    """Return −log Σ_{c allowed} p(c | foreground) inside boxes, averaged over these pixels; 0 without any.

    The semantic form of the student's classification loss: if a pixel in a box of c is an object, it is c. It only
    separates the categories; the object's extent is left to projection and propagation.
    """
    region = valid & (allowed.sum(dim=1) > 1)
    objects = logits.clone()
    objects[:, background] = -torch.inf
    # Outside boxes no category is allowed: keep the logits finite there, `region` drops these pixels.
    kept = objects.masked_fill(~allowed & region[:, None], -torch.inf)
    loss = objects.logsumexp(dim=1) - kept.logsumexp(dim=1)
    return (loss * region).sum() / region.sum().clamp(min=1)


def sure_loss(
    logits: Float[Tensor, "b e h w"],
    allowed: Bool[Tensor, "b e h w"],
    valid: Bool[Tensor, "b h w"],
    threshold: float = 0.7,
) -> Float[Tensor, ""]:
    """Return the self-training loss: cross-entropy with confident own predictions inside boxes; 0 without any.

    The target is the most probable allowed class, background included, where its share of the allowed classes'
    probability exceeds `threshold`; the boxes correct categories that the network confuses.
    """
    shares = (logits.detach().softmax(dim=1) * allowed).clamp(min=1e-8)
    share, answer = (shares / shares.sum(dim=1, keepdim=True)).max(dim=1)
    region = valid & (allowed.sum(dim=1) > 1) & (share > threshold)
    loss = F.cross_entropy(logits, answer, reduction="none")
    return (loss * region).sum() / region.sum().clamp(min=1)


@dataclass(frozen=True)
class SemanticTerms:
    """Weights of the losses from boxes, `sure_weight` of self-training; and the affinity (None: no pairwise loss)."""

    outside_weight: float = 1.0
    class_weight: float = 1.0
    projection_weight: float = 3.0
    sure_weight: float = 0.0
    affinity: Affinity | None = None


def semantic_objectives(
    logits: Float[Tensor, "b e h w"], boxes: Boxes, batch: Batch, terms: SemanticTerms, *, background: int
) -> dict[str, Tensor]:
    """Return the weighted losses of class logits at the resolution of `boxes` and `batch`, by name.

    outside · L_outside + class · L_class + sure · L_sure + projection · L_projection(q, b), and L_pairwise(q) (Eq. 15).
    Without boxes only L_outside is not zero.
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
    """Return the classifier's row of each category, skipping the background's."""
    return labels + (labels >= background).long()
