"""Bilinear resizing without antialiasing, as in the published box-supervised heads, and masks on a map's cells.

Axes: b image · d channel · n mask · h row · w column, H and W the new size.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def resized(maps: Float[Tensor, "*b h w"], size: tuple[int, int]) -> Float[Tensor, "*b H W"]:
    """Resize maps bilinearly; maps of that size are returned as they are."""
    if maps.shape[-2:] == size:
        return maps
    # As a batch of one-channel images: torch rounds three channels differently (by 1e-7) and refuses none at all.
    flat = maps[None].flatten(0, -3)[:, None]
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).view(*maps.shape[:-2], *size)


def resized_within(
    maps: Float[Tensor, "b d h w"], valid: Bool[Tensor, "b h w"], size: tuple[int, int]
) -> tuple[Float[Tensor, "b d H W"], Bool[Tensor, "b H W"]]:
    """Resize maps without their padding, and `valid`: a cell over half in padding is padding."""
    if maps.shape[-2:] == size:
        return maps, valid
    present = valid[:, None].to(maps.dtype)
    share = resized(present, size)
    return resized(maps * present, size) / share.clamp(min=0.5), share[:, 0] >= 0.5


def coarse_masks(
    masks: Bool[Tensor, "n h w"], size: tuple[int, int], cells: tuple[int, int], *, stride: int
) -> Bool[Tensor, "n H W"]:
    """Return masks of an image on `cells` = (H, W) cells of `stride` pixels of the image resized to `size`.

    A cell is inside if the mask covers at least half of its part in the image. Cells beyond the image are outside; what
    lies beyond the cells is cut off.
    """
    if not len(masks):
        return masks.new_zeros(0, *cells, dtype=torch.bool)
    fine = masks[:, None].float()
    if masks.shape[-2:] != size:
        fine = F.interpolate(fine, size=size, mode="bilinear", antialias=True)
    padding = (0, cells[1] * stride - size[1], 0, cells[0] * stride - size[0])
    covered, present = (F.avg_pool2d(F.pad(x, padding), stride)[:, 0] for x in (fine, torch.ones_like(fine[:1])))
    return (covered >= 0.5 * present) & (present > 0)
