"""Oracles: the equations in loops over pixels and channels, in float64."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from misa.ops.affinity import pairwise_affinity
from misa.ops.readings import Classifier, read, window_of


@pytest.fixture
def case(rng):
    features = torch.randn(2, 5, 4, 6, generator=rng)
    layer = Classifier(
        torch.randn(3, 5, generator=rng),
        torch.randn(5, generator=rng),
        torch.randn(3, generator=rng),
        torch.randn((), generator=rng),
    )
    valid = torch.ones(2, 4, 6, dtype=torch.bool)
    valid[0, 3:] = False
    return features, layer, valid


def k_of(layer, factors):
    k, other = layer.factors.double(), layer.background.double()
    return {"signed": k, "absolute": k.abs(), "positive": k.clamp(min=0), "contrast": k - other}[factors]


def normed(features, valid, norm):
    s = features.double().clone()
    for b, d in itertools.product(range(2), range(5)):
        if norm == "channel":
            s[b, d] /= s[b, d][valid[b]].std(correction=0)
    if norm == "pixel":
        for b, i, j in itertools.product(range(2), range(4), range(6)):
            s[b, :, i, j] /= math.sqrt(float(s[b, :, i, j].square().sum()))
    return s


@pytest.mark.parametrize("norm", ["none", "channel", "pixel"])
@pytest.mark.parametrize("factors", ["signed", "absolute", "positive", "contrast"])
def test_channels_are_compared_one_by_one(case, norm, factors):
    features, layer, valid = case
    found = read(features, layer, norm=norm, factors=factors, valid=valid)
    expected = torch.einsum("cd,bdhw->bcdhw", k_of(layer, factors), normed(features, valid, norm))
    ours = found.factors[None, :, :, None, None] * found.values[:, None]
    assert found.sigma == "image"
    assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "channel", "pixel"])
@pytest.mark.parametrize("factors", ["signed", "absolute", "positive", "contrast"])
def test_the_class_map_is_the_sum_over_channels_in_units_of_its_spread(case, norm, factors):
    """The affinity compares |S^c(i) − S^c(j)| / σ of the sum, pixel by pixel."""
    features, layer, valid = case
    found = read(features, layer, values="class", norm=norm, factors=factors, valid=valid)
    s, k = normed(features, valid, norm), k_of(layer, factors)
    for b, c in itertools.product(range(2), range(3)):
        summed = torch.zeros(4, 6, dtype=torch.float64)
        for d in range(5):
            summed += k[c, d] * s[b, d]
        summed = summed / summed[valid[b]].std(correction=0)
        ours = (found.factors[c, :, None, None] * found.values[b]).double().sum(dim=0) / found.sigma
        assert_close(ours - ours[0, 0], summed - summed[0, 0], rtol=1e-4, atol=1e-4)
        assert_close(ours[valid[b]].mean(), torch.tensor(0.0).double(), rtol=0, atol=1e-5)


def test_probabilities_are_those_of_eq_1(case):
    features, layer, valid = case
    found = read(features, layer, values="probability", valid=valid)
    for b in range(2):
        scores = [
            float(layer.bias[c]) + torch.einsum("d,dhw->hw", layer.factors[c].double(), features[b].double())
            for c in range(3)
        ]
        scores.append(
            float(layer.background_bias) + torch.einsum("d,dhw->hw", layer.background.double(), features[b].double())
        )
        total = sum(score.exp() for score in scores)
        for c in range(3):
            p = scores[c].exp() / total
            p = (p - p[valid[b]].mean()) / p[valid[b]].std(correction=0)
            assert_close(found.values[b, c].double(), p, rtol=1e-4, atol=1e-4)


def test_a_class_map_compares_the_same_however_many_classes_there_are(case):
    """The spread of a map is its own and does not depend on the other maps."""
    features, layer, _ = case
    both = read(features, layer, values="class")
    alone = read(
        features,
        Classifier(layer.factors[1:2], layer.background, layer.bias[1:2], layer.background_bias),
        values="class",
    )
    many = pairwise_affinity(both.values, channel_weights=both.factors, sigma=both.sigma)[:, 1]
    one = pairwise_affinity(alone.values, channel_weights=alone.factors, sigma=alone.sigma)[:, 0]
    assert_close(many, one)


def test_the_default_hands_on_what_it_was_given(case):
    features, layer, valid = case
    found = read(features, layer, valid=valid)
    assert found.values is features
    assert found.factors is layer.factors


@pytest.mark.parametrize("values", ["class", "probability", "channels"])
def test_a_constant_map_stays_finite(case, values):
    _, layer, _ = case
    found = read(torch.zeros(1, 5, 4, 6), layer, values=values, norm="none" if values == "probability" else "channel")
    assert found.values.isfinite().all()


def test_wrong_choices_and_shapes_are_one_clear_sentence(case):
    features, layer, _ = case
    with pytest.raises(ValueError, match="read knows values channels, class, probability, not 'cam'"):
        read(features, layer, values="cam")
    for other in ({"norm": "pixel"}, {"factors": "contrast"}):
        with pytest.raises(ValueError, match="probabilities are of S and K as they are"):
            read(features, layer, values="probability", **other)
    with pytest.raises(ValueError, match="read needs features"):
        read(features[:, :3], layer)
    with pytest.raises(ValueError, match="window_share must be positive"):
        window_of(0.0, 10, 10)


@pytest.mark.parametrize(("h", "w", "side"), [(200, 336, 5), (64, 80, 3), (32, 32, 3), (300, 400, 7), (8, 8, 3)])
def test_the_window_grows_with_the_map(h, w, side):
    assert window_of(0.01, h, w) == side


@pytest.mark.parametrize(
    ("values", "norm"),
    [*itertools.product(["channels", "class"], ["none", "channel", "pixel"]), ("probability", "none")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(values, norm, dtype, case):
    """As of a teacher in bfloat16; a count of pixels above 65,504 is infinite in float16."""
    features = torch.randn(1, 5, 260, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = Classifier(*(part.to(dtype) for part in case[1][:4]))
    expected = read(features.float(), Classifier(*(part.float() for part in layer[:4])), values=values, norm=norm)
    found = read(features, layer, values=values, norm=norm)
    assert found.sigma == expected.sigma
    for own, right in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(own, right)


@pytest.mark.parametrize("values", ["channels", "class", "probability"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(values, dtype, case):
    features, layer, valid = case
    expected = read(features, layer, values=values, valid=valid)
    affinity = pairwise_affinity(expected.values, channel_weights=expected.factors, sigma="window")
    with torch.autocast(features.device.type, dtype=dtype):
        found = read(features, layer, values=values, valid=valid)
        same = pairwise_affinity(found.values, channel_weights=found.factors, sigma="window")
    assert torch.equal(found.values, expected.values)
    assert torch.equal(same, affinity)
