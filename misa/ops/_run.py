"""Kernels called on tensors, in threads, with memory to work in.

Threads follow `torch.get_num_threads()`. Scratch memory belongs to a thread and is kept between calls.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from misa.ops._compile import Kernel

T = TypeVar("T")
BLOCK = 1 << 25  # bytes; systems hand out memory when it is touched, so the rest costs nothing
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def run(kernel: Kernel, *arguments: Any) -> Any:
    """Call a kernel with tensors, which must be contiguous, addresses and numbers."""
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


class _Memory(threading.local):
    """Memory of one thread to work in, handed out piece after piece and taken back in the reverse order."""

    def __init__(self) -> None:
        self.more: list[Tensor] = []  # what did not fit; the next block is as large as all together
        self.used = self.most = 0
        self.reserve(BLOCK)

    def reserve(self, size: int) -> None:
        """A block of `size` bytes."""
        self.block: Tensor | None = None  # let go first
        self.block = torch.empty(size, dtype=torch.uint8)
        self.size, self.address = size, self.block.data_ptr()

    def piece(self, size: int, dtype: torch.dtype) -> int:
        """The address of room for `size` numbers, with whatever was in it."""
        start = self.used
        self.used += -(-size * dtype.itemsize // 64) * 64
        self.most = max(self.most, self.used)
        if self.used <= self.size:
            return self.address + start
        self.more.append(torch.empty(self.used - start, dtype=torch.uint8))
        return self.more[-1].data_ptr()


_memory = _Memory()


@contextmanager
def scratch() -> Iterator[Callable[[int, torch.dtype], int]]:
    """Addresses of memory of this thread, by size and type, good until the block ends; blocks may be nested."""
    mine, before = _memory, _memory.used
    if before == 0 and mine.most > mine.size:
        mine.reserve(mine.most)
    try:
        yield mine.piece
    finally:
        mine.used = before
        if before == 0:
            mine.more.clear()
