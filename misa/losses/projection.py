"""The projection loss (§4.3, after BoxInst): a mask must reach every row and column of its box, and no others.

Axes: n instance · h row · w column.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from misa.losses.pseudo import dice
from misa.ops.affinity import check_probabilities
from misa.ops.axes import check_shapes, single


@single(masks=3, box_masks=3)
def projection_loss(
    masks: Float[Tensor, "n h w"], box_masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"], *, eps: float = 1e-5
) -> Tensor:
    """Return the Dice loss between the max-projections of mask and box, summed over both axes; (n,), each in [0, 2].

    `masks` are probabilities in [0, 1]. Denominators are squared; eps 1e-5 is BoxInst's (Tian et al. 2021), DiscoBox
    has 1e-3 for each sum, 2e-3 in total. The gradient goes to each row's and column's maximum, shared by equal ones.
    Half precision is computed in float32.
    Raises ValueError: the shapes differ; on the CPU also for masks with NaN or outside [0, 1], such as logits.
    """
    check_shapes("projection_loss", masks=(masks, "n h w"), box_masks=(box_masks, "n h w"))
    check_probabilities("projection_loss: masks", masks)
    masks = masks.float() if masks.dtype in (torch.float16, torch.bfloat16) else masks
    box_masks = box_masks.to(masks.dtype)
    return dice(masks.amax(1), box_masks.amax(1), eps) + dice(masks.amax(2), box_masks.amax(2), eps)
