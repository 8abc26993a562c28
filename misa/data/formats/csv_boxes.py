"""CSV of boxes, one object per line: image, label, and xmin ymin xmax ymax or x y width height, 0-based pixels.

    boxes.csv (any name) beside the images, with or without a column split; the file itself; train.csv and val.csv;
    or one in each of train/ and val/

Standard library only.
"""

import csv
import difflib
import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from misa.data.formats.coco import DataError
from misa.data.formats.parts import (
    SPLITS,
    Boxed,
    Entry,
    Format,
    NotText,
    Part,
    ReportFault,
    files_of,
    number,
    read_text,
    size_in,
    split_folders,
    with_rest,
)

COLUMNS = {
    "image": (
        *("image", "filename", "file", "imagefile", "imagename", "imagepath", "path", "imageid", "img", "filepath"),
    ),
    "label": ("label", "class", "name", "category", "classname", "labelname", "categoryname"),
    "corners of the box": ("xmin ymin xmax ymax", "x1 y1 x2 y2", "left top right bottom", "x0 y0 x1 y1"),
    "or its top left corner": ("x y", "xmin ymin", "left top", "boxx boxy", "bboxx bboxy"),
    # Names that mean the sides of the box come before those that may mean the sides of the image.
    "and its sides": ("boxwidth boxheight", "bboxwidth bboxheight", "boxw boxh", "w h", "width height"),
    "size of the image": ("width height", "imagewidth imageheight", "imgwidth imgheight"),
    "split": ("split", "set", "subset", "fold"),
}
"""Accepted names of the columns, in lower case without spaces and underscores; the first one present counts."""
_CORNERS, _CORNER, _SIDES = (
    [names.split() for names in COLUMNS[key]]
    for key in ("corners of the box", "or its top left corner", "and its sides")
)
_BOXES = (*_CORNERS, *(corner + sides for sides in _SIDES for corner in _CORNER))
_NAMES = {name for accepted in COLUMNS.values() for names in accepted for name in names.split()}
_NAMELESS = "image, x1, y1, x2, y2, label"  # the columns of a file without a header


class _Columns(NamedTuple):
    image: int
    label: int | None
    box: tuple[int, int, int, int]
    corners: bool
    size: tuple[int, int] | None
    split: int | None


def find(root: Path) -> list[Part]:
    """Find the CSV files of a folder and of its splits; `root` may be the file itself."""
    if root.suffix.lower() == ".csv" and root.is_file():
        return [Part((root,), root.parent, "", root.parent)]
    found = files_of(root, ".csv")
    named = {path: SPLITS[path.stem.lower()] for path in found if path.stem.lower() in SPLITS}
    others = [path for path in found if path not in named]
    rest = Part((others[0],), root, "", root) if len(others) == 1 else None
    inner = [(path, folder, split) for folder, split in split_folders(root) for path in files_of(folder, ".csv")]
    if named:
        return with_rest([Part((path,), root, split, root) for path, split in named.items()], rest)
    if len(found) > 1 and not inner:
        names = ", ".join(path.name for path in found[:8])
        raise DataError(f"{root} holds several csv files ({names}); give one of them, or call them train.csv, val.csv.")
    return with_rest([Part((path,), folder, split, folder) for path, folder, split in inner], rest)


def left(root: Path, read: Collection[Path]) -> list[Path]:
    """Returns the csv files of a folder and of its splits, but for those that are read."""
    folders = [root, *(folder for folder, _ in split_folders(root))]
    return [path for folder in folders for path in files_of(folder, ".csv") if path not in read]


