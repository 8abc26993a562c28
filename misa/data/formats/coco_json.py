"""COCO json as annotation tools write it, and the form of it that mmdet and pycocotools read without surprise.

    Roboflow      train/_annotations.coco.json beside its images; valid/, test/
    CVAT          annotations/instances_default.json, images/default/
    Label Studio  result.json, images/
    FiftyOne      labels.json, data/
    one json      any name, beside its images or a folder of them; or the json itself

`plain` settles what readers take differently: ids and sizes as text, `iscrowd` that is left out, `ignore`, empty
masks, areas. Needs pycocotools for areas alone.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from misa.data.formats.coco import DataError
from misa.data.formats.parts import (
    Boxed,
    Entry,
    Format,
    Part,
    Tell,
    child,
    files_of,
    image_folder,
    split_folders,
    split_in,
)
from misa.errors import number, whole

TABLES = ("images", "annotations", "categories")
_OTHERS = ("captions", "person_keypoints", "stuff", "panoptic", "image_info")  # published beside the instances
# An area that differs from the mask's by more than this share, and by more than some pixels, is wrong.
_AREA_SHARE, _AREA_PIXELS = 0.05, 8.0


class BadJson(DataError):
    """A file that is no json: `place` in it ("" for all of it), `message` and `cure`."""

    def __init__(self, path: Path, kind: str, place: str, message: str, cure: str) -> None:
        super().__init__(f"{path}{', ' if place else ''}{place}: {message}; {cure}.")
        self.kind, self.place, self.message, self.cure = kind, place, message, cure


def read_json(path: Path) -> Any:
    """A json file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark; BadJson says where it is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"it cannot be read ({error.strerror})"
        raise BadJson(path, "unreadable", "", message, "give an annotation file that is there") from error
    try:
        found = json.loads(content)
        if isinstance(found, dict) and any(content.count(f'"{key}"'.encode()) > 1 for key in TABLES):
            _require_single(path, content)
        return found
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        ended = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
        message = "the file ends too early" if ended else f"it is not json ({error.msg})"
        cure = "copy or download it again" if ended else "correct it there"
        raise BadJson(path, "not-json", place, message, cure) from error
    except (ValueError, RecursionError) as error:  # no unicode, a number of thousands of digits, endless nesting
        message = f"it is not json ({error})"
        raise BadJson(path, "not-json", "", message, "give a COCO annotation file") from error


def _require_single(path: Path, content: bytes) -> None:
    """BadJson where a table is there twice, of which json would keep the last without a word."""
    keys: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys[:] = [key for key, _ in pairs]  # the outermost object ends last
        return {}

    json.loads(content, object_pairs_hook=keep)
    if twice := [key for key in TABLES if keys.count(key) > 1]:
        raise BadJson(path, "duplicate-key", "", f"it has '{twice[0]}' more than once", "put all in one list")


def other_kind(content: dict[str, Any]) -> str:
    """The kind of a COCO file that holds no instances, panoptic or captions; else ""."""
    rows = content.get("annotations")
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    return "panoptic" if "segments_info" in first else "captions" if "caption" in first and "bbox" not in first else ""


def find(root: Path) -> list[Part]:
    """COCO jsons by split, with the folder of their images."""
    if root.is_file():
        return [Part((root,), _images(root.parent, root), "", root.parent)] if _is_coco(root) else []
    found: list[Part] = []
    for folder, split in split_folders(root):
        if path := _only(_jsons(folder), folder):
            found.append(Part((path,), image_folder(folder), split, folder))
    if found:
        return found
    for place in (child(root, "annotations"), root, child(root, "labels")):
        files = [] if place is None else _jsons(place)
        by_split: dict[str, list[Path]] = {}
        for path in files:
            by_split.setdefault(split_in(path.stem), []).append(path)
        named = {split: paths for split, paths in by_split.items() if split} or by_split
        if files and place is not None:
            chosen = [(split, _only(paths, place)) for split, paths in named.items()]
            return [Part((path,), _images(root, path), split, root) for split, path in chosen if path is not None]
    return []


def _jsons(folder: Path) -> list[Path]:
    files = [path for path in files_of(folder, ".json") if _is_coco(path)]
    return [path for path in files if not path.name.startswith(_OTHERS)] or files


