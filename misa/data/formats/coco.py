"""Find the annotation files and image folders of a data set in COCO layout.

    root/annotations/instances_train2017.json    root/train2017/ or root/images/train2017/
    root/annotations/instances_val2017.json      root/val2017/   or root/images/val2017/

Files of other names are found by `misa.data.formats.coco_json`. Standard library only.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from misa.data.formats.parts import IMAGES, walk
from misa.errors import UserError, counted, did_you_mean
from misa.files import listing, missing

__all__ = ["DataError", "Layout", "Split", "did_you_mean", "find_layout", "require_there"]

_DRAWN = re.compile(r"demo-[0-9a-f]{8}")  # folders of embedded data, never suggested for a misspelled path
EVERY_FORMAT = "docs/data.md shows every format"
_GIVE = f"give the folder or file of your annotations ({EVERY_FORMAT})"
# What the readers still need beside files of a suffix that none of them could use.
_NEEDED = {
    ".json": (
        "a json must be COCO's (images, annotations, categories) or LabelMe's (shapes), beside the images or in "
        "annotations/"
    ),
    ".xml": "Pascal VOC's xml files must lie beside the images or in Annotations/",
    ".csv": "a csv of boxes must lie beside the images",
    ".txt": "YOLO needs a data.yaml with the class names and the folders of train and val",
}
_BOXES = "add the boxes, such as a csv beside the images with a line for each: image,xmin,ymin,xmax,ymax,label"
_MOST_FOLDERS = 1000  # whose files are counted to describe a folder
PathLike = str | os.PathLike[str]


class DataError(UserError):
    """Unusable data; the message is one sentence with the problem, its place and what to do."""


class Split(NamedTuple):
    """One annotation file and the folder of its images."""

    annotations: Path
    images: Path

    def label_map(self, file_name: str) -> Path:
        """Where the ground-truth label map of an image is, if there is one: VOC's PNG of the same name."""
        return self.annotations.parent.parent / "SegmentationClass" / Path(file_name).with_suffix(".png").name


@dataclass(frozen=True)
class Layout:
    """The paths of a data set on disk; all exist, except that `train` may be missing if it was not needed.

    test: the test split, if there is one; it is not used for training or evaluation.
    overlap: a warning about images that are both for training and for validation, or "".
    """

    root: Path
    train: Split
    val: Split
    test: Split | None = None
    overlap: str = ""


def find_layout(root: PathLike, *, need_train: bool = True) -> Layout:
    """Find the files of a COCO-layout data set.

    Raises DataError that names what is missing, what was found instead, and what to do. Without `need_train` the
    training split may be missing: its paths are then the default ones.
    """
    root = Path(root).expanduser()
    require_there(root)
    if not root.is_dir():
        raise DataError(f"{root} is a file, but not of annotations that can be read; {_GIVE}.")
    try:
        train = _split(root, "train")
    except DataError:
        if need_train:
            raise
        train = Split(root / "annotations" / "instances_train2017.json", root / "train2017")
    val = _split(root, "val")
    test = Split(root / "annotations" / "instances_test2017.json", root / "test2017")
    return Layout(root, train, val, test if test.annotations.is_file() and test.images.is_dir() else None)


def require_there(root: Path) -> None:
    """Raise DataError if `root` is neither a folder nor a file."""
    if not os.path.exists(root):
        raise DataError(missing(root, "folder" if not root.suffix else "file or folder", _GIVE))


def _split(root: Path, split: str) -> Split:
    return Split(_annotations(root, split), _images(root, split))


def _annotations(root: Path, split: str) -> Path:
    path = root / f"annotations/instances_{split}2017.json"
    if path.is_file():
        return path
    if (inner := _root_nearby(root, split)) is not None:
        raise DataError(f"{root} is not the data set's own folder; did you mean {str(inner)!r}?")
    folder = path.parent
    if not folder.is_dir():
        raise DataError(_without_annotations(root))
    hint = _rename(path.name, listing(folder), split, "; rename or link the right one to this name.")
    raise DataError(f"the {split} annotation file {path} is missing: {folder} holds {_listing(folder)}{hint}")


def _without_annotations(root: Path) -> str:
    """Returns the message for a folder in no known format: what it holds, and what the closest format needs."""
    folders = list(islice(walk(root), _MOST_FOLDERS + 1))
    if len(folders) > _MOST_FOLDERS:
        return f"{root} holds more than {_MOST_FOLDERS} folders and no annotations where a format has them; {_GIVE}."
    own = [names for folder, names in folders if not any(map(_DRAWN.fullmatch, folder.relative_to(root).parts))]
    counts = Counter(Path(name).suffix.lower() for names in own for name in names)
    kinds = [counted(count, f"{suffix[1:]} file") for suffix, count in counts.most_common() if suffix]
    if not kinds:
        return f"{root} holds {'nothing' if len(own) == len(folders) else 'drawn scenes alone'}; {_GIVE}."
    images = sum(counts[suffix] for suffix in IMAGES)
    if 2 * counts[".txt"] < images:  # a few texts beside the images are not labels
        del counts[".txt"]
    needed = next((text for suffix, text in _NEEDED.items() if counts[suffix]), _BOXES if images else "")
    holds = ", ".join(kinds[:3]) + (" and others" if kinds[3:] else "")
    return f"{root} holds {holds} and no annotations; {f'{needed} ({EVERY_FORMAT})' if needed else _GIVE}."


def _images(root: Path, split: str) -> Path:
    name = f"{split}2017"
    for path in (root / name, root / "images" / name):
        if path.is_dir():
            return path
    hint = _rename(name, listing(root), split, "; put the images there, or rename or link their folder to it.")
    raise DataError(f"the {split} image folder {root / name} is missing: {root} holds {_listing(root)}{hint}")


def _rename(wanted: str, names: list[str], split: str, otherwise: str) -> str:
    """Returns advice for a missing file or folder: a similar name, but not one of the other split."""
    other = "train2017" if split == "val" else "val2017"
    hint = did_you_mean(wanted, (name for name in names if other not in name))
    return f"{hint} Rename or link it to this name." if hint else otherwise


def _root_nearby(root: Path, split: str) -> Path | None:
    """Returns the folder that was probably meant, one level up or down."""

    def fits(folder: Path) -> bool:
        return (folder / "annotations" / f"instances_{split}2017.json").is_file()

    if fits(root):
        return None
    inside = [root / name for name in listing(root) if not _DRAWN.fullmatch(name) and fits(root / name)]
    return inside[0] if inside else root.parent if fits(root.parent) else None


def _listing(folder: Path) -> str:
    names = list(dict.fromkeys("drawn scenes" if _DRAWN.fullmatch(name) else name for name in listing(folder)))
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
