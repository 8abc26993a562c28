"""Stream JSON files of any size: the rows of large lists one by one, in the memory of a few rows.

Errors have the place and the wording of Python's json module, whose scanner does the parsing.
"""

import codecs
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from misa.data.formats.coco import DataError

_CHUNK = 1 << 20  # bytes
_TAIL = 16  # an error this close to the end of the window may be due to the missing rest
_SPACE = re.compile(r"[ \t\n\r]*")


class BadJson(DataError):
    """A file that is not valid JSON: `place` in it ("" for the whole file), `message` and `advice`."""

    def __init__(self, path: Path, kind: str, place: str, message: str, advice: str) -> None:
        super().__init__(f"{path}{', ' if place else ''}{place}: {message}; {advice}.")
        self.kind, self.place, self.message, self.advice = kind, place, message, advice


def stream_json(path: Path, take: Mapping[str, Callable[[Any], object]], *, once: tuple[str, ...] = ()) -> Any:
    """Returns the content of a JSON file, with the rows of some lists passed to callbacks instead of kept.

    path: a file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark. take: by key of the outermost object,
    called with each row of the list there; in the result that list is empty. once: keys that may not be repeated;
    Python's json would silently keep the last.
    Raises BadJson: the file cannot be read, is not valid JSON, or repeats a key; with line and column.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file.read, take, once).content()
    except OSError as error:
        message = f"it cannot be read ({error.strerror})"
        raise BadJson(path, "unreadable", "", message, "give an annotation file that is there") from error
    except _Fault as fault:
        place = f"line {fault.line}, column {fault.column}"
        message = "the file ends too early" if fault.ended else f"it is not json ({fault.message})"
        advice = "copy or download it again" if fault.ended else "correct it there"
        raise BadJson(path, "not-json", place, message, advice) from fault
    except (ValueError, RecursionError) as error:  # invalid Unicode, numbers of thousands of digits, too deep nesting
        if isinstance(error, BadJson):
            raise
        message = f"it is not json ({error})"
        raise BadJson(path, "not-json", "", message, "give a COCO annotation file") from error


class _Fault(Exception):
    def __init__(self, message: str, line: int, column: int, *, ended: bool) -> None:
        super().__init__(message)
        self.message, self.line, self.column, self.ended = message, line, column, ended


class _Reader:
    """A sliding window over the file: `text` from `at` on is not yet parsed; `all`: the end of the file is in it."""

    def __init__(
        self,
        path: Path,
        read: Callable[[int], bytes],
        take: Mapping[str, Callable[[Any], object]],
        once: tuple[str, ...],
    ) -> None:
        self.path, self.read, self.take, self.once = path, read, take, once
        head = read(_CHUNK)
        self.decoder = codecs.getincrementaldecoder(json.detect_encoding(head))("surrogatepass")
        self.scan = json.JSONDecoder().raw_decode
        self.all = len(head) < _CHUNK
        self.text, self.at = self.decoder.decode(head, self.all), 0
        self.line, self.column = 1, 0  # of the window's start

    def content(self) -> Any:
        if self.next() == "{":
            found: Any = self.table()
        else:
            found = self.value()
        if self.next():
            self.fail("Extra data", self.at)
        return found

    def table(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self.at += 1
        if self.next() == "}":
            self.at += 1
            return found
        while True:
            if self.next() != '"':
                self.fail("Expecting property name enclosed in double quotes", self.at)
            key = self.value()
            if key in self.once and key in found:
                raise BadJson(self.path, "duplicate-key", "", f"it has '{key}' more than once", "put all in one list")
            self.expect(":", "Expecting ':' delimiter")
            found[key] = self.rows(self.take[key]) if key in self.take and self.next() == "[" else self.value()
            if self.next() == "}":
                self.at += 1
                return found
            self.expect(",", "Expecting ',' delimiter")

    def rows(self, take: Callable[[Any], object]) -> list[Any]:
        self.at += 1
        if self.next() != "]":
            take(self.value())
            while self.next() == ",":
                self.at += 1
                take(self.value())
        self.expect("]", "Expecting ',' delimiter")
        return []

    def value(self) -> Any:
        """Parse the value at the current position."""
        while True:
            self.next()
            try:
                found, end = self.scan(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.text) - _TAIL or error.msg.startswith("Unterminated string")
                if self.all or not cut:
                    self.fail(error.msg, error.pos)
            else:
                if self.all or end < len(self.text):  # else a number may continue beyond the window
                    self.at = end
                    return found
            self.more()

    def next(self) -> str:
        """Returns the next character that is not a space, "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.all:
                return self.text[self.at : self.at + 1]
            self.more()

    def expect(self, sign: str, message: str) -> None:
        if self.next() != sign:
            self.fail(message, self.at)
        self.at += 1

    def more(self) -> None:
        """Advance the window; its size doubles if a single row does not fit."""
        self.line, self.column = self.place(self.at)
        self.text, self.at = self.text[self.at :], 0
        size = max(_CHUNK, len(self.text))
        part = self.read(size)
        self.all = len(part) < size
        self.text += self.decoder.decode(part, self.all)

    def place(self, at: int) -> tuple[int, int]:
        """Returns line and column of a position in the window."""
        lines = self.text.count("\n", 0, at)
        return self.line + lines, at - self.text.rindex("\n", 0, at) - 1 if lines else self.column + at

    def fail(self, message: str, at: int) -> None:
        line, column = self.place(at)
        ended = self.all and at >= len(self.text.rstrip())
        raise _Fault(message, line, column + 1, ended=ended or message.startswith("Unterminated string"))
