"""Check a COCO annotation file and its images before training, and report what is wrong, where, and how to fix it.

Fatal problems stop a training; warnings report what would otherwise change silently. For training from boxes masks
are not checked: a missing or invalid `segmentation` does not matter there.
"""

import itertools
import json
import os
import random
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from misa.data.check.doubtful_boxes import Doubts
from misa.data.check.image_files import Listed, Twins, check_files
from misa.data.check.masks import broken_runs, mask_fault
from misa.data.check.report import KEPT, Notes, Report, Sample
from misa.data.formats.coco import DataError, PathLike
from misa.data.formats.coco_file import TABLES, CocoFile
from misa.data.formats.json_stream import BadJson
from misa.data.formats.names import Images
from misa.data.formats.parts import split_in
from misa.data.formats.plain import is_ignored
from misa.errors import counted, did_you_mean, number, whole

__all__ = ["Purpose", "Twins", "check_coco", "has_masks", "require_usable"]

Purpose = Literal["train", "mask", "eval", "boxes", "score"]
# The purposes that need a mask of every object, with the reason.
_WHY = {"mask": "this row learns from masks", "eval": "scoring compares with true masks"}
_ADVICE = {
    "mask": "give every training object one, or train a row that learns from boxes",
    "eval": "only the val split needs masks, give every object there one",
}
# COCO's own train2017 has 2 boxes without height among 860k. Below this share they are dropped with a warning.
_FEW = 1e-4
_BY_MASK = "it is scored by its mask"
_MANY = 0.05
# COCO's boxes are rounded and may exceed the image by fractions of a pixel, which is not reported.
_SLACK = 1.0
_TOGETHER = 1000  # RLEs decoded in one batch


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
    of_run: bool = False,
) -> Report:
    """Check a whole annotation file and its images; never raises for their content.

    What `misa.data.formats.plain` normalizes is not a fault, as every reader applies it. Annotations are streamed:
    only the images of a file are held in memory.

    classes: required names (others are dropped with a warning); None takes all. of_run: whether they are a run's.
    verify_images: "exists" lists the folder; "open" also reads the start and end of each file (8 threads).
    purpose: "train" checks boxes only; "mask" also the masks to learn from, "eval" the masks for pycocotools;
        "boxes" is evaluation without masks; "score" is "eval" if any object has a mask, else "boxes".
    long_side: the cap of the resized long side in pixels; images too thin to be shrunk so far are fatal.
    samples: number of images to keep with their boxes in the report.
    twins: collects images by content to report duplicates; pass the same one to the check of each split.
    alone: no other split has its images in that folder; False omits the note on images that are not listed.

    Boxes that exceed the image are clipped with a warning; boxes without area or completely outside are fatal,
    except that flat boxes rarer than 1 in 10,000 (COCO itself has two) are dropped with a warning.
    """
    if verify_images not in ("exists", "open"):
        raise ValueError(f"verify_images must be 'exists' or 'open'; got {verify_images!r}.")
    if purpose not in ("train", "mask", "eval", "boxes", "score"):
        raise ValueError(f"purpose must be 'train', 'mask', 'eval', 'boxes' or 'score'; got {purpose!r}.")
    folder, notes, repeated = Path(image_dir), Notes(Path(annotation_file)), _Repeated()
    file = _open(notes.file, folder, notes, repeated)
    masks = file is not None and file.masks
    if purpose == "score":
        purpose = "eval" if masks else "boxes"
    images = _images(file.images if file is not None else [], folder, notes)
    names = _categories(file.categories if file is not None else [], notes)
    there = file is not None and file.has("categories")
    wanted = _match(names, classes, purpose, notes, of_run=of_run) if there else tuple(classes or ())
    found = _Objects(dict.fromkeys(wanted, 0), dict.fromkeys(_chosen(images, samples)))
    if file is not None and all(file.has(key) for key in TABLES):
        _annotations(file, _Known(images, names, purpose), found, repeated, notes)
    if long_side is not None:
        _thin(images, long_side, notes)
    _files(images, folder, notes, read=verify_images == "open", twins=twins, alone=alone)
    empty = images.keys() - found.busy
    # An image whose objects could not be read, or are reported, does not count as empty.
    _empty_images(images, set() if notes.unread else empty - found.named, notes)
    return _report(notes, folder, images, found, wanted, empty=len(empty), masks=masks)


