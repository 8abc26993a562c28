"""Writes large json files row by row: nothing of a file's size is held in memory."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from misa.files import atomic_write


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


def write_coco(path: Path, content: Mapping[str, Any], annotations: Callable[[Callable[[Any], None]], object]) -> None:
    """Write a COCO annotation file, put in place in one step when it is complete.

    Args:
        path: the json.
        content: its other keys in their order, lists row by row; a list "annotations" in it is left out.
        annotations: is called with what takes a row, for each of them: `lambda add: [add(row) for row in rows]`.
    """
    with ObjectFile(path) as out:
        for key, value in content.items():
            if isinstance(value, list) and key != "annotations":
                with out.rows(key) as add:
                    for row in value:
                        add(row)
            elif key != "annotations":
                out.value(key, value)
        with out.rows("annotations") as add:
            annotations(add)
