"""Run-length encoding of masks given as crops, without allocating the full image.

Axes: n instance · h row · w column.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

Runs = dict[str, Any]
"""COCO's compressed RLE: `size` [h, w] and `counts` as text."""


class Part(NamedTuple):
    """A mask cropped to its extent: `pixels` (h w), whose first one lies at (`top`, `left`) of the image."""

    top: int
    left: int
    pixels: NDArray[np.bool_]


def trimmed(top: int, left: int, pixels: NDArray[np.bool_]) -> Part:
    """Crop a mask (h w), whose first pixel lies at (`top`, `left`), to its extent."""
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    if len(rows) == 0:
        return Part(0, 0, np.zeros((0, 0), bool))
    inner = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Part(top + int(rows[0]), left + int(columns[0]), inner)


def encode_part(pixels: NDArray[np.bool_], top: int, left: int, size: tuple[int, int]) -> Runs:
    """Encode a mask of an image of `size` (h, w) given by its crop `pixels` (h w) at (`top`, `left`)."""
    if min(top, left) < 0 or top + pixels.shape[0] > size[0] or left + pixels.shape[1] > size[1]:
        raise ValueError(f"a part of {pixels.shape} at ({top}, {left}) does not lie within an image of {size}.")
    steps = np.diff(np.pad(pixels.astype(np.int8), ((1, 1), (0, 0))), axis=0).T  # column by column, as COCO counts
    columns, starts = np.nonzero(steps == 1)
    _, ends = np.nonzero(steps == -1)
    base = (columns.astype(np.int64) + left) * size[0] + top
    first, last = base + starts, base + ends
    # A run that ends at the bottom of a column continues in a run from the top of the next.
    apart = np.ones(len(first) + 1, bool)
    apart[1:-1] = first[1:] != last[:-1]
    edges = np.stack([first[apart[:-1]], last[apart[1:]]], axis=1).reshape(-1)
    counts = np.diff(np.concatenate([[0], edges, [size[0] * size[1]]])).tolist()
    if counts[-1] == 0 and len(counts) > 1:
        counts.pop()
    return _text(rle.frPyObjects({"counts": counts, "size": list(size)}, *size))


def encode(mask: NDArray[np.bool_]) -> Runs:
    """Encode a full mask (h w)."""
    return _text(rle.encode(np.asfortranarray(mask, dtype=np.uint8)))


def decode(runs: Runs) -> NDArray[np.bool_]:
    """Decode to a full mask (h w)."""
    return np.asarray(rle.decode(runs), dtype=bool)


def decode_part(runs: Runs) -> Part:
    """Decode to the crop at the mask's tight box."""
    left, top, width, height = (int(side) for side in rle.toBbox(runs))
    if not width or not height:
        return Part(top, left, np.zeros((0, 0), bool))
    # Only the columns of the box are decoded: hundreds of instances of a huge image must fit into memory and time.
    rows = int(runs["size"][0])
    edges = np.cumsum(_lengths(runs["counts"])) - left * rows
    steps = np.zeros(width * rows + 1, np.int8)
    # The two edges around an empty run cancel.
    np.add.at(steps, edges[::2][: len(edges) // 2], 1)
    np.add.at(steps, np.minimum(edges[1::2], width * rows), -1)
    inside = np.cumsum(steps[:-1], dtype=np.int8).astype(bool).reshape(width, rows).T
    return Part(top, left, inside[top : top + height].copy(order="C"))


def _lengths(counts: str | bytes) -> NDArray[np.int64]:
    """Decode pycocotools' text: 5 bits per character, lowest first; numbers are differences to the last but one."""
    codes = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values -= np.where(codes[ends] & 16, np.int64(1) << (5 * (ends - starts + 1)), 0)
    # The first three are absolute; from the fourth on there are two interleaved cumulative sums.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _text(runs: Runs) -> Runs:
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode()}