def _report(
    notes: Notes,
    folder: Path,
    images: dict[int, Listed | None],
    found: "_Objects",
    wanted: tuple[str, ...],
    *,
    empty: int,
    masks: bool,
) -> Report:
    return Report(
        annotation_file=notes.file,
        image_dir=folder,
        images=len(images),
        objects=sum(found.per_class.values()),
        crowds=found.crowds,
        empty_images=empty,
        classes=wanted,
        masks=masks,
        per_class=found.per_class,
        problems=tuple(sorted((p for p in notes.problems if not p.note), key=lambda problem: not problem.fatal)),
        totals=dict(notes.totals),
        notes=tuple(p for p in notes.problems if p.note),
        samples=tuple(
            Sample(folder / image.file_name, [box for box, _ in sample], [label for _, label in sample])
            for key, sample in sorted(found.shown.items())
            if (image := images[key]) is not None
        ),
    )


def _files(
    images: dict[int, Listed | None], folder: Path, notes: Notes, *, read: bool, twins: Twins | None, alone: bool
) -> None:
    """Check the image files."""
    if not os.access(folder, os.R_OK | os.X_OK) or not folder.is_dir():
        message = f"its image folder {folder} does not exist or cannot be read"
        notes.add("image-folder", "", message, "give the folder of the images")
        return
    listed = [image for image in images.values() if image is not None]
    for fault in check_files(listed, folder, read=read, twins=twins, alone=alone):
        place = fault.image.where or f"image {fault.image.id}"
        weight = {"fatal": fault.weight == "error", "note": fault.weight == "note"}
        notes.add(fault.kind, place, fault.message, fault.advice, **weight)


def _empty_images(images: dict[int, Listed | None], empty: set[int], notes: Notes) -> None:
    for image in (images[key] for key in sorted(empty)[:KEPT]):
        if image is not None:
            place = image.where or f"image {image.id}"
            message, advice = f"{image.file_name} has no object", "nothing to do, if that is so"
            notes.add("image-empty", place, message, advice, note=True)
    if notes.totals["image-empty"]:
        notes.totals["image-empty"] = len(empty)


def has_masks(annotation_file: PathLike) -> bool:
    """Whether any object has a `segmentation`; empty ones, as box tools write them, do not count."""
    try:
        return CocoFile(Path(annotation_file), keep=("id",)).masks
    except BadJson:  # reported by the check
        return False


def require_usable(
    annotation_file: PathLike,
    image_dir: PathLike,
    *,
    classes: Sequence[str] | None = None,
    verify_images: Literal["exists", "open"] = "open",
    purpose: Purpose = "train",
    long_side: int | None = None,
    of_run: bool = False,
) -> Report:
    """Returns the report of `check_coco`; DataError with the first fatal problem and the number of the others."""
    report = check_coco(
        annotation_file,
        image_dir,
        classes=classes,
        verify_images=verify_images,
        purpose=purpose,
        long_side=long_side,
        of_run=of_run,
    )
    if report.usable:
        return report
    more = sum(report.totals[kind] for kind in {problem.kind for problem in report.fatal}) - 1
    first = report.fatal[0].sentence
    raise DataError(f"{first[:-1]} ({more} more; `misa check` lists them){first[-1]}" if more else first)


class _Known(NamedTuple):
    """Images (None: listed but unusable) and class names by id, to which annotations refer, and the purpose."""

    images: dict[int, Listed | None]
    names: dict[int, str]
    purpose: str


class _Repeated:
    """Finds duplicate annotation ids and boxes in a file, in 16 bytes per object."""

    def __init__(self) -> None:
        self._ids, self._boxes = array("q"), array("q")

    def see(self, row: Any) -> None:
        """Add an annotation as read from the file."""
        if isinstance(row, dict):
            if whole(row.get("id")):
                self._ids.append(row["id"])
            box = row.get("bbox")
            if isinstance(box, list) and _four(box) and whole(row.get("image_id")) and whole(row.get("category_id")):
                self._boxes.append(hash((row["image_id"], row["category_id"], *box)))

    def ids(self) -> set[int]:
        return _more_than_once(self._ids)

    def boxes(self) -> set[int]:
        return _more_than_once(self._boxes)


def _more_than_once(values: "array[int]") -> set[int]:
    order = np.sort(np.frombuffer(values, np.int64)) if values else np.zeros(0, np.int64)
    return set(order[1:][order[1:] == order[:-1]].tolist())


class _Once:
    """Detects repeated values. among: the values to remember; None: all."""

    def __init__(self, among: set[int] | None) -> None:
        self.among, self.seen = among, set[int]()

    def again(self, value: int) -> bool:
        if self.among is not None and value not in self.among:
            return False
        known = value in self.seen
        self.seen.add(value)
        return known


