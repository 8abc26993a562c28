"""Fake CUDA tensors: every operation is computed on the CPU, and those that would synchronise with the host are logged.

A `Pretend` reports cuda:0 as its device and holds a CPU tensor. Inside `pretended()` factories and `.to("cuda")` create
such tensors, values are real, and the returned list gets a line for each operation that makes the host wait: reading a
value (`item`, `bool`), a shape that depends on values (`nonzero`, a boolean index, `unique`), a copy to the host, one
to the device that is not `non_blocking` or copies more than 64 KB of unpinned memory (the driver stages smaller ones),
and an explicit synchronisation. Operands on both devices raise an error, as in CUDA. Triton's kernels run in its
interpreter. A non-blocking copy to the host completes immediately, so reading it before its event or a synchronisation
is an error that is not detected here.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from mmengine.structures import instance_data
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, return_and_correct_aliasing
from triton.runtime.interpreter import InterpretedFunction

from misa.ops.frequency import forget_filters

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
# Operations that return a value to the host, or whose output shape depends on values.
READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "equal", "is_nonzero", "nms",
}  # fmt: skip
COPIES = {"_to_copy", "copy_"}
STAGED = 2**16  # maximum bytes that the driver copies from pageable memory without waiting
INDEXING = {"index", "index_put", "index_put_"}


class Pretend(Tensor):
    """A CPU tensor that reports cuda:0 as its device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Pretend":
        # Autograd needs an available device; "meta" has no kernels, so nothing is computed by accident.
        made: Pretend = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner = inner
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """Bypass torch's C++ implementation, which would use "meta"."""
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_sent(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_sent(index), value)

    def tolist(self) -> Any:
        """Like torch's, which rejects subclasses."""
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        """Raise torch's own error."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __format__(self, form: str) -> str:
        return format(self.item() if self.dim() == 0 else str(self), form)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        watch = _get_current_dispatch_mode()
        if isinstance(watch, Watch):  # printing reads values
            watch.note("repr")
        return f"Pretend({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} met a Pretend outside of pretended()")


class Watch(TorchDispatchMode):
    """Computes on the CPU and logs operations that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.pinned: list[Tensor] = []  # kept alive, so that no other tensor reuses the memory

    def note(self, name: str) -> None:
        """Log a wait."""
        self.waits.append(f"{name} at {_caller()}")

    def pin(self, values: Tensor, *_: Any) -> Tensor:
        """Replacement of `Tensor.pin_memory`."""
        self.pinned.append(values.clone())
        return self.pinned[-1]

    def is_pinned(self, values: Tensor) -> bool:
        """Whether a tensor's memory came from `pin`."""
        return any(values.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() for own in self.pinned)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        tensors = _tensors((args, kwargs))
        there = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
        assert not any(tensor.is_meta for tensor in tensors), f"{name}: C++ made a tensor of a Pretend's device"
        asked = kwargs.get("device")
        on_cuda = bool(there) if asked is None else torch.device(asked).type != "cpu"
        if name == "copy_":
            on_cuda = isinstance(args[0], Pretend)
        if self._waits(name, args, kwargs, on_cuda):
            self.note(name)
        if there and name not in COPIES | INDEXING:
            here = [tensor for tensor in tensors if not isinstance(tensor, Pretend) and tensor.dim() > 0]
            if here:
                raise RuntimeError(f"{name}: Expected all tensors to be on the same device, at {_caller()}")
        result = function(*_bare(args), **(_bare(kwargs) | ({} if asked is None else {"device": torch.device("cpu")})))
        if not on_cuda or name == "_local_scalar_dense":
            return args[0] if name == "copy_" else result
        wrapped = _mapped(Tensor, Pretend, result)
        return return_and_correct_aliasing(function, args, kwargs, wrapped)

    def _waits(self, name: str, args: Any, kwargs: Any, to_cuda: bool) -> bool:
        if name in COPIES:
            source = args[1] if name == "copy_" else args[0]
            blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            crosses = isinstance(source, Pretend) != to_cuda
            paged = to_cuda and source.nbytes > STAGED and not self.is_pinned(source)
            return crosses and (blocking or paged) and source.numel() > 0
        if name in INDEXING:
            where = [index for index in args[1] if index is not None]
            masks = [index for index in where if index.dtype in (torch.bool, torch.uint8)]
            single = name != "index" and len(where) == 1 and masks and args[2].numel() == 1  # a masked_fill
            mixed = isinstance(args[0], Pretend) and not all(isinstance(index, Pretend) for index in where)
            return mixed or (bool(masks) and isinstance(args[0], Pretend) and not single)
        reads = name in READS or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        return reads and any(isinstance(tensor, Pretend) for tensor in _tensors((args, kwargs)))


def _sent(index: Any) -> Any:
    """Convert lists and ranges within an index to tensors on the device, which torch does in C++."""
    if isinstance(index, tuple):
        return tuple(_sent(part) for part in index)
    return torch.tensor(list(index), device=CUDA) if isinstance(index, list | range) else index


def _mapped(kind: type, change: Callable[[Any], Any], values: Any) -> Any:
    """As torch's tree_map, for what operations take and return, and several times as fast."""
    if isinstance(values, kind):
        return change(values)
    if isinstance(values, tuple | list):
        return type(values)([_mapped(kind, change, value) for value in values])
    if isinstance(values, dict):
        return {name: _mapped(kind, change, value) for name, value in values.items()}
    return values


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(Tensor, found.append, values)
    return found


def _bare(values: Any) -> Any:
    return _mapped(Pretend, lambda pretend: pretend.inner, values)


def _caller() -> str:
    """Returns file and function of the innermost caller outside torch and this file."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and f"site-packages{Path('/')}torch{Path('/')}" not in path:
            return f"{Path(path).parent.name}/{Path(path).name} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class Event:
    """Replacement of `torch.cuda.Event`: always complete, but waiting for it is logged."""

    watch: Watch

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """No-op."""

    def query(self) -> bool:
        """Always complete."""
        return True

    def synchronize(self) -> None:
        """Log a wait."""
        self.watch.note("synchronize")


@contextmanager
def pretended() -> Iterator[list[str]]:
    """Fake "cuda" inside the block; yields the log of waits. Clear it after a first step, which fills caches."""
    torch._C._ensureCUDADeviceGuardSet()
    before = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.cuda, "_lazy_init", lambda: None))
        stack.enter_context(patch.object(instance_data, "IndexType", Tensor | instance_data.IndexType))
        torch._C._set_only_lift_cpu_tensors(True)  # treat `torch.tensor(…, device="cuda")` as a copy
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        stack.enter_context(patch.object(torch.cuda, "device_of", nullcontext))
        launch = InterpretedFunction.run
        stack.enter_context(
            patch.object(InterpretedFunction, "run", lambda kernel, *args, **more: launch(kernel, *_bare(args), **more))
        )
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # the dispatch mode is thread-local
        watch = Watch()
        event = type("Event", (Event,), {"watch": watch})
        stack.enter_context(patch.object(torch.cuda, "Event", event))
        stack.enter_context(patch.object(torch.cuda, "current_stream", lambda *_: event()))
        stack.enter_context(patch.object(torch.cuda, "synchronize", lambda *_: watch.note("synchronize")))
        stack.enter_context(patch.object(Tensor, "pin_memory", lambda values, *_: watch.pin(values)))
        forget_filters()  # tensors cached for "cuda" must not leak into or out of the block
        stack.callback(forget_filters)
        stack.enter_context(watch)
        yield watch.waits
