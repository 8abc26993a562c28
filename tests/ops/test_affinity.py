"""Eq. 8 and 10–13 in loops and float64, and the pitfall of a spread per channel."""

import math

import pytest
import torch
from torch.testing import assert_close

from misa.ops.affinity import (
    check_finite,
    pairwise_affinity,
    reweight,
    saliency_affinity,
    spread,
    window_spread,
)
from misa.ops.neighbors import window_offsets


def slow_affinity(values, offsets, sigma):
    """exp(−(|V(i) − V(k)| / σ)²) for one image; σ a function of the pixel."""
    d, h, w = values.shape
    v = values.double()
    result = torch.zeros(len(offsets), h, w, dtype=torch.float64)
    for k, (dy, dx) in enumerate(offsets):
        for y in range(h):
            for x in range(w):
                if 0 <= y + dy < h and 0 <= x + dx < w:
                    distance = math.sqrt(sum(float(v[c, y, x] - v[c, y + dy, x + dx]) ** 2 for c in range(d)))
                    result[k, y, x] = math.exp(-((distance / sigma(y, x)) ** 2))
    return result


@pytest.mark.parametrize(("h", "w"), [(5, 6), (1, 4), (3, 1)])
@pytest.mark.parametrize(("window", "dilation"), [(3, 1), (5, 1), (3, (1, 2))])
def test_affinity_is_the_equation(rng, device, h, w, window, dilation):
    values = torch.rand(2, 3, h, w, generator=rng)
    offsets = window_offsets(window, dilation)
    result = pairwise_affinity(values.to(device), window=window, dilation=dilation).cpu()
    fixed = pairwise_affinity(values.to(device), window=window, dilation=dilation, sigma=0.3).cpu()
    for b in range(2):
        sigma = float(values[b].double().std(correction=0))
        expected = slow_affinity(values[b], offsets, lambda y, x, sigma=sigma: sigma)
        assert_close(result[b].double(), expected, atol=1e-6, rtol=0)
        assert_close(fixed[b].double(), slow_affinity(values[b], offsets, lambda y, x: 0.3), atol=1e-6, rtol=0)


def test_a_window_of_one_pixel_has_no_neighbors(rng, device):
    values, rows = torch.rand(2, 3, 4, 5, generator=rng).to(device), torch.rand(7, 3, generator=rng).to(device)
    assert pairwise_affinity(values, window=1, sigma="window").shape == (2, 0, 4, 5)
    assert pairwise_affinity(values, window=1, channel_weights=rows).shape == (2, 7, 0, 4, 5)


