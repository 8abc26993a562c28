"""LabelMe: one JSON file per image with shapes; rectangles give boxes; polygons, circles and masks also give masks.

    *.json beside the images (also in images/), or such folders in train/ and val/, or in annotations/ beside images/

Shapes of any kind with the same label and group_id are one object; points and lines are dropped. Source: the JSON of
labelme 5 (github.com/wkentaro/labelme): shapes (label, points, group_id, shape_type, mask), imagePath, imageHeight,
imageWidth.
"""

import base64
import io
import json
import math
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from misa.data.formats.parts import (
    Boxed,
    Entry,
    Format,
    Part,
    ReportFault,
    child,
    files_of,
    image_folder,
    size_in,
    split_folders,
    walk,
    with_rest,
)
from misa.data.rle import encode_part
from misa.errors import counted
from misa.errors import number as is_number

_SIDES_OF_CIRCLE = 64
_KEYS = re.compile(rb'"(shapes|imagePath)"\s*:')


def find(root: Path) -> list[Part]:
    """Find the JSON files with shapes in a folder, its splits or its folder of annotations."""
    if found := _beside(root, root):
        return found
    images = image_folder(root)
    if (inner := child(root, "annotations", "ann", "labels", "json", "labelme")) is not None:
        if files := _files(inner):
            return [Part(tuple(files), images, "", root)]
        found = [Part(tuple(files), images, split, root) for f, split in split_folders(inner) if (files := _files(f))]
    return found or _beside(images, root)


def _beside(folder: Path, home: Path) -> list[Part]:
    """Returns the JSON files beside the images in a folder or in its splits."""
    files, splits = _files(folder), [(_files(inner), inner, split) for inner, split in split_folders(folder)]
    rest = Part(tuple(files), folder, "", home) if files else None
    return with_rest([Part(tuple(own), inner, split, inner) for own, inner, split in splits if own], rest)


def left(root: Path, read: Collection[Path]) -> list[Path]:
    """Returns LabelMe's files anywhere in a folder, but for those that are read."""
    found = [inner / name for inner, names in walk(root) for name in names if name.lower().endswith(".json")]
    return [path for path in found if path not in read and os.path.isfile(path) and is_labelme(path)]


def _files(folder: Path) -> list[Path]:
    """Returns the JSON files of a folder if any is LabelMe's, else none; the reader reports the others."""
    files = files_of(folder, ".json")
    return files if any(map(is_labelme, files)) else []


def is_labelme(path: Path) -> bool:
    """Whether a JSON file is LabelMe's, by its start and end only, as the embedded image may be large."""
    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(max(file.seek(0, 2) - 4096, 0))
        ends = (head + file.read()).replace(b"\0", b"")  # UTF-16 as well
    return _KEYS.search(ends) is not None


def entries(part: Part, report: ReportFault) -> Iterator[Entry]:
    """Yield an entry per file; invalid files are reported and dropped."""
    for path in part.files:
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            report("labelme", str(path), f"it is not readable as json ({error})", "copy or export it again")
            continue
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            report("labelme", str(path), "it has no shapes", "give LabelMe's files alone, or take this one away")
            continue
        size = size_in(str(content.get("imageWidth")), str(content.get("imageHeight")))
        name = content.get("imagePath")
        objects = list(_objects(content["shapes"], size, path, report))
        yield Entry(name if isinstance(name, str) else "", size, objects, str(path), part.split, path.name[:-5])


def _objects(shapes: list[Any], size: tuple[int, int] | None, path: Path, report: ReportFault) -> Iterator[Boxed]:
    groups: dict[tuple[str, str], list[Boxed]] = {}
    ignored = 0
    for i, shape in enumerate(shapes, 1):
        where = f"{path}, shape {i}"
        if fault := _fault(shape):
            report("labelme", where, fault, "correct or remove it")
            continue
        label, kind, points = shape["label"].strip(), str(shape.get("shape_type") or ""), shape["points"]
        found: Boxed | None = None
        if kind in ("point", "line", "linestrip", "points"):
            ignored += 1
        elif kind == "rectangle" and len(points) >= 2:
            found = Boxed(label, _extent(points), where)
        elif kind == "mask" and len(points) >= 2:
            found = _mask(label, shape.get("mask"), points, size, where, report)
        elif kind == "circle" and len(points) == 2:
            found = _polygon(label, _circle(points), where)
        elif kind in ("polygon", "", "rotation") and len(points) >= 3:
            found = _polygon(label, [side for point in points for side in point], where)
        else:
            report("labelme", where, f"it is a {kind or 'polygon'} of {counted(len(points), 'point')}", "draw it again")
        if found is not None:
            group = shape.get("group_id")
            groups.setdefault((label, f"#{i}" if group is None else str(group)), []).append(found)
    if ignored:
        message = f"{counted(ignored, 'point or line is', 'points or lines are')} left out"
        report("labelme-points", str(path), message, "nothing to do", fatal=False)
    for parts in groups.values():
        yield parts[0] if len(parts) == 1 else _joined(parts, size)


