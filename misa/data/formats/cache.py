"""Cache of converted files, kept outside the data and rebuilt when a source file has changed.

The cache is in $XDG_CACHE_HOME/misa or ~/.cache/misa. Results are put in place atomically, so several processes may
request them at once; files that another process may be reading are never changed. Standard library only.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from misa.data.formats.coco import DataError
from misa.files import write_json

# Part of every key; increased when the same data is written differently.
_EDITION = 11
OURS = ("plain_of", "converted_from", "faults")
"""Keys of converted files in addition to the user's; of the same name in a user's file they are left out."""


@dataclass
class Made:
    """A cached result: its files by name, all files and folders that it depends on, and messages about it."""

    files: dict[str, Path] = field(default_factory=dict)
    depends: set[Path] = field(default_factory=set)
    says: list[str] = field(default_factory=list)


def made_once(source: Path, make: Callable[[Path, Made], None], *, kind: str = "", state: str = "") -> Made:
    """Returns the result of `make(folder, made)` for `source`, from the cache if no dependency has changed.

    kind: distinguishes several results of one source. state: what else it depends on; only the last state is kept.

    Raises DataError: files have to be written and the cache is not writable.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "misa"
    key = hashlib.sha256(f"{_EDITION} {kind} {source}".encode("utf-8", "surrogateescape")).hexdigest()[:12]
    card = home / f"{source.name}-{key}.json"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _turn(card.with_suffix(".lock")):
            if (known := _known(home, card, state)) is not None:
                return known
            beside = Path(tempfile.mkdtemp(prefix=".making-", dir=home))
            try:
                return _make(make, beside, home, card, state)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        with tempfile.TemporaryDirectory() as folder:
            made = Made()
            make(Path(folder), made)
            if not made.files:  # nothing to write: the data is read in place
                return made
        raise DataError(
            f"the converted annotations of {source} cannot be written to {home} ({error.strerror}); set "
            "XDG_CACHE_HOME to a folder that can be written."
        ) from error


def _make(make: Callable[[Path, Made], None], beside: Path, home: Path, card: Path, state: str) -> Made:
    made = Made()
    make(beside, made)
    stamps = {str(path): _stamp(path) for path in sorted(made.depends)}
    digest = hashlib.sha256(json.dumps([card.name, stamps, state]).encode()).hexdigest()[:12]
    folder = home / f"{card.stem.rpartition('-')[0]}-{digest}"
    files = {name: path.relative_to(beside).as_posix() for name, path in made.files.items()}
    if files and not all((folder / inner).is_file() for inner in files.values()):
        shutil.rmtree(folder, ignore_errors=True)
        beside.chmod(0o755)
        with contextlib.suppress(FileExistsError, OSError):  # another machine has written the same folder
            beside.rename(folder)
    content = {"folder": folder.name, "files": files, "depends": stamps, "says": made.says, "state": state}
    write_json(card, content, indent=None)
    return Made({name: folder / inner for name, inner in files.items()}, made.depends, made.says)


def _known(home: Path, card: Path, state: str) -> Made | None:
    """Returns the cached result of the card if it is of `state` and no file is missing or has changed, else None."""
    try:
        content: dict[str, Any] = json.loads(card.read_text(encoding="utf-8"))
        files = {name: home / content["folder"] / inner for name, inner in content["files"].items()}
        depends = {Path(path): stamp for path, stamp in content["depends"].items()}
        says = list(content["says"])
        same = content["state"] == state
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = same and all(path.is_file() for path in files.values())
    if whole and all(_stamp(path) == stamp for path, stamp in depends.items()):
        return Made(files, set(depends), says)
    return None


def _stamp(path: Path) -> list[int] | None:
    """Returns size and modification time of a file or folder; None if it does not exist."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Lock for one process at a time; on a file system without locks each process builds its own result."""
    with path.open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
