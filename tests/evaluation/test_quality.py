"""The quality of a mask: its formula pixel by pixel, and its value on unambiguous masks."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from misa.evaluation.quality import mask_quality


def by_hand(p, spread, box, threshold):
    """The docstring's formula for one mask, in loops."""
    cells = [(y, x) for y, x in itertools.product(*map(range, p.shape)) if box[y, x]]
    mine = {c for c in cells if p[c] > threshold}
    if not mine:
        return 0.0
    over = sum(v > threshold for v in p.reshape(-1))
    student = sum(min(p[c], c in mine) for c in cells) / sum(max(p[c], c in mine) for c in cells)
    theirs = {c for c in cells if spread[c] > threshold}
    ys, xs = zip(*mine, strict=True)
    extent = (max(ys) - min(ys) + 1) * (max(xs) - min(xs) + 1)

    def around(c):
        steps = ((c[0] + 1, c[1]), (c[0] - 1, c[1]), (c[0], c[1] + 1), (c[0], c[1] - 1))
        return [s for s in steps if 0 <= s[0] < p.shape[0] and 0 <= s[1] < p.shape[1]]

    inner = sum(all(n in mine for n in around(c)) for c in mine)
    outer = len(mine | {n for c in mine for n in around(c)})
    border = (inner + len(mine)) / (len(mine) + outer)
    parts = student * (len(mine & theirs) / len(mine | theirs)) * (extent / len(cells) * len(mine) / over) * border
    return min(parts**0.25, 0.5 + (1 - len(mine) / len(cells)) / 0.3)


@given(st.integers(0, 10**6), st.floats(0.1, 0.9))
def test_it_is_the_formula(seed, threshold):
    rng = np.random.default_rng(seed)
    p, spread = rng.uniform(size=(2, 3, 6, 7))
    box = np.zeros((3, 6, 7), bool)
    for own in box:
        (top, bottom), (left, right) = np.sort(rng.integers(0, 6, 2)), np.sort(rng.integers(0, 7, 2))
        own[top : bottom + 1, left : right + 1] = True
    found = mask_quality(p, spread, box, threshold=threshold)
    assert ((found >= 0) & (found <= 1)).all()
    np.testing.assert_allclose(found, [by_hand(*one, threshold) for one in zip(p, spread, box, strict=True)])


def test_no_doubt_at_all_and_nothing_at_all():
    """If the object nearly fills the image, there is almost no border that could be wrong."""
    box = np.ones((2, 40, 40), bool)
    full, corner = np.ones((40, 40)), np.add.outer(np.arange(40), np.arange(40)) < 22  # 253 of 1600 cells
    masks = np.stack([np.where(corner, 0.0, full), 0.1 * full])
    found = mask_quality(masks, masks, box)
    assert 0.99 < found[0] < 1
    assert found[1] == 0
    assert mask_quality(np.zeros((0, 5, 5)), np.zeros((0, 5, 5)), np.zeros((0, 5, 5), bool)).shape == (0,)


def test_each_contradiction_lowers_it():
    box = np.zeros((1, 20, 20), bool)
    box[:, 3:17, 3:17] = True
    y, x = np.mgrid[:20, :20]
    disk = (y - 9.5) ** 2 + (x - 9.5) ** 2 < 7.2**2  # touches all sides of its box
    good = np.where(disk, 0.9, 0.05)[None]
    smaller, loose = good.copy(), good.copy()
    smaller[:, 3:10] = 0.1
    loose[:, :3] = 0.9
    best = mask_quality(good, good, box)
    assert best[0] > 0.85
    for masks, spread in ((good * 0.7, good), (good, smaller), (smaller, smaller), (loose, loose)):
        assert mask_quality(masks, spread, box)[0] < best[0] - 0.02


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 7), (14, 14), (30, 9)])
@pytest.mark.parametrize("sure", [0.51, 0.7, 1.0])
def test_agreement_with_the_box_alone_is_no_quality(height, width, sure):
    """A box-shaped mask propagates to itself and touches all sides, whatever the object; its quality is 0.5."""
    box = np.zeros((1, 34, 34), bool)
    box[:, 2 : 2 + height, 3 : 3 + width] = True
    masks = np.where(box, sure, 0.0)
    assert mask_quality(masks, box.astype(float), box)[0] <= 0.5
    assert mask_quality(masks, masks, box)[0] <= 0.5


@given(st.integers(0, 10**6))
def test_a_shape_is_better_than_its_box_where_all_else_agrees(seed):
    """Confident ellipses that propagate to themselves have a higher quality than an equally confident box."""
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(4, 14, 2)
    y, x = np.mgrid[:32, :32]
    shape = ((y - 15.5) / a) ** 2 + ((x - 15.5) / b) ** 2 < 1
    rows, columns = (np.flatnonzero(shape.any(axis=axis)) for axis in (1, 0))
    box = np.zeros((1, 32, 32), bool)
    box[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    found = [mask_quality(m[None] * 1.0, m[None] * 1.0, box)[0] for m in (shape, box[0])]
    assert found[0] > found[1] + 0.2


def test_another_shape_is_an_error():
    with pytest.raises(ValueError, match="mask_quality needs masks"):
        mask_quality(np.zeros((1, 2, 3)), np.zeros((1, 2, 3)), np.zeros((1, 3, 2), bool))
