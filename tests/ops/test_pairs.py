"""Similar neighbors and neighbors on one side of a mask, against loops."""

import math

import pytest
import torch
from torch.testing import assert_close

from misa.ops.neighbors import window_offsets
from misa.ops.pairs import pair_similarity, same_side


def slow_similarity(values, valid, scale, offsets):
    d, h, w = values.shape
    out = torch.zeros(len(offsets), h, w, dtype=values.dtype)
    for k, (dy, dx) in enumerate(offsets):
        for y in range(h):
            for x in range(w):
                if 0 <= y + dy < h and 0 <= x + dx < w and valid[y + dy, x + dx]:
                    squared = sum((values[c, y, x] - values[c, y + dy, x + dx]).item() ** 2 for c in range(d))
                    out[k, y, x] = math.exp(-scale * math.sqrt(squared))
    return out


@pytest.mark.parametrize(("h", "w"), [(7, 9), (1, 5), (2, 2), (1, 1)])
@pytest.mark.parametrize(("window", "dilation"), [(3, 2), (3, 1), (5, 1)])
def test_similarity_equals_the_loop(rng, device, h, w, window, dilation):
    values = torch.randn(2, 3, h, w, generator=rng, dtype=torch.float64)
    valid = torch.rand(2, h, w, generator=rng) > 0.3
    got = pair_similarity(values.to(device), valid.to(device), scale=0.5, window=window, dilation=dilation)
    offsets = window_offsets(window, dilation)
    assert_close(
        got.cpu(), torch.stack([slow_similarity(v, m, 0.5, offsets) for v, m in zip(values, valid, strict=True)])
    )


def test_a_threshold_on_a_planted_difference():
    """BoxInst keeps a pair at 0.3 and above: a L*a*b* distance of up to 2 log(1 / 0.3) = 2.408."""
    for distance, kept in ((2.40, True), (2.42, False)):
        values = torch.zeros(1, 3, 1, 3)
        values[0, 1, 0, 2] = distance
        similarity = pair_similarity(values, torch.ones(1, 1, 3, dtype=torch.bool), scale=0.5)
        assert ((similarity >= 0.3).sum() == 2 * kept).all()


def test_only_the_neighbor_must_be_valid():
    valid = torch.tensor([[[True, False, False]]])
    similarity = pair_similarity(torch.zeros(1, 1, 1, 3), valid, scale=1.0)
    assert similarity[0, :, 0].sum(dim=0).tolist() == [0, 0, 1]


def test_gradcheck(rng):
    values = torch.randn(1, 2, 4, 5, generator=rng, dtype=torch.float64).requires_grad_()
    valid = torch.ones(1, 4, 5, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda v: pair_similarity(v, valid, scale=0.7), (values,))


def slow_side(mask, offsets):
    """The published form in loops: the mask averaged with its 3 x 3 mean, then both in or both out."""
    h, w = mask.shape

    def at(y, x):
        return mask[y, x].item() if 0 <= y < h and 0 <= x < w else 0.0

    b = [
        [(at(y, x) + sum(at(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9) / 2 for x in range(w)]
        for y in range(h)
    ]
    out = torch.zeros(len(offsets), h, w, dtype=torch.bool)
    for k, (dy, dx) in enumerate(offsets):
        for y in range(h):
            for x in range(w):
                if 0 <= y + dy < h and 0 <= x + dx < w:
                    one, two = b[y][x], b[y + dy][x + dx]
                    out[k, y, x] = one * two + (1 - one) * (1 - two) >= 0.5
    return out


def test_smooth_sides_equal_the_loop(rng):
    masks = torch.rand(3, 6, 7, generator=rng, dtype=torch.float64)
    offsets = window_offsets(3, 2)
    assert torch.equal(same_side(masks, smooth=True), torch.stack([slow_side(m, offsets) for m in masks]))
    assert not torch.equal(same_side(masks, smooth=True), same_side(masks))


@pytest.mark.parametrize(("h", "w"), [(9, 11), (1, 6), (2, 2)])
def test_for_binary_masks_smoothing_changes_nothing(rng, h, w):
    masks = torch.rand(20, h, w, generator=rng) > 0.5
    assert torch.equal(same_side(masks), same_side(masks, smooth=True))


def test_says_what_it_needs():
    with pytest.raises(ValueError, match="valid"):
        pair_similarity(torch.zeros(1, 3, 4, 4), torch.ones(4, 4, dtype=torch.bool), scale=1.0)
    with pytest.raises(ValueError, match="positive scale"):
        pair_similarity(torch.zeros(1, 3, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), scale=0.0)
    with pytest.raises(ValueError, match="same_side needs"):
        same_side(torch.zeros(4, 4))
