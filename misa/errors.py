"""Exceptions that end a run with one sentence, hints, option names, plurals, number checks. Standard library only."""

import contextlib
import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

DIVERGED = "diverged: "  # prefix of the command line's message, parsed by a parent process


class Diverged(RuntimeError):
    """A training loss became NaN or infinite; the command line prints the message and exits with status 1."""


class NotFinite(ValueError):
    """NaN or infinity in an input or a result; the training loop turns it into `Diverged`."""


class Stopped(RuntimeError):
    """A training stopped early and can be resumed; the command line prints the message and exits with `status`."""

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.status = status

    def _render_traceback_(self) -> list[str]:
        """Returns what a notebook shows: only the message, without a traceback."""
        return [f"{type(self).__name__}: {self}"]


class UserError(ValueError):
    """Wrong input by the user; the command line prints the message and exits with status 2."""

    _render_traceback_ = Stopped._render_traceback_


_as_flags = False


@contextlib.contextmanager
def on_command_line() -> Iterator[None]:
    """Within this context, `option_name` returns the names of the command line."""
    global _as_flags
    before, _as_flags = _as_flags, True
    try:
        yield
    finally:
        _as_flags = before


def option_name(name: str, *, off: bool = False) -> str:
    """Returns the name of an option as the caller writes it; `off`: of a switch that is off.

    >>> option_name("work_dir"), option_name("resume", off=True)
    ('work_dir', 'resume=False')
    >>> with on_command_line():
    ...     option_name("work_dir"), option_name("resume", off=True)
    ('--work-dir', '--no-resume')
    """
    if _as_flags:
        return f"--{'no-' * off}{name.replace('_', '-')}"
    return f"{name}=False" if off else name


def did_you_mean(wanted: str, found: Iterable[str], *, key: Callable[[str], str] = str) -> str:
    """Returns a hint such as "; did you mean 'train2017'?", or "" if no name is similar under `key`."""
    # Case-insensitive: 'Train2017' is a common typo, and difflib counts another case as another letter.
    names = {key(name).lower(): name for name in found}
    close = difflib.get_close_matches(key(wanted).lower(), names, n=1, cutoff=0.6)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def stem(name: str) -> str:
    """Returns a file name without its suffix, for `did_you_mean`: a common suffix makes any two names similar."""
    return name.rpartition(".")[0] or name


def counted(number: int, one: str, many: str = "") -> str:
    """Returns a number with its noun, plural unless it is 1: "1 image", "0 images", "2 boxes"."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def whole(value: Any) -> bool:
    """Whether a value is an integer that fits 64 bits (ids, sizes and seeds become tensors); bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def number(value: Any) -> bool:
    """Whether a value is an integer as in `whole` or a finite float."""
    return whole(value) or (isinstance(value, float) and math.isfinite(value))
