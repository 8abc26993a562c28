"""What a reader of a format gives: annotation files with their images, and what these say of each image.

A format is one file with `find` and `entries`, and one row in `misa.data.formats.table.FORMATS`. Standard library only.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from misa.files import listing

IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Suffixes of image files, in lower case."""
SPLITS = {
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What a split may be called."""
IMAGE_FOLDERS = ("JPEGImages", "images", "img", "imgs", "data")
"""What a folder of images may be called, in any case."""


class Tell(Protocol):
    """Takes a fault: its kind, where it is, what is wrong, what to do, and whether it forbids a training."""

    def __call__(self, kind: str, where: str, message: str, cure: str, *, fatal: bool = True) -> None:
        """Take one."""


class Boxed(NamedTuple):
    """An object's box x y w h in pixels.

    hard: marked as too difficult to be taught or scored. mask: polygons or run lengths as COCO has them, or None.
    """

    label: str
    box: tuple[float, float, float, float]
    where: str
    hard: bool = False
    mask: Any = None


class Entry(NamedTuple):
    """What one file or line says of an image: its file, (width, height) if given, objects, and split if named.

    own: the name of the annotation file itself, relative to its folder and without suffix, where each image has one.
    """

    file: str
    size: tuple[int, int] | None
    objects: list[Boxed]
    where: str
    split: str = ""
    own: str = ""


class Part(NamedTuple):
    """Annotation files of one format, the folder of their images, and their split ("": not said).

    home: the folder in which they and lists of splits lie.
    """

    files: tuple[Path, ...]
    images: Path
    split: str
    home: Path


class Format(NamedTuple):
    """How a format is found below a folder (or as a file), how it is read, and what it looks like.

    entries: images relative to the part's folder of images or to the root.
    """

    find: Callable[[Path], list[Part]]
    entries: Callable[[Part, Tell], Iterator[Entry]]
    example: str


def number(text: str | None) -> float | None:
    """A finite number of moderate size, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) < 1e9 else None


def size_in(width: str | None, height: str | None) -> tuple[int, int] | None:
    """(width, height) where both are numbers of 1 or more."""
    w, h = number(width), number(height)
    return (int(w), int(h)) if w is not None and h is not None and w >= 1 and h >= 1 else None


def child(folder: Path, *names: str) -> Path | None:
    """The first of these files or folders that is there, whatever the case of its name."""
    there = {name.lower(): name for name in reversed(listing(folder))}
    found = next((there[name.lower()] for name in names if name.lower() in there), None)
    return None if found is None else folder / found


def files_of(folder: Path | None, *suffixes: str) -> list[Path]:
    """The files of a folder with one of these suffixes, in the order of their names."""
    if folder is None:
        return []
    found = [folder / name for name in listing(folder) if name.lower().endswith(suffixes)]
    return [path for path in found if os.path.isfile(path)]


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder below and its files, in order; links to folders are followed, hidden names are not."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(root), sorted(name for name in files if not name.startswith("."))


def split_folders(root: Path) -> list[tuple[Path, str]]:
    """The folders that are called as a split, with that split."""
    found = [(root / name, SPLITS[name.lower()]) for name in listing(root) if name.lower() in SPLITS]
    return [(path, split) for path, split in found if os.path.isdir(path)]


def split_in(name: str) -> str:
    """The split that a file's name speaks of, as instances_train2017.json does; "" for none."""
    words = re.findall(r"[a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def image_folder(home: Path) -> Path:
    """The folder of images in a data set's folder: one that is called so, or the folder itself."""
    found = child(home, *IMAGE_FOLDERS)
    return found if found is not None and os.path.isdir(found) else home


def without_suffix(name: str) -> str:
    """A file's name without the suffix of an image; other dots belong to the name."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGES else name
