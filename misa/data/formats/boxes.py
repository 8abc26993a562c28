"""Boxes in other forms than COCO json, one object at a time: folders of Pascal VOC xml, and csv files.

VOC counts pixels from 1 and its boxes include their last pixel; a csv's boxes are taken as corners from 0 (x1 y1 x2 y2)
or as x y width height, whichever its columns are named for. Standard library only.
"""

import csv
import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from misa.data.formats.coco import DataError
from misa.errors import did_you_mean

Tell = Callable[[str, str, str, str], None]
"""Takes a fault: kind, where, message, cure."""


class Boxed(NamedTuple):
    """An object's box x y w h in pixels; hard: marked as too difficult to be taught or scored."""

    label: str
    box: tuple[float, float, float, float]
    where: str
    hard: bool = False


class Entry(NamedTuple):
    """What one file or line says of an image: its file, (width, height) if given, objects, and split if named."""

    file: str
    size: tuple[int, int] | None
    objects: list[Boxed]
    where: str
    split: str = ""


def read_voc(files: Iterable[Path], tell: Tell) -> Iterator[Entry]:
    """The entries of Pascal VOC xml files; a file that is none is told and left out."""
    for path in files:
        try:
            root = ET.parse(path).getroot()
        except (ET.ParseError, OSError, ValueError) as error:
            tell("xml", str(path), f"it is not readable as xml ({error})", "copy or export it again")
            continue
        if root.tag != "annotation":
            tell("xml", str(path), f"it holds <{root.tag}> and not <annotation>", "give Pascal VOC files")
            continue
        name = (root.findtext("filename") or "").strip().replace("\\", "/").rsplit("/", 1)[-1]
        width, height = (_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
        known = width is not None and height is not None and width > 0 and height > 0
        size = (int(width), int(height)) if known and width is not None and height is not None else None
        objects = [_voc_object(item, f"{path}, object {i}", tell) for i, item in enumerate(root.iter("object"), 1)]
        yield Entry(name or path.stem, size, [o for o in objects if o is not None], str(path))


def _voc_object(item: ET.Element, where: str, tell: Tell) -> Boxed | None:
    label = (item.findtext("name") or "").strip()
    if not label:
        tell("missing-key", where, "it has no <name>", "add the class")
        return None
    sides = [_number(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
    x1, y1, x2, y2 = sides
    if x1 is None or y1 is None or x2 is None or y2 is None:
        tell("box-value", where, "its <bndbox> is not four numbers", "give xmin, ymin, xmax and ymax")
        return None
    hard = (item.findtext("difficult") or "0").strip() == "1"
    return Boxed(label, (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1), where, hard)


# What a csv's columns may be called, in lower case without spaces and underscores.
_IMAGE = ("image", "filename", "file", "imagefile", "imagename", "imagepath", "path", "imageid", "img", "filepath")
_LABEL = ("label", "class", "name", "category", "classname", "labelname", "categoryname")
_CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
    ("x0", "y0", "x1", "y1"),
)
_SIDES = (("x", "y", "w", "h"), ("x", "y", "width", "height"), ("left", "top", "width", "height"))
_SPLIT = ("split", "set", "subset", "fold")


class _Columns(NamedTuple):
    image: int
    label: int
    box: tuple[int, int, int, int]
    corners: bool
    size: tuple[int, int] | None
    split: int | None


def read_csv(path: Path, tell: Tell) -> Iterator[Entry]:
    """An entry a line of a csv; a line without a box is an image without objects.

    The first line names the columns: image, label and a box (xmin ymin xmax ymax, x1 y1 x2 y2, or x y w h), and where
    there are any, width and height of the image and split (train or val). Without a name line the columns are
    image, x1, y1, x2, y2, label.

    Raises:
        DataError: it is no csv, or a column is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            sample = file.read(1 << 14)
            file.seek(0)
            delimiter = max(",;\t|", key=sample.partition("\n")[0].count)
            rows = csv.reader(file, delimiter=delimiter)
            first = next(rows, [])
            if len(first) == 6 and all(_number(cell) is not None or not cell for cell in first[1:5]):
                columns = _Columns(0, 5, (1, 2, 3, 4), True, None, None)
                yield from _line(first, columns, f"{path}, line 1", tell)
            else:
                columns = _columns(path, first)
            for row in rows:
                if any(cell.strip() for cell in row):
                    yield from _line(row, columns, f"{path}, line {rows.line_num}", tell)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a csv ({error}); save it as comma-separated UTF-8.") from error


def _columns(path: Path, first: Sequence[str]) -> _Columns:
    names = [cell.strip().lower().replace("_", "").replace(" ", "") for cell in first]

    def find(wanted: Sequence[str]) -> int | None:
        return next((names.index(name) for name in wanted if name in names), None)

    image, label, split = find(_IMAGE), find(_LABEL), find(_SPLIT)
    forms = [*((form, True) for form in _CORNERS), *((form, False) for form in _SIDES)]
    box = next(((form, corners) for form, corners in forms if set(form) <= set(names)), None)
    for found, wanted in ((image, "image"), (label, "label"), (box, "xmin, ymin, xmax, ymax")):
        if found is None:
            there = ", ".join(cell.strip() for cell in first) or "nothing"
            hint = did_you_mean(wanted.split(",")[0], [cell.strip() for cell in first])
            raise DataError(
                f"{path} has no column {wanted}: its first line is {there}{hint or '; name the columns there.'}"
            )
    assert image is not None, "found above"
    assert label is not None, "found above"
    assert box is not None, "found above"
    form, corners = box
    x, y, w, h = (names.index(name) for name in form)
    sized = "width" in names and "height" in names and "width" not in form
    size = (names.index("width"), names.index("height")) if sized else None
    return _Columns(image, label, (x, y, w, h), corners, size, split)


def _line(row: Sequence[str], columns: _Columns, where: str, tell: Tell) -> Iterator[Entry]:
    def cell(index: int) -> str:
        return row[index].strip() if index < len(row) else ""

    file, label, raw = cell(columns.image), cell(columns.label), [cell(index) for index in columns.box]
    if not file:
        tell("missing-key", where, "it names no image", "give the image's file, or remove the line")
        return
    size = None
    if columns.size is not None:
        width, height = (_number(cell(index)) for index in columns.size)
        if width is not None and height is not None and width >= 1 and height >= 1:
            size = int(width), int(height)
    split = cell(columns.split).lower() if columns.split is not None else ""
    objects: list[Boxed] = []
    if any(raw):
        a, b, c, d = (_number(text) for text in raw)
        if a is None or b is None or c is None or d is None:
            shown = ", ".join(raw)
            tell("box-value", where, f"its box {shown} is not four numbers", "correct it, or leave all four empty")
            return
        if not label:
            tell("missing-key", where, "it has a box and no label", "add the class")
            return
        box = (a, b, c - a, d - b) if columns.corners else (a, b, c, d)
        objects.append(Boxed(label, box, where))
    yield Entry(file.replace("\\", "/"), size, objects, where, split)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) < 1e9 else None


def xml_files(folder: Path) -> list[Path]:
    """The xml files of a folder in the order of their names."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith(".xml") and name[0] != ".")
    except OSError:
        return []
    return [folder / name for name in names]
