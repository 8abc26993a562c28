"""PolarMask's losses on the distances from a location to the contour.

Axes: n positive location · k ray.
"""

from jaxtyping import Float
from torch import Tensor

from misa.ops.affinity import check_finite
from misa.ops.axes import check_shapes

SHORTEST = 1e-6  # a ray that found no contour, in pixels


def polar_iou_loss(lengths: Float[Tensor, "n k"], target: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Return log(Σ_k max(d, d*) / Σ_k min(d, d*)) of each location, 0 or more; lengths in pixels, 0 or more.

    PolarMask (Xie et al. 2020, Eq. 10), with the sums inside the logarithm as in the published code. It is 0 only if
    all rays agree and |log r| if all differ by the factor r (the masks' IoU is then r² or 1/r²); it is invariant to
    scaling both. Lengths below 1e-6 are raised to that.
    Raises ValueError: the shapes differ; NotFinite: NaN or Inf, on the CPU only.
    """
    check_shapes("polar_iou_loss", lengths=(lengths, "n k"), target=(target, "n k"))
    check_finite("polar_iou_loss: lengths", lengths)
    d, aim = lengths.clamp(min=SHORTEST), target.clamp(min=SHORTEST)
    return (d.maximum(aim).sum(dim=1) / d.minimum(aim).sum(dim=1)).log()


def polar_centerness(target: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Return sqrt(min_k d* / max_k d*), in (0, 1]: 1 at the center of a circle (PolarMask, Eq. 4).

    A location with a missing ray gets about 0, so almost no weight.
    """
    if target.dim() != 2 or target.shape[1] == 0:
        raise ValueError(f"polar_centerness needs lengths of shape (n, k): they are {tuple(target.shape)}.")
    aim = target.clamp(min=SHORTEST)
    return (aim.amin(dim=1) / aim.amax(dim=1)).sqrt()
