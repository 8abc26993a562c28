"""Kernel launches and bytes of a batch's losses on CUDA, with torch operations and with Triton; counted without a GPU.

    python -m benchmarks.launches                    # 2 images of 200 x 304, 64 masks each, 8 categories, D = 256

The table lists the stages of the pairwise loss and their sum, then MISA's other terms and the objectives of other
papers, except SIM and BoxTeacher, which read values that fake tensors do not have.

Operations run on fake CUDA tensors; Triton kernels are recorded instead of launched. An operation counts as one launch,
a sort as ten (the passes of a radix sort of 64 bits) and a prefix sum as two. Bytes are those of each one's inputs and
outputs, once: repeated or partial reads within a kernel are not counted.
"""

import argparse
import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.stages import OBJECTIVES, READERS, Problem, hosted, objective_loss
from benchmarks.stages import stages as measured
from misa.ops.backends.choice import use
from misa.ops.frequency import forget_filters
from misa.ops.guides import GlobalForm

SEVERAL = {"aten::sort": 10, "aten::argsort": 10, "aten::cumsum": 2, "aten::cummax": 2}  # launches per operation
# Operations without a launch: they only allocate or alias memory.
NOTHING = {
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::detach",
    "aten::_unsafe_view",
}


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments' types, in Triton's notation, and its constants."""

    module: str
    name: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass
class Count:
    """Number of launches, bytes, and every Triton kernel."""

    launches: int = 0
    bytes: int = 0
    kernels: list[Launch] = field(default_factory=list)


def size(values: object) -> int:
    """Return the bytes of all tensors among some values; a view counts its own elements."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor))


class Operations(TorchDispatchMode):
    """Counts the operations that launch a kernel."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        leaves = [x for x in tree_leaves((args, out)) if isinstance(x, Tensor)]
        on_device = any(x.device.type == "cuda" for x in leaves)
        if name.startswith("aten::") and name not in NOTHING and not func.is_view and on_device and size(out) > 0:
            self.count.launches += SEVERAL.get(name, 1)
            self.count.bytes += size((args, kwargs, out))
        return out


TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}


def described(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> Launch:
    """Describe a launch by its types; arguments in capitals are constants."""
    constants = {name: value for name, value in arguments.items() if name.isupper()}
    types = {
        name: TYPES[value.dtype] if isinstance(value, Tensor) else "fp32" if isinstance(value, float) else "i32"
        for name, value in arguments.items()
        if name not in constants
    }
    return Launch(kernel.fn.__module__, kernel.fn.__name__, types, constants, options)


@contextlib.contextmanager
def counted() -> Iterator[Count]:
    """Count the operations in the block; Triton kernels are recorded but not run."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    count = Count()

    def run(kernel: Any, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
        names = inspect.signature(kernel.fn).parameters
        own = {name: value for name, value in options.items() if name in names}
        arguments = inspect.signature(kernel.fn).bind(*args, **own).arguments
        rest = {name: value for name, value in options.items() if name not in names}
        count.kernels.append(described(kernel, arguments, rest))
        count.launches += 1
        count.bytes += size(list(arguments.values()))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(InterpretedFunction, "run", run),
        mock.patch.object(torch.cuda, "device_of", contextlib.nullcontext),
        Operations(count),
    ):
        yield count


PULL = ("distances and spread of S", "trees", "pass 1", "pass 2", "window")  # of the pairwise loss


def stages(masks: int, categories: int, channels: int, h: int, w: int, *, form: GlobalForm = "sum") -> dict[str, Count]:
    """Count the stages of the pairwise loss for two images with `masks` masks each, with the current backend."""
    return _counts(masks, categories, channels, h, w, form, others=False)


def every(masks: int, categories: int, channels: int, h: int, w: int, *, form: GlobalForm = "sum") -> dict[str, Count]:
    """Count the same, MISA's other terms and the objectives of other papers, all in the forward pass."""
    return _counts(masks, categories, channels, h, w, form, others=True)


def _counts(
    masks: int, categories: int, channels: int, h: int, w: int, form: GlobalForm, *, others: bool
) -> dict[str, Count]:
    found, n = {}, 2 * masks
    labels, image = hosted(masks, categories)  # real tensors: the host reads them
    with FakeTensorMode(allow_non_fake_inputs=True):

        def there(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda")

        problem = Problem(
            there(n, h, w),
            there(n, h, w, dtype=torch.bool),
            there(2, 3, h, w),
            there(2, channels, h, w),
            there(categories, channels),
            there(2, channels, h, w),
            there(2, 5, h, w),
            there(2, h, w, dtype=torch.bool),
            labels,
            image,
        )
        work: dict[str, Callable[[], Any]] = dict(measured(problem, form))
        if others:
            work |= {name: objective_loss(problem, name) for name in OBJECTIVES if name not in READERS}
        else:
            work = {name: work[name] for name in PULL}
        forget_filters()  # no cached tensors from outside the fake mode
        for name, run in work.items():
            if name not in PULL:
                with counted():
                    run()  # fills caches
            with counted() as found[name]:
                run()
        forget_filters()
    return found


def compiled(launch: Launch, architecture: int, *, ones: bool = False) -> bytes:
    """Return a kernel's machine code for an NVIDIA architecture such as 90; with `ones`, every integer argument is 1.

    Triton specializes on arguments of 1. Not available in a process with interpreted kernels.
    """
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget

    kernel = getattr(importlib.import_module(launch.module), launch.name)
    constants = dict(launch.constants)
    if ones:
        constants |= {name: 1 for name, kind in launch.types.items() if kind == "i32"}
    signature = {name: "constexpr" if name in constants else launch.types[name] for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
    code: bytes = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options).asm[
        "cubin"
    ]
    return code


def distinct(counts: Sequence[Count]) -> list[Launch]:
    """Return one launch of every kernel with each set of constants and types."""
    return list({(k.name, str(k.constants), str(k.types)): k for count in counts for k in count.kernels}.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "benchmarks.launches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--masks", type=int, default=64, help="of each of the two images (64)")
    parser.add_argument("--categories", type=int, default=8, help="in each image (8)")
    parser.add_argument("--channels", type=int, default=256, help="of S (256)")
    parser.add_argument("--size", type=int, nargs=2, default=(200, 304), metavar=("H", "W"), help="of the masks")
    options = parser.parse_args(argv)
    tables = {}
    for name in ("torch", "triton"):
        with use(name):
            tables[name] = every(options.masks, options.categories, options.channels, *options.size)
    print(f"{'launches / GB':30} {'torch operations':>18} {'kernels':>18} {'of them Triton':>15}")
    rows = [(stage, [tables[name][stage] for name in tables]) for stage in tables["torch"]]
    rows.insert(len(PULL), ("sum", [total([table[name] for name in PULL]) for table in tables.values()]))
    for stage, both in rows:
        cells = [f"{c.launches} / {c.bytes / 1e9:.2f}" for c in both]
        print(f"{stage:30} {cells[0]:>18} {cells[1]:>18} {len(both[1].kernels):>15}")
    return 0


def total(counts: Sequence[Count]) -> Count:
    """Return the sum of several counts."""
    kernels = [kernel for count in counts for kernel in count.kernels]
    return Count(sum(count.launches for count in counts), sum(count.bytes for count in counts), kernels)


if __name__ == "__main__":
    raise SystemExit(main())