def _only(files: list[Path], folder: Path) -> Path | None:
    """The file of instances; DataError where it cannot be told."""
    named = [path for path in files if path.name.startswith("instances")]
    if len(files) > 1 and len(named) != 1:
        names = ", ".join(path.name for path in files[:8])
        raise DataError(f"{folder} holds several COCO files ({names}); give one of them, or move the others away.")
    return named[0] if named else files[0] if files else None


def _is_coco(path: Path) -> bool:
    """Whether a json begins or ends with COCO's tables."""
    if path.suffix.lower() != ".json":
        return False
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
            file.seek(max(file.seek(0, 2) - (1 << 16), 0))
            ends = (head + file.read()).replace(b"\0", b"")  # UTF-16 as well
    except OSError:
        return False
    return (
        sum(f'"{key}"'.encode() in ends for key in (*TABLES, "image_id", "file_name")) >= 2 and b'"shapes"' not in ends
    )


def _images(root: Path, path: Path) -> Path:
    """Of an annotation file the folder of its images: called as its subset, its split, images or data."""
    subset = path.stem.removeprefix("instances_")
    names = dict.fromkeys(name for name in (subset, split_in(path.stem)) if name)
    inner = image_folder(root)
    for folder in (inner, root):
        for name in names:
            if (found := child(folder, name, f"{name}2017")) is not None and os.path.isdir(found):
                return found
    return inner


def plain(content: dict[str, Any], *, areas: bool = True) -> bool:
    """Bring the tables of a COCO file into one form, in place; whether anything was changed. Wrong rows stay.

    Ids and sizes that are texts become numbers, where all of a table's ids are texts from 1 on if they must. A missing
    `iscrowd` is 0, `ignore` is a crowd (which is neither taught nor scored), an empty mask is []. areas: an area that
    contradicts the mask becomes the mask's, a missing one without a mask the box's.
    """
    tables: dict[str, list[Any]] = {key: content[key] for key in TABLES if isinstance(content.get(key), list)}
    ids = {key: _numbered(rows) for key, rows in tables.items()}
    changed = any(ids.values())
    sizes: dict[Any, tuple[Any, Any]] = {}
    for row in tables.get("images", ()):
        if isinstance(row, dict):
            for side in ("width", "height"):
                value = row.get(side)
                if isinstance(value, str | float) and (found := _whole(value)) is not None:
                    row[side], changed = found, True
            if isinstance(row.get("id"), int):
                sizes[row["id"]] = row.get("width"), row.get("height")
    for row in tables.get("annotations", ()):
        if isinstance(row, dict):
            changed |= _plain_references(row, ids)
            changed |= plain_annotation(
                row, sizes.get(row.get("image_id") if whole(row.get("image_id")) else None), areas
            )
    return changed


def _numbered(rows: list[Any]) -> dict[str, int]:
    """Numbers in the place of ids that are all texts: what they say, or from 1 on; by the text."""
    texts = [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]
    if not texts or len(texts) != len(rows):
        return {}
    said = [_whole(text) for text in texts]
    fit = None not in said and len(set(said)) == len(set(texts))
    order = {text: i for i, text in enumerate(dict.fromkeys(texts), 1)}
    table = {t: int(s) if fit and s is not None else order[t] for t, s in zip(texts, said, strict=True)}
    for row in rows:
        row["id"] = table[row["id"]]
    return table


def _plain_references(row: dict[str, Any], ids: dict[str, dict[str, int]]) -> bool:
    changed = False
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        value = row.get(key)
        if isinstance(value, str):
            found = ids.get(table, {}).get(value, None if ids.get(table) else _whole(value))
            if found is not None:
                row[key], changed = found, True
    return changed


def plain_annotation(row: dict[str, Any], size: tuple[Any, Any] | None, areas: bool) -> bool:
    """`plain` for one annotation of an image of (width, height)."""
    before = row.get("iscrowd"), row.get("segmentation"), row.get("area")
    if "iscrowd" not in row or row["iscrowd"] is None:
        row["iscrowd"] = 0
    elif isinstance(row["iscrowd"], bool):
        row["iscrowd"] = int(row["iscrowd"])
    if is_ignored(row) and row["iscrowd"] == 0:
        row["iscrowd"] = 1
    if "segmentation" in row and is_empty(row["segmentation"]):
        row["segmentation"] = []
    if areas:
        _plain_area(row, size)
    after = row.get("iscrowd"), row.get("segmentation"), row.get("area")
    return any(a is not b and a != b for a, b in zip(before, after, strict=True)) or before[0] is None


