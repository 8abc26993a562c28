"""Finds the annotation files and image folders of a data set in COCO layout, before any long work.

    root/annotations/instances_train2017.json    root/train2017/ or root/images/train2017/
    root/annotations/instances_val2017.json      root/val2017/   or root/images/val2017/

Other names are given explicitly, see `find_layout`. Standard library only.
"""

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from misa.errors import UserError

__all__ = ["DataError", "Layout", "Split", "did_you_mean", "find_layout"]

PathLike = str | os.PathLike[str]


class DataError(UserError):
    """Data that cannot be used: one sentence that names the thing, where it is, and the cure."""


class Split(NamedTuple):
    """One annotation file and the folder of its images."""

    annotations: Path
    images: Path


@dataclass(frozen=True)
class Layout:
    """A data set as it lies on disk; every path exists."""

    root: Path
    train: Split
    val: Split


def find_layout(
    root: PathLike,
    *,
    train_annotations: PathLike | None = None,
    val_annotations: PathLike | None = None,
    train_images: PathLike | None = None,
    val_images: PathLike | None = None,
) -> Layout:
    """The files of a COCO-layout data set; paths that are given are absolute or relative to root.

    Raises DataError naming what is missing, what is there instead, and the cure.
    """
    root = Path(root).expanduser()
    _require_root(root)
    train = _split(root, "train", train_annotations, train_images)
    val = _split(root, "val", val_annotations, val_images)
    return Layout(root, train, val)


def did_you_mean(wanted: str, found: Iterable[str], *, before: str = "") -> str:
    """A hint such as "; did you mean 'train2017'?", or nothing when no name comes close."""
    # Compared without case: 'Train2017' is the usual slip, and difflib counts it as a different letter.
    names = {name.lower(): name for name in found}
    close = difflib.get_close_matches(wanted.lower(), names, n=1, cutoff=0.6)
    return f"; did you mean {before}{names[close[0]]!r}?" if close else ""


def _require_root(root: Path) -> None:
    # os.path and not Path: a folder that may not be looked into counts as absent instead of raising.
    if os.path.isdir(root):
        return
    if os.path.exists(root):
        raise DataError(f"data_root {root} is a file; give the folder that holds annotations/ and the image folders.")
    parent = next(p for p in root.absolute().parents if os.path.isdir(p))
    # The first part of the path that is missing is the one to compare with what is there.
    missing = root.absolute().relative_to(parent).parts[0]
    hint = did_you_mean(missing, _names(parent)) or "; give the folder that holds annotations/ and the image folders."
    raise DataError(f"data_root {root} does not exist: {parent} holds {_listing(parent)}{hint}")


def _split(root: Path, split: str, annotations: PathLike | None, images: PathLike | None) -> Split:
    return Split(_annotations(root, split, annotations), _images(root, split, images))


def _annotations(root: Path, split: str, given: PathLike | None) -> Path:
    path = root / (Path(given).expanduser() if given is not None else f"annotations/instances_{split}2017.json")
    if path.is_file():
        return path
    if given is None and (inner := _root_nearby(root)) is not None:
        raise DataError(f"data_root {root} is not the data set's own folder; did you mean {str(inner)!r}?")
    folder = path.parent
    if not folder.is_dir():
        raise DataError(
            f"the {split} annotation file {path} is missing: there is no folder {folder}, and {root} holds "
            f"{_listing(root)}; give the folder that holds annotations/ or name the file with {split}_annotations."
        )
    hint = did_you_mean(path.name, _names(folder)) or "; put the file there or name it with " + f"{split}_annotations."
    raise DataError(f"the {split} annotation file {path} is missing: {folder} holds {_listing(folder)}{hint}")


def _images(root: Path, split: str, given: PathLike | None) -> Path:
    name = f"{split}2017"
    candidates = [root / Path(given).expanduser()] if given is not None else [root / name, root / "images" / name]
    for path in candidates:
        if path.is_dir():
            return path
    path = candidates[0]
    around = path.parent if path.parent.is_dir() else root
    hint = did_you_mean(path.name, _names(around)) or f"; put the images there or name the folder with {split}_images."
    raise DataError(f"the {split} image folder {path} is missing: {around} holds {_listing(around)}{hint}")


def _root_nearby(root: Path) -> Path | None:
    """The folder that was probably meant, one level up or down."""

    def fits(folder: Path) -> bool:
        return (folder / "annotations" / "instances_train2017.json").is_file()

    if fits(root):
        return None
    inside = [root / name for name in _names(root) if fits(root / name)]
    return inside[0] if inside else root.parent if fits(root.parent) else None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


def _listing(folder: Path, most: int = 8) -> str:
    names = _names(folder)
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
