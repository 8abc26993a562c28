"""Atomic writes, JSON, and a folder locked for one process."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from misa.errors import UserError, did_you_mean, stem

_LONGEST_NAME = 255  # bytes, on the usual file systems
IN_USE = "is in use by another run"


@contextmanager
def atomic_write(path: Path, *, suffix: str = ".part") -> Iterator[Path]:
    """A file to write to, which takes the place of `path` when the block ends: a kill leaves the old or the new one.

    The folder of `path` is made if need be. Where the block raises, `path` stays as it was and nothing is left.

    Args:
        path: the file to write.
        suffix: appended to its name while it is written, for libraries that choose a format by the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + suffix)
    if len(os.fsencode(partial.name)) > _LONGEST_NAME:
        partial = path.with_name(hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32] + suffix)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a json file atomically; ValueError for NaN or infinity, which JSON has no words for."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n")


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


def digest(path: Path) -> str:
    """The first digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def listing(folder: Path) -> list[str]:
    """The names in a folder in their order, without hidden ones; none where there is no folder."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


def missing(path: Path, what: str, cure: str) -> str:
    """The sentence on a path that is not there: with the name that comes close where there is one, else with `cure`."""
    # os.path and not Path: a folder that may not be looked into counts as missing instead of raising.
    parent = next((p for p in path.absolute().parents if os.path.isdir(p)), Path("/"))
    # The first part of the path that is missing is the one to compare with what is there.
    wanted = path.absolute().relative_to(parent).parts[0]
    return f"there is no {what} {path}{did_you_mean(wanted, listing(parent), key=stem) or f'; {cure}.'}"


@contextmanager
def locked(folder: Path, name: str = "work_dir", *, shared: bool = False) -> Iterator[None]:
    """Lock a folder, made if need be, for this process alone, or `shared` with others that ask for no more.

    Raises:
        UserError: it cannot be written, or another run has locked it. `name` is what the sentence calls it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{name} {folder} cannot be written ({error.strerror}); choose another {name}.") from error
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
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
