"""The ideal low pass L of a disc around DC, by the two transforms that are worth having.

Axes: h row · w column · u, v basis function of the rows, of the columns.

The disc u² + v² ≤ t² is symmetric in u and in v, so L is an orthogonal projection onto products of real cosines and
sines: L x = E_h ((E_hᵀ x E_w) ∘ M) E_wᵀ with orthonormal E_h (h, 2t+1), E_w (w, 2t+1) and a 0/1 table M. Those four
thin matrix products are the pruned form; no complex number and no frequency beyond t is ever computed. L is its own
adjoint.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Transform = Literal["auto", "pruned", "fft"]

# Measured on one CPU thread with `python -m benchmarks.frequency --radii`: the pruned form's lead shrinks as the disc
# fills the map and is lost at about this share of the basis functions that a map's side has. Not yet measured on CUDA.
PRUNED_SHARE = 0.5


def disc_filter(
    h: int, w: int, radius: float, *, transform: Transform, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """L for maps (..., h, w) of one dtype and device, as a function that returns a new tensor."""
    if transform not in ("auto", "pruned", "fft"):
        raise ValueError(f"transform is {transform!r}; choose 'auto', 'pruned' or 'fft'.")
    if (h // 2) ** 2 + (w // 2) ** 2 <= radius * radius:
        return torch.clone  # the disc holds every bin
    if transform == "auto":
        kept = max((2 * radius + 1) / h, (2 * radius + 1) / w)
        transform = "pruned" if kept <= PRUNED_SHARE else "fft"
    # A cached tensor must be usable in training too, whatever mode the first caller was in.
    with torch.inference_mode(False), torch.no_grad():
        if transform == "fft":
            inside = _half_disc(h, w, radius, dtype, device)
            return lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * inside, s=(h, w))
        rows, u = _basis(h, radius, dtype, device)
        columns, v = _basis(w, radius, dtype, device)
        table = _table(u, v, radius, dtype, device)
    return lambda x: (rows @ ((rows.t() @ (x @ columns)) * table)) @ columns.t()


@lru_cache(maxsize=128)
def _basis(n: int, radius: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """Orthonormal cosines and sines (n, k) of the frequencies up to `radius`, and each one's frequency."""
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
    """The disc on rfft2's bins, DC at [0, 0]."""
    row = torch.arange(h)
    u, v = torch.minimum(row, h - row), torch.arange(w // 2 + 1)
    return (u[:, None] ** 2 + v**2 <= math.floor(radius * radius)).to(device=device, dtype=dtype)
