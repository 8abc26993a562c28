"""The object bank against loops: crops of boxes, similarity of objects, and insertion of new ones."""

import collections

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from misa.ops.bank import Objects, alike, first, objects_in, put_back, ring_slots


def boxes(*corners, h=12, w=14):
    """Box masks (m h w) of x1 y1 x2 y2."""
    out = torch.zeros(len(corners), h, w, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(out, corners, strict=True):
        mask[y1:y2, x1:x2] = True
    return out


def test_a_box_is_cut_out_where_it_is(device):
    """For values linear in position, the mean of a bin is the value at its centre, at any stride of the map."""
    within = boxes((2, 3, 12, 8), (4, 2, 9, 11))
    y, x = torch.meshgrid(torch.arange(12) + 0.5, torch.arange(14) + 0.5, indexing="ij")
    masks = torch.stack([(x + 2 * y) / 40, (3 * x - y) / 60]).double()
    y, x = torch.meshgrid(torch.arange(24) + 0.5, torch.arange(28) + 0.5, indexing="ij")
    finest = torch.stack([x / 2 + 1, y / 2 + 2]).double()[None].expand(2, -1, -1, -1) * torch.tensor([1.0, 7])[
        :, None, None, None
    ].to(torch.float64)
    found = objects_in(*(each.to(device) for each in (finest, masks, within)), torch.tensor([1, 0]), grid=5, side=4)
    for m, (x1, y1, x2, y2) in enumerate([(2, 3, 12, 8), (4, 2, 9, 11)]):
        assert found.aspect[m].item() == (x2 - x1) / (y2 - y1)
        for size, values in ((5, found.features[m]), (4, found.masks[m])):
            for row in range(size):
                for column in range(size):
                    px, py = x1 + (x2 - x1) * (column + 0.5) / size, y1 + (y2 - y1) * (row + 0.5) / size
                    if size == 4:
                        expected = torch.tensor((px + 2 * py) / 40 if m == 0 else (3 * px - py) / 60)
                    else:
                        expected = torch.tensor([px + 1, py + 2]) * (7 if m == 0 else 1)
                        expected = expected / ((expected.square().sum() + 1e-6).sqrt() + 1e-6)
                    assert_close(values[..., row, column].cpu(), expected.double(), atol=1e-6, rtol=0)


def test_the_gradient_flows_into_the_map(rng):
    within = boxes((1, 0, 5, 4), (0, 1, 3, 5), h=5, w=6)
    finest = torch.randn(1, 2, 5, 6, generator=rng, dtype=torch.float64) + 3
    masks = torch.rand(2, 5, 6, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda f, m: objects_in(f, m, within, torch.zeros(2).long(), grid=2, side=3)[:2],
        (finest.requires_grad_(), masks.requires_grad_()),
    )


def objects(rng, m, c=3, s=3, u=6):
    """Returns objects with similar masks and features, so that every rule decides some pairs."""
    features = F.normalize(torch.rand(m, c, s, s, generator=rng, dtype=torch.float64) + 0.35, dim=1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, u), torch.linspace(-1, 1, u), indexing="ij")
    radius = 0.7 + 0.3 * torch.rand(m, 1, 1, generator=rng, dtype=torch.float64)
    masks = ((radius - (x**2 + y**2).sqrt()) * 8).sigmoid()
    return Objects(features, masks, 0.85 + 0.3 * torch.rand(m, generator=rng, dtype=torch.float64))


def rules(a, b):
    """Returns the four criteria of a pair, in loops, in float64."""

    def overlap(p, q):
        pairs = list(zip(p.flatten().tolist(), q.flatten().tolist(), strict=True))
        return sum(v * w for v, w in pairs) / max(sum(v + w >= 1 for v, w in pairs), 1)

    size = a[0].shape[1:]
    small = [F.interpolate(x[1][None, None], size=size, mode="bilinear")[0, 0] for x in (a, b)]
    top = bottom = 0.0
    for y in range(size[0]):
        for x in range(size[1]):
            both = float(small[0][y, x] * small[1][y, x])
            top += both * float(a[0][:, y, x] @ b[0][:, y, x])
            bottom += both
    return overlap(a[1], b[1]), overlap(1 - a[1], 1 - b[1]), top / (bottom + 1e-6), float(a[2] / b[2])


def test_alike_equals_the_loop(rng, device):
    bank, ones = objects(rng, 40), objects(rng, 6)
    decided = collections.Counter()
    for m in range(6):
        one = Objects(*(part[m] for part in ones))
        found = alike(Objects(*(part.to(device) for part in one)), Objects(*(part.to(device) for part in bank)))
        for k in range(40):
            fg, bg, look, aspect = rules(one, [part[k] for part in bank])
            passed = (fg > 0.7, bg > 0.7, look > 0.7, 0.9 <= aspect <= 1.2)
            assert bool(found[k]) == all(passed)
            decided[passed.index(False) if sum(passed) == 3 else all(passed)] += 1
    assert {0, 1, 3} <= decided.keys()


