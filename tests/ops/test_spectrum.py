"""Spectra by their theorems: Parseval, pure waves, DC."""

import math

import pytest
import torch
from torch.testing import assert_close

from misa.ops.frequency import fourier_mask
from misa.ops.spectrum import power, radial_energy, radii


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (7, 9), (12, 5)])
def test_energy_is_that_of_the_map(rng, size):
    features = torch.randn(3, *size, generator=rng)
    assert_close(power(features).sum(dim=(1, 2)), features.square().sum(dim=(1, 2)))
    assert_close(radial_energy(features).sum(), features.square().sum())


@pytest.mark.parametrize("frequency", [0, 1, 5, 8])
def test_a_wave_is_in_its_ring(frequency):
    wave = torch.cos(2 * math.pi * frequency * torch.arange(16) / 16).expand(16, 16)
    rings = radial_energy(wave)
    assert_close(rings[frequency], wave.square().sum())
    assert float(rings.sum() - rings[frequency]) < 1e-3


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_radii_are_measured_as_the_mask_does(size):
    assert torch.equal(radii(*size) <= 2.5, fourier_mask(*size, radius=2.5, scale=0.0) == 0)
