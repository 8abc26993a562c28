"""Checks a COCO annotation file and its images before any long work, and says what is wrong, where, and the cure.

Fatal problems stop a training; warnings tell what is changed silently otherwise. Masks are not looked at for
training from boxes: a missing or senseless `segmentation` is no problem there.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from misa.data.check.image_files import Listed, Twins, check_files
from misa.data.check.masks import broken_runs, mask_fault
from misa.data.check.report import _KEPT, Report, Sample, _Notes
from misa.data.formats.coco import DataError, PathLike
from misa.data.formats.json_rows import read_object
from misa.errors import did_you_mean, number, whole

__all__ = ["Purpose", "Twins", "check_coco", "has_masks", "require_usable"]

Purpose = Literal["train", "mask", "eval", "boxes"]
# What a purpose needs of an object besides its box, and the reason.
_NEEDED: dict[str, tuple[str, ...]] = {
    "train": (),
    "mask": ("segmentation", "area"),
    "eval": ("segmentation", "area", "iscrowd"),
    "boxes": (),
}
_WHY = {"mask": "this row learns from masks", "eval": "scoring compares with true masks"}
_CURE = {
    "mask": "give every training object one, or train a row that learns from boxes",
    "eval": "only the val split needs masks, give every object there one",
}
# COCO's own train2017 has 2 boxes without height among 860k. A share below this is left out with a warning.
_FEW = 1e-4
# COCO's boxes are rounded and leave the image by fractions of a pixel: nothing to speak of.
_SLACK = 1.0


def check_coco(
    annotation_file: PathLike,
    image_dir: PathLike,
    *,
    classes: Sequence[str] | None = None,
    verify_images: Literal["exists", "open"] = "exists",
    purpose: Purpose = "train",
    long_side: int | None = None,
    samples: int = 0,
    twins: Twins | None = None,
    alone: bool = True,
) -> Report:
    """Reads the whole annotation file and looks at the images; never raises for what they hold.

    Annotations are read row by row, twice: what is held in memory are the ids, names and sizes of the images and the
    ids of the annotations.

    classes: the names that must be there (others are left out with a warning); None takes all.
    verify_images: "exists" lists the folder; "open" also reads the start and end of each file (8 threads).
    purpose: "train" looks at boxes only; "mask" also at the masks to learn from (segmentation and area), "eval" at
        those that pycocotools scores with (and iscrowd); "boxes" is scoring without masks.
    long_side: the cap of the resized long side in pixels; images too thin to be shrunk so far are fatal.
    samples: how many images to keep with their boxes in the report.
    twins: gathers the images by content, so that equal ones are told; give it to the check of each split.
    alone: no other split has its images in that folder; False leaves out the note on images that are not listed.

    Boxes that reach beyond the image are clipped with a warning; boxes without area or wholly outside are fatal,
    except that flat boxes rarer than 1 in 10,000 (COCO itself has two) are left out with a warning.
    """
    if verify_images not in ("exists", "open"):
        raise ValueError(f"verify_images must be 'exists' or 'open'; got {verify_images!r}.")
    if purpose not in _NEEDED:
        raise ValueError(f"purpose must be 'train', 'mask', 'eval' or 'boxes'; got {purpose!r}.")
    path, folder = Path(annotation_file), Path(image_dir)
    notes = _Notes(path)
    content = _read(path, notes)
    images, names = content.images, content.names
    wanted = _match(names, classes, notes) if "categories" in content.tables else tuple(classes or ())
    found = _Objects(dict.fromkeys(wanted, 0))
    if content.tables >= {"images", "annotations", "categories"}:
        shown = _chosen(images, samples)
        _annotations(_rows(path, "annotations"), images, names, purpose, found, shown, notes)
        if not sum(found.per_class.values()) and not any(problem.fatal for problem in notes.problems):
            aim = "to learn from" if purpose in ("train", "mask") else "to score on"
            notes.add("no-objects", "", f"it has no object {aim}", "add annotations, or choose another file")
    if long_side is not None:
        _thin(images, long_side, notes)
    if not os.access(folder, os.R_OK | os.X_OK) or not folder.is_dir():
        message = f"its image folder {folder} does not exist or cannot be read"
        notes.add("image-folder", "", message, "give the folder of the images")
    else:
        listed = [image for image in images.values() if image is not None]
        for fault in check_files(listed, folder, read=verify_images == "open", twins=twins, alone=alone):
            place = fault.image.where or f"image {fault.image.id}"
            weight = {"fatal": fault.weight == "error", "note": fault.weight == "note"}
            notes.add(fault.kind, place, fault.message, fault.cure, **weight)
    empty = images.keys() - found.busy
    for image in (images[key] for key in sorted(empty)[:_KEPT]):
        if image is not None:
            place = image.where or f"image {image.id}"
            message, cure = f"{image.file_name} has no object", "nothing to do, if that is so"
            notes.add("image-empty", place, message, cure, note=True)
    if notes.totals["image-empty"]:
        notes.totals["image-empty"] = len(empty)
    return Report(
        annotation_file=notes.file,
        image_dir=folder,
        images=len(images),
        objects=sum(found.per_class.values()),
        crowds=found.crowds,
        empty_images=len(empty),
        classes=wanted,
        per_class=found.per_class,
        problems=tuple(sorted((p for p in notes.problems if not p.note), key=lambda problem: not problem.fatal)),
        totals=dict(notes.totals),
        notes=tuple(p for p in notes.problems if p.note),
        samples=tuple(
            Sample(folder / image.file_name, *found.shown[key])
            for key in sorted(found.shown)
            if (image := images[key]) is not None
        ),
    )


def has_masks(annotation_file: PathLike) -> bool:
    """Whether any object has a `segmentation`; also where the file cannot be read, which a check will tell.

    An empty one, as tools for boxes write it, is none.
    """
    try:
        rows = _rows(Path(annotation_file), "annotations")
        return any(isinstance(row, dict) and row.get("segmentation") not in (None, []) for row in rows)
    except (OSError, ValueError, RecursionError):
        return True


def require_usable(
    annotation_file: PathLike,
    image_dir: PathLike,
    *,
    classes: Sequence[str] | None = None,
    verify_images: Literal["exists", "open"] = "open",
    purpose: Purpose = "train",
    long_side: int | None = None,
) -> Report:
    """The report of `check_coco`, or DataError with the first fatal problem and the number of the others."""
    report = check_coco(
        annotation_file,
        image_dir,
        classes=classes,
        verify_images=verify_images,
        purpose=purpose,
        long_side=long_side,
    )
    if report.usable:
        return report
    more = sum(report.totals[kind] for kind in {problem.kind for problem in report.fatal}) - 1
    first = report.fatal[0].sentence
    raise DataError(f"{first[:-1]} ({more} more; `misa check` lists them){first[-1]}" if more else first)


@dataclass
class _Content:
    """What the first reading leaves: which tables are there, the images and class names by id."""

    tables: set[str] = field(default_factory=set)
    images: dict[int, Listed | None] = field(default_factory=dict)  # None: known but not usable
    names: dict[int, str] = field(default_factory=dict)


@dataclass
class _Objects:
    """What the second reading counts."""

    per_class: dict[str, int]
    crowds: int = 0
    busy: set[int] = field(default_factory=set)
    shown: dict[int, tuple[list[list[float]], list[str]]] = field(default_factory=dict)


def _read(path: Path, notes: _Notes) -> _Content:
    """The file's tables, as far as they are there, without the annotations."""
    found = _Content()
    others: list[str] = []
    files: dict[str, int] = {}
    counts: Counter[str] = Counter()
    before = len(notes.problems)
    try:
        for kind, key, value in read_object(path):
            if kind == "value" and not key:
                notes.add("not-coco", "", f"it holds {_kind(value)}, not an object", "give a COCO annotation file")
                return found
            if kind == "list":
                if key in found.tables:
                    notes.add("duplicate-key", "", f"it has '{key}' more than once", "put all in one list")
                found.tables.add(key)
            elif kind == "row" and key == "images":
                _image(value, counts[key], found.images, files, notes)
            elif kind == "row" and key == "categories":
                _category(value, counts[key], found.names, notes)
            elif kind == "row" and key == "faults" and notes.converted:
                notes.add(*(str(part) for part in value))
            elif key == "converted_from":
                notes.converted, notes.file = True, Path(str(value))
            elif kind == "value" and key in ("images", "annotations", "categories"):
                others.append(key)
                notes.add("not-coco", "", f"'{key}' is {_kind(value)}, not a list", "give a COCO annotation file")
            if kind != "row":
                others.append(key)
            counts[key] += kind == "row"
    except OSError as error:
        notes.add("unreadable", "", f"it cannot be read ({error.strerror})", "give an annotation file that is there")
        return _Content()
    except (ValueError, RecursionError) as error:  # also no unicode, a number of thousands of digits, endless nesting
        del notes.problems[before:]
        notes.totals.clear()
        _not_json(error, notes)
        return _Content()
    for key in ("images", "annotations", "categories"):
        if key not in others:
            hint = did_you_mean(key, (name for name in others if name not in ("info", "licenses")))
            there = ", ".join(others[:8]) or "nothing"
            notes.add("missing-key", "", f"it has no '{key}' but {there}{hint.rstrip('?')}", "add the key")
    if "images" in found.tables and not counts["images"]:
        notes.add("no-images", "", "it lists no images", "choose another file, this data set is empty")
    if "categories" in found.tables and not counts["categories"]:
        notes.add("no-classes", "", "it lists no categories", "add the classes as [{'id': 1, 'name': ...}, ...]")
    return found


