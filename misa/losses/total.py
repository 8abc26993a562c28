"""What a student learns from boxes alone: the sum that a table's row switches on (§4.3).

L = projection_weight * L_projection + L_pairwise (Eq. 15), each part named in the result.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from misa.losses.inputs import Batch, Positives, SemanticPrior
from misa.losses.pairwise import pairwise_loss
from misa.losses.projection import projection_loss


def box_objectives(
    positives: Positives,
    batch: Batch,
    *,
    projection_weight: float = 3.0,
    affinity: Mapping[str, Any] | None = None,
    prior: SemanticPrior | None = None,
) -> dict[str, Tensor]:
    """The weighted box-supervised losses of the positives, by name; zero (with a gradient) where there are none.

    `affinity` holds the arguments of `pairwise_loss`; None leaves the pairwise term out.
    """
    masks = positives.mask_logits.sigmoid()
    projection = projection_loss(masks, positives.box_masks)
    losses = {"loss_projection": projection_weight * projection.sum() / max(len(projection), 1)}
    if affinity is not None:
        losses |= pairwise_loss(
            masks,
            positives.box_masks,
            batch.images,
            positives.image,
            labels=positives.labels,
            prior=prior,
            valid=batch.valid,
            **affinity,
        )
    return losses
