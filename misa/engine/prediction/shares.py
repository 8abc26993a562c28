"""Work on many images split over processes that know nothing of each other: several GPUs, or an array job of a cluster.

Each process takes its share and keeps a record of its own below the folder of the results; whoever runs the same
without a share does what is missing and puts all of it together, in an order that does not depend on who did what.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from misa.errors import UserError
from misa.files import locked

DONE = "done.jsonl"
"""A line an image that is done."""


@dataclass(frozen=True)
class Share:
    """Which images a process takes: every `shards`-th from number `shard` on, or all of them."""

    shards: int = 1
    shard: int | None = None

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise UserError(f"shards must be at least 1, not {self.shards}.")
        if self.shard is not None and not 0 <= self.shard < self.shards:
            raise UserError(
                f"shard must be from 0 to {self.shards - 1} with {self.shards} shards, not {self.shard}; an array "
                f"job's indices are --array=0-{self.shards - 1}."
            )

    @property
    def whole(self) -> bool:
        """Whether it is everything."""
        return self.shard is None

    def takes(self, number: int) -> bool:
        """Whether the image of this number, from 0, is in it."""
        return self.shard is None or number % self.shards == self.shard

    def place(self, folder: Path) -> Path:
        """Where its record is: the folder of the results itself, or one of its own in it."""
        return folder if self.whole else folder / "shards" / f"{self.shard}-of-{self.shards}"

    @contextlib.contextmanager
    def locked(self, folder: Path, name: str) -> Iterator[None]:
        """The folder for this process alone; of a share, its own place alone, and the folder not for whoever takes all.

        UserError where another process has it; `name` is what the sentence calls the folder.
        """
        with locked(folder, name, shared=not self.whole), contextlib.ExitStack() as stack:
            if not self.whole:
                stack.enter_context(locked(self.place(folder), name))
            yield


def record_files(folder: Path) -> list[Path]:
    """The records of all shares, then that of whoever takes all, which counts where both have an image."""
    return [path for path in (*sorted(folder.glob(f"shards/*/{DONE}")), folder / DONE) if path.is_file()]
