"""Oracles: Eq. 3–4 typed out with torch.fft, the DFT as loops, and theory (waves, constants, linearity)."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from misa.ops.frequency import disc_filter, fourier_mask, high_pass, low_pass

SIZES = [(8, 8), (7, 9), (15, 18), (1, 1), (1, 6), (5, 1), (12, 31)]
TRANSFORMS = ["pruned", "fft", "auto"]
sides = st.integers(1, 20)


def literal(features, alpha):
    spectrum = torch.fft.fftshift(torch.fft.fft2(features), dim=(-2, -1)) * alpha
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)))


def slow_mask(h, w, radius, scale):
    near = [[(i - h // 2) ** 2 + (j - w // 2) ** 2 <= radius**2 for j in range(w)] for i in range(h)]
    return torch.tensor([[scale if x else 1.0 for x in row] for row in near], dtype=torch.float64)


def slow_filter(plane, radius, scale):
    """Eq. 3–4 as four nested sums over one plane; frequencies beyond half the side are negative."""
    h, w = len(plane), len(plane[0])
    result = [[0j] * w for _ in range(h)]
    for u in range(h):
        for v in range(w):
            wave = [[cmath.exp(-2j * math.pi * (u * y / h + v * x / w)) for x in range(w)] for y in range(h)]
            coefficient = sum(plane[y][x] * wave[y][x] for y in range(h) for x in range(w))
            inside = min(u, h - u) ** 2 + min(v, w - v) ** 2 <= radius**2
            coefficient *= scale if inside else 1
            for y in range(h):
                for x in range(w):
                    result[y][x] += coefficient * wave[y][x].conjugate() / (h * w)
    return torch.tensor(result, dtype=torch.complex128)


@pytest.mark.parametrize(("h", "w"), SIZES)
@pytest.mark.parametrize("radius", [0, 1, 2.5, 3, 100])
def test_mask_is_eq_4_around_the_dc_bin(h, w, radius):
    mask = fourier_mask(h, w, radius=radius, scale=0.2, dtype=torch.float64)
    assert_close(mask, slow_mask(h, w, radius, 0.2))
    assert mask[h // 2, w // 2] == 0.2


def test_mask_defaults_are_the_papers():
    mask = fourier_mask(64, 48)
    assert mask.dtype == torch.float32
    assert_close(mask, slow_mask(64, 48, 10, 0.2).float())


@pytest.mark.parametrize(("h", "w"), SIZES)
@pytest.mark.parametrize("radius", [0, 1, 2.5, 3, 100])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_both_bands_equal_the_literal_transforms(rng, device, h, w, radius, transform):
    features = torch.randn(2, 3, h, w, generator=rng, dtype=torch.float64).to(device)
    alpha = fourier_mask(h, w, radius=radius, scale=0.3, dtype=torch.float64, device=device)
    for band, mask in ((high_pass, alpha), (low_pass, 1.3 - alpha)):
        expected = literal(features, mask)
        assert expected.imag.abs().max() < 1e-12
        found = band(features, radius=radius, scale=0.3, transform=transform)
        assert_close(found, expected.real, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_last_bin_outside_the_disc_counts(rng, transform):
    # Only the bin of both highest frequencies, at a squared distance of 32 from DC, is outside.
    features = torch.randn(1, 1, 8, 8, generator=rng, dtype=torch.float64)
    checks = 1.0 - 2.0 * ((torch.arange(8)[:, None] + torch.arange(8)) % 2).double()
    corner = (features * checks).mean() * checks
    found = low_pass(features, radius=31.5**0.5, scale=0.0, transform=transform)
    assert_close(found, features - corner, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (5, 4)])
@pytest.mark.parametrize("radius", [0, 1, 1.5])
@pytest.mark.parametrize("transform", ["pruned", "fft"])
def test_high_pass_equals_the_dft_in_loops(rng, size, radius, transform):
    plane = torch.randn(size, generator=rng, dtype=torch.float64)
    expected = slow_filter(plane.tolist(), radius, 0.2)
    found = high_pass(plane[None, None], radius=radius, transform=transform)[0, 0]
    assert_close(found, expected.real, atol=1e-12, rtol=0)


@given(h=sides, w=sides, radius=st.floats(0, 25), scale=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_bands_add_up_and_flips_commute(h, w, radius, scale, seed):
    features = torch.randn(1, 2, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    high = high_pass(features, radius=radius, scale=scale)
    low = low_pass(features, radius=radius, scale=scale)
    assert_close(high + low, (1 + scale) * features, atol=1e-10, rtol=0)
    assert_close(high_pass(features.flip(-1), radius=radius, scale=scale), high.flip(-1), atol=1e-10, rtol=0)
    assert_close(low_pass(features.flip(-2), radius=radius, scale=scale), low.flip(-2), atol=1e-10, rtol=0)


@given(h=sides, w=sides, radius=st.floats(0, 25), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_disc_filter_is_a_linear_self_adjoint_projection(h, w, radius, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(1, 1, h, w, generator=generator, dtype=torch.float64) for _ in range(2))
    for transform in ("pruned", "fft"):
        low = disc_filter(h, w, radius, transform=transform, dtype=x.dtype, device=x.device)
        assert_close(low(2 * x - 3 * y), 2 * low(x) - 3 * low(y), atol=1e-10, rtol=0)
        assert_close(low(low(x)), low(x), atol=1e-10, rtol=0)
        assert_close((low(x) * y).sum(), (x * low(y)).sum(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("h", "w"), [(9, 14), (32, 33)])
def test_a_flat_image_is_pure_dc(device, h, w, transform):
    flat = torch.full((1, 2, h, w), 3.0, device=device)
    assert_close(high_pass(flat, radius=0, transform=transform), 0.2 * flat)
    assert_close(low_pass(flat, radius=0, transform=transform), flat)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("u", "v"), [(3, 4), (5, 0), (0, 5), (4, 4), (6, 0), (0, 16), (20, 3)])
def test_a_wave_of_known_frequency_gets_its_gain(u, v, transform):
    h, w = 40, 33
    rows, columns = torch.arange(h, dtype=torch.float64)[:, None], torch.arange(w, dtype=torch.float64)
    wave = torch.cos(2 * math.pi * (u * rows / h + v * columns / w) + 0.4)[None, None]
    inside = u * u + v * v <= 25  # the disc is closed: (3, 4) is in it
    assert_close(high_pass(wave, radius=5, scale=0.2, transform=transform), (0.2 if inside else 1.0) * wave)
    assert_close(low_pass(wave, radius=5, scale=0.2, transform=transform), (1.0 if inside else 0.2) * wave)


def test_a_disc_larger_than_the_map_keeps_everything(rng):
    features = torch.randn(1, 2, 6, 7, generator=rng)
    assert torch.equal(low_pass(features, radius=10), features)
    assert_close(high_pass(features, radius=10), 0.2 * features)
    assert low_pass(features, radius=10).data_ptr() != features.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_filtered_in_float32(rng, device, dtype):
    features = torch.randn(1, 4, 24, 30, generator=rng).to(device, dtype)
    found = high_pass(features, radius=4)
    assert found.dtype == dtype
    assert torch.equal(found, high_pass(features.float(), radius=4).to(dtype))


def test_autocast_leaves_the_filter_in_float32(rng, device):
    features = torch.randn(1, 4, 24, 30, generator=rng).to(device)
    expected = low_pass(features, radius=4)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = low_pass(features, radius=4)
    assert torch.equal(found, expected)


def test_a_first_call_in_inference_mode_leaves_training_possible():
    x = torch.ones(1, 1, 21, 23, dtype=torch.float64)
    for transform in ("pruned", "fft"):
        with torch.inference_mode():
            high_pass(x, radius=3.25, transform=transform)
        high_pass(x.clone().requires_grad_(), radius=3.25, transform=transform).sum().backward()


@pytest.mark.parametrize("transform", ["pruned", "fft"])
def test_gradients_of_both_bands(rng, transform):
    features = torch.randn(1, 2, 5, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    for band in (high_pass, low_pass):
        assert torch.autograd.gradcheck(lambda x, band=band: band(x, radius=1, transform=transform), (features,))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": torch.zeros(4, 4)}, "shape"),
        ({"features": torch.zeros(1, 2, 0, 4)}, "shape"),
        ({"radius": -1.0}, "radius"),
        ({"radius": float("nan")}, "radius"),
        ({"radius": float("inf")}, "radius"),
        ({"scale": -0.1}, "scale"),
        ({"scale": 1.1}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"transform": "dct"}, "transform"),
        ({"features": torch.full((1, 1, 30, 30), torch.nan)}, "NaN"),
        ({"features": torch.full((1, 1, 30, 30), torch.inf)}, "NaN or Inf"),
    ],
)
@pytest.mark.parametrize("band", [high_pass, low_pass])
def test_wrong_input_is_one_clear_sentence(band, change, words):
    arguments = {"features": torch.zeros(1, 2, 30, 30), "radius": 3.0, "scale": 0.2} | change
    with pytest.raises(ValueError, match=words):
        band(arguments.pop("features"), **arguments)


def test_a_mask_needs_a_map():
    with pytest.raises(ValueError, match="at least one row"):
        fourier_mask(0, 4)
    with pytest.raises(ValueError, match="radius"):
        fourier_mask(4, 4, radius=-2)


def test_huge_finite_numbers_are_not_taken_for_infinite():
    assert low_pass(torch.full((1, 1, 4, 4), 1e38), radius=9).isfinite().all()
