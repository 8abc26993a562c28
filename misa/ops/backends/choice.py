"""Choice of the propagation backend: loops compiled by numba for CPU tensors, Triton kernels for CUDA tensors.

Torch operations serve all other devices, and are the fallback without a working numba or Triton.
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
    """Return `cpu` for CPU tensors, `cuda.operations` for CUDA tensors, else `torch_ops`, unless overridden.

    `use`, or else the environment variable MISA_KERNELS, overrides: "torch" means torch operations everywhere, "cpu"
    the compiled loops on the CPU, "triton" the kernels without a trial launch; these take CPU tensors only in Triton's
    interpreter (TRITON_INTERPRET=1). torch.compile, and by default fake CUDA tensors, trace the torch operations.
    Raises UserError: MISA_KERNELS is none of `NAMES`, "cpu" without numba, or "triton" for CPU tensors outside the
    interpreter.
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
    """Use one of `NAMES` as backend within the block; "auto" is the default choice, see `backend`."""
    if name not in NAMES:
        raise ValueError(f"there is no backend {name!r}; there are {', '.join(NAMES)}.")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def warm() -> bool:
    """Load the compiled loops, compiling them if they are not in numba's cache; False without numba.

    The cache is beside the package, else in the user's cache folder (or NUMBA_CACHE_DIR). If neither is writable, every
    process compiles again.
    """
    return compiled_loops() is not None


@cache
def compiled_loops() -> ModuleType | None:
    """Return the module `cpu`, or None without numba."""
    try:
        from misa.ops.backends import cpu
        from misa.ops.backends.loops import products  # noqa: F401  preloaded
    except ImportError:  # no numba, or one that does not fit the installed numpy
        return None
    return cpu


def _kernels() -> ModuleType:
    from misa.ops.backends.cuda import operations

    return operations