def _not_json(error: Exception, notes: _Notes) -> None:
    if not isinstance(error, json.JSONDecodeError):
        notes.add("not-json", "", f"it is not json ({error})", "give a COCO annotation file")
        return
    place = f"line {error.lineno}, column {error.colno}"
    ended = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
    message = "the file ends too early" if ended else f"it is not json ({error.msg})"
    notes.add("not-json", place, message, "copy or download it again" if ended else "correct it there")


def _rows(path: Path, key: str) -> Iterator[Any]:
    """The rows of a list in a file that has been read before."""
    return (event.value for event in read_object(path) if event.kind == "row" and event.key == key)


def _chosen(images: dict[int, Listed | None], count: int) -> list[int]:
    """Some images to look at, the same each time."""
    usable = [key for key, image in images.items() if image is not None]
    return random.Random(0).sample(usable, min(count, len(usable)))


def _image(row: Any, index: int, images: dict[int, Listed | None], files: dict[str, int], notes: _Notes) -> None:
    key = _key(row, "image", index, notes)
    if key is None:
        return
    place = notes.place(row, f"image {key}")
    if key in images:
        notes.add("duplicate-id", place, "this id is used more than once", "number the images apart")
        return
    images[key] = None
    missing = [name for name in ("file_name", "width", "height") if name not in row]
    if missing:
        notes.add("missing-key", place, f"it has no '{missing[0]}'", "add the key")
    elif not isinstance(row["file_name"], str) or not row["file_name"]:
        notes.add("bad-value", place, f"file_name is {_kind(row['file_name'])}", "give the name of the image file")
    elif not (_size(row["width"]) and _size(row["height"])):
        size = f"{_short(row['width'])} x {_short(row['height'])}"
        notes.add("bad-value", place, f"its size is {size}", "give width and height as whole numbers above 0")
    else:
        name = row["file_name"]
        where = place if notes.converted else ""
        images[key] = Listed(key, name, int(row["width"]), int(row["height"]), where)
        if name in files:
            message = f"{name} is listed before, as image {files[name]}"
            notes.add("duplicate-file", place, message, "list every file once, with all its objects", fatal=False)
        files.setdefault(name, key)