def is_ignored(row: dict[str, Any]) -> bool:
    """Whether an object is marked to be ignored, which mmdet leaves out and pycocotools would score."""
    return row.get("ignore") in (1, True, "1", "true")


def is_empty(mask: Any) -> bool:
    """Whether a segmentation is none, in the forms that tools for boxes write."""
    if isinstance(mask, list):
        return all(part == [] for part in mask)
    if isinstance(mask, dict):
        return not mask.get("counts")
    return mask is None


def _plain_area(row: dict[str, Any], size: tuple[Any, Any] | None) -> None:
    mask, said = row.get("segmentation"), row.get("area")
    if is_empty(mask):
        box = row.get("bbox")
        if isinstance(box, list) and len(box) == 4 and all(map(number, box)):
            true = max(box[2], 0) * max(box[3], 0)
            # A mask that was taken out leaves its area, which is smaller than its box.
            if not (number(said) and 0 < said <= (1 + _AREA_SHARE) * true + _AREA_PIXELS):  # type: ignore[operator]
                row["area"] = true
        return
    if size is None or not all(whole(side) and 0 < side < 10**6 for side in size):
        return
    rough = _rough_area(mask)
    if rough is not None and number(said) and abs(said - rough) <= max(_AREA_PIXELS, _AREA_SHARE * rough):  # type: ignore[operator]
        return
    true = _area(mask, size)
    if true is not None and not (number(said) and abs(said - true) <= max(_AREA_PIXELS, _AREA_SHARE * true)):  # type: ignore[operator]
        row["area"] = true


def _rough_area(mask: Any) -> float | None:
    """The area of polygons that do not overlap, or of run lengths as a list."""
    if isinstance(mask, dict):
        counts = mask.get("counts")
        return float(sum(counts[1::2])) if isinstance(counts, list) and all(map(whole, counts)) else None
    total = 0.0
    for part in mask if isinstance(mask, list) else ():
        if not isinstance(part, list) or not all(map(number, part)):
            return None
        xs, ys = part[::2], part[1::2]
        total += (
            abs(sum(a * d - b * c for a, b, c, d in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=False))) / 2
        )
    return total


def _area(mask: Any, size: tuple[Any, Any]) -> float | None:
    """The mask's number of pixels; None where it cannot be decoded, which the check tells."""
    from pycocotools import mask as rle

    from misa.data.check.masks import broken_runs, mask_fault

    width, height = size
    if mask_fault(mask, height, width) is not None:
        return None
    if isinstance(mask, list):
        return float(rle.area(rle.merge(rle.frPyObjects(mask, height, width))))
    if isinstance(mask["counts"], list):
        return float(sum(mask["counts"][1::2]))
    return None if broken_runs([mask["counts"]], [height * width])[0] else float(rle.area(mask))


def _whole(value: Any) -> int | None:
    """A whole number that is written as a text or with a fraction of 0."""
    try:
        found = float(value)
        return int(found) if found == int(found) and abs(found) < 2**53 else None
    except (ValueError, OverflowError):
        return None


def entries(part: Part, tell: Tell) -> Iterator[Entry]:
    """An entry an image with its objects, crowds marked as hard; DataError where a row is none of COCO's."""
    (path,) = part.files
    content = read_json(path)
    try:
        plain(content, areas=False)
        names = {row["id"]: str(row["name"]) for row in content["categories"]}
        objects: dict[Any, list[Boxed]] = {row["id"]: [] for row in content["images"]}
        for row in content["annotations"]:
            x, y, w, h = (float(side) for side in row["bbox"])
            where = f"{path}, annotation {row.get('id')}"
            mask = row.get("segmentation") or None
            hard = bool(row["iscrowd"])
            objects[row["image_id"]].append(Boxed(names[row["category_id"]], (x, y, w, h), where, hard, mask))
        for row in content["images"]:
            size = (row["width"], row["height"]) if "width" in row and "height" in row else None
            yield Entry(str(row["file_name"]), size, objects[row["id"]], str(path), part.split)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"{path} is no COCO json with boxes ({error!r}); `misa check` says what is wrong.") from error


COCO = Format(find, entries, "annotations/instances_train2017.json, train2017/1.jpg; a json beside its images")
