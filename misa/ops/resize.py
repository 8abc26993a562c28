"""Maps at another size: bilinear without antialiasing, as the published box-supervised heads resize everything.

Axes: b image · d channel · n mask · h row · w column, H and W the size asked for.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def resized(maps: Float[Tensor, "*b h w"], size: tuple[int, int]) -> Float[Tensor, "*b H W"]:
    """The maps themselves where they have that size."""
    if maps.shape[-2:] == size:
        return maps
    # One channel each: three at once torch rounds differently (by 1e-7), and no maps at all it takes as images alone.
    flat = maps[None].flatten(0, -3)[:, None]
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).view(*maps.shape[:-2], *size)


def resized_within(
    maps: Float[Tensor, "b d h w"], valid: Bool[Tensor, "b h w"], size: tuple[int, int]
) -> tuple[Float[Tensor, "b d H W"], Bool[Tensor, "b H W"]]:
    """The maps where a cell takes nothing from padding, and `valid`: a cell is padding where most of it is."""
    if maps.shape[-2:] == size:
        return maps, valid
    present = valid[:, None].to(maps.dtype)
    share = resized(present, size)
    return resized(maps * present, size) / share.clamp(min=0.5), share[:, 0] >= 0.5
