"""Which neighboring pixels belong together: by color, by feature, or by a given mask.

Axes: b image · d channel · n instance · k neighbor · h row · w column. The neighbors are those of
`window_offsets(window, dilation)`; the defaults are BoxInst's, eight neighbors at a distance of two.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from misa.ops.affinity import check_finite, promote
from misa.ops.axes import check_shapes
from misa.ops.neighbors import inside, shift, window_offsets


def pair_similarity(
    values: Float[Tensor, "b d h w"], valid: Bool[Tensor, "b h w"], *, scale: float, window: int = 3, dilation: int = 2
) -> Float[Tensor, "b k h w"]:
    """Return exp(−scale · |v_i − v_k|) for every neighbor k, 0 where it is outside the image or padding; in [0, 1].

    BoxInst (Tian et al. 2021, Eq. 5) and BoxTeacher: `values` in L*a*b*, scale 0.5. SIM: features, scale 1. As in the
    published code, the pixel i itself may be padding: boxes select the pixels.
    Raises ValueError: shapes do not fit, or a scale that is not positive; NotFinite: NaN or Inf, on the CPU only.
    """
    check_shapes("pair_similarity", values=(values, "b d h w"), valid=(valid, "b h w"))
    if not scale > 0:
        raise ValueError(f"pair_similarity needs a positive scale: it is {scale}.")
    check_finite("pair_similarity: values", values)
    values = promote(values)
    planes = []
    for offset in window_offsets(window, dilation):
        distance = torch.linalg.vector_norm(shift(values, offset) - values, dim=1)
        planes.append((-scale * distance).exp() * shift(valid, offset))
    return torch.stack(planes, dim=1)


def same_side(
    masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"], *, window: int = 3, dilation: int = 2, smooth: bool = False
) -> Bool[Tensor, "n k h w"]:
    """Return whether a pixel and its neighbor are both in or both out of the mask; False across the image's border.

    BoxTeacher (Cheng et al. 2023) tests b_i b_k + (1 − b_i)(1 − b_k) ≥ 0.5, with b the mean of the mask and its average
    over 3 x 3 pixels (`smooth`, zeros outside). For binary masks that equals comparing the masks at 0.5, which is the
    default and cheaper; for soft masks the two differ.
    """
    check_shapes("same_side", masks=(masks, "n h w"))
    offsets = window_offsets(window, dilation)
    there = inside(masks.shape[-2], masks.shape[-1], offsets, device=masks.device)
    if not smooth:
        inner = masks > 0.5
        return torch.stack([shift(inner, offset) == inner for offset in offsets], dim=1) & there
    b = promote(masks)
    b = (b + torch.nn.functional.avg_pool2d(b[:, None], 3, stride=1, padding=1)[:, 0]) / 2
    both = [shift(b, offset) * b + (1 - shift(b, offset)) * (1 - b) for offset in offsets]
    return (torch.stack(both, dim=1) >= 0.5) & there
