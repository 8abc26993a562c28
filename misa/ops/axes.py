"""One convention for batches in all public functions: a leading axis is optional.

- If a function takes a batch (b d h w) or the masks of an image (n h w), the first axis may be omitted from all its
  tensors together, for one image or one mask; the result then lacks it too (`single`).
- If a function takes one image (d h w), all its tensors may have a leading axis of images; the result then has it too,
  and every image is computed separately (`images`). Arguments of an image that are no tensors, a tree or a
  `SemanticGuide`, are given as a sequence.

Mixed shapes raise ValueError: nothing is broadcast.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def single(**ranks: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make the first axis optional for these tensors together. ranks: their number of axes; the first one decides."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature, (first, full) = inspect.signature(function), next(iter(ranks.items()))

        @wraps(function)
        def inner(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            given = {name: x for name in ranks if isinstance(x := bound.arguments.get(name), Tensor)}
            if first not in given or given[first].dim() != full - 1:
                return function(*bound.args, **bound.kwargs)
            _refuse(
                function,
                {name: x for name, x in given.items() if x.dim() != ranks[name] - 1},
                f"without its first axis like {first}",
            )
            bound.arguments.update({name: x[None] for name, x in given.items()})
            result: Any = function(*bound.args, **bound.kwargs)
            return result[0] if result.dim() else result

        return inner

    return decorate


def images(join: Callable[[list[Any]], Any] = torch.stack, **ranks: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Allow a leading axis of images on these arguments together.

    ranks: their number of axes without it, the first one decides; 0 for arguments given as a sequence. join: combines
    the results of all images.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature, (first, full) = inspect.signature(function), next(iter(ranks.items()))

        @wraps(function)
        def inner(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            leading = bound.arguments.get(first)
            if not isinstance(leading, Tensor) or leading.dim() != full + 1:
                return function(*bound.args, **bound.kwargs)
            each = {name: x for name in ranks if (x := bound.arguments.get(name)) is not None}
            _refuse(
                function,
                {name: x for name, x in each.items() if _images(x, ranks[name]) != len(leading)},
                f"for each of the {len(leading)} images of {first}",
            )
            found: list[Any] = []
            for i in range(len(leading)):
                bound.arguments.update({name: x[i] for name, x in each.items()})
                found.append(function(*bound.args, **bound.kwargs))
            result: R = join(found)
            return result

        return inner

    return decorate


def check_shapes(function: str, **given: tuple[Any, str]) -> None:
    """Raise ValueError if tensors or arrays do not have these axes; None is skipped.

    Axes with the same letter must have the same size; a number is an exact size.

    >>> check_shapes("f", masks=(torch.ones(2, 3, 4), "n h w"), boxes=(torch.ones(2, 4), "n 5"))
    Traceback (most recent call last):
    ValueError: f needs masks (n, h, w) and boxes (n, 5): they are (2, 3, 4) and (2, 4).
    """
    there = {name: (tuple(x.shape), axes.split()) for name, (x, axes) in given.items() if x is not None}
    sizes: dict[str, int] = {}
    for shape, axes in there.values():
        fits = len(shape) == len(axes)
        for size, axis in zip(shape, axes, strict=False):
            fits &= size == (int(axis) if axis.isdigit() else sizes.setdefault(axis, size))
        if not fits:
            needs = _listed([f"{name} ({', '.join(axes)})" for name, (_, axes) in there.items()])
            they = "they are" if len(there) > 1 else "it is"
            raise ValueError(
                f"{function} needs {needs}: {they} {_listed([str(shape) for shape, _ in there.values()])}."
            )


def _listed(words: list[str]) -> str:
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1]


def _images(value: Any, rank: int) -> int | None:
    """Return the number of images an argument has, None if it has no axis of images."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() > rank else None
    return len(value) if isinstance(value, Sequence) else None


def _refuse(function: Callable[..., Any], wrong: dict[str, Any], wanted: str) -> None:
    for name, value in wrong.items():
        has = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else "is one for all"
        raise ValueError(f"{function.__name__} needs {name} {wanted}: it {has}.")