def _thin(images: dict[int, Listed | None], long_side: int, notes: _Notes) -> None:
    """The images that have no pixel left across when their long side is shrunk to the cap; OpenCV fails on them."""
    for image in filter(None, images.values()):
        short, long = sorted((image.width, image.height))
        if short * long_side < long:
            size = f"{image.width} x {image.height} pixels"
            message = f"its {size} are less than one across when the long side is shrunk to {long_side}"
            notes.add("image-thin", f"image {image.id}", message, "cut it into parts, or take it out of the list")


def _category(row: Any, index: int, names: dict[int, str], notes: _Notes) -> None:
    key = _key(row, "category", index, notes)
    if key is None:
        return
    place, name = f"category {key}", row.get("name")
    if key in names:
        notes.add("duplicate-id", place, "this id is used more than once", "number the categories apart")
    elif not isinstance(name, str) or not name:
        notes.add("missing-key", place, "it has no 'name'", "add the key")
    elif name in names.values():
        notes.add("duplicate-name", place, f"the name {name!r} is used more than once", "name each class once")
    else:
        alike = [other for other in names.values() if "".join(other.split()).lower() == "".join(name.split()).lower()]
        if alike:
            message = f"the class {name!r} differs from {alike[0]!r} in case or spaces only"
            notes.add("class-names-alike", place, message, "give both one name, if they are one class", fatal=False)
        names[key] = name


