"""Which code runs a propagation: compiled loops for CPU tensors, torch operations for all others."""

import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from misa.ops import _device
from misa.ops._compile import available

_choice: dict[str, Any] = {"kernels": os.environ.get("MISA_KERNELS", "auto")}


def backend(like: Tensor) -> ModuleType:
    """`_cpu` for CPU tensors, unless llvmlite is absent or MISA_KERNELS=torch says otherwise; `_device` else.

    Under torch.compile the torch operations are traced like all others.
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling() or _choice["kernels"] == "torch" or not available():
        return _device
    if _choice["kernels"] == "numba":
        from misa.ops.backends import cpu

        return cpu
    from misa.ops import _cpu

    return _cpu
