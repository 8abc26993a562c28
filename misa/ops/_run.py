"""Kernels called on tensors, in threads, with memory to work in.

Threads follow `torch.get_num_threads()`. Scratch memory belongs to a thread and is kept between calls.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from misa.ops._compile import Kernel

T = TypeVar("T")
_scratch = threading.local()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def run(kernel: Kernel, *arguments: Any) -> Any:
    """Call a kernel with tensors, which must be contiguous, and numbers."""
    return kernel.compiled(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


def spread_out(task: Callable[..., T], *items: Any) -> list[T]:
    """`map` over threads; the kernels let go of the interpreter's lock."""
    workers = min(torch.get_num_threads(), len(items[0]))
    if workers <= 1:
        return [task(*item) for item in zip(*items, strict=True)]
    key = (os.getpid(), workers)  # a forked process needs threads of its own
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(workers, thread_name_prefix="misa")
    return list(_pools[key].map(task, *items))


def scratch(name: str, size: int, dtype: torch.dtype) -> Tensor:
    """Memory of this thread under a name, at least `size` long, with whatever was in it."""
    have: dict[str, Tensor] = _scratch.__dict__
    if name not in have or have[name].numel() < size:
        have[name] = torch.empty(size, dtype=dtype)
    return have[name]
