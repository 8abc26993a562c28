"""What stops a run in one sentence, the hint for a misspelt name, and plurals. Standard library only."""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

DIVERGED = "diverged: "  # how the command line begins such a sentence, for whoever started it


class Diverged(RuntimeError):
    """A training whose losses are no longer numbers; the command line prints its sentence and exits with status 1."""


class NotFinite(ValueError):
    """NaN or infinity, in what was given or in what came out; a training ends with `Diverged` in its place."""


class Stopped(RuntimeError):
    """A training that ended before it was done and can go on; the command line prints its sentence, exits `status`."""

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.status = status

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the sentence, without the frames of the package."""
        return [f"{type(self).__name__}: {self}"]


class UserError(ValueError):
    """Wrong input by the person who runs misa; the command line prints its sentence and exits with status 2."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the sentence, without the frames of the package."""
        return [f"{type(self).__name__}: {self}"]


def did_you_mean(wanted: str, found: Iterable[str], *, before: str = "", key: Callable[[str], str] = str) -> str:
    """A hint such as "; did you mean 'train2017'?", or nothing when no name comes close by `key`."""
    # Compared without case: 'Train2017' is the usual slip, and difflib counts it as a different letter.
    names = {key(name).lower(): name for name in found}
    close = difflib.get_close_matches(key(wanted).lower(), names, n=1, cutoff=0.6)
    return f"; did you mean {before}{names[close[0]]!r}?" if close else ""


def stem(name: str) -> str:
    """A file's name without its suffix: two names with one suffix are half alike already."""
    return name.rpartition(".")[0] or name


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun, in the plural where it is not 1: "1 image", "0 images", "2 boxes"."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def whole(value: Any) -> bool:
    """A whole number of 64 bits (ids, sizes and seeds end in tensors), which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def number(value: Any) -> bool:
    """A whole or a finite number."""
    return whole(value) or (isinstance(value, float) and math.isfinite(value))
