"""CIE L*a*b* colors, in which BoxInst, SIM and BoxTeacher compare neighboring pixels.

Axes: b image · h row · w column.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from misa.ops.affinity import check_finite, promote
from misa.ops.axes import check_shapes

# Linear sRGB to XYZ, D65 white, 2° observer.
XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)


def rgb_to_lab(images: Float[Tensor, "b 3 h w"] | Int[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Convert RGB in 0 … 255 to L* in 0 … 100, a* and b* in about −110 … 110 (CIE 1976, sRGB, D65, 2°).

    The published BoxInst and BoxTeacher round the pooled image down to integers first; that is left to the caller.
    Computed in float64 for float64, else in float32, also under autocast.
    Raises ValueError: the shape is not (b, 3, h, w); on the CPU also for values outside [0, 255], such as a normalized
    image; NotFinite: NaN or Inf, on the CPU only.
    """
    check_shapes("rgb_to_lab", images=(images, "b 3 h w"))
    values = promote(images)
    check_finite("rgb_to_lab: images", values)
    if values.device.type == "cpu" and values.numel():
        low, high = values.detach().aminmax()
        if low < 0 or high > 255:
            raise ValueError(
                f"rgb_to_lab needs colors of 0 to 255: they are {low:.3g} to {high:.3g}. Undo the normalization first."
            )
    v = values / 255
    linear = torch.where(v > 0.04045, ((v + 0.055) / 1.055) ** 2.4, v / 12.92)
    xyz, white = (torch.tensor(each, dtype=v.dtype).to(v.device, non_blocking=True) for each in (XYZ, WHITE))
    with torch.autocast(v.device.type, enabled=False):
        t = torch.einsum("xc,bchw->bxhw", xyz, linear) / white[:, None, None]
    # The clamp keeps the unused branch's gradient finite at black.
    f = torch.where(t > 0.008856, t.clamp(min=0.008856) ** (1 / 3), 7.787 * t + 16 / 116)
    x, y, z = f.unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
