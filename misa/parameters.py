"""Options declared once: a dataclass field is both an option of the command and a parameter of the notebook.

    class Predict(Parameters):
        run: str = argument("a run folder, or a file made by misa export")
        score: float = option(0.3, "score threshold", low=0, high=1)
        masks: Literal["map", "each", "none"] = option("map", "one PNG per image, one per instance, or none")

The type of a field is bool, int, float or str, one of these or None, a `Literal`, or a tuple of strings.
"""

import argparse
import ast
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, MutableMapping
from typing import Any, Literal, Self, dataclass_transform

from misa.errors import UserError, did_you_mean

# Names that IPython adds to a notebook's namespace.
_IPYTHON = {"In", "Out", "get_ipython", "exit", "quit", "open"}
_SEEN = "_misa_cells_read"  # name in the notebook's namespace: number of cells run at the last `read`


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    only: Literal["", "command", "notebook"] = "",
) -> Any:
    """Declare an option: its default (... for a required one) and help; numbers lie in [`low`, `high`].

    only: restricts it to the notebook or to the command.
    """
    metadata = {"help": help, "low": low, "high": high, "only": only, "nargs": None}
    return dataclasses.field(default=dataclasses.MISSING if default is ... else default, metadata=metadata)


def argument(help: str, *, default: Any = dataclasses.MISSING, optional: bool = False) -> Any:
    """Declare a positional argument, required unless `optional`. default: the value in the notebook."""
    metadata = {"help": help, "low": None, "high": None, "only": "", "nargs": "?" if optional else 1}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Parameters:
    """Base of the dataclasses that hold the options of a command and the parameters of its notebook."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        listing = (f"    {field.name}: {field.metadata['help']}" for field in _fields(cls))
        cls.__doc__ = "\n".join([cls.__doc__ or cls.__name__, "", *listing])

    def __post_init__(self) -> None:
        for field, hint in _typed(type(self)):
            value = _converted(getattr(self, field.name), hint)
            object.__setattr__(self, field.name, value)
            if problem := _problem(value, hint, field):
                raise UserError(f"parameter {field.name} {problem}.")

    @classmethod
    def read(cls, namespace: MutableMapping[str, Any]) -> Self:
        """Read the parameters from a notebook's namespace (`globals()`); UserError for an undeclared name.

        papermill only warns of an undeclared parameter and goes on with the defaults. The first call checks every
        name; later calls, when the notebook's cells have defined names of their own, check only names assigned in
        the same cell as a parameter, such as an edited parameter cell that is run again.
        """
        names = [field.name for field in _fields(cls) if field.metadata["only"] != "command"]
        there = {
            name
            for name, value in namespace.items()
            if not name.startswith("_")
            and name not in _IPYTHON
            and not isinstance(value, types.ModuleType | type | types.FunctionType)
        }
        first = _SEEN not in namespace
        cells = [str(cell) for cell in namespace.get("In", [])]
        seen = 0 if first else namespace[_SEEN]
        namespace[_SEEN] = len(cells)
        beside = set().union(*(assigned for c in cells[seen:] if not (assigned := _assigned(c)).isdisjoint(names)))
        for name in sorted((there if first else there & beside) - set(names)):
            hint = did_you_mean(name, names) or f"; the parameters are {', '.join(names)}."
            raise UserError(f"there is no parameter {name}{hint}")
        return cls(**{name: namespace[name] for name in names if name in namespace})

    @classmethod
    def cell(cls) -> str:
        """Returns the source of the notebook's parameter cell."""
        lines = []
        for field, hint in _typed(cls):
            if field.metadata["only"] != "command":
                value = ",".join(field.default) if isinstance(field.default, tuple) else field.default
                text = f'"{value}"' if isinstance(value, str) else repr(value)
                lines.append(f"{field.name}: {_papermill_type(hint)} = {text}  # {field.metadata['help']}")
        return "\n".join(lines)

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options to an argparse parser."""
        for field, hint in _typed(cls):
            if field.metadata["only"] != "notebook":
                _add(parser, field, hint)

    @classmethod
    def parsed(cls, namespace: argparse.Namespace) -> Self:
        """Returns the parameters from argparse's namespace; UserError for a value out of range."""
        values = vars(namespace)
        for field, hint in _typed(cls):
            if field.name in values and (problem := _problem(_converted(values[field.name], hint), hint, field)):
                raise UserError(f"{_shown(field)} {problem}.")
        return cls(**values)

    def command_line(self) -> list[str]:
        """Returns the command-line arguments that give these values; defaults are omitted."""
        positional: list[str] = []
        options: list[str] = []
        for field in _fields(type(self)):
            value = getattr(self, field.name)
            if field.metadata["only"] == "notebook" or (value == field.default and field.metadata["nargs"] != 1):
                continue
            values = [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
            if field.metadata["nargs"] is not None:
                positional += values
            elif isinstance(value, bool):
                options.append(_shown(field) if value else _shown(field).replace("--", "--no-", 1))
            else:
                options += [_shown(field), *values]
        return positional + options


def _assigned(cell: str) -> set[str]:
    """Returns the names that a cell assigns at top level; empty if it is not plain Python."""
    try:
        tree = ast.parse(cell)
    except SyntaxError:
        return set()
    found: set[str] = set()
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def _fields(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)


def _typed(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    yield from ((field, hints[field.name]) for field in _fields(cls))


def _shown(field: dataclasses.Field[Any]) -> str:
    """Returns the name on the command line, such as "--short-side"."""
    return field.name if field.metadata["nargs"] else "--" + field.name.replace("_", "-")


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _kinds(hint: Any) -> tuple[Any, ...]:
    return (str,) if typing.get_origin(hint) is Literal else typing.get_args(hint) or (hint,)


def _converted(value: Any, hint: Any) -> Any:
    """Convert papermill's values: `-p radius 7` and `-p images 7` arrive as int, a list as comma-separated text."""
    if _is_list(hint):
        parts = (part.strip() for part in value.split(",")) if isinstance(value, str) else value
        return tuple(part for part in parts if part) if isinstance(value, str | list | tuple) else value
    kinds = _kinds(hint) if type(value) is int else ()
    if int not in kinds and str in kinds and typing.get_origin(hint) is not Literal:
        return str(value)
    return float(value) if float in kinds else value


def _problem(value: Any, hint: Any, field: dataclasses.Field[Any]) -> str:
    """Returns what is wrong with a value (type, range or choice), or "" if it is valid."""
    if _is_list(hint):
        good = isinstance(value, tuple) and all(isinstance(part, str) for part in value)
        return "" if good else f"must be a list of strings, not {value!r}"
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return "" if value in choices else f"must be one of {', '.join(filter(None, choices))}, not {value!r}"
    kinds = _kinds(hint)
    # isinstance(True, int) holds, but a bool is a mistake where a number is declared.
    if type(value) not in kinds:
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        fix = "; write True or False" if bool in kinds else ""
        return f"must be {names}, not {value!r} ({type(value).__name__}){fix}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return ""
    low, high = field.metadata["low"], field.metadata["high"]
    if (low is None or value >= low) and (high is None or value <= high):
        return "" if math.isfinite(value) else f"must be a finite number, not {value}"
    return f"must be {f'at least {low}' if high is None else f'from {low} to {high}'}, not {value}"


def _papermill_type(hint: Any) -> str:
    """Returns a type annotation that papermill can parse: neither `X | None` nor Literal."""
    if _is_list(hint) or typing.get_origin(hint) is Literal:
        return "str"
    kinds = [kind.__name__ for kind in _kinds(hint) if kind is not type(None)]
    return f'"Optional[{kinds[0]}]"' if type(None) in _kinds(hint) else kinds[0]


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    required = field.default is dataclasses.MISSING
    default = None if required else field.default
    help = field.metadata["help"].replace("%", "%%")
    if default not in (None, "", ()) and not isinstance(default, bool) and field.metadata["nargs"] != 1:
        help += f" (default: {default})"
    keys: dict[str, Any] = {"help": help, "default": default}
    if field.metadata["nargs"] is not None:
        many = {1: "+", "?": "*"} if _is_list(hint) else {1: None, "?": "?"}
        parser.add_argument(field.name, nargs=many[field.metadata["nargs"]], type=_reader(hint), **keys)
        return
    keys |= {"dest": field.name}
    flag = _shown(field)
    if hint is bool:
        if default:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **keys)
        else:
            parser.add_argument(flag, action="store_true", **keys)
            keys |= {"help": argparse.SUPPRESS}
            parser.add_argument(flag.replace("--", "--no-", 1), action="store_false", **keys)
        return
    if typing.get_origin(hint) is Literal:
        keys |= {"metavar": "{" + ",".join(filter(None, typing.get_args(hint))) + "}"}
    elif int in _kinds(hint) or float in _kinds(hint):
        keys |= {"metavar": "N" if int in _kinds(hint) else "X"}
    many_or_one = "+" if _is_list(hint) else None
    parser.add_argument(flag, nargs=many_or_one, required=required, type=_reader(hint), **keys)


def _reader(hint: Any) -> Any:
    """Returns the converter (argparse `type`) for a type hint."""
    kinds = _kinds(hint)

    def read(text: str) -> Any:
        for kind, name in ((int, "whole number"), (float, "number")):
            if kind in kinds:
                try:
                    return kind(text)
                except ValueError as error:
                    if str not in kinds:
                        raise argparse.ArgumentTypeError(f"{text!r} is not a {name}") from error
        return text

    return read
