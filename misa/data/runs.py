"""Run lengths of masks that are known within their extent only: nothing of the image's size is made.

Axes: n instance · h row · w column.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

Runs = dict[str, Any]
"""COCO's run lengths: `size` [h, w] and `counts` as text."""


def encode_part(pixels: NDArray[np.bool_], top: int, left: int, size: tuple[int, int]) -> Runs:
    """A mask of an image of `size` (h, w) that is `pixels` (h w) from (`top`, `left`) on and empty elsewhere."""
    if min(top, left) < 0 or top + pixels.shape[0] > size[0] or left + pixels.shape[1] > size[1]:
        raise ValueError(f"a part of {pixels.shape} at ({top}, {left}) does not lie within an image of {size}.")
    steps = np.diff(np.pad(pixels.astype(np.int8), ((1, 1), (0, 0))), axis=0).T  # column by column, as COCO counts
    columns, starts = np.nonzero(steps == 1)
    _, ends = np.nonzero(steps == -1)
    base = (columns.astype(np.int64) + left) * size[0] + top
    first, last = base + starts, base + ends
    # A run to the bottom of a column and one from the top of the next are one.
    apart = np.ones(len(first) + 1, bool)
    apart[1:-1] = first[1:] != last[:-1]
    edges = np.stack([first[apart[:-1]], last[apart[1:]]], axis=1).reshape(-1)
    counts = np.diff(np.concatenate([[0], edges, [size[0] * size[1]]])).tolist()
    if counts[-1] == 0 and len(counts) > 1:
        counts.pop()
    return _text(rle.frPyObjects({"counts": counts, "size": list(size)}, *size))


def encode(mask: NDArray[np.bool_]) -> Runs:
    """A whole mask (h w)."""
    return _text(rle.encode(np.asfortranarray(mask, dtype=np.uint8)))


def decode(runs: Runs) -> NDArray[np.bool_]:
    """A mask (h w)."""
    return np.asarray(rle.decode(runs), dtype=bool)


def decode_part(runs: Runs) -> tuple[int, int, NDArray[np.bool_]]:
    """Top, left and the pixels within a mask's extent."""
    left, top, width, height = (int(side) for side in rle.toBbox(runs))
    # A copy: a view would hold the whole image's mask, which hundreds of instances cannot afford.
    return top, left, rle.decode(runs)[top : top + height, left : left + width].astype(bool, order="C")


def _text(runs: Runs) -> Runs:
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode()}
