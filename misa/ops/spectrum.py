"""Spectra of features (§3.2, Figure 3).

Axes: d channel · h row · w column · r radius in bins. Spectra are centered: DC sits at [h//2, w//2].
"""

import torch
from jaxtyping import Float
from torch import Tensor


def power(features: Float[Tensor, "*d h w"]) -> Float[Tensor, "*d h w"]:
    """Return the centered power spectrum, scaled so that its sum is the sum of squares of the map (Parseval)."""
    h, w = features.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(features.float()), dim=(-2, -1))
    return spectrum.abs().square() / (h * w)


def radii(h: int, w: int) -> Float[Tensor, "{h} {w}"]:
    """Return the distance of every bin from DC, in bins, as in Eq. 4."""
    down, across = torch.arange(h) - h // 2, torch.arange(w) - w // 2
    return torch.hypot(down[:, None].float(), across[None].float())


def radial_energy(features: Float[Tensor, "*d h w"]) -> Float[Tensor, " r"]:
    """Return the energy of all channels in rings of one bin around DC: ring r holds radii from r − 0.5 to r + 0.5.

    The sum over the rings is the sum of squares of the features.

    >>> radial_energy(torch.ones(4, 4)).round()
    tensor([16.,  0.,  0.,  0.])
    """
    h, w = features.shape[-2:]
    ring = radii(h, w).add(0.5).floor().long()
    total = power(features).reshape(-1, h, w).sum(dim=0)
    return torch.zeros(int(ring.max()) + 1).index_add_(0, ring.flatten(), total.flatten())
