"""Whether a dataclass holds what it declares: Python does not look, and values come from files and callers."""

import math
import typing
from dataclasses import fields, is_dataclass
from typing import Any, Literal


def require_types(values: Any, name: str) -> None:
    """TypeError where a field of a dataclass, or of one within it, holds another type than it is declared with."""
    hints = typing.get_type_hints(type(values))
    for one in fields(values):
        value, hint = getattr(values, one.name), hints[one.name]
        if is_dataclass(value) and type(value) in (hint, *typing.get_args(hint)):
            require_types(value, f"{name}.{one.name}")
        elif not _fits(value, hint):
            raise TypeError(f"{name}.{one.name} is {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    inner, args = typing.get_origin(hint), typing.get_args(hint)
    if inner is Literal:
        return value in args
    if inner is tuple:
        kinds = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is Ellipsis else args
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if args:  # a union
        return any(_fits(value, kind) for kind in args)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return hint is Any or type(value) is hint
