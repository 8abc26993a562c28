"""Large json files row by row: nothing of a file's size is held in memory.

An annotation file is one object whose long lists ("images", "annotations") are taken a row at a time. What a row is,
and what is wrong with one, is the standard library's json to say.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

from misa.files import atomic_write

_CHUNK = 1 << 20  # characters
# A value that the end of a chunk has cut is reported this near to it, an unfinished text at its start.
_NEAR = 16


class Event(NamedTuple):
    """A piece of an object: a key with its whole value, the begin of a list, or a row of one."""

    kind: str  # "value", "list" or "row"
    key: str
    value: Any = None


def read_object(path: Path) -> Iterator[Event]:
    """The keys of a file's object in their order, lists row by row; a file that holds no object is one "value" event.

    Raises as json.loads does (JSONDecodeError with the place in the file, ValueError, RecursionError), and OSError.
    """
    with path.open("rb") as file:
        encoding = json.detect_encoding(file.read(4))
    with path.open(encoding=encoding, errors="surrogatepass") as text:
        reader = _Reader(text.read)
        if reader.peek() != "{":
            yield Event("value", "", json.loads(path.read_bytes()))
            return
        yield from reader.members()


class _Reader:
    def __init__(self, read: Callable[[int], str]) -> None:
        self.read = read
        self.buffer, self.at, self.ended = "", 0, False
        self.lines, self.column = 0, 0  # before the buffer: line breaks, and characters since the last one
        self.decode = json.JSONDecoder().raw_decode

    def members(self) -> Iterator[Event]:
        self.take("{")
        if self.peek() == "}":
            self.take("}")
        else:
            while True:
                if self.peek() != '"':
                    raise self.error("Expecting property name enclosed in double quotes", self.at)
                key = self.value()
                self.take(":")
                if self.peek() == "[":
                    yield Event("list", key)
                    yield from (Event("row", key, row) for row in self.elements())
                else:
                    yield Event("value", key, self.value())
                if self.peek() != ",":
                    break
                self.take(",")
            self.take("}", "Expecting ',' delimiter")
        if self.peek():
            raise self.error("Extra data", self.at)

    def elements(self) -> Iterator[Any]:
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.peek() != ",":
                break
            self.take(",")
        self.take("]", "Expecting ',' delimiter")

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.buffer) - _NEAR or error.msg.startswith("Unterminated string")
                behind = error.pos - self.at  # which stays, wherever the buffer begins
                if not (cut and self.more()):
                    raise self.error(error.msg, self.at + behind) from None
            else:
                length = end - self.at
                # A number near the end of the buffer may go on beyond it, as 1e+ does.
                if end <= len(self.buffer) - _NEAR or not self.more():
                    self.at += length
                    return value

    def peek(self) -> str:
        """The next character that is no space; "" at the end of the file."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\n\r":
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def take(self, wanted: str, message: str = "") -> None:
        if self.peek() != wanted:
            raise self.error(message or f"Expecting '{wanted}' delimiter", self.at)
        self.at += 1

    def more(self) -> bool:
        """Read on and forget what is done with; False at the end of the file."""
        if self.ended:
            return False
        done = self.buffer[: self.at]
        breaks = done.count("\n")
        self.column = len(done) - done.rindex("\n") - 1 if breaks else self.column + len(done)
        self.lines += breaks
        rest = self.buffer[self.at :]
        # Twice as far each time, so that a row of many chunks is not decoded in vain too often.
        chunk = self.read(max(_CHUNK, len(rest)))
        self.ended = not chunk
        self.buffer, self.at = rest + chunk, 0
        return not self.ended

    def error(self, message: str, at: int) -> json.JSONDecodeError:
        """The error with its place in the whole file, and a document that tells whether it is at the end."""
        before = self.buffer[:at]
        breaks = before.count("\n")
        error = json.JSONDecodeError(message, self.buffer, at)
        error.lineno = self.lines + breaks + 1
        error.colno = len(before) - before.rindex("\n") if breaks else self.column + len(before) + 1
        return error


class ObjectFile:
    """A json object written piece by piece, put in place in one step when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._first = True

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._file = self._stack.enter_context(self._stack.enter_context(atomic_write(self.path)).open("w"))
        self._stack.push(self._end)
        self._file.write("{")
        return self

    def value(self, key: str, value: Any) -> None:
        """A key with its value."""
        self._key(key)
        self._file.write(json.dumps(value))

    def rows(self, key: str) -> "_Rows":
        """A key with a list: `with file.rows(key) as add: add(row)`."""
        self._key(key)
        return _Rows(self._file.write)

    def _key(self, key: str) -> None:
        self._file.write(("" if self._first else ",") + f"\n{json.dumps(key)}: ")
        self._first = False

    def _end(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._file.write("\n}\n")

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class _Rows:
    def __init__(self, write: Callable[[str], Any]) -> None:
        self.write, self.between = write, "\n"

    def __enter__(self) -> Callable[[Any], None]:
        self.write("[")
        return self.add

    def add(self, row: Any) -> None:
        self.write(self.between + json.dumps(row))
        self.between = ",\n"

    def __exit__(self, *_: Any) -> None:
        self.write("\n]")
