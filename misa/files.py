"""Atomic writes, JSON, and a folder locked for one process."""

import contextlib
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from misa.errors import UserError, did_you_mean, option_name, stem

_LONGEST_NAME = 255  # bytes, on the usual file systems
IN_USE = "is in use by another run"


@contextmanager
def atomic_write(path: Path, *, suffix: str = ".part") -> Iterator[Path]:
    """Yield a temporary file that replaces `path` when the block ends: a kill leaves the old or the new file, whole.

    Creates the folder of `path`. If the block raises, `path` is unchanged and the temporary file is removed.

    path: the file to write. suffix: of the temporary name, for libraries that choose a format by the name.
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
    """Write a JSON file atomically; ValueError for NaN or infinity, which are not valid JSON."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n")


def write_first(path: Path, value: Any) -> None:
    """Write a JSON file unless another process has, at the same time or before."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # process ids repeat on other machines
    try:
        partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
        try:
            os.link(partial, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file, or None if there is no file; UserError if it holds no valid object."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or choose another folder.") from error
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path} holds no values; restore it, or choose another folder.")
    return values


def digest(path: Path) -> str:
    """Returns the first digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def listing(folder: Path) -> list[str]:
    """Returns the sorted names in a folder except hidden ones; empty if there is no folder."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (OSError, ValueError):  # a name with a zero byte
        return []


def missing(path: Path, what: str, advice: str) -> str:
    """Returns the message for a missing path: with a similar existing name if there is one, else with `advice`."""
    # os.path and not Path: a folder without read permission counts as missing instead of raising.
    parent = next((p for p in path.absolute().parents if os.path.isdir(p)), Path("/"))
    # Compare the first missing part of the path with the names in its parent.
    wanted = path.absolute().relative_to(parent).parts[0]
    return f"there is no {what} {path}{did_you_mean(wanted, listing(parent), key=stem) or f'; {advice}.'}"


_LOCKS: list[IO[str]] = []


def close_locks() -> None:
    """Close the locks that a forked process has inherited, so that they end with the process that holds them."""
    for lock in _LOCKS:
        lock.close()
    _LOCKS.clear()


@contextmanager
def locked(folder: Path, name: str = "", *, shared: bool = False) -> Iterator[None]:
    """Lock a folder (created if missing) exclusively, or `shared` with other processes that lock it shared.

    Raises UserError: the folder is not writable or locked by another run; `name` names it in the message (default: the
    option work_dir).
    """
    name = name or option_name("work_dir")
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
        _LOCKS.append(lock)
        try:
            yield
        finally:
            _LOCKS.remove(lock)
            if made and [path.name for path in folder.iterdir()] == [".lock"]:  # created here and still empty
                (folder / ".lock").unlink()
                with contextlib.suppress(OSError):  # another run has just written to it
                    for path in made:
                        path.rmdir()


def shorter(path: Path) -> str:
    """Returns the path, relative to the working directory if that is shorter."""
    seen = os.path.relpath(path)
    return seen if len(seen) < len(str(path)) else str(path)
