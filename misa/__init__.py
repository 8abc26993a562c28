"""MISA: box-supervised instance segmentation with a semantic prior (IJCAI-24).

    misa.load(run_or_file)            # a trained student, to be called on images
    misa.load_teacher(run_or_name)    # a semantic teacher: S and K of Eq. 1 for any image
    misa.UserError                    # wrong input, in one sentence

A student takes one image or several, a teacher one; functions on tensors take an optional batch axis (`misa.ops.axes`).

The import is lazy: mmdet, mmcv and torch are loaded at the first call of a function. It makes mmcv usable without its
compiled ops (`misa.mmcv_ext`), so import misa before mmdet.
"""

import importlib
from typing import Any

from misa.mmcv_ext import install as _install_mmcv_ext

__version__ = "0.1.0"
__all__ = ["UserError", "load", "load_teacher"]

_install_mmcv_ext()


def __getattr__(name: str) -> Any:
    """Import the functions of `misa.api`, and their error, at first access."""
    if name in __all__:
        return getattr(importlib.import_module("misa.errors" if name == "UserError" else "misa.api"), name)
    raise AttributeError(f"module 'misa' has no attribute {name!r}; it has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