def _joined(parts: list[Boxed], size: tuple[int, int] | None) -> Boxed:
    """Returns the object of several shapes: the box around them, and their masks, if all have one."""
    corners = [(x, y, x + w, y + h) for x, y, w, h in (part.box for part in parts)]
    left, top = (min(corner[i] for corner in corners) for i in (0, 1))
    right, bottom = (max(corner[i] for corner in corners) for i in (2, 3))
    masks: list[Any] = [part.mask for part in parts]
    whole: Any = None
    if all(isinstance(mask, list) for mask in masks):
        whole = [polygon for mask in masks for polygon in mask]
    elif all(mask is not None for mask in masks) and size is not None:
        w, h = size
        runs = [code for mask in masks for code in (rle.frPyObjects(mask, h, w) if isinstance(mask, list) else [mask])]
        whole = rle.merge(runs)
        whole["counts"] = whole["counts"].decode()
    return parts[0]._replace(box=(left, top, right - left, bottom - top), mask=whole)


def _fault(shape: Any) -> str:
    """Returns what is wrong with the label or the points of a shape, or ""."""
    if not isinstance(shape, dict):
        return "it is not an object"
    label, points = shape.get("label"), shape.get("points")
    if not isinstance(label, str):
        return "it has no label" if label is None else f"its label is {str(label)[:60]}, not a text"
    if not label.strip():
        return "its label is empty"
    if not isinstance(points, list):
        return "it has no points"
    bad = [p for p in points if not (isinstance(p, list) and len(p) == 2 and all(map(is_number, p)))]
    return f"its point {str(bad[0])[:60]} is not two finite numbers" if bad else ""


def _extent(points: list[list[float]]) -> tuple[float, float, float, float]:
    xs, ys = [float(x) for x, _ in points], [float(y) for _, y in points]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def _circle(points: list[list[float]]) -> list[float]:
    """Returns the polygon of a circle given by its center and a point on it."""
    (x, y), (px, py) = points
    radius, steps = math.hypot(px - x, py - y), _SIDES_OF_CIRCLE
    angles = [2 * math.pi * i / steps for i in range(steps)]
    return [side for a in angles for side in (x + radius * math.cos(a), y + radius * math.sin(a))]


def _polygon(label: str, sides: list[float], where: str) -> Boxed:
    points = [[x, y] for x, y in zip(sides[::2], sides[1::2], strict=True)]
    return Boxed(label, _extent(points), where, mask=[sides])


def _mask(
    label: str, text: Any, points: list[list[float]], size: tuple[int, int] | None, where: str, report: ReportFault
) -> Boxed | None:
    """Decode a mask given as a PNG in base64, with the first point as its top left corner."""
    try:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(bool)
        if size is None:
            raise ValueError("the file does not say the image's size")
        left, top = int(points[0][0]), int(points[0][1])
        width, height = size
        inside = pixels[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
        mask = encode_part(inside, min(max(top, 0), height), min(max(left, 0), width), (height, width))
    except (ValueError, TypeError, OSError, SyntaxError) as error:
        report("labelme", where, f"its mask cannot be read ({error})", "draw it again")
        return None
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    if not len(rows):
        report("labelme", where, "its mask is empty", "remove it", fatal=False)
        return None
    box = (left + int(columns[0]), top + int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1)
    return Boxed(label, box, where, mask=mask)


LABELME = Format(find, entries, "1.json beside 1.jpg: shapes with label, points, shape_type; imagePath", left=left)
