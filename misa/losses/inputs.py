"""Inputs of the losses: a student produces `Positives`, a teacher a `SemanticPrior`.

The losses do not depend on the framework. Axes: b image · n instance · c category · d channel · h row · w column.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.ops.boxes import box_masks, centers_within


class Positives(NamedTuple):
    """Predicted masks matched to ground-truth boxes; `labels`, `image` and `instance` stay on the host."""

    mask_logits: Float[Tensor, "n h w"]
    box_masks: Bool[Tensor, "n h w"]
    labels: Int[Tensor, " n"]
    image: Int[Tensor, " n"]  # which image of the batch
    instance: Int[Tensor, " n"]  # which box of the batch, the images' boxes concatenated


class SemanticPrior(NamedTuple):
    """The teacher's dense feature S (Eq. 1) and classifier weight K, foreground rows only."""

    features: Float[Tensor, "b d h w"]
    saliency_factors: Float[Tensor, "c d"]


class Batch(NamedTuple):
    """The normalized images at the masks' resolution, and which pixels are not padding."""

    images: Float[Tensor, "b 3 h w"]
    valid: Bool[Tensor, "b h w"]


def union_of_boxes(boxes: list[Tensor], features: Tensor, stride: int) -> Tensor:
    """Return B of Eq. 5 (b 1 h w): the union of each image's boxes at the size of `features`."""
    h, w = features.shape[-2:]
    return torch.stack([box_masks(own, h, w, stride=stride).any(dim=0, keepdim=True) for own in boxes])


def shrink(images: Tensor, shapes: list[tuple[int, int]], union: Tensor) -> Batch:
    """Resize the images to `union` (b 1 h w; bilinear without antialiasing, as APro) and mark what is not padding.

    A cell partly in the padding is valid if its center is, or if a box covers it.
    """
    size = (union.shape[-2], union.shape[-1])
    stride = images.shape[-2] / size[0], images.shape[-1] / size[1]
    valid = union[:, 0].clone()
    for mask, (h, w, *_) in zip(valid, shapes, strict=True):
        mask[: centers_within(h, stride[0]), : centers_within(w, stride[1])] = True
    return Batch(F.interpolate(images, size=size, mode="bilinear", align_corners=False), valid)
