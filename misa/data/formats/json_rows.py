"""Write large JSON files row by row, without holding them in memory."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from misa.files import atomic_write


class ObjectFile:
    """A JSON object written incrementally, see `object_file`."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self._write, self._between = write, "\n"

    def value(self, key: str, value: Any) -> None:
        """Write a key and its value."""
        self._key(key)
        self._write(json.dumps(value))

    @contextmanager
    def rows(self, key: str) -> Iterator[Callable[[Any], None]]:
        """Write a key and a list: `with file.rows(key) as add: add(row)`."""
        self._key(key)
        between = "[\n"

        def add(row: Any) -> None:
            nonlocal between
            self._write(between + json.dumps(row))
            between = ",\n"

        yield add
        self._write("\n]" if between == ",\n" else "[\n]")

    def all_rows(self, key: str, rows: Iterable[Any]) -> None:
        """Write a key and a list of these rows."""
        with self.rows(key) as add:
            for row in rows:
                add(row)

    def _key(self, key: str) -> None:
        self._write(f"{self._between}{json.dumps(key)}: ")
        self._between = ",\n"


@contextmanager
def object_file(path: Path) -> Iterator[ObjectFile]:
    """Yield a JSON object to write incrementally; the file appears atomically when the block ends."""
    with atomic_write(path) as partial, partial.open("w") as file:
        file.write("{")
        yield ObjectFile(file.write)
        file.write("\n}\n")


def write_coco(path: Path, content: Mapping[str, Any], annotations: Callable[[Callable[[Any], None]], object]) -> None:
    """Write a COCO annotation file atomically.

    path: the JSON file. content: the other keys in order, lists written row by row; a list "annotations" in it is
    ignored. annotations: called with a function that writes a row: `lambda add: [add(row) for row in rows]`.
    """
    with object_file(path) as out:
        for key, value in content.items():
            if isinstance(value, list) and key != "annotations":
                out.all_rows(key, value)
            elif key != "annotations":
                out.value(key, value)
        with out.rows("annotations") as add:
            annotations(add)