def test_window_spread_is_that_of_the_vectors(rng, device):
    values = torch.rand(1, 3, 4, 5, generator=rng)

    def sigma(y, x):
        window = [
            values[0, :, v, u]
            for v in range(max(0, y - 1), y + 2)
            for u in range(max(0, x - 1), x + 2)
            if v < 4 and u < 5
        ]
        return math.sqrt(float(torch.stack(window).double().var(dim=0, correction=0).sum()))

    result = pairwise_affinity(values.to(device), sigma="window").cpu()
    assert_close(result[0].double(), slow_affinity(values[0], window_offsets(3), sigma), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sigma", ["image", "window", 0.7])
def test_all_categories_at_once_are_one_after_the_other(rng, device, sigma):
    features, factors = torch.randn(5, 6, 7, generator=rng).to(device), torch.randn(4, 5, generator=rng).to(device)
    labels = torch.tensor([3, 0, 3], device=device)
    together = saliency_affinity(features, factors, labels, sigma=sigma)
    apart = torch.cat([pairwise_affinity(s[None], sigma=sigma) for s in reweight(features, factors[labels])])
    assert_close(together, apart, atol=2e-6, rtol=0)
    assert saliency_affinity(features, factors).shape == (4, 8, 6, 7)


@pytest.mark.parametrize("sigma", ["image", "window"])
def test_saliency_changes_the_affinity(rng, sigma):
    """With a spread per channel K would cancel out of Eq. 12 exactly; with a shared one it must not."""
    features, factors = torch.randn(5, 6, 7, generator=rng), torch.rand(2, 5, generator=rng) + 0.1
    plain = pairwise_affinity(features[None], sigma=sigma)
    one, two = saliency_affinity(features, factors, sigma=sigma)
    assert (one - plain[0]).abs().max() > 0.05
    assert (one - two).abs().max() > 0.05
    per_channel = features.flatten(1).std(dim=1)[:, None, None]
    trapped = (factors[0, :, None, None] * features) / (factors[0, :, None, None] * per_channel)
    assert_close(trapped, features / per_channel)


@pytest.mark.parametrize("sigma", ["image", "window"])
def test_blind_to_brightness_contrast_and_the_size_of_the_factors(rng, sigma):
    values, factors = torch.randn(1, 5, 6, 7, generator=rng), torch.randn(2, 5, generator=rng)
    plain = pairwise_affinity(values, sigma=sigma)
    assert_close(pairwise_affinity(3 * values + 2, sigma=sigma), plain, atol=1e-5, rtol=0)
    big = saliency_affinity(values[0], 10 * factors, sigma=sigma)
    assert_close(big, saliency_affinity(values[0], factors, sigma=sigma), atol=1e-5, rtol=0)


def test_symmetric_and_absent_outside(rng):
    values = torch.rand(1, 3, 5, 6, generator=rng)
    affinity = pairwise_affinity(values, window=3)[0]
    assert_close(affinity[4, :, :-1], affinity[3, :, 1:])  # right of i, left of its right neighbor
    assert_close(affinity[6, :-1], affinity[1, 1:])
    assert (affinity[1, 0] == 0).all()
    assert (affinity[4, :, -1] == 0).all()
    assert (affinity[:, 1:-1, 1:-1] > 0).all()


def test_constant_image_has_affinity_one():
    for sigma in ("image", "window"):
        affinity = pairwise_affinity(torch.full((1, 3, 4, 4), 0.3), sigma=sigma)
        assert (affinity[0, :, 1:-1, 1:-1] == 1).all()


def test_spread_has_moments_for_every_category(rng):
    features, factors = torch.randn(2, 5, 6, 7, generator=rng) + 3, torch.randn(4, 5, generator=rng)
    expected = torch.stack([reweight(f, factors).flatten(1).std(dim=1, correction=0) for f in features])
    assert_close(spread(features, channel_weights=factors), expected)
    assert_close(spread(features), features.flatten(1).std(dim=1, correction=0))
    assert window_spread(features, window_offsets(3)).shape == (2, 6, 7)


def test_gradients(rng):
    values = torch.rand(1, 2, 3, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: pairwise_affinity(v, sigma=0.5), values)
    assert torch.autograd.gradcheck(lambda v: pairwise_affinity(v), values)


def test_half_precision_is_promoted(rng, device):
    values = torch.rand(1, 3, 4, 5, generator=rng).half().to(device)
    assert_close(pairwise_affinity(values), pairwise_affinity(values.float()))


def test_wrong_input_is_named(rng):
    values = torch.rand(1, 3, 4, 5, generator=rng)
    with pytest.raises(ValueError, match="b, d, h, w"):
        pairwise_affinity(values[0, 0])
    with pytest.raises(ValueError, match="sigma"):
        pairwise_affinity(values, sigma=0.0)
    with pytest.raises(ValueError, match="sigma"):
        pairwise_affinity(values, sigma="channel")
    values[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        pairwise_affinity(values)


def test_large_numbers_are_finite():
    values = torch.full((1, 1, 2, 2), 3e38)
    check_finite("values", values)
    check_finite("values", torch.full((4,), 6e4).half())
    values[0, 0, 1, 1] = -torch.inf
    with pytest.raises(ValueError, match="NaN or Inf"):
        check_finite("values", values)


def test_factors_of_other_channels_are_refused_and_not_broadcast(rng):
    features = torch.rand(4, 5, 6, generator=rng)
    for channels in (1, 3):
        factors = torch.ones(2, channels)
        with pytest.raises(ValueError, match=r"reweight needs features \(d, h, w\) and saliency_factors \(c, d\)"):
            reweight(features, factors)
        with pytest.raises(ValueError, match=r"pairwise_affinity needs .* and channel_weights \(c, d\)"):
            pairwise_affinity(features, channel_weights=factors)
        with pytest.raises(ValueError, match=r"saliency_affinity needs .* and saliency_factors \(c, d\)"):
            saliency_affinity(features, factors)
    with pytest.raises(ValueError, match=r"and labels \(n\): they are .* and \(1, 2\)"):
        saliency_affinity(features, torch.ones(2, 4), torch.zeros(1, 2).long())
