"""Scenes with a known result, sums in loops, and the propagations of the loss itself."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from misa.evaluation.guidance import Pull, iou, pull_of, ratio, summary
from misa.experiment import Affinity
from misa.losses.pairwise import pseudo_masks
from misa.ops.readings import Classifier, read


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    masks = rng.uniform(0.05, 0.95, (4, 9, 11))
    truth = rng.uniform(size=(4, 9, 11)) > 0.5
    boxes = np.zeros((4, 9, 11), bool)
    boxes[:, 1:8, 2:9] = True
    return masks, truth & boxes, boxes


@pytest.mark.parametrize(("share", "pull"), [(1.0, 1), (0.3, 1), (-0.3, -1)])
def test_what_goes_to_the_truth_pulls_by_one_and_what_goes_away_by_minus_one(case, share, pull):
    masks, truth, boxes = case
    found = pull_of(masks, masks + share * (truth - masks), truth, boxes)
    np.testing.assert_allclose(found.towards, pull * found.moved)
    if share == 1:
        np.testing.assert_allclose(found.iou, 1)
        np.testing.assert_allclose(found.gain, 1 - iou(masks > 0.5, truth, boxes))


def test_a_mask_that_stays_is_moved_by_nothing(case):
    masks, truth, boxes = case
    found = pull_of(masks, masks, truth, boxes)
    assert not found.moved.any()
    assert not found.gain.any()
    assert math.isnan(summary(found, [0, 0, 1, 1])["pull"].value)


def test_outside_the_box_nothing_counts(case):
    masks, truth, boxes = case
    pseudo = np.where(boxes, masks, 1.0)
    assert not pull_of(masks, pseudo, truth, boxes).moved.any()


def test_it_is_the_sum_over_pixels_one_by_one(case):
    masks, truth, boxes = case
    pseudo = np.random.default_rng(1).uniform(size=masks.shape)
    found = pull_of(masks, pseudo, truth, boxes)
    for n in range(4):
        towards = moved = growth = area = both = either = 0.0
        for y, x in itertools.product(range(9), range(11)):
            if not boxes[n, y, x]:
                continue
            change = pseudo[n, y, x] - masks[n, y, x]
            towards += change if truth[n, y, x] else -change
            moved += abs(change)
            growth += change
            area += 1
            both += (pseudo[n, y, x] > 0.5) and truth[n, y, x]
            either += (pseudo[n, y, x] > 0.5) or truth[n, y, x]
        np.testing.assert_allclose(
            [found.towards[n], found.moved[n], found.growth[n], found.iou[n]],
            [towards / area, moved / area, growth / area, both / either],
        )


@given(st.integers(0, 2**32 - 1))
def test_the_pull_is_between_minus_one_and_one(seed):
    rng = np.random.default_rng(seed)
    masks, pseudo = rng.uniform(size=(2, 3, 4, 5))
    found = pull_of(masks, pseudo, rng.uniform(size=(3, 4, 5)) > 0.5, np.ones((3, 4, 5), bool))
    assert (np.abs(found.towards) <= found.moved + 1e-12).all()
    assert (found.moved <= 1).all()


def test_shapes_and_empty_boxes_are_one_clear_sentence(case):
    masks, truth, boxes = case
    with pytest.raises(ValueError, match="pull_of needs masks"):
        pull_of(masks[:2], masks, truth, boxes)
    boxes = boxes.copy()
    boxes[2] = False
    with pytest.raises(ValueError, match="object 2 has a box without a pixel"):
        pull_of(masks, masks, truth, boxes)


def test_a_ratio_is_of_sums_and_its_interval_over_images():
    above, below, images = [1.0, 2.0, np.nan, 4.0], [2.0, 2.0, 5.0, 4.0], [7, 7, 8, 9]
    found = ratio(above, below, images)
    assert found.value == pytest.approx(7 / 8)
    assert math.isnan(found.low), "three images are too few for an interval"
    half = [0.0] * 5 + [1.0] * 5
    found = ratio(half, np.ones(10), range(10))
    # A resample's mean is a tenth of a binomial variable.
    assert [found.low, found.high] == pytest.approx(binom.ppf([0.025, 0.975], 10, 0.5) / 10)
    assert ratio(half, np.ones(10), range(10)) == found
    assert math.isnan(ratio(half, np.ones(10), [0, *range(9)]).low)
    assert math.isnan(ratio([], [], []).value)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        images = np.repeat(np.arange(60), 3)
        values = rng.normal(0.2, 1, 60)[images] + rng.normal(0, 0.3, 180)
        found = ratio(values, np.ones(180), images, resamples=300, seed=int(rng.integers(1000)))
        hits += found.low <= 0.2 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


# ---- propagations with a known result


def scene(colored: bool):
    """A square object in its box, visible in color or only in S, whose class map is the object in one of 2 channels."""
    truth = np.zeros((1, 24, 24), bool)
    truth[0, 8:17, 7:16] = True
    boxes = np.zeros_like(truth)
    boxes[0, 8:17, 5:18] = True  # wider than the object, so that the box alone does not decide
    t = torch.from_numpy(truth[0]).float()
    image = torch.zeros(1, 3, 24, 24)
    image[:] = t if colored else torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)) * 0.02
    noise = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    features = torch.stack([t, noise])[None]
    layer = Classifier(torch.tensor([[4.0, 0.05]]), torch.zeros(2), torch.zeros(1), torch.zeros(()))
    masks = 0.45 + 0.15 * t  # correct, but with low confidence
    return masks[None], truth, boxes, image, features, layer


def pulls(masks, truth, boxes, image, reading=None, **options):
    first = torch.zeros(1, dtype=torch.long)
    affinity = Affinity(saliency=True, **options)
    pairs = pseudo_masks(masks, torch.from_numpy(boxes), image, first, affinity=affinity, labels=first, prior=reading)
    return {name: pull_of(seen, target, truth, boxes) for name, (seen, target) in pairs.items()}


def test_a_hole_in_a_colored_object_is_filled_by_color():
    """Propagation moves probability from the rest of the object into the hole: a better mask with zero pull."""
    _, truth, boxes, image, *_ = scene(colored=True)
    masks = torch.where(torch.from_numpy(truth), 0.8, 0.1)
    masks[0, 11:13, 10:12] = 0.3
    for found in pulls(masks, truth, boxes, image, local_steps=20, window=3).values():
        assert found.gain[0] > 0
        assert found.iou[0] == 1


def test_an_object_that_s_alone_knows_is_found_by_s_and_not_by_color():
    masks, truth, boxes, image, features, layer = scene(colored=False)
    color = pulls(masks, truth, boxes, image, local_steps=20)["local"]
    options = {"local_form": "product", "semantic_scale": 0.3, "local_steps": 20}
    known = pulls(masks, truth, boxes, image, read(features, layer, values="class"), **options)["local"]
    assert color.gain[0] < 0, "color has no edge: the mask leaks"
    assert known.gain[0] >= 0
    assert known.iou[0] > color.iou[0]


def test_a_pull_is_a_plain_tuple_of_arrays(case):
    masks, truth, boxes = case
    pull = Pull(*(np.tile(part, 10) for part in pull_of(masks, 1 - masks, truth, boxes)))
    found = summary(pull, range(40))
    assert set(found) == {"iou", "gain", "pull", "moved", "growth"}
    assert all(f.low <= f.value <= f.high for f in found.values())
