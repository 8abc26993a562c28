"""Box2Mask's local consistency: a mask should equal its own average over neighbors of the same color.

Axes: b image · c channel · n instance · k neighbor · h row · w column.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.ops.affinity import check_finite, check_probabilities, promote
from misa.ops.axes import check_shapes
from misa.ops.neighbors import window_offsets


def consistency_kernel(
    images: Float[Tensor, "b c h w"],
    *,
    dilation: int = 2,
    sharpness: float = 0.3,
    valid: Bool[Tensor, "b h w"] | None = None,
) -> Float[Tensor, "b 8 h w"]:
    """Return the softmax over the eight neighbors of −mean_c ((I_k − I_i) / (s_i · sharpness))²; it sums to 1.

    s_i is the unbiased standard deviation of the eight neighbors, channel by channel, without the pixel itself. The
    border is replicated. Box2Mask (Li et al. 2022), after PAMR but with one dilation. Computed in float32: where all
    neighbors are equal, the exponent reaches 1e17. No gradient. With `valid`, False at padding right of and below an
    image, the image's own border is replicated; the published code lets the padding's color vote.
    Raises ValueError: the shape is not (b, c, h, w); NotFinite: NaN or Inf, on the CPU only.
    """
    check_shapes("consistency_kernel", images=(images, "b c h w"))
    check_finite("consistency_kernel: images", images)
    images = promote(images.detach())
    around = _neighbors(images, dilation, _border(valid))
    spread = around.std(dim=1, keepdim=True)
    logits = -((around - images[:, None]) / (spread + 1e-8) / sharpness).square().mean(dim=2)
    return logits.softmax(dim=1)


def local_consistency(
    masks: Float[Tensor, "n h w"],
    box_masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"],
    kernel: Float[Tensor, "b 8 h w"],
    image: Int[Tensor, " n"],
    *,
    steps: int,
    dilation: int = 2,
    valid: Bool[Tensor, "b h w"] | None = None,
) -> Float[Tensor, ""]:
    """Return Σ |m − M| B / max(Σ B, 1), m the mask M after `steps` averages with the kernel of its `image`; 0 or more.

    One ratio over all instances, so large boxes weigh more. The gradient flows through both m and M, as in the
    published Box2Mask, whose results used one step (by its git history); its paper and present code take ten. With an
    even dilation pixels of different parity never mix, so a checkerboard costs nothing. `valid` as in
    `consistency_kernel`.
    Raises ValueError: shapes do not fit, or no step; on the CPU also for masks outside [0, 1].
    """
    check_shapes(
        "local_consistency",
        masks=(masks, "n h w"),
        kernel=(kernel, "b 8 h w"),
        image=(image, "n"),
        box_masks=(box_masks, "n h w"),
    )
    if steps < 1:
        raise ValueError(f"local_consistency needs one step or more: it is {steps}.")
    check_probabilities("local_consistency: masks", masks)
    where = image.to(kernel.device, non_blocking=True)
    own, border = kernel[where], _border(None if valid is None else valid[where])
    smooth = masks.to(own.dtype)
    boxes = box_masks.to(own.dtype)
    for _ in range(steps):
        smooth = (own * _neighbors(smooth[:, None], dilation, border)[:, :, 0]).sum(dim=1)
    return ((smooth - masks).abs() * boxes).sum() / boxes.sum().clamp(min=1)


def _border(valid: Bool[Tensor, "b h w"] | None) -> tuple[Tensor, Tensor] | None:
    """Row (b h) and column (b w) of the nearest valid pixel; images are at the top left of their padding."""
    if valid is None:
        return None
    near = []
    for axis in (2, 1):
        there = valid.any(dim=axis)
        last = (there.sum(dim=1, keepdim=True) - 1).clamp(min=0)
        near.append(torch.minimum(torch.arange(there.shape[1], device=valid.device)[None], last))
    return near[0], near[1]


def _neighbors(
    values: Float[Tensor, "b c h w"], dilation: int, border: tuple[Tensor, Tensor] | None
) -> Float[Tensor, "b 8 c h w"]:
    """Return the eight neighbors at distance `dilation`; the border is replicated."""
    h, w = values.shape[-2:]
    if border is not None:
        rows, columns = border
        values = values.gather(2, rows[:, None, :, None].expand_as(values))
        values = values.gather(3, columns[:, None, None].expand_as(values))
    padded = F.pad(values, (dilation,) * 4, mode="replicate")
    return torch.stack(
        [
            padded[..., dilation + dy : dilation + dy + h, dilation + dx : dilation + dx + w]
            for dy, dx in window_offsets(3, dilation)
        ],
        dim=1,
    )
