"""The two things that students and teachers hand over to the losses.

A student's only duty is to produce `Positives`, a teacher's a `SemanticPrior`; the losses never learn
which framework fed them. Axes: b image · n instance · c category · d channel · h row · w column.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.ops.boxes import box_masks


class Positives(NamedTuple):
    """The masks that some ground-truth box is responsible for; `labels`, `image` and `instance` stay on the host."""

    mask_logits: Float[Tensor, "n h w"]
    box_masks: Bool[Tensor, "n h w"]
    labels: Int[Tensor, " n"]
    image: Int[Tensor, " n"]  # which image of the batch
    instance: Int[Tensor, " n"]  # which box of the batch, all images' boxes one after the other


class SemanticPrior(NamedTuple):
    """The teacher's dense feature S (Eq. 1) and classifier weight K, foreground rows only."""

    features: Float[Tensor, "b d h w"]
    saliency_factors: Float[Tensor, "c d"]


class Batch(NamedTuple):
    """The images at the masks' resolution, normalised, and which pixels are not padding."""

    images: Float[Tensor, "b 3 h w"]
    valid: Bool[Tensor, "b h w"]


def union_of_boxes(boxes: list[Tensor], features: Tensor, stride: int) -> Tensor:
    """B of Eq. 5 (b 1 h w): where any of an image's boxes is, at the size of `features`."""
    h, w = features.shape[-2:]
    return torch.stack([box_masks(own, h, w, stride=stride).any(dim=0, keepdim=True) for own in boxes])


def shrink(images: Tensor, shapes: list[tuple[int, int]], union: Tensor) -> Batch:
    """The images at the size of `union` (bilinear without antialiasing, as APro) and where they are not padding.

    A cell half in the padding counts by its centre, unless a box (b 1 h w) says that something is there.
    """
    size = (union.shape[-2], union.shape[-1])
    stride = images.shape[-2] / size[0], images.shape[-1] / size[1]
    valid = union[:, 0].clone()
    for mask, (h, w, *_) in zip(valid, shapes, strict=True):
        mask[: round(h / stride[0]), : round(w / stride[1])] = True
    return Batch(F.interpolate(images, size=size, mode="bilinear", align_corners=False), valid)
