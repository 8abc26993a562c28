"""Frequency split of dense features (§3.2, Eq. 3–4).

Axes: b image · d channel · h row · w column. Spectra are centered: DC sits at [h//2, w//2].

Both bands come from one low pass L of the disc (1 inside, 0 outside): high = x − (1 − θ) L x and
low = θ x + (1 − θ) L x, which equals masking the centered spectrum and taking the real part. L is a pruned
transform or one rfft2 pair; `transform="auto"` takes the faster one.

The pruned form: the disc u² + v² ≤ t² is symmetric in u and in v, so L is an orthogonal projection onto products of
real cosines and sines: L x = E_h ((E_hᵀ x E_w) ∘ M) E_wᵀ with orthonormal E_h (h, 2t+1), E_w (w, 2t+1) and a 0/1 table
M. Those are four thin matrix products; no complex number and no frequency beyond t is ever computed. L is its own
adjoint.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from misa.errors import NotFinite
from misa.ops.affinity import promote
from misa.ops.axes import single

Transform = Literal["auto", "pruned", "fft"]

# Measured on one CPU thread with `python -m benchmarks.frequency --radii`: the pruned form is faster up to about this
# share of the basis functions of a map's side. Not yet measured on CUDA.
PRUNED_SHARE = 0.5


def fourier_mask(
    h: int,
    w: int,
    *,
    radius: float = 10.0,
    scale: float = 0.2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "{h} {w}"]:
    """Return the high-pass mask α of Eq. 4: `scale` θ within `radius` t bins of DC (closed disc), 1 beyond.

    Eq. 4 measures from (H/2, W/2). For odd sizes that point lies between bins, so the mask is not symmetric and the
    inverse transform is complex; we measure from the DC bin, which is the same point for even sizes.
    `radius` counts bins of the feature map, so the cut-off in pixels depends on the map's size.

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


@single(features=4)
def high_pass(
    features: Float[Tensor, "b d h w"], *, radius: float = 10.0, scale: float = 0.2, transform: Transform = "auto"
) -> Float[Tensor, "b d h w"]:
    """Return features with the frequencies within `radius` bins of DC damped to `scale` (Eq. 3 with Eq. 4's mask).

    Half precision is filtered in float32 and returned in its own type. Raises ValueError on a wrong shape or range,
    and on the CPU on NaN or Inf (elsewhere the check would synchronize with the device).
    """
    x = _checked("high_pass", features, radius, scale)
    return torch.add(x, _low(x, radius, transform), alpha=scale - 1).to(_returned(features))


@single(features=4)
def low_pass(
    features: Float[Tensor, "b d h w"], *, radius: float = 10.0, scale: float = 0.2, transform: Transform = "auto"
) -> Float[Tensor, "b d h w"]:
    """Return features with the frequencies beyond `radius` bins of DC damped to `scale`.

    The paper prints the high pass only; we mirror it, so that high + low = (1 + scale) · features. Precision and
    errors as `high_pass`.
    """
    x = _checked("low_pass", features, radius, scale)
    return torch.lerp(x, _low(x, radius, transform), 1 - scale).to(_returned(features))


def check_band(caller: str, radius: float, scale: float) -> None:
    """Raise ValueError on a radius or scale outside the range of Eq. 4."""
    if not (math.isfinite(radius) and radius >= 0):
        raise ValueError(f"{caller} needs a finite radius of zero or more bins: radius is {radius}.")
    if not 0 <= scale <= 1:
        raise ValueError(f"{caller} needs a scale between 0 and 1, as Eq. 4's α: scale is {scale}.")


def is_finite(values: Tensor) -> bool:
    """Return whether there is no NaN or Inf; always True off the CPU, where the check would synchronize."""
    # A finite sum rules out NaN and Inf in one pass; only sums that overflow need the slower test.
    return values.device.type != "cpu" or bool(values.detach().sum().isfinite() or values.isfinite().all())


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


def disc_filter(
    h: int, w: int, radius: float, *, transform: Transform, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return L for maps (..., h, w) of one dtype and device, as a function that returns a new tensor."""
    if transform not in ("auto", "pruned", "fft"):
        raise ValueError(f"transform is {transform!r}; choose 'auto', 'pruned' or 'fft'.")
    if (h // 2) ** 2 + (w // 2) ** 2 <= radius * radius:
        return torch.clone  # the disc holds every bin
    if transform == "auto":
        kept = max((2 * radius + 1) / h, (2 * radius + 1) / w)
        transform = "pruned" if kept <= PRUNED_SHARE else "fft"
    # Cached tensors must work in training even if the first call was in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        if transform == "fft":
            inside = _half_disc(h, w, radius, dtype, device)
            return lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * inside, s=(h, w))
        rows, u = _basis(h, radius, dtype, device)
        columns, v = _basis(w, radius, dtype, device)
        table = _table(u, v, radius, dtype, device)
    return lambda x: (rows @ ((rows.t() @ (x @ columns)) * table)) @ columns.t()


def forget_filters() -> None:
    """Clear the caches of bases and masks for all sizes, radii and devices."""
    for kept in (_basis, _table, _half_disc):
        kept.cache_clear()


@lru_cache(maxsize=128)
def _basis(n: int, radius: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """Return the orthonormal cosines and sines (n, k) of frequencies up to `radius`, and each one's frequency."""
    position = torch.arange(n)
    functions, frequency = [torch.full((n,), n**-0.5, dtype=torch.float64)], [0]
    for f in range(1, min(int(radius), n // 2) + 1):
        angle = (2 * math.pi / n) * ((f * position) % n).double()
        if 2 * f == n:  # the highest frequency of an even side has no sine
            functions.append(angle.cos() * n**-0.5)
            frequency.append(f)
        else:
            functions += [angle.cos() * (2 / n) ** 0.5, angle.sin() * (2 / n) ** 0.5]
            frequency += [f, f]
    return torch.stack(functions, dim=1).to(device=device, dtype=dtype), tuple(frequency)


@lru_cache(maxsize=128)
def _table(
    u: tuple[int, ...], v: tuple[int, ...], radius: float, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "u v"]:
    squared = torch.tensor(u)[:, None] ** 2 + torch.tensor(v) ** 2
    return (squared <= math.floor(radius * radius)).to(device=device, dtype=dtype)


@lru_cache(maxsize=32)
def _half_disc(
    h: int, w: int, radius: float, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "{h} {w}//2+1"]:
    """Return the disc as 0/1 on rfft2's bins, DC at [0, 0]."""
    row = torch.arange(h)
    u, v = torch.minimum(row, h - row), torch.arange(w // 2 + 1)
    return (u[:, None] ** 2 + v**2 <= math.floor(radius * radius)).to(device=device, dtype=dtype)
