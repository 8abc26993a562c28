"""Which code runs a propagation: loops compiled by numba for CPU tensors, Triton's kernels for CUDA tensors.

Torch operations serve all others, and both where numba or Triton does not run.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from misa.errors import UserError
from misa.ops.backends import torch_ops
from misa.ops.backends.cuda.works import interpreted, say_once, triton_works

NAMES = ("auto", "cpu", "torch", "triton")
_chosen: ContextVar[str | None] = ContextVar("backend", default=None)


def backend(like: Tensor) -> ModuleType:
    """`cpu` for CPU tensors, `cuda.operations` for CUDA tensors, `torch_ops` else; `use` and MISA_KERNELS have a say.

    "torch" asks for torch operations everywhere, "cpu" for the loops on the CPU, "triton" for the kernels without a
    trial; these take CPU tensors in Triton's interpreter alone (TRITON_INTERPRET=1). Under torch.compile, and for fake
    tensors, the torch operations are traced like all others.

    Raises:
        UserError: for a MISA_KERNELS that is none of `NAMES`, and where "cpu" was asked for without numba, or "triton"
            for CPU tensors outside the interpreter.
    """
    kind = like.device.type
    if torch.compiler.is_compiling() and kind == "cuda":
        say_once(
            "propagation on CUDA within torch.compile is traced as torch operations, which give the same results "
            "several times slower than its kernels; compile the networks and leave the losses outside."
        )
    if kind not in ("cpu", "cuda") or torch.compiler.is_compiling():
        return torch_ops
    name = _chosen.get() or os.environ.get("MISA_KERNELS", "auto")
    if name not in NAMES:
        raise UserError(f"MISA_KERNELS is {name!r}; set it to {', '.join(NAMES[:-1])} or {NAMES[-1]}.")
    if name == "triton":
        if kind == "cpu" and not interpreted():
            raise UserError("Triton's kernels run on CPU tensors in its interpreter alone: set TRITON_INTERPRET=1.")
        return _kernels()
    if kind == "cuda":
        return torch_ops if name == "torch" or isinstance(like, FakeTensor) or not triton_works() else _kernels()
    loops = None if name == "torch" else compiled_loops()
    if loops is None and name == "cpu":
        raise UserError("the compiled loops of the CPU were asked for, and numba is not installed: pip install numba.")
    return loops or torch_ops


@contextmanager
def use(name: str) -> Iterator[None]:
    """Propagate by one of `NAMES` until the block ends; "auto" is the rule, see `backend`."""
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
    return compiled_loops() is not None


@cache
def compiled_loops() -> ModuleType | None:
    """`cpu`, or None without numba."""
    try:
        from misa.ops.backends import cpu
        from misa.ops.backends.loops import products  # noqa: F401  the second is loaded ahead
    except ImportError:  # no numba, or none for the numpy at hand
        return None
    return cpu


def _kernels() -> ModuleType:
    from misa.ops.backends.cuda import operations

    return operations