@dataclass
class _Objects:
    """Counts and findings over all annotations."""

    per_class: dict[str, int]
    shown: dict[int, Any]
    crowds: int = 0
    ignored: int = 0
    count: int = 0  # rows
    busy: set[int] = field(default_factory=set)
    named: set[int] = field(default_factory=set)  # ids of images with any annotation
    boxes: _Once = field(default_factory=lambda: _Once(None))
    flat: list[tuple[str, str]] = field(default_factory=list)  # the first ones
    flats: int = 0
    masks: list[tuple[str, str, int]] = field(default_factory=list)  # place, run lengths as text, pixels
    doubts: Doubts = field(default_factory=Doubts)

    def __post_init__(self) -> None:
        self.shown = {key: [] for key in self.shown}


def _open(path: Path, folder: Path, notes: Notes, repeated: _Repeated) -> CocoFile | None:
    """Open the file in normalized form; returns None, with a problem noted, if it holds no instances."""
    try:
        file = CocoFile(path, keep=("id", "file_name", "width", "height", "where"), see=repeated.see)
    except BadJson as error:
        notes.add(error.kind, error.place, error.message, error.advice)
        return None
    content = file.content
    if not isinstance(content, dict):
        notes.add("not-coco", "", f"it holds {_kind(content)}, not an object", "give a COCO annotation file")
        return None
    notes.converted = "converted_from" in content
    notes.file = _origin(content, path)
    if notes.converted or "plain_of" in content:
        for fault in content.get("faults", ()):
            notes.add(*fault[:4], fatal=fault[4])
            notes.unread |= fault[4]
    elif folder.is_dir():
        file.settle_images(Images(folder, suffixes=False), folder, folder)
    if kind := file.kind:
        found = f"this is a {kind} file, not one of instances"
        notes.add("not-instances", "", found, f"give COCO's {path.name.replace(kind, 'instances')} instead")
        return None
    for key in TABLES:
        if key not in content:
            others = [name for name in content if name not in ("info", "licenses")]
            hint = did_you_mean(key, others)
            there = ", ".join(list(content)[:8]) or "nothing"
            notes.add("missing-key", "", f"it has no '{key}' but {there}{hint.rstrip('?')}", "add the key")
        elif not file.has(key):
            message = f"'{key}' is {_kind(content[key])}, not a list"
            notes.add("not-coco", "", message, "give a COCO annotation file")
    if notes.problems and any(problem.fatal for problem in notes.problems):
        return file  # what could not be converted is missing and already reported
    if file.has("images") and not file.images:
        advice = "add images, or name a split for each" if notes.converted else "choose another file"
        notes.add("no-images", "", "it lists no images", advice)
    if file.has("categories") and not file.categories:
        notes.add("no-classes", "", "it lists no categories", "add the classes as [{'id': 1, 'name': ...}, ...]")
    return file


def _origin(content: dict[str, Any], path: Path) -> Path:
    """Returns the user's own file or folder, with the split if its name does not say it."""
    if "plain_of" not in content:
        return Path(str(content.get("converted_from", path)))
    origin, split = Path(str(content["plain_of"])), split_in(path.name)
    known = split in ("", split_in(origin.name), split_in(origin.parent.name))
    return origin if known else origin.with_name(f"{origin.name} ({split} split)")


def _chosen(images: dict[int, Listed | None], count: int) -> list[int]:
    """Choose sample images, deterministically."""
    usable = [key for key, image in images.items() if image is not None]
    return random.Random(0).sample(usable, min(count, len(usable)))


def _images(rows: list[Any], folder: Path, notes: Notes) -> dict[int, Listed | None]:
    """Returns the images by id; None for an image that is listed but unusable."""
    images: dict[int, Listed | None] = {}
    files: dict[str, int] = {}
    for index, row in enumerate(rows):
        key = _key(row, "image", index, notes)
        if key is None:
            continue
        place = notes.place(row, f"image {key}")
        if key in images:
            notes.add("duplicate-id", place, "this id is used more than once", "number the images apart")
            continue
        images[key] = _listed(row, key, folder, place, notes)
        if (image := images[key]) is not None:
            if image.file_name in files:
                message = f"{image.file_name} is listed before, as image {files[image.file_name]}"
                notes.add("duplicate-file", place, message, "list every file once, with all its objects", fatal=False)
            files.setdefault(image.file_name, key)
    return images


