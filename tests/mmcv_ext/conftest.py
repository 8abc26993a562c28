"""Install the finder before a test file imports mmcv.ops, as import sorting puts mmcv before misa."""

import importlib

import pytest

import misa.mmcv_ext


@pytest.fixture(autouse=True)
def _ours() -> None:
    """If a compiled mmcv is installed it is used, and its ops are not tested here."""
    if not misa.mmcv_ext.is_ours(importlib.import_module("mmcv._ext")):
        pytest.skip("mmcv is installed with compiled ops, so ours are not in use")