def _match(names: dict[int, str], classes: Sequence[str] | None, notes: _Notes) -> tuple[str, ...]:
    """The wanted classes, in the wanted order."""
    found = tuple(names.values())
    if classes is None:
        return found
    for name in classes:
        if name not in found:
            hint = did_you_mean(name, found)[2:] or "give the class names of this file"
            listing = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
            notes.add("class-names", "", f"class {name!r} is expected, but found are {listing or 'none'}", hint)
    if extra := [name for name in found if name not in classes]:
        listing = ", ".join(extra[:8]) + (f" and {len(extra) - 8} more" if len(extra) > 8 else "")
        notes.add(
            "class-names-left-out", "", f"objects of {listing} are left out", "ask for these classes", fatal=False
        )
    return tuple(classes)


def _annotations(
    rows: Iterator[Any],
    images: dict[int, Listed | None],
    names: dict[int, str],
    purpose: str,
    found: _Objects,
    shown: list[int],
    notes: _Notes,
) -> None:
    """Count the crowds, the objects by class, the images with objects; keep the boxes of those to be shown."""
    seen: set[int] = set()
    boxes: set[int] = set()
    flat: list[tuple[str, str]] = []
    masks: list[tuple[str, str, int]] = []
    index, per_class = -1, found.per_class
    found.shown = {key: ([], []) for key in shown}
    for index, row in enumerate(rows):
        key = _key(row, "annotation", index, notes)
        if key is None:
            continue
        place = notes.place(row, f"annotation {key}")
        if key in seen:
            notes.add("duplicate-id", place, "this id is used more than once", "number the annotations apart")
            continue
        seen.add(key)
        if missing := [name for name in ("image_id", "category_id", "bbox") if name not in row]:
            notes.add("missing-key", place, f"it has no '{missing[0]}'", "add the key")
            continue
        image, category = row["image_id"], row["category_id"]
        if not whole(image) or image not in images:
            notes.add(
                "unknown-image", place, f"image_id {_short(image)} is not in 'images'", "add the image, or remove it"
            )
            continue
        if not whole(category) or category not in names:
            message = f"category_id {_short(category)} is not in 'categories'"
            notes.add("unknown-category", place, message, "add the category, or remove it")
            continue
        crowd = row.get("iscrowd", 0)
        if not isinstance(crowd, int) or crowd not in (0, 1):
            notes.add("bad-value", place, f"iscrowd is {_short(crowd)}", "give 0 or 1")
            continue
        if names[category] in per_class and not _mask(row, images[image], place, purpose, masks, notes):
            continue
        at = place if notes.converted else f"{place} on image {image}"
        if not _box(row["bbox"], images[image], at, flat, notes):
            continue
        if crowd:
            found.crowds += 1
        elif names[category] in per_class:
            per_class[names[category]] += 1
            found.busy.add(image)
            same = hash((image, category, *row["bbox"]))
            if same in boxes:
                message = f"another {names[category]} of this image has the same box"
                notes.add("duplicate-box", at, message, "remove one of them", fatal=False)
            boxes.add(same)
            if image in found.shown:
                x, y, w, h = row["bbox"]
                found.shown[image][0].append([x, y, x + w, y + h])
                found.shown[image][1].append(names[category])
    broken = broken_runs([counts for _, counts, _ in masks], [pixels for _, _, pixels in masks])
    for (place, _, _), bad in zip(masks, broken, strict=True):
        if bad:
            notes.add("bad-mask", place, "segmentation has counts that cannot be decoded", "draw or encode it again")
    few = len(flat) <= _FEW * (index + 1)
    for place, message in flat:
        cure = "it is left out" if few else "give it a width and height above 0, or remove it"
        notes.add("box-size", place, message, cure, fatal=not few)


