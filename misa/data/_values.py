"""What counts as a number in a file or a knob that others wrote."""

import math
from typing import Any


def whole(value: Any) -> bool:
    """A whole number of 64 bits (ids, sizes and seeds end in tensors), which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def number(value: Any) -> bool:
    """A whole or a finite number."""
    return whole(value) or (isinstance(value, float) and math.isfinite(value))
