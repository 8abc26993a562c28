"""Normalize the rows of COCO files to the form that mmdet and pycocotools read correctly.

Ids, sizes and `iscrowd` given as strings or integral floats become integers. A missing `iscrowd` becomes 0, `ignore`
becomes a crowd (neither trained nor evaluated on), an empty mask []. An area that contradicts the mask is replaced by
the mask's, a missing one without a mask by the box's. Invalid rows are left unchanged. Areas need pycocotools.
"""

from typing import Any

from misa.errors import number, whole

# An area that differs from the mask's by more than both of these, a share and a number of pixels, is wrong.
_AREA_SHARE, _AREA_PIXELS = 0.05, 8.0


class TextIds:
    """Collects the ids of a table as long as all are strings, and numbers to replace them."""

    def __init__(self) -> None:
        self.texts: dict[str, None] | None = {}

    def see(self, row: Any) -> None:
        """Add a row of the table; an id that is not a string ends the collection."""
        if self.texts is not None:
            key = row.get("id") if isinstance(row, dict) else None
            if isinstance(key, str):
                self.texts[key] = None
            else:
                self.texts = None

    def numbers(self) -> dict[str, int]:
        """Returns a number per string: its value if all are distinct integers, else 1, 2, …; {} if some id is none."""
        said = {text: _whole(text) for text in self.texts or ()}
        if None not in said.values() and len(set(said.values())) == len(said):
            return {text: int(value) for text, value in said.items() if value is not None}
        return {text: i for i, text in enumerate(said, 1)}


def plain_id(row: Any, numbers: dict[str, int]) -> bool:
    """Replace a row's id by its number if it is a string of `numbers` or an integral float; returns whether it was."""
    key = row.get("id") if isinstance(row, dict) else None
    number = _whole(key) if isinstance(key, float) else numbers.get(key) if isinstance(key, str) else None
    if number is None:
        return False
    row["id"] = number
    return True


def reference_numbers(numbers: dict[str, int]) -> dict[Any, int]:
    """Returns the numbers of ids that were strings by what may refer to them: also as numbers, if they were such."""
    own = all(_whole(text) == number for text, number in numbers.items())
    return {**numbers, **({number: number for number in numbers.values()} if own else {})}


def plain_image(row: Any) -> bool:
    """Convert sizes given as strings or integral floats to integers, in place; returns whether there were any."""
    changed = False
    for side in ("width", "height") if isinstance(row, dict) else ():
        value = row.get(side)
        if isinstance(value, str | float) and (found := _whole(value)) is not None:
            row[side], changed = found, True
    return changed


def plain_references(row: dict[str, Any], images: dict[Any, int], categories: dict[Any, int]) -> bool:
    """Replace references to an image or a category that are no integers, in place; returns whether there were any.

    images, categories: `reference_numbers` of the table. Where its ids were strings and have been numbered anew, a
    number that is none of them becomes a text that no id has, as it would be that of another row.
    """
    changed = False
    for key, numbers in (("image_id", images), ("category_id", categories)):
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            continue
        found = _referred(value, numbers)
        if found is not None and found is not value:
            row[key], changed = found, True
    return changed


def _referred(value: str | float, numbers: dict[Any, int]) -> int | str | None:
    """Returns what a reference becomes; None if it is not understood."""
    whole = value if isinstance(value, int) else _whole(value)
    if not numbers:
        return whole
    found = next((numbers[form] for form in (value, whole, str(whole)) if form in numbers), None)
    return f"number {value}" if found is None and not isinstance(value, str) else found


def plain_annotation(row: dict[str, Any], size: tuple[Any, Any] | None, areas: bool) -> bool:
    """Normalize an annotation of an image of (width, height) in place; returns whether anything was changed.

    areas: also replace a wrong area.
    """
    before = row.get("iscrowd"), row.get("segmentation"), row.get("area")
    value = row.get("iscrowd")
    if value is None:
        row["iscrowd"] = 0
    elif isinstance(value, bool):
        row["iscrowd"] = int(value)
    elif isinstance(value, str | float) and (found := _whole(value)) in (0, 1):
        row["iscrowd"] = found
    if is_ignored(row) and row["iscrowd"] == 0:
        row["iscrowd"] = 1
    if "segmentation" in row and is_empty(row["segmentation"]):
        row["segmentation"] = []
    if areas:
        _plain_area(row, size)
    after = row.get("iscrowd"), row.get("segmentation"), row.get("area")
    return any(a is not b and a != b for a, b in zip(before, after, strict=True)) or before[0] is None


def is_ignored(row: dict[str, Any]) -> bool:
    """Whether an object is marked `ignore`, which mmdet drops and pycocotools would score."""
    return row.get("ignore") in (1, True, "1", "true")


def is_empty(mask: Any) -> bool:
    """Whether a segmentation is empty, in the forms that box tools write."""
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
            # The area may be that of a mask that was removed, which is smaller than the box.
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
    """Returns the area of an uncompressed RLE, or of polygons, assuming that they do not overlap."""
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
    """Returns the mask's number of pixels; None if it cannot be decoded, which the check reports."""
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
    """Returns the integer in a string or an integral float, else None."""
    try:
        found = float(value)
        return int(found) if found == int(found) and abs(found) < 2**53 else None
    except (ValueError, OverflowError):
        return None