def _listed(row: dict[str, Any], key: int, folder: Path, place: str, notes: Notes) -> Listed | None:
    missing = [name for name in ("file_name", "width", "height") if name not in row]
    name: Any = row.get("file_name")
    named, sized = isinstance(name, str) and name, all(row.get(side) not in (None, "") for side in ("width", "height"))
    if named and not sized and not os.path.isfile(folder / name):  # its size would have been read
        if folder.is_dir():  # else reported itself
            advice = f"add it, or take image {key} out of the list"
            notes.add("image-absent", place, f"the file {folder / name} is missing", advice)
    elif missing:
        notes.add("missing-key", place, f"it has no '{missing[0]}'", "add the key")
    elif not named:
        notes.add("bad-value", place, f"file_name is {_kind(name)}", "give the name of the image file")
    elif not (_size(row["width"]) and _size(row["height"])):
        size = f"{_short(row['width'])} x {_short(row['height'])}"
        notes.add("bad-value", place, f"its size is {size}", "give width and height as whole numbers above 0")
    else:
        where = place if notes.converted else ""
        return Listed(key, name, int(row["width"]), int(row["height"]), where)
    return None


def _thin(images: dict[int, Listed | None], long_side: int, notes: Notes) -> None:
    """Report images whose short side becomes 0 pixels when the long side is shrunk to the cap; OpenCV fails on them."""
    for image in filter(None, images.values()):
        short, long = sorted((image.width, image.height))
        if short * long_side < long:
            size = f"{image.width} x {image.height} pixels"
            message = f"its {size} are less than one across when the long side is shrunk to {long_side}"
            place, advice = image.where or f"image {image.id}", "cut it into parts, or take it out of the list"
            notes.add("image-thin", place, message, advice)


def _categories(rows: list[Any], notes: Notes) -> dict[int, str]:
    """Returns the class names by id, "" for a category whose name is reported."""
    names: dict[int, str] = {}
    for index, row in enumerate(rows):
        key = _key(row, "category", index, notes)
        if key is not None:
            _category(row, key, names, notes)
    return names


def _category(row: dict[str, Any], key: int, names: dict[int, str], notes: Notes) -> None:
    place, name = f"category {key}", row.get("name")
    if key in names:
        notes.add("duplicate-id", place, "this id is used more than once", "number the categories apart")
        return
    names[key] = ""
    if "name" not in row:
        notes.add("missing-key", place, "it has no 'name'", "add the key")
    elif not isinstance(name, str):
        notes.add("bad-value", place, f"its name is {_short(name)}, not a text", "give the name of the class")
    elif not name:
        notes.add("bad-value", place, "its name is empty", "give the name of the class")
    elif name in names.values():
        notes.add("duplicate-name", place, f"the name {name!r} is used more than once", "name each class once")
    else:
        alike = [other for other in names.values() if other and _folded(other) == _folded(name)]
        if alike:
            message = f"the class {name!r} differs from {alike[0]!r} in case, spaces or Unicode form only"
            at = "" if notes.converted else place  # ids are COCO's alone
            notes.add("class-names-alike", at, message, "give both one name, if they are one class", fatal=False)
        names[key] = name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", "".join(name.split()).casefold())


def _match(
    names: dict[int, str], classes: Sequence[str] | None, purpose: str, notes: Notes, *, of_run: bool
) -> tuple[str, ...]:
    """Returns the requested classes, in the requested order."""
    found = tuple(filter(None, names.values()))
    if classes is None:
        return found
    missing, extra = (
        [name for name in one if name not in other] for one, other in ((classes, found), (found, classes))
    )
    # A file for evaluation may lack some of the classes, but not have others.
    if purpose in ("eval", "boxes") and found and not extra:
        for name in missing:
            message = f"class {name!r} does not occur in it, so it is not scored"
            notes.add("class-absent", "", message, "nothing to do, if it has no such object", fatal=False)
    elif missing and of_run:
        message = f"the run knows the classes {_joined(classes)}, and this data has {_joined(found) or 'none'}"
        drop = ", remove those that the run does not know" if len(extra) < len(found) else ""
        notes.add("class-names", "", message, f"rename those that mean the same{drop}, or train a run on this data")
    else:
        for name in missing:
            hint = did_you_mean(name, found)[2:] or "give the class names of this file"
            notes.add("class-names", "", f"class {name!r} is expected, but found are {_joined(found) or 'none'}", hint)
    if extra and not (missing and of_run):
        message = f"any objects of {_joined(extra)} are left out, as they are of no class of the "
        advice = "add the class to the training annotations, if it is to be learned"
        advice = "train a run on data that has it, if it is to be scored" if of_run else advice
        notes.add("class-names-left-out", "", message + ("run" if of_run else "training"), advice, fatal=False)
    return tuple(classes)


