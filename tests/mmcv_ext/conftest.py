"""The finder has to be in place before a test file imports mmcv.ops, and import sorting puts mmcv before misa."""

import importlib

import pytest

import misa.mmcv_ext


@pytest.fixture(autouse=True)
def _ours() -> None:
    """Where a compiled mmcv is installed it is the one in use, and its ops are not ours to test."""
    if not misa.mmcv_ext.is_ours(importlib.import_module("mmcv._ext")):
        pytest.skip("mmcv is installed with compiled ops, so ours are not in use")
