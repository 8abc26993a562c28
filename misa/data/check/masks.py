"""Check that masks can be decoded: on invalid ones pycocotools and mmdet crash or read out of bounds.

A mask is a list of polygons (x, y, x, y, ...) in pixels, or an RLE {"size": [h, w], "counts": ...} with a list of
numbers or pycocotools' text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from misa.errors import whole

# Polygons are rasterized over their whole extent: a corner farther out takes minutes and all memory.
_FARTHEST = 1e6
# A 32-bit run length needs no more characters.
_LONGEST = 7
_TOGETHER = 1000


def mask_fault(segmentation: Any, height: int, width: int) -> str | None:
    """Returns what is wrong with a mask, to follow "segmentation", or None; text in `counts` is for `broken_runs`."""
    if isinstance(segmentation, list):
        if not segmentation:
            return "is empty"
        return None if all(map(_polygon, segmentation)) else "has a polygon that is not 3 or more corners x, y"
    if not isinstance(segmentation, dict):
        return "is neither polygons nor run lengths"
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        return f"is of size {size} (h, w), the image of [{height}, {width}]"
    if isinstance(counts, str) and counts:
        return None
    if not isinstance(counts, list) or not all(whole(run) and run >= 0 for run in counts):
        return "has counts that are not run lengths"
    return None if sum(counts) == height * width else "has counts that do not add up to the image"


def mask_fault_of(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with an annotation's mask in an image, text in `counts` included; see `mask_fault`."""
    mask, (height, width) = annotation["segmentation"], (image["height"], image["width"])
    fault = mask_fault(mask, height, width)
    if fault is None and isinstance(mask, dict) and isinstance(mask["counts"], str):
        return "has counts that cannot be decoded" if broken_runs([mask["counts"]], [height * width])[0] else None
    return fault


def _polygon(corners: Any) -> bool:
    if not isinstance(corners, list) or len(corners) < 6 or len(corners) % 2:
        return False
    try:
        values = np.asarray(corners)
    except ValueError:  # lists in it
        return False
    return values.ndim == 1 and values.dtype.kind in "iuf" and bool((np.abs(values) <= _FARTHEST).all())


def broken_runs(counts: Sequence[str], pixels: Sequence[int]) -> NDArray[np.bool_]:
    """Returns which texts (none empty) are not a valid RLE of a mask of the given number of pixels."""
    parts = range(0, len(counts), _TOGETHER)
    found = [_broken(counts[i : i + _TOGETHER], pixels[i : i + _TOGETHER]) for i in parts]
    return np.concatenate(found) if found else np.zeros(0, bool)


def _broken(counts: Sequence[str], pixels: Sequence[int]) -> NDArray[np.bool_]:
    texts = [text.encode("utf-8", "surrogatepass") for text in counts]
    lengths = np.array([len(text) for text in texts])
    codes = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48
    owner = np.repeat(np.arange(len(texts)), lengths)
    broken = np.zeros(len(texts), bool)
    broken[owner[(codes < 0) | (codes > 63)]] = True
    # A number has 5 bits per character, lowest first; the sixth bit means that more follow.
    ends = (codes & 32) == 0
    last = np.cumsum(lengths) - 1
    broken |= ~ends[last]
    ends[last] = True
    stop = np.flatnonzero(ends)
    start = np.concatenate([[0], stop[:-1] + 1])
    owner, digits = owner[start], stop - start + 1
    broken[owner[digits > _LONGEST]] = True
    place = np.minimum(np.arange(len(codes)) - np.repeat(start, digits), _LONGEST)
    values = np.add.reduceat((codes & 31) << (5 * place), start)
    values -= np.where(codes[stop] & 16, np.int64(1) << (5 * np.minimum(digits, _LONGEST)), 0)
    # From the fourth on, a number is the difference to the last but one: two interleaved cumulative sums.
    index = np.arange(len(owner)) - np.flatnonzero(np.diff(owner, prepend=-1))[owner]
    totals = np.zeros(len(texts))
    for chosen in (index == 0, index % 2 == 1, (index % 2 == 0) & (index > 0)):
        whose, runs = owner[chosen], np.cumsum(values[chosen])
        heads = np.flatnonzero(np.diff(whose, prepend=-1))
        runs -= np.repeat(runs[heads] - values[chosen][heads], np.diff(heads, append=len(runs)))
        broken[whose[runs < 0]] = True
        totals += np.bincount(whose, weights=runs, minlength=len(texts))
    return broken | (totals != np.asarray(pixels))
