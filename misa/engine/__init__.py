"""From an `Experiment` to a trained, scored run folder."""

import misa.models  # noqa: F401  (first, because it imports mmdet silently)
