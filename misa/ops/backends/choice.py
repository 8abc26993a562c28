"""Which code runs a propagation: loops compiled by numba for CPU tensors, torch operations for all others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from misa.errors import UserError
from misa.ops.backends import torch_ops

NAMES = ("auto", "cpu", "torch")
_chosen: ContextVar[str | None] = ContextVar("backend", default=None)


def backend(like: Tensor) -> ModuleType:
    """`cpu` for CPU tensors where numba is installed, `torch_ops` else; `use` and MISA_KERNELS have a say.

    Under torch.compile the torch operations are traced like all others.

    Raises:
        UserError: for a MISA_KERNELS that is none of `NAMES`, and without numba where "cpu" was asked for.
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return torch_ops
    name = _chosen.get() or os.environ.get("MISA_KERNELS", "auto")
    if name not in NAMES:
        raise UserError(f"MISA_KERNELS is {name!r}; set it to {', '.join(NAMES[:-1])} or {NAMES[-1]}.")
    loops = None if name == "torch" else _loops()
    if loops is None and name == "cpu":
        raise UserError("the compiled loops of the CPU were asked for, and numba is not installed: pip install numba.")
    return loops or torch_ops


@contextmanager
def use(name: str) -> Iterator[None]:
    """Propagate by "torch" operations or by the compiled loops of the "cpu" until the block ends; "auto" is the rule.

    Tensors on other devices go through torch operations in any case.
    """
    if name not in NAMES:
        raise ValueError(f"there is no backend {name!r}; there are {', '.join(NAMES)}.")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def warm() -> bool:
    """Load the compiled loops, and compile them where no earlier process of this machine has; False without numba.

    The machine code is kept in numba's cache: beside the package, else in the user's folder for caches
    (NUMBA_CACHE_DIR names another). Where none can be written, every process compiles anew.
    """
    return _loops() is not None


@cache
def _loops() -> ModuleType | None:
    try:
        from misa.ops.backends import cpu, tree_sums  # noqa: F401  the second is loaded ahead
    except ImportError:  # no numba, or none for the numpy at hand
        return None
    return cpu
