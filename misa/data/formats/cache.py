"""Files made from other files, kept outside of the data and made again when one of these has changed.

Everything lies in $XDG_CACHE_HOME/misa or ~/.cache/misa. What was made is put in place in one step, so that several
processes may ask for it at once; what another process reads is never changed. Standard library only.
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

# Part of every key: raised when the same data is written otherwise.
_EDITION = 4


@dataclass
class Made:
    """What was made: its files by name, all files and folders that it depends on, and what is said of it."""

    files: dict[str, Path] = field(default_factory=dict)
    depends: set[Path] = field(default_factory=set)
    says: list[str] = field(default_factory=list)


def made_once(source: Path, make: Callable[[Path, Made], None], *, kind: str = "") -> Made:
    """What `make(folder, made)` writes for `source`, from an earlier call where nothing has changed since.

    Raises:
        DataError: the cache cannot be written, and something has to be.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "misa"
    key = hashlib.sha256(f"{_EDITION} {kind} {source}".encode("utf-8", "surrogateescape")).hexdigest()[:12]
    card = home / f"{source.name}-{key}.json"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _turn(card.with_suffix(".lock")):
            if (known := _known(home, card)) is not None:
                return known
            beside = Path(tempfile.mkdtemp(prefix=".making-", dir=home))
            try:
                return _make(make, beside, home, card)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        with tempfile.TemporaryDirectory() as folder:
            made = Made()
            make(Path(folder), made)
            if not made.files:  # nothing has to be written: the data is read as it lies
                return made
        raise DataError(
            f"the converted annotations of {source} cannot be written to {home} ({error.strerror}); set "
            "XDG_CACHE_HOME to a folder that can be written."
        ) from error


def _make(make: Callable[[Path, Made], None], beside: Path, home: Path, card: Path) -> Made:
    made = Made()
    make(beside, made)
    stamps = {str(path): _stamp(path) for path in sorted(made.depends)}
    digest = hashlib.sha256(json.dumps([card.name, stamps]).encode()).hexdigest()[:12]
    folder = home / f"{card.stem.rpartition('-')[0]}-{digest}"
    files = {name: path.relative_to(beside).as_posix() for name, path in made.files.items()}
    if files and not all((folder / inner).is_file() for inner in files.values()):
        shutil.rmtree(folder, ignore_errors=True)
        beside.chmod(0o755)
        with contextlib.suppress(FileExistsError, OSError):  # another machine has put the same there
            beside.rename(folder)
    content = {"folder": folder.name, "files": files, "depends": stamps, "says": made.says}
    write_json(card, content, indent=None)
    return Made({name: folder / inner for name, inner in files.items()}, made.depends, made.says)


def _known(home: Path, card: Path) -> Made | None:
    """What the card says, if all is there and nothing has changed."""
    try:
        content: dict[str, Any] = json.loads(card.read_text(encoding="utf-8"))
        files = {name: home / content["folder"] / inner for name, inner in content["files"].items()}
        depends = {Path(path): stamp for path, stamp in content["depends"].items()}
        says = list(content["says"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if all(path.is_file() for path in files.values()) and all(_stamp(p) == stamp for p, stamp in depends.items()):
        return Made(files, set(depends), says)
    return None


def _stamp(path: Path) -> list[int] | None:
    """Size and time of a file or folder; None where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """One process at a time; where the file system has no locks, each makes its own."""
    with path.open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