def entries(part: Part, report: ReportFault) -> Iterator[Entry]:
    """Yield an entry per line; a line without a box is an image without objects.

    The first line names the columns: image, label and box, optionally width and height of the image and split (train,
    val, test). Without a header the columns are image, x1, y1, x2, y2, label. The label may be absent if the part needs
    no classes.
    Raises DataError: it is not a CSV file, or a column is missing.
    """
    (path,) = part.files
    try:
        text = read_text(path)
        delimiter = max(",;\t|", key=text.partition("\n")[0].count)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        first = next(rows, [])
        nameless = len(first) == 6 or (len(first) == 5 and not part.classes)
        if nameless and all(number(cell) is not None or not cell for cell in first[1:5]):
            columns = _Columns(0, 5 if len(first) == 6 else None, (1, 2, 3, 4), True, None, None)
            yield from _line(first, columns, f"{path}, line 1", part, report)
        else:
            columns = _columns(path, first, part.classes)
        for row in rows:
            if any(cell.strip() for cell in row):
                yield from _line(row, columns, f"{path}, line {rows.line_num}", part, report)
    except (OSError, NotText, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a csv ({error}); save it as comma-separated UTF-8.") from error


def _columns(path: Path, first: Sequence[str], classes: bool) -> _Columns:
    names = [_plain(cell) for cell in first]
    image, label, split = (
        next((names.index(name) for name in COLUMNS[key] if name in names), None) for key in ("image", "label", "split")
    )
    form = next((form for form in _BOXES if set(form) <= set(names)), None)
    if label is None and not classes:  # unless the name is misspelt
        others = [name for name in names if name not in _NAMES]
        classes = any(difflib.get_close_matches(name, COLUMNS["label"], 1, cutoff=0.8) for name in others)
    if image is None or form is None or (label is None and classes):
        raise DataError(_misnamed(path, first, form))
    x, y, w, h = (names.index(name) for name in form)
    sizes = (pair.split() for pair in COLUMNS["size of the image"])
    sides = next(((a, b) for a, b in sizes if {a, b} <= set(names) - set(form)), None)
    size = None if sides is None else (names.index(sides[0]), names.index(sides[1]))
    return _Columns(image, label, (x, y, w, h), form in _CORNERS, size, split)


def _plain(cell: str) -> str:
    """Normalize a column's name for comparison."""
    return cell.strip().lower().replace("_", "").replace(" ", "")


def _misnamed(path: Path, first: Sequence[str], form: Sequence[str] | None) -> str:
    """Returns the message on a header without the required columns; form: the names of the box, if found."""
    shown = {_plain(cell): cell.strip() for cell in first if cell.strip()}
    there = f"its first line is {', '.join(shown.values()) or 'empty'}"
    if sum(number(cell) is not None for cell in first) >= 2:
        return f"{path} has no names of columns: {there}; write them above, or give the columns {_NAMELESS}."

    def fit(names: Sequence[str]) -> tuple[int, int]:
        near = {close for name in names for close in difflib.get_close_matches(name, shown, 1)}
        return len(shown.keys() & set(names)), len(near) if len(near) > 1 else 0

    # The form of a box with the most columns present, then with the most similar names.
    sides = form or max(_BOXES, key=fit)
    wanted = {"image": COLUMNS["image"], **{side: (side,) for side in sides}, "label": COLUMNS["label"]}
    absent = {key: names for key, names in wanted.items() if not shown.keys() & set(names)}
    free = shown.keys() - {name for names in wanted.values() for name in names}
    pairs = [
        (max(difflib.SequenceMatcher(None, name, other).ratio() for other in names), name, key)
        for key, names in absent.items()
        for name in free
    ]
    guesses: dict[str, str] = {}
    for ratio, name, key in sorted(pairs, reverse=True):
        if ratio >= 0.6 and key not in guesses and name not in guesses.values():
            guesses[key] = name
    likely = ", ".join(f"{shown[guesses[key]]!r} for {key}" for key in absent if key in guesses)
    known = [f"{key} may be called {', '.join(COLUMNS[key])}" for key in ("image", "label") if key in absent]
    if form is None:
        sided = f"x y (top left) with {', '.join(map(' '.join, _SIDES))}"
        known.append(f"a box is {', '.join(COLUMNS['corners of the box'])}, or {sided}")
    likely = f"probably {likely}; " if likely else ""
    return (
        f"{path} has no column {', '.join(absent)}: {there}; {likely}{'; '.join(known)} "
        "(capitals, spaces and underscores do not matter)."
    )


def _line(row: Sequence[str], columns: _Columns, where: str, part: Part, report: ReportFault) -> Iterator[Entry]:
    def cell(index: int | None) -> str:
        return row[index].strip() if index is not None and index < len(row) else ""

    file, label, raw = cell(columns.image), cell(columns.label), [cell(index) for index in columns.box]
    if not file:
        report("missing-key", where, "it names no image", "give the image's file, or remove the line")
        return
    size = None if columns.size is None else size_in(cell(columns.size[0]), cell(columns.size[1]))
    word = cell(columns.split).lower()
    if word and word not in SPLITS:
        report("split", where, f"its split is {word!r}", "write train, val or test")
    objects: list[Boxed] = []
    if any(raw):
        a, b, c, d = (number(text) for text in raw)
        if a is None or b is None or c is None or d is None:
            shown = ", ".join(raw)
            report("box-value", where, f"its box {shown} is not four numbers", "correct it, or leave all four empty")
            return
        if not label and part.classes:
            report("missing-key", where, "it has a box and no label", "add the class")
            return
        if columns.corners and (a > c or b > d):
            report("box-swapped", where, f"its box {', '.join(raw)} ends before it begins", "give x1 < x2 and y1 < y2")
            return
        objects.append(Boxed(label, (a, b, c - a, d - b) if columns.corners else (a, b, c, d), where))
    yield Entry(file, size, objects, where, part.split or SPLITS.get(word, ""))


CSV = Format(find, entries, "boxes.csv with the columns image, xmin, ymin, xmax, ymax, label (and split)", left=left)
