"""Types that the readers of formats return: annotation files with their images, and the objects of each image.

A format is one file with `find` and `entries`, and one row in `misa.data.formats.table.FORMATS`. Standard library only.
"""

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
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
"""Accepted names of each split."""
IMAGE_FOLDERS = ("JPEGImages", "images", "img", "imgs", "data")
"""Accepted names of a folder of images, in any case."""


class ReportFault(Protocol):
    """Callback that reports a fault: its kind, place, message and advice, and whether it forbids a training."""

    def __call__(self, kind: str, where: str, message: str, advice: str, *, fatal: bool = True) -> None:
        """Report one fault."""


class Boxed(NamedTuple):
    """An object's box x y w h in pixels.

    hard: marked as too difficult for training or evaluation. mask: polygons or RLE in COCO's form, or None.
    """

    label: str
    box: tuple[float, float, float, float]
    where: str
    hard: bool = False
    mask: Any = None


class Entry(NamedTuple):
    """Annotations of an image in one file or line: image file, (width, height) if given, objects, split if named.

    own: the name of the annotation file, relative to its folder and without suffix, if each image has its own.
    """

    file: str
    size: tuple[int, int] | None
    objects: list[Boxed]
    where: str
    split: str = ""
    own: str = ""


class Part(NamedTuple):
    """Annotation files of one format, the folder of their images, and their split ("": not given).

    home: the folder that holds them and the lists of splits. classes: False if boxes without a class are accepted (by
    formats that can omit it), with label "".
    """

    files: tuple[Path, ...]
    images: Path
    split: str
    home: Path
    classes: bool = True


class Format(NamedTuple):
    """A format: functions that find it below a folder (or as a file) and read it, and an example of its layout.

    entries: yields images, relative to the part's folder of images or to the root. looked: the folders, present or not,
    in which `entries` looks for further files of annotations. left: the files of this format in a folder that are none
    of those that are read.
    """

    find: Callable[[Path], list[Part]]
    entries: Callable[[Part, ReportFault], Iterator[Entry]]
    example: str
    looked: Callable[[Part], Iterable[Path]] = lambda part: ()
    left: Callable[[Path, Collection[Path]], Iterable[Path]] = lambda root, read: ()


def number(text: str | None) -> float | None:
    """Parse a finite number of moderate size; None if it is none."""
    try:
        value = float("" if "_" in (text or "") else text or "")  # Python reads 1_0 as 10
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) < 1e9 else None


def size_in(width: str | None, height: str | None) -> tuple[int, int] | None:
    """Returns (width, height) if both are numbers of at least 1, else None."""
    w, h = number(width), number(height)
    return (int(w), int(h)) if w is not None and h is not None and w >= 1 and h >= 1 else None


class NotText(ValueError):
    """A file that is not text in UTF-8, nor in UTF-16 with a byte order mark."""


def read_text(path: Path) -> str:
    """Read text in UTF-8, or in UTF-16 if it starts with a byte order mark, with line ends as they are.

    Raises NotText: it is in another encoding.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotText(str(error)) from error
    if "\0" in text:
        raise NotText("it has zero bytes")
    return text


def child(folder: Path, *names: str) -> Path | None:
    """Returns the first of these files or folders that exists, ignoring case."""
    there = {name.lower(): name for name in reversed(listing(folder))}
    found = next((there[name.lower()] for name in names if name.lower() in there), None)
    return None if found is None else folder / found


def files_of(folder: Path | None, *suffixes: str) -> list[Path]:
    """Returns the files of a folder with one of these suffixes, sorted by name."""
    if folder is None:
        return []
    found = [folder / name for name in listing(folder) if name.lower().endswith(suffixes)]
    return [path for path in found if os.path.isfile(path)]


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder below with its files, sorted; follows links to folders, skips hidden names."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # a cycle of links
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(root), sorted(name for name in files if not name.startswith("."))


def split_folders(root: Path) -> list[tuple[Path, str]]:
    """Returns the folders that are named like a split, with the split."""
    found = [(root / name, SPLITS[name.lower()]) for name in listing(root) if name.lower() in SPLITS]
    return [(path, split) for path, split in found if os.path.isdir(path)]


def with_rest(parts: list[Part], rest: Part | None) -> list[Part]:
    """Returns the parts of splits and, unless one of them is for training, the one without a split before them.

    Its images are for training, then, unless a list or a column of its own says otherwise.
    """
    return parts if rest is None or any(part.split == "train" for part in parts) else [rest, *parts]


def split_in(name: str) -> str:
    """Returns the split in a file name such as instances_train2017.json; "" for none."""
    words = re.findall(r"[a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def image_folder(home: Path) -> Path:
    """Returns the folder of images in a data set: a subfolder with an accepted name, else the folder itself."""
    found = child(home, *IMAGE_FOLDERS)
    return found if found is not None and os.path.isdir(found) else home


def without_suffix(name: str) -> str:
    """Remove an image suffix from a file name; other dots belong to the name."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGES else name
