"""The two things that students and teachers hand over to the losses.

A student's only duty is to produce `Positives`, a teacher's a `SemanticPrior`; the losses never learn
which framework fed them. Axes: b image · n instance · c category · d channel · h row · w column.
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor


class Positives(NamedTuple):
    """The masks that some ground-truth box is responsible for; `labels` and `image` stay on the host."""

    mask_logits: Float[Tensor, "n h w"]
    box_masks: Bool[Tensor, "n h w"]
    labels: Int[Tensor, " n"]
    image: Int[Tensor, " n"]  # which image of the batch


class SemanticPrior(NamedTuple):
    """The teacher's dense feature S (Eq. 1) and classifier weight K, foreground rows only."""

    features: Float[Tensor, "b d h w"]
    saliency_factors: Float[Tensor, "c d"]


class Batch(NamedTuple):
    """The images at the masks' resolution, normalised, and which pixels are not padding."""

    images: Float[Tensor, "b 3 h w"]
    valid: Bool[Tensor, "b h w"]
