"""CUDA backend: the same functions as `cpu` and `torch_ops`, in Triton kernels, on the device of their tensors."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from misa.ops.backends.cuda import features, sums, trees, windows

P = ParamSpec("P")
T = TypeVar("T")


def on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """Make the tensors' device current: Triton launches on the current device, which may be another."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        first = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        with torch.cuda.device_of(first):
            return function(*args, **kwargs)

    return inner


spanning_trees = on_its_device(trees.spanning_trees)
at_edges = on_its_device(trees.at_edges)
propagate = on_its_device(sums.propagate)
propagate_along = on_its_device(sums.propagate_along)
lengths_and_variance = on_its_device(features.lengths_and_variance)
propagate_window = on_its_device(windows.propagate_window)
