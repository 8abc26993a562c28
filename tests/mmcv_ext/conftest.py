"""The finder has to be in place before a test file imports mmcv.ops, and import sorting puts mmcv before misa."""

import misa  # noqa: F401
