"""The AUC of pairs against a count over all pairs, and on maps with a known result."""

import math

import numpy as np
import pytest

from misa.evaluation.separation import auc, separation, surroundings


def test_auc_against_a_count_of_all_pairs():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 6, 23).astype(float), rng.integers(0, 5, 31).astype(float)
    count = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative)
    assert auc(positive, negative) == pytest.approx(count / (23 * 31))
    assert math.isnan(auc(positive, negative[:0]))


def half(size=20):
    mask = np.zeros((1, size, size), bool)
    mask[0, 4:14, 5:15] = True
    return mask


def test_a_map_that_shows_the_object_separates_it():
    mask = half()
    noise = 0.1 * np.random.default_rng(0).normal(size=(2, 20, 20))
    assert separation(mask + noise[:1], mask)[0] > 0.99


def test_noise_separates_nothing():
    values = np.random.default_rng(0).normal(size=(4, 20, 20))
    assert separation(values, half(), pairs=20000)[0] == pytest.approx(0.5, abs=0.05)


def test_an_object_of_three_contrasting_parts_is_below_chance():
    values = np.zeros((3, 20, 20))
    values[0, 4:7, 5:15] = values[1, 7:10, 5:15] = values[2, 10:14, 5:15] = 1.0
    # Two parts are sqrt(2) apart, part and surroundings 1: only the third of pairs within a part is nearer.
    assert separation(values, half())[0] == pytest.approx(0.34, abs=0.05)


def test_factors_choose_the_channels_that_count():
    mask = half()
    values = np.concatenate([mask.astype(float), 50 * np.random.default_rng(0).normal(size=(1, 20, 20))])
    plain, chosen = separation(values, mask)[0], separation(values, mask, factors=np.array([[1.0, 0.0]]))[0]
    assert plain < 0.6
    assert chosen == 1


def test_the_surroundings_are_the_grown_box_without_the_object():
    mask = np.zeros((20, 20), bool)
    mask[4:12, 0:8] = True
    mask[4, 0] = False
    around = surroundings(mask)
    expected = np.zeros((20, 20), bool)
    expected[2:14, 0:10] = True
    assert np.array_equal(around, expected & ~mask)


def test_small_objects_have_surroundings_two_pixels_wide():
    mask = np.zeros((12, 12), bool)
    mask[5:7, 5:7] = True
    assert surroundings(mask).sum() == 6 * 6 - 4


def test_one_pixel_has_no_pairs():
    mask = np.zeros((1, 9, 9), bool)
    mask[0, 4, 4] = True
    assert np.isnan(separation(np.zeros((1, 9, 9)), mask)[0])


def test_equal_seeds_give_equal_numbers_and_sizes_are_checked():
    values, mask = np.random.default_rng(0).normal(size=(2, 20, 20)), half()
    assert separation(values, mask, seed=3) == separation(values, mask, seed=3)
    with pytest.raises(ValueError, match="separation needs values"):
        separation(values[:, :10], mask)