def _mask(
    row: dict[str, Any],
    image: Listed | None,
    place: str,
    purpose: str,
    masks: list[tuple[str, str, int]],
    notes: _Notes,
) -> bool:
    """Whether an object's mask serves the purpose; run lengths as text go to `masks`, to be decoded together."""
    if missing := [name for name in _NEEDED[purpose] if name not in row]:
        message, cure = f"it has no '{missing[0]}'", "add the key"
        if missing[0] == "segmentation":
            message, cure = f"{message}, and {_WHY[purpose]}", _CURE[purpose]
        notes.add("missing-key", place, message, cure)
        return False
    if not _NEEDED[purpose]:
        return True
    if not number(row["area"]):
        notes.add("bad-value", place, f"area is {_short(row['area'])}", "give the mask's number of pixels")
        return False
    if image is None:
        return False
    mask = row["segmentation"]
    if fault := mask_fault(mask, image.height, image.width):
        notes.add("bad-mask", place, f"segmentation {fault}", "draw or encode it again")
        return False
    if isinstance(mask, dict) and isinstance(mask["counts"], str):
        masks.append((place, mask["counts"], image.height * image.width))
    return True


def _box(box: Any, image: Listed | None, place: str, flat: list[tuple[str, str]], notes: _Notes) -> bool:
    """Whether a box (x y w h) can be trained on; boxes without width or height go to `flat`, to be judged together."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(number, box)):
        notes.add(
            "box-value", place, f"bbox {_short(box)} is not four finite numbers", "give it as [x, y, width, height]"
        )
        return False
    x, y, w, h = box
    shown = f"bbox {_short(box)}"
    if w < 0 or h < 0:
        cure = "give it as [x, y, width, height], not as corners"
        notes.add("box-size", place, f"{shown} has negative size", cure)
        return False
    if w == 0 or h == 0:
        flat.append((place, f"{shown} has no area"))
        return False
    if image is None:
        return False
    size = f"the image of {image.width} x {image.height} pixels"
    if x >= image.width or y >= image.height or x + w <= 0 or y + h <= 0:
        notes.add("box-outside", place, f"{shown} lies outside {size}", "correct or remove it")
        return False
    over = max(-x, -y, x + w - image.width, y + h - image.height)
    if over > _SLACK:
        notes.add("box-clipped", place, f"{shown} reaches beyond {size}", "it is clipped", fatal=False)
    # What is left after clipping; mmdet's reader leaves boxes thinner than a pixel out without a word.
    inside = min(min(x + w, image.width) - max(x, 0), min(y + h, image.height) - max(y, 0))
    if inside < 1:
        notes.add("box-thin", place, f"{shown} is thinner than a pixel", "it is left out", fatal=False)
        return False
    return True


def _key(row: Any, what: str, index: int, notes: _Notes) -> int | None:
    """The id of a row; a note and None when it has none."""
    place = f"{what} number {index + 1} in the list"
    if not isinstance(row, dict):
        notes.add("bad-value", place, f"it is {_kind(row)}, not an object", "correct or remove it")
    elif "id" not in row:
        notes.add("missing-key", place, "it has no 'id'", "add the key")
    elif not whole(row["id"]):
        notes.add("bad-value", place, f"its id is {_short(row['id'])}", "give a whole number")
    else:
        return int(row["id"])
    return None


def _size(value: Any) -> bool:
    return whole(value) and int(value) > 0


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = _kind(value)
    return text if len(text) <= 60 else text[:57] + "..."
