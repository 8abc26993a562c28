"""Objects cut out of an image and pasted over others."""

import collections

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from misa.ops.paste import Picture, PictureQueue, cut_out, onto, scores, uncovered

H, W, SURE = 24, 32, 0.7


def picture(rng, *boxes, value=0.9, stride=4):
    """Returns an image with objects that fill their boxes; masks at a quarter of the size."""
    masks = torch.full((len(boxes), H // stride, W // stride), 0.05)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1 // stride : y2 // stride, x1 // stride : x2 // stride] = value
    pixels = torch.randint(0, 256, (3, H, W), generator=rng, dtype=torch.uint8)
    return Picture(pixels, masks, torch.tensor(boxes).float().view(-1, 4), torch.arange(len(boxes)) + 5)


def test_a_score_is_the_mean_of_the_sure_pixels_in_the_box(rng):
    own = picture(rng, (4, 4, 16, 12), (8, 0, 32, 24))
    own.masks[0] = torch.rand(6, 8, generator=rng)
    found = scores(own, sure=SURE)
    total = count = 0.0
    for y in range(1, 3):
        for x in range(1, 4):
            value = float(own.masks[0, y, x])
            total, count = (total + value, count + 1) if value > SURE else (total, count)
    assert count > 0
    assert_close(found, torch.tensor([total / (count + 1), 36 * 0.9 / 37]))


def test_a_mask_is_its_stretched_probabilities_in_the_box(rng):
    """In loops: bilinear at half-pixel centres."""
    own = picture(rng, (4, 4, 30, 22))
    own = own._replace(masks=torch.rand(1, 6, 8, generator=rng) * 0.5 + 0.45)
    labels, (mask,) = cut_out(own, (H, W), rng, sure=SURE)
    for y in range(H):
        for x in range(W):
            v, u = (min(max((c + 0.5) / 4 - 0.5, 0), top) for c, top in ((y, 5), (x, 7)))
            top, left = min(int(v), 4), min(int(u), 6)
            a, b = v - top, u - left
            p = own.masks[0, top : top + 2, left : left + 2].double()
            value = (1 - a) * ((1 - b) * p[0, 0] + b * p[0, 1]) + a * ((1 - b) * p[1, 0] + b * p[1, 1])
            assert bool(mask[y, x]) == (float(value) > SURE and 4 <= x < 30 and 4 <= y < 22)
    assert labels.tolist() == [5]


@pytest.mark.parametrize(("objects", "expected"), [(1, 1), (2, 1), (3, 1), (4, 2), (6, 3), (20, 3)])
def test_half_of_the_objects_are_drawn_up_to_three(rng, objects, expected):
    labels, masks = cut_out(picture(rng, *[(4, 4, 16, 16)] * objects), (H, W), rng, sure=SURE)
    assert labels.shape == (expected,)
    assert masks.shape == (expected, H, W)


def test_objects_are_drawn_by_the_cubes_of_their_scores(rng):
    own = picture(rng, *[(4, 4, 16, 16)] * 2)
    own.masks[1] *= 0.8 / 0.9
    weights = scores(own, sure=SURE) ** 3
    drawn = collections.Counter(cut_out(own, (H, W), rng, sure=SURE)[0].item() for _ in range(2000))
    assert drawn[5] / 2000 == pytest.approx(float(weights[0] / weights.sum()), abs=0.03)


def test_the_same_generator_draws_the_same(rng):
    own = picture(rng, *[(4 * i, 4, 4 * i + 8, 16) for i in range(6)])
    found = [cut_out(own, (H, W), torch.Generator().manual_seed(3), sure=SURE) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_canvas_of_another_size_cuts_or_pads(rng):
    own = picture(rng, (20, 8, 32, 24))
    whole = cut_out(own, (H, W), rng, sure=SURE)[1]
    assert torch.equal(cut_out(own, (H + 8, W - 8), rng, sure=SURE)[1], onto(whole, (H + 8, W - 8)))
    assert onto(whole, (H + 8, W - 8))[:, H:].sum() == 0
    labels, masks = cut_out(own, (H, 16), rng, sure=SURE)  # the object is outside
    assert labels.shape == (0,)
    assert masks.shape == (0, H, 16)


@given(st.lists(st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 12)] * 2), max_size=5), st.integers(0, 2**32 - 1))
def test_what_is_left_of_a_box(corners, seed):
    boxes = torch.tensor([(x, y, min(x + a, 14), min(y + b, 14)) for x, y, a, b in corners]).float().view(-1, 4)
    covered = torch.zeros(14, 14, dtype=torch.bool)
    x, y, a, b = torch.randint(0, 14, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    covered[y : y + b, x : x + a] = True
    found, whose = uncovered(boxes, covered)
    expected = {}
    for n, (x1, y1, x2, y2) in enumerate(boxes.int().tolist()):
        left = [(r, c) for r in range(y1, y2) for c in range(x1, x2) if not covered[r, c]]
        if left:
            rows, columns = zip(*left, strict=True)
            expected[n] = [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
    assert whose.tolist() == list(expected)
    assert found.tolist() == [[float(v) for v in box] for box in expected.values()]


def test_a_box_of_which_nothing_is_covered_keeps_its_fractions():
    found, whose = uncovered(torch.tensor([[1.25, 2.5, 6.75, 7.0]]), torch.zeros(9, 9, dtype=torch.bool))
    assert found.tolist() == [[1.25, 2.5, 6.75, 7.0]]
    assert whose.tolist() == [0]


def test_the_queue_holds_the_last_pictures_and_comes_back(rng):
    queue = PictureQueue(3)
    every = [picture(rng, (4, 4, 16, 16), (0, 0, 8, 8)) for _ in range(5)]
    every[1].masks[0] = 0.6  # no confident pixel
    every[2] = every[2]._replace(masks=every[2].masks * 0)
    for number, own in enumerate(every):
        assert queue.full == (number == 4)
        queue.put(own, sure=SURE)
    assert [len(own.labels) for own in queue.pictures] == [1, 2, 2]
    assert [torch.equal(own.pixels, every[i].pixels) for own, i in zip(queue.pictures, (1, 3, 4), strict=True)]
    assert queue.pictures[0].labels.tolist() == [6]
    again = PictureQueue(3)
    again.restore(queue.state())
    assert again.full
    for one, other in zip(queue.pictures, again.pictures, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(ValueError, match="one picture or more"):
        PictureQueue(0)


def test_what_the_queue_takes_can_be_cut_out(rng):
    """The only sure pixel may round to the threshold in half precision, in which the queue keeps masks."""
    own = picture(rng, (4, 4, 16, 16), value=0.5)
    own.masks[0, 2, 2] = 0.75005
    queue = PictureQueue(2)
    queue.put(own, sure=0.75)
    for kept in queue.pictures:
        cut_out(kept, (H, W), rng, sure=0.75)
    assert queue.pictures == []