def test_each_rule_alone_keeps_an_object_out(rng):
    one = objects(rng, 1)
    hard = torch.zeros(1, 6, 6, dtype=torch.float64)
    hard[:, 1:5, 1:5] = 1
    one = one._replace(masks=hard, aspect=torch.ones(1, dtype=torch.float64))
    smaller, larger, other = hard.clone(), torch.ones_like(hard), one.features.roll(1, dims=1)
    smaller[:, 1:3] = 0
    larger[:, 0, 0] = 0
    alone = torch.zeros_like(one.features)
    alone[:, 0] = 1
    turned = alone.roll(1, dims=1)
    here = Objects(alone, one.masks, one.aspect)
    assert other.shape == alone.shape
    for changes, expected in (
        ({}, True),
        ({"masks": smaller}, False),
        ({"masks": larger}, False),
        ({"features": turned}, False),
        ({"aspect": torch.tensor([1.12])}, False),  # 1 / 1.12 < 0.9
        ({"aspect": torch.tensor([1.1])}, True),
        ({"aspect": torch.tensor([0.84])}, True),
        ({"aspect": torch.tensor([0.83])}, False),
        ({"aspect": torch.zeros(1), "masks": torch.zeros(1, 6, 6), "features": torch.zeros_like(alone)}, False),
    ):
        assert alike(Objects(*(part[0] for part in here)), here._replace(**changes)).tolist() == [expected], changes


def test_the_first_of_the_hits():
    hits = torch.tensor([False, True, False, True, True, True])
    assert first(hits, 3)[0].tolist() == [1, 3, 4]
    assert first(hits, 4)[1]
    place, enough = first(hits, 5)
    assert place[:4].tolist() == [1, 3, 4, 5]
    assert not enough
    with pytest.raises(ValueError, match="a count of 1 to 6"):
        first(hits, 7)


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=9), max_size=6), st.integers(1, 4))
def test_the_ring_holds_the_newest_of_each_class(steps, size):
    """Against one deque per class: the same objects, without duplicates."""
    filled, ring = torch.zeros(3, dtype=torch.long), torch.full((3 * size + 1,), -1)
    expected, number = [collections.deque(maxlen=size) for _ in range(3)], 0
    for step in steps:
        labels = torch.tensor([label for label, _ in step], dtype=torch.long)
        keep = torch.tensor([kept for _, kept in step], dtype=torch.bool)
        slots, filled = ring_slots(labels, keep, filled, size)
        assert (slots[~keep] == 3 * size).all()
        ring[slots] = torch.arange(number, number + len(step))
        used = slots[slots < 3 * size]
        assert len(used.unique()) == len(used)
        for label, kept in step:
            if kept:
                expected[label].append(number)
            number += 1
    for label in range(3):
        here = ring[label * size : (label + 1) * size].tolist()
        assert sorted(x for x in here if x >= 0) == list(expected[label])
        assert filled[label] == sum(1 for step in steps for own, kept in step if kept and own == label)


def test_values_are_stretched_over_their_box(rng, device):
    within = boxes((2, 3, 12, 8), (4, 2, 5, 12), (0, 0, 14, 12))
    values = torch.rand(3, 2, 4, 4, generator=rng, dtype=torch.float64)
    found = put_back(values.to(device), within.to(device)).cpu()
    for m, (x1, y1, x2, y2) in enumerate([(2, 3, 12, 8), (4, 2, 5, 12), (0, 0, 14, 12)]):
        expected = torch.zeros(2, 12, 14, dtype=torch.float64)
        expected[:, y1:y2, x1:x2] = F.interpolate(values[m : m + 1], size=(y2 - y1, x2 - x1), mode="bilinear")[0]
        assert_close(found[m], expected)


def test_nothing_to_cut_out_and_what_is_needed():
    none = boxes()
    found = objects_in(torch.zeros(1, 3, 12, 14), none.float(), none, torch.zeros(0).long(), grid=2, side=3)
    assert [part.shape for part in found] == [(0, 3, 2, 2), (0, 3, 3), (0,)]
    assert put_back(torch.zeros(0, 2, 3, 3), none).shape == (0, 2, 12, 14)
    with pytest.raises(ValueError, match="objects_in needs finest"):
        objects_in(torch.zeros(3, 12, 14), none.float(), none, torch.zeros(0).long())
