"""Files of a run: JSON written in one step, and a folder held for one process."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from misa.errors import UserError

IN_USE = "is in use by another run"


def write_json(path: Path, value: Any) -> None:
    """Write a json file in one step: a killed process leaves the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The values of a json file, or None where there is none; UserError where it does not hold any."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or choose another work_dir.") from error
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path} holds no values; restore it, or choose another work_dir.")
    return values


@contextmanager
def held(folder: Path, name: str = "work_dir") -> Iterator[None]:
    """The folder, made if need be, for this process alone; UserError if it cannot be written or another run has it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{name} {folder} cannot be written ({error.strerror}); choose another {name}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{name} {folder} {IN_USE}; wait for it or choose another.") from error
        try:
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] == [".lock"]:  # nothing came of it
                (folder / ".lock").unlink()
                with contextlib.suppress(OSError):  # another run has begun beside it
                    for path in made:
                        path.rmdir()
