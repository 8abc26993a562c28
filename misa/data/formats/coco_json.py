"""COCO JSON as annotation tools write it.

Roboflow      train/_annotations.coco.json beside its images; valid/, test/
CVAT          annotations/instances_default.json, images/default/
Label Studio  result.json, images/
FiftyOne      labels.json, data/
one json      any name, beside its images or a folder of them; or the json itself
"""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from misa.data.formats.coco import DataError
from misa.data.formats.coco_file import TABLES, CocoFile
from misa.data.formats.parts import (
    SPLITS,
    Boxed,
    Entry,
    Format,
    Part,
    ReportFault,
    child,
    files_of,
    image_folder,
    split_folders,
    split_in,
    with_rest,
)

_OTHERS = ("captions", "person_keypoints", "stuff", "panoptic", "image_info")  # published beside the instances

_PLAIN = {"instances", "annotations", "annotation", "labels", "label", "boxes", "bbox", "objects", "coco", "json", "gt"}
_KEYS = re.compile(rb'"(images|annotations|categories|image_id|file_name)"\s*:')
_SHAPES = re.compile(rb'"shapes"\s*:')  # LabelMe's key; a category may have this name


def find(root: Path) -> list[Part]:
    """Find COCO JSON files by split, with the folder of their images."""
    if root.is_file():
        return [Part((root,), _images(root.parent, root), "", root.parent)] if _is_coco(root) else []
    found: list[Part] = []
    for folder, split in split_folders(root):
        if path := _only(_jsons(folder), folder):
            found.append(Part((path,), image_folder(folder), split, folder))
    if found:
        rest = _jsons(root)
        return with_rest(found, Part((rest[0],), _images(root, rest[0]), "", root) if len(rest) == 1 else None)
    for place in (child(root, "annotations"), root, child(root, "labels")):
        files = [] if place is None else _jsons(place)
        by_split: dict[str, list[Path]] = {}
        for path in files:
            by_split.setdefault(split_in(path.stem) if len(files) > 1 else _split_of_one(path), []).append(path)
        named = {split: paths for split, paths in by_split.items() if split} or by_split
        if "train" not in named and "" in by_split:
            named[""] = by_split[""]
        if files and place is not None:
            chosen = [(split, _only(paths, place)) for split, paths in named.items()]
            return [Part((path,), _images(root, path), split, root) for split, path in chosen if path is not None]
    return []


def left(root: Path, read: Collection[Path]) -> list[Path]:
    """Returns the COCO files in the places that `find` knows, but for those that are read."""
    places = [root, child(root, "annotations"), child(root, "labels"), *(folder for folder, _ in split_folders(root))]
    return [path for place in places if place is not None for path in _jsons(place) if path not in read]


def _split_of_one(path: Path) -> str:
    """Returns the split of a lone file: my_test_labels.json need not be of the test split, test_labels.json is."""
    words = set(re.findall("[a-z]+", path.stem.lower())) - SPLITS.keys()
    return split_in(path.stem) if words <= _PLAIN else ""


def _jsons(folder: Path) -> list[Path]:
    files = [path for path in files_of(folder, ".json") if _is_coco(path)]
    return [path for path in files if not path.name.startswith(_OTHERS)] or files


def _only(files: list[Path], folder: Path) -> Path | None:
    """Returns the file of instances; DataError if it is ambiguous."""
    named = [path for path in files if path.name.startswith("instances")]
    if len(files) > 1 and len(named) != 1:
        names = ", ".join(path.name for path in files[:8])
        raise DataError(f"{folder} holds several COCO files ({names}); give one of them, or move the others away.")
    return named[0] if named else files[0] if files else None


def _is_coco(path: Path) -> bool:
    """Whether a JSON file begins or ends with COCO's tables."""
    if path.suffix.lower() != ".json":
        return False
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
            file.seek(max(file.seek(0, 2) - (1 << 16), 0))
            ends = (head + file.read()).replace(b"\0", b"")  # UTF-16 as well
    except OSError:
        return False
    keys = set(_KEYS.findall(ends))
    return len(keys) >= 2 and not _SHAPES.search(ends)


def images_of(path: Path) -> Path:
    """Returns the folder of images of a json given alone: as in a data set, or its own where the names say so."""
    folder = _images(path.parent, path)
    try:
        rows = [] if folder == path.parent else CocoFile(path, keep=("file_name",)).images
    except DataError:  # reported by the check
        rows = []
    names = [str(row.get("file_name")) for row in rows if isinstance(row, dict)]
    own = any(not os.path.isfile(folder / name) and os.path.isfile(path.parent / name) for name in names)
    return path.parent if own else folder


def _images(root: Path, path: Path) -> Path:
    """Returns the folder of images of an annotation file: named like its subset or split, or images or data."""
    subset = path.stem.removeprefix("instances_")
    names = dict.fromkeys(name for name in (subset, split_in(path.stem)) if name)
    inner = image_folder(root)
    for folder in (inner, root):
        for name in names:
            if (found := child(folder, name, f"{name}2017")) is not None and os.path.isdir(found):
                return found
    return inner


def entries(part: Part, report: ReportFault) -> Iterator[Entry]:
    """Yield an entry per image with its objects, crowds marked as hard; DataError if a row is not COCO's."""
    (path,) = part.files
    file = CocoFile(path)
    if missing := [key for key in TABLES if not file.has(key)]:
        raise DataError(f"{path} is not a COCO json with boxes: it has no list {missing[0]!r}; `misa check` says more.")
    try:
        names = {row["id"]: str(row["name"]) for row in file.categories}
        objects: dict[Any, list[Boxed]] = {row["id"]: [] for row in file.images}

        def add(row: Any) -> None:
            x, y, w, h = (float(side) for side in row["bbox"])
            where = f"{path}, annotation {row.get('id')}"
            mask = row.get("segmentation") or None
            if (hard := row["iscrowd"]) not in (0, 1):
                raise ValueError(f"iscrowd of {where} is {hard!r}, not 0 or 1")
            objects[row["image_id"]].append(Boxed(names[row["category_id"]], (x, y, w, h), where, bool(hard), mask))

        file.each_annotation(add, areas=False)
        for row in file.images:
            size = (row["width"], row["height"]) if "width" in row and "height" in row else None
            yield Entry(str(row["file_name"]), size, objects[row["id"]], str(path), part.split)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(
            f"{path} is not a COCO json with boxes ({error!r}); `misa check` says what is wrong."
        ) from error


COCO = Format(
    find, entries, "annotations/instances_train2017.json, train2017/1.jpg; a json beside its images", left=left
)
