"""Means over seeds with confidence intervals."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return mean and half width of Student's t interval; both NaN without values, the width also for one value."""
    mean = float(np.mean(values)) if len(values) else math.nan
    if len(values) < 2:
        return mean, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * error
