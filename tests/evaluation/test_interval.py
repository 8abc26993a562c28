"""The confidence interval against Student's table and SciPy."""

import math

import numpy as np
import pytest
from scipy import stats

from misa.evaluation.interval import interval


def test_the_interval_of_three_values():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)  # t(0.975, 2) = 4.303, spread 1


def test_the_interval_is_that_of_a_t_test():
    values = np.random.default_rng(0).normal(size=7)
    for confidence in (0.9, 0.95):
        mean, half = interval(list(values), confidence)
        its = stats.ttest_1samp(values, 0).confidence_interval(confidence)
        assert (mean - half, mean + half) == pytest.approx((its.low, its.high))


def test_one_value_has_no_interval():
    mean, half = interval([5.0])
    assert mean == 5
    assert math.isnan(half)
    assert all(math.isnan(x) for x in interval([]))
