"""The interval against Student's table."""

import math

import pytest

from misa.engine.repeat import interval


def test_the_interval_of_three_values():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)  # t(0.975, 2) = 4.303, spread 1


def test_one_value_has_no_interval():
    mean, half = interval([5.0])
    assert mean == 5
    assert math.isnan(half)
