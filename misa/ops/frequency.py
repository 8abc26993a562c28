"""Frequency split of dense features (§3.2, Eq. 3–4).

Axes: b image · d channel · h row · w column. Spectra are centered: DC sits at [h//2, w//2].

Both bands come from one low pass L of the disc (1 inside, 0 outside): high = x − (1 − θ) L x and
low = θ x + (1 − θ) L x, which equals masking the centered spectrum and taking the real part. L is the pruned
transform of `misa.ops._dft` or one rfft2 pair; `transform="auto"` takes the faster one.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from misa.errors import NotFinite
from misa.ops._dft import Transform, disc_filter

__all__ = ["Transform", "disc_filter", "fourier_mask", "high_pass", "low_pass"]


def fourier_mask(
    h: int,
    w: int,
    *,
    radius: float = 10.0,
    scale: float = 0.2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "{h} {w}"]:
    """The high-pass mask α of Eq. 4: `scale` θ within `radius` t bins of DC (closed disc), 1 beyond.

    Eq. 4 measures from (H/2, W/2). For odd sizes that point lies between bins, the mask loses its symmetry and the
    inverse transform turns complex; we measure from the DC bin, which is the same thing for even sizes.
    `radius` counts bins of the feature map, so the cut-off in pixels moves with the map's size.

    >>> fourier_mask(4, 4, radius=1, scale=0.2)[2]
    tensor([1.0000, 0.2000, 0.2000, 0.2000])
    """
    if h < 1 or w < 1:
        raise ValueError(f"fourier_mask needs a map of at least one row and one column: it is {h} x {w}.")
    check_band("fourier_mask", radius, scale)
    u = torch.arange(h, device=device) - h // 2
    v = torch.arange(w, device=device) - w // 2
    inside = u[:, None] ** 2 + v**2 <= math.floor(radius * radius)
    alpha = torch.ones(h, w, dtype=dtype, device=device)
    return alpha.masked_fill(inside, scale)


def high_pass(
    features: Float[Tensor, "b d h w"], *, radius: float = 10.0, scale: float = 0.2, transform: Transform = "auto"
) -> Float[Tensor, "b d h w"]:
    """Features with the frequencies within `radius` bins of DC damped to `scale` (Eq. 3 with the mask of Eq. 4).

    Half precision is filtered in float32 and handed back in its own type. Raises ValueError on a wrong shape or
    range, and on the CPU on NaN or Inf (elsewhere the question would stall the device).
    """
    x = _checked("high_pass", features, radius, scale)
    return torch.add(x, _low(x, radius, transform), alpha=scale - 1).to(_returned(features))


def low_pass(
    features: Float[Tensor, "b d h w"], *, radius: float = 10.0, scale: float = 0.2, transform: Transform = "auto"
) -> Float[Tensor, "b d h w"]:
    """Features with the frequencies beyond `radius` bins of DC damped to `scale`.

    The paper prints the high pass only; we mirror it, so that high + low = (1 + scale) · features. Precision and
    errors as `high_pass`.
    """
    x = _checked("low_pass", features, radius, scale)
    return torch.lerp(x, _low(x, radius, transform), 1 - scale).to(_returned(features))


def check_band(caller: str, radius: float, scale: float) -> None:
    """Refuse a radius or scale that Eq. 4 cannot have."""
    if not (math.isfinite(radius) and radius >= 0):
        raise ValueError(f"{caller} needs a finite radius of zero or more bins: radius is {radius}.")
    if not 0 <= scale <= 1:
        raise ValueError(f"{caller} needs a scale between 0 and 1, as Eq. 4's α: scale is {scale}.")


def is_finite(values: Tensor) -> bool:
    """Whether there is no NaN or Inf, in one reading pass; always True off the CPU, where asking would stall."""
    # A sum carries every NaN and Inf; only a sum of huge finite numbers needs the slower question.
    return values.device.type != "cpu" or bool(values.detach().sum().isfinite() or values.isfinite().all())


def promote(values: Tensor) -> Tensor:
    """Half precision and integers become float32; float32 and float64 stay."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _checked(caller: str, features: Tensor, radius: float, scale: float) -> Tensor:
    if features.dim() != 4 or 0 in features.shape[-2:]:
        raise ValueError(f"{caller} needs features of shape (b, d, h, w): they are {tuple(features.shape)}.")
    check_band(caller, radius, scale)
    if not is_finite(features):
        raise NotFinite(f"{caller}: features hold NaN or Inf, which a filter would spread over the whole map.")
    return promote(features)


def _returned(features: Tensor) -> torch.dtype:
    return features.dtype if features.dtype.is_floating_point else torch.float32


def _low(x: Tensor, radius: float, transform: Transform) -> Tensor:
    h, w = x.shape[-2:]
    # Autocast would run the matrix products in half precision.
    with torch.autocast(x.device.type, enabled=False):
        return disc_filter(h, w, radius, transform=transform, dtype=x.dtype, device=x.device)(x)
