"""Split the work on many images over independent processes: several GPUs, or an array job of a cluster.

Each process takes its share and writes its own record below the results' folder. A run without a share completes what
is missing and merges the records, in an order that does not depend on the split.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from misa.errors import UserError, counted
from misa.files import locked

DONE = "done.jsonl"
"""The record file, with one line per finished image."""


@dataclass(frozen=True)
class Share:
    """The images that a process takes: every `shards`-th starting at number `shard`, or all."""

    shards: int = 1
    shard: int | None = None

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise UserError(f"shards must be at least 1, not {self.shards}.")
        if self.shard is not None and not 0 <= self.shard < self.shards:
            raise UserError(
                f"shard must be from 0 to {self.shards - 1} with {counted(self.shards, 'shard')}, not {self.shard}; an "
                f"array job's indices are --array=0-{self.shards - 1}."
            )

    @property
    def whole(self) -> bool:
        """Whether it includes all images."""
        return self.shard is None

    def takes(self, number: int) -> bool:
        """Whether it includes the image of this number, from 0."""
        return self.shard is None or number % self.shards == self.shard

    def place(self, folder: Path) -> Path:
        """Folder of its record: the results' folder, or a subfolder of it."""
        return folder if self.whole else folder / "shards" / f"{self.shard}-of-{self.shards}"

    @contextlib.contextmanager
    def locked(self, folder: Path, name: str) -> Iterator[None]:
        """Lock the folder: exclusively without a share; for a share, its subfolder exclusively and the folder shared.

        UserError if another process has locked it; `name` is the folder's name in the message.
        """
        with locked(folder, name, shared=not self.whole), contextlib.ExitStack() as stack:
            if not self.whole:
                stack.enter_context(locked(self.place(folder), name))
            yield


def record_files(folder: Path) -> list[Path]:
    """The records of all shares, then that of the run without a share, which takes precedence in equal calls."""
    return [path for path in (*sorted(folder.glob(f"shards/*/{DONE}")), folder / DONE) if path.is_file()]


@dataclass
class Tally:
    """Counts the images on record, of all shares and earlier calls, each time reading only what has been added."""

    folder: Path
    _read: dict[Path, tuple[int, int]] = field(default_factory=dict)  # bytes and lines of each record

    def __call__(self) -> str:
        """Returns the count in words, such as "312 images done"."""
        for path in record_files(self.folder):
            size, lines = self._read.get(path, (0, 0))
            with contextlib.suppress(OSError), path.open("rb") as file:
                if file.seek(0, 2) < size:  # written anew
                    size, lines = 0, 0
                file.seek(size)
                while content := file.read(2**20):
                    size, lines = size + len(content), lines + content.count(b"\n")
                self._read[path] = size, lines
        return f"{counted(sum(lines for _, lines in self._read.values()), 'image')} done"
