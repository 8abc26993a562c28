"""Finds the annotation files and image folders of a data set in COCO layout, before any long work.

    root/annotations/instances_train2017.json    root/train2017/ or root/images/train2017/
    root/annotations/instances_val2017.json      root/val2017/   or root/images/val2017/

Files of other names are renamed or linked to these; from Python `find_layout` takes them too. Standard library only.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from misa.errors import UserError, did_you_mean

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
    """A data set as it lies on disk; every path exists, of `train` only where it was needed.

    test: where one is named; nothing is trained or scored on it.
    """

    root: Path
    train: Split
    val: Split
    test: Split | None = None


def find_layout(
    root: PathLike,
    *,
    train_annotations: PathLike | None = None,
    val_annotations: PathLike | None = None,
    train_images: PathLike | None = None,
    val_images: PathLike | None = None,
    need_train: bool = True,
) -> Layout:
    """The files of a COCO-layout data set; paths that are given are absolute or relative to root.

    Raises DataError naming what is missing, what is there instead, and the cure. Without `need_train` the training
    split may be absent: its paths are then the usual ones.
    """
    root = Path(root).expanduser()
    _require_root(root)
    try:
        train = _split(root, "train", train_annotations, train_images)
    except DataError:
        if need_train:
            raise
        train = Split(root / "annotations" / "instances_train2017.json", root / "train2017")
    val = _split(root, "val", val_annotations, val_images)
    test = Split(root / "annotations" / "instances_test2017.json", root / "test2017")
    return Layout(root, train, val, test if test.annotations.is_file() and test.images.is_dir() else None)


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
    if given is None and (inner := _root_nearby(root, split)) is not None:
        raise DataError(f"data_root {root} is not the data set's own folder; did you mean {str(inner)!r}?")
    folder = path.parent
    if not folder.is_dir():
        raise DataError(
            f"the {split} annotation file {path} is missing: there is no folder {folder}, and {root} holds "
            f"{_listing(root)}; give the folder that holds annotations/, or a csv or Pascal VOC xml files of boxes."
        )
    hint = _rename(path.name, _names(folder), split, "; rename or link the right one to this name.")
    raise DataError(f"the {split} annotation file {path} is missing: {folder} holds {_listing(folder)}{hint}")


def _images(root: Path, split: str, given: PathLike | None) -> Path:
    name = f"{split}2017"
    candidates = [root / Path(given).expanduser()] if given is not None else [root / name, root / "images" / name]
    for path in candidates:
        if path.is_dir():
            return path
    path = candidates[0]
    around = path.parent if path.parent.is_dir() else root
    hint = _rename(path.name, _names(around), split, "; put the images there, or rename or link their folder to it.")
    raise DataError(f"the {split} image folder {path} is missing: {around} holds {_listing(around)}{hint}")


def _rename(wanted: str, names: list[str], split: str, otherwise: str) -> str:
    """The cure for a file or folder that is not there: the name that comes close, but not the other split's."""
    other = "train2017" if split == "val" else "val2017"
    hint = did_you_mean(wanted, (name for name in names if other not in name))
    return f"{hint} Rename or link it to this name." if hint else otherwise


def _root_nearby(root: Path, split: str) -> Path | None:
    """The folder that was probably meant, one level up or down."""

    def fits(folder: Path) -> bool:
        return (folder / "annotations" / f"instances_{split}2017.json").is_file()

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
