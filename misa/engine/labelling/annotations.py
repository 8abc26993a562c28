"""Read the annotations to label, and write them with the predicted masks.

Ids, names, boxes and all other content of a file are preserved, so that tools for the dataset can read the result.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from misa.data.check.annotations import check_coco, require_usable
from misa.data.check.masks import broken_runs, mask_fault
from misa.data.formats.coco import DataError, Split
from misa.data.formats.coco_file import TABLES, CocoFile, read_coco
from misa.data.formats.convert import open_layout
from misa.data.formats.json_rows import object_file
from misa.data.formats.plain import is_empty
from misa.data.polygons import polygons
from misa.data.rle import Runs, decode_part

SplitName = Literal["all", "train", "val"]


class Target(NamedTuple):
    """An image with boxes to label: its entry and file, and its annotations.

    `boxes` (n 4) are x1 y1 x2 y2 within the image, `names` the annotations' classes.
    """

    name: str
    image: dict[str, Any]
    path: Path
    rows: list[dict[str, Any]]
    boxes: NDArray[np.float64]
    names: tuple[str, ...]

    @property
    def stamp(self) -> list[int]:
        """A key that changes with the image, its boxes or their classes."""
        status = self.path.stat()
        known = json.dumps([[row["id"], name, row["bbox"]] for row, name in zip(self.rows, self.names, strict=True)])
        return [status.st_size, status.st_mtime_ns, zlib.crc32(known.encode())]


@dataclass(frozen=True)
class Labels:
    """Annotations of one file: its content, the image files by id, and the output file.

    texts: by table, the ids that are strings in the file, by the numbers that replace them here.
    """

    content: dict[str, Any]
    files: dict[int, Path]
    out: Path
    texts: Mapping[str, Mapping[int, str]]

    def original(self, table: str, row: dict[str, Any]) -> dict[str, Any]:
        """Returns a row of a table with the ids of the file."""
        references = {"image_id": "images", "category_id": "categories"} if table == "annotations" else {}
        known = {key: self.texts.get(name, {}) for key, name in {"id": table, **references}.items()}
        return row | {key: texts[row[key]] for key, texts in known.items() if row[key] in texts}

    @cached_property
    def names(self) -> dict[int, str]:
        """Names of the classes by id."""
        return {row["id"]: row["name"] for row in self.content["categories"]}

    @cached_property
    def targets(self) -> list[Target]:
        """The images with boxes that contain pixels, without crowds."""
        rows: dict[int, list[dict[str, Any]]] = {}
        for row in self.content["annotations"]:
            rows.setdefault(row["image_id"], []).append(row)
        found = []
        for image in self.content["images"]:
            own = [row for row in rows.get(image["id"], []) if not row["iscrowd"]]
            boxes: NDArray[np.float64] = np.array([row["bbox"] for row in own], dtype=np.float64).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            boxes = np.clip(boxes, 0, [image["width"], image["height"]] * 2)
            kept = [i for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()) if x2 > x1 and y2 > y1]
            if kept:
                name = f"{self.out.name}/{image['id']}"
                rows_kept = [own[i] for i in kept]
                classes = tuple(self.names[row["category_id"]] for row in rows_kept)
                found.append(Target(name, image, self.files[image["id"]], rows_kept, boxes[kept], classes))
        return found


class Mask(NamedTuple):
    """A recorded mask: run-length encoding, quality, and whether the box replaces it."""

    runs: Runs
    quality: float
    fallback: bool


def open_labels(data: str | Path, out: Path, split: SplitName = "all") -> list[Labels]:
    """Open the annotations of a dataset in any format: a single one for a single file, otherwise one per split.

    Raises UserError: no dataset there, invalid annotations, or no boxes.
    """
    layout = open_layout(data, need_train=split != "val")
    places = {name: place for name, place in (("train", layout.train), ("val", layout.val)) if split in ("all", name)}
    read: dict[str, dict[str, Any]] = {}
    for name, place in places.items():
        if any(problem.kind != "no-objects" for problem in check_coco(*place).fatal):
            require_usable(*place, verify_images="exists")  # raises the error
        content = read_coco(place.annotations)
        if content["images"]:
            read[name] = content
    if not any(row for content in read.values() for row in content["annotations"]):
        where = " or ".join(str(place.annotations) for place in places.values())
        raise DataError(f"{where} has no boxes, so there is nothing to label; give data with boxes.")
    files = {name: _files(content, places[name]) for name, content in read.items()}
    origins = {name: content.get("plain_of") for name, content in read.items()}
    one = len(set(origins.values())) == 1 and (None not in origins.values() or _converted(read))
    if len(read) > 1 and one:
        every = {key: file for own in files.values() for key, file in own.items()}
        content, texts = _original(list(read.values()), every)
        return [Labels(content, every, out, texts)]
    found = []
    for name, own in read.items():
        content, texts = _original([own], files[name])
        target = out.with_stem(f"{out.stem}_{name}") if len(read) > 1 else out
        found.append(Labels(content, files[name], target, texts))
    return found


def _converted(read: Mapping[str, dict[str, Any]]) -> bool:
    return all("converted_from" in content for content in read.values())


def _files(content: dict[str, Any], place: Split) -> dict[int, Path]:
    return {image["id"]: place.images / image["file_name"] for image in content["images"]}


def _original(
    contents: list[dict[str, Any]], files: Mapping[int, Path]
) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    """The content of the file that a split was made from, restricted to the split's images, without our additions.

    Also returns, by table, its ids that are strings, by the numbers that replace them.
    """
    first, texts = contents[0], {}
    if "plain_of" in first:
        file = CocoFile(Path(first["plain_of"]))
        content = file.whole()
        texts = {table: {number: text for text, number in ids.items()} for table, ids in file.numbers.items()}
    else:
        content = dict(first)
        for key in TABLES[:2]:  # what is in both splits has one id
            rows = {row["id"]: row for own in contents for row in own[key]}
            content[key] = [rows[found] for found in sorted(rows)]
    if "converted_from" in content:
        content = {key: [{k: v for k, v in row.items() if k != "where"} for row in content[key]] for key in TABLES}
    content["images"] = [image for image in content["images"] if image["id"] in files]
    sizes = {image["id"]: (image["width"], image["height"]) for own in contents for image in own["images"]}
    for image in content["images"]:  # read from the images if missing in the file
        image["width"], image["height"] = sizes[image["id"]]
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in files]
    return content, texts


def write(
    path: Path, labels: Labels, masks: Mapping[int, Mask], *, tolerance: float | None, about: dict[str, Any]
) -> None:
    """Write the annotations with their masks, without boxes outside their image; crowds are unchanged.

    tolerance: of polygons, in pixels; None writes run-length encodings. about: added to `info`.
    """
    info = labels.content.get("info")
    with object_file(path) as file:
        file.value("info", {**(info if isinstance(info, dict) else {}), "misa": about})
        for key, value in labels.content.items():
            if key == "annotations":
                kept = (row for row in value if row["iscrowd"] or row["id"] in masks)
                made = (a if a["iscrowd"] else labelled(a, masks[a["id"]], tolerance) for a in kept)
                file.all_rows(key, (labels.original(key, a) for a in made))
            elif key in TABLES:
                file.all_rows(key, (labels.original(key, row) for row in value))
            elif isinstance(value, list):
                file.all_rows(key, value)
            elif key != "info":
                file.value(key, value)


def labelled(row: Mapping[str, Any], mask: Mask, tolerance: float | None) -> dict[str, Any]:
    """Add the mask, the area of its written form, and `quality` to an annotation; `fallback` if it is the box."""
    form: Any = mask.runs
    area = int(rle.area(mask.runs))
    if tolerance is not None:
        top, left, pixels = decode_part(mask.runs)
        for within in (tolerance, 0.0):  # exact if the mask is thinner than the tolerance
            form = polygons(pixels, top=top, left=left, tolerance=within)
            area = int(rle.area(rle.merge(rle.frPyObjects(form, *mask.runs["size"]))))
            if area:
                break
    kept = {key: value for key, value in row.items() if key not in ("segmentation", "area", "ignore", "fallback")}
    made = {"segmentation": form, "area": area, "iscrowd": 0, "quality": mask.quality}
    return kept | made | ({"fallback": "box"} if mask.fallback else {})


def true_runs(row: Mapping[str, Any], size: tuple[int, int]) -> Runs | None:
    """The run-length encoding of an annotation's existing mask, or None. Raises DataError: it cannot be decoded."""
    mask: Any = row.get("segmentation")
    if is_empty(mask):
        return None
    text = isinstance(mask, dict) and not isinstance(mask["counts"], list)
    if mask_fault(mask, *size) is not None or (text and broken_runs([mask["counts"]], [size[0] * size[1]])[0]):
        raise DataError(f"annotation {row['id']} has a mask that cannot be read; correct it, or leave score out.")
    found = mask if text else rle.frPyObjects(mask, *size)
    merged: Runs = rle.merge(found) if isinstance(found, list) else found
    return merged


def digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