def _joined(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _annotations(file: CocoFile, known: _Known, found: _Objects, repeated: _Repeated, notes: Notes) -> None:
    """Count crowds, objects by class and images with objects; keep the boxes of the sample images."""
    # If ids were text, their replacements differ from the ids that `repeated` counted.
    ids = _Once(None if file.texts else repeated.ids())
    found.boxes = _Once(None if file.texts else repeated.boxes())
    found.count = file.count
    places = itertools.count()

    def look(row: Any) -> None:
        key = _key(row, "annotation", next(places), notes)
        if key is None:
            return
        place = notes.place(row, f"annotation {key}")
        if ids.again(key):
            notes.add("duplicate-id", place, "this id is used more than once", "number the annotations apart")
        elif _refers(row, place, known, notes):
            _object(row, place, known, found, notes)

    file.each_annotation(look, areas=False)
    _decide(known, found, notes)
    if not sum(found.per_class.values()) and not any(problem.fatal for problem in notes.problems):
        aim = "to learn from" if known.purpose in ("train", "mask") else "to score on"
        notes.add("no-objects", "", f"it has no object {aim}", "add annotations, or choose another file")


def _refers(row: dict[str, Any], place: str, known: _Known, notes: Notes) -> bool:
    """Whether an annotation has the required fields: a known image and class, a box and a valid `iscrowd`."""
    if missing := [name for name in ("image_id", "category_id", "bbox") if name not in row]:
        notes.add("missing-key", place, f"it has no '{missing[0]}'", "add the key")
        return False
    for key, table, what in (("image_id", known.images, "image"), ("category_id", known.names, "category")):
        value, tables = row[key], "images" if what == "image" else "categories"
        if not whole(value) or value not in table:
            message = f"{key} {_short(value)} is not in '{tables}'"
            notes.add(f"unknown-{what}", place, message, f"add the {what}, or remove it")
            return False
    if not isinstance(row["iscrowd"], int) or row["iscrowd"] not in (0, 1):
        notes.add("bad-value", place, f"iscrowd is {_short(row['iscrowd'])}", "give 0 or 1")
        return False
    return True


def _object(row: dict[str, Any], place: str, known: _Known, found: _Objects, notes: Notes) -> None:
    name, key = known.names[row["category_id"]], row["image_id"]
    found.named.add(key)
    image = known.images[key]
    if name in found.per_class and not _mask(row, image, place, known.purpose, found.masks, notes):
        return
    at = place if notes.converted else f"{place} on image {key}"
    if image is not None and _four(row["bbox"]):
        found.doubts.add(row, image)
    if not _box(row["bbox"], image, at, found, notes, by_mask=known.purpose == "eval"):
        return
    if row["iscrowd"]:
        found.crowds += 1
        found.ignored += is_ignored(row)
    elif name in found.per_class:
        found.per_class[name] += 1
        found.busy.add(key)
        if found.boxes.again(hash((key, row["category_id"], *row["bbox"]))):
            message = f"another {name} of this image has the same box"
            notes.add("duplicate-box", at, message, "remove one of them", fatal=False)
        if key in found.shown:
            x, y, w, h = row["bbox"]
            found.shown[key].append(([x, y, x + w, y + h], name))


def _decide(known: _Known, found: _Objects, notes: Notes) -> None:
    """Report what follows from all annotations together."""
    _judge_runs(found.masks, notes)
    few = found.flats <= _FEW * found.count
    by_mask = few and known.purpose == "eval"
    kind, advice = ("box-size-mask", _BY_MASK) if by_mask else ("box-size", "it is left out")
    for place, message in found.flat:
        notes.add(
            kind, place, message, advice if few else "give it a width and height above 0, or remove it", fatal=not few
        )
    if found.flats > len(found.flat):
        notes.totals[kind] += found.flats - len(found.flat)
    if (doubt := found.doubts.verdict()) is not None:
        notes.forget("box-clipped", "box-thin", "box-thin-mask", "box-outside")  # consequences of it
        notes.add(*doubt)
    verb = "learned from" if known.purpose in ("train", "mask") else "scored on"
    for count, what, kind in (
        (found.crowds - found.ignored, "marked as crowd (iscrowd or difficult)", "crowds"),
        (found.ignored, "marked by the key ignore", "ignored"),
    ):
        if count:
            be = "is" if count == 1 else "are"
            message = f"{count} of {counted(found.count, 'object')} {be} {what} and {be} not {verb}"
            advice = "set the mark to 0 where one is a single object"
            # COCO itself has one in a hundred, which is only a note.
            notes.add(kind, "", message, advice, fatal=False, note=count < _MANY * found.count)


def _judge_runs(masks: list[tuple[str, str, int]], notes: Notes) -> None:
    """Decode the collected RLEs, report invalid ones and clear the list."""
    broken = broken_runs([counts for _, counts, _ in masks], [pixels for _, _, pixels in masks])
    for (place, _, _), bad in zip(masks, broken, strict=True):
        if bad:
            notes.add("bad-mask", place, "segmentation has counts that cannot be decoded", "draw or encode it again")
    masks.clear()


def _mask(
    row: dict[str, Any], image: Listed | None, place: str, purpose: str, masks: list[tuple[str, str, int]], notes: Notes
) -> bool:
    """Whether an object's mask is valid for the purpose; RLEs as text are appended to `masks`, to decode in batches."""
    if purpose not in _WHY:
        return True
    if "segmentation" not in row:
        notes.add("missing-key", place, f"it has no 'segmentation', and {_WHY[purpose]}", _ADVICE[purpose])
        return False
    if image is None:
        return False
    mask = row["segmentation"]
    if fault := mask_fault(mask, image.height, image.width):
        notes.add("bad-mask", place, f"segmentation {fault}", "draw or encode it again")
        return False
    if isinstance(mask, dict) and isinstance(mask["counts"], str):
        masks.append((place, mask["counts"], image.height * image.width))
        if len(masks) >= _TOGETHER:
            _judge_runs(masks, notes)
    return True


def _box(box: Any, image: Listed | None, place: str, found: _Objects, notes: Notes, *, by_mask: bool) -> bool:
    """Whether a box (x y w h) is usable; boxes without width or height are collected and judged by their number.

    by_mask: the object is scored by its mask, as pycocotools does, also if its box is too thin to learn from.
    """
    if not _four(box):
        notes.add(
            "box-value", place, f"bbox {_short(box)} is not four finite numbers", "give it as [x, y, width, height]"
        )
        return False
    x, y, w, h = box
    # Converted boxes are shown in pixels, whatever their original form.
    span = f"its box (x {x:g} to {x + w:g}, y {y:g} to {y + h:g} in pixels from 0)"
    shown = span if notes.converted else f"bbox {_short(box)}"
    if w < 0 or h < 0:
        advice = "correct it" if notes.converted else "give it as [x, y, width, height], not as corners"
        notes.add("box-size", place, f"{shown} has negative size", advice)
        return False
    if w == 0 or h == 0:
        found.flats += 1
        if len(found.flat) < KEPT:
            found.flat.append((place, f"{shown} has no area"))
        return by_mask and image is not None
    if image is None:
        return False
    size = f"the image of {image.width} x {image.height} pixels"
    if x >= image.width or y >= image.height or x + w <= 0 or y + h <= 0:
        notes.add("box-outside", place, f"{shown} lies outside {size}", "correct or remove it")
        return False
    over = max(-x, -y, x + w - image.width, y + h - image.height)
    if over > _SLACK:
        notes.add("box-clipped", place, f"{shown} reaches beyond {size}", "it is clipped", fatal=False)
    # Size after clipping; mmdet's reader silently drops boxes thinner than a pixel.
    inside = min(min(x + w, image.width) - max(x, 0), min(y + h, image.height) - max(y, 0))
    if inside < 1:
        kind, advice = ("box-thin-mask", _BY_MASK) if by_mask else ("box-thin", "it is left out")
        notes.add(kind, place, f"{shown} is thinner than a pixel", advice, fatal=False)
        return by_mask
    return True


def _four(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(number, box))


def _key(row: Any, what: str, index: int, notes: Notes) -> int | None:
    """Returns the id of a row; None, with a problem noted, if it has none."""
    place = f"{what} number {index + 1} in the list"
    if not isinstance(row, dict):
        notes.add("bad-value", place, f"it is {_kind(row)}, not an object", "correct or remove it")
    elif "id" not in row:
        notes.add("missing-key", place, "it has no 'id'", "add the key")
    elif not whole(row["id"]):
        below = " below 2^63" if isinstance(row["id"], int) else ""
        notes.add("bad-value", place, f"its id is {_short(row['id'])}", f"give a whole number{below}")
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
