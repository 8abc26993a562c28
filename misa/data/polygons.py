"""Masks as COCO's polygons, traced along the edges of the pixels: without simplification they decode to the same mask.

A pixel (row r, column c) covers c ≤ x < c + 1, r ≤ y < r + 1. COCO has no holes; a polygon around one is cut open along
a seam of no width, which even-odd filling (pycocotools, OpenCV, annotation tools) does not see.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

Loop = NDArray[np.int32]
"""The corners (k 2: x, y) of a closed line, clockwise around pixels, counter-clockwise around a hole."""

_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # east, south, west, north as x, y


def polygons(pixels: NDArray[np.bool_], *, top: int = 0, left: int = 0, tolerance: float = 0.0) -> list[list[float]]:
    """A mask that is `pixels` (h w) from (`top`, `left`) on as flat lists x1 y1 x2 y2 …, the largest piece first.

    tolerance: how far, in pixels, a corner that is left out may lie from the polygon (Douglas and Peucker 1973).
    Pieces and holes of at most tolerance² pixels are left out, but not the largest piece. Every polygon has three
    corners or more; a mask without pixels has none.
    """
    if not tolerance >= 0:
        raise ValueError(f"polygons needs a tolerance of 0 or more: it is {tolerance}.")
    traced = sorted(loops(pixels), key=_area, reverse=True)
    pieces = [loop for i, loop in enumerate(traced) if _area(loop) > tolerance**2 or (i == 0 and _area(loop) > 0)]
    found = [_simple(loop, tolerance) for loop in pieces]
    for hole in (loop for loop in traced if _area(loop) < -(tolerance**2)):
        owner = max(i for i, piece in enumerate(pieces) if _holds(piece, hole))  # the smallest that is around it
        found[owner] = _joined(found[owner], _simple(hole, tolerance))
    return [[float(side) for side in (loop + np.array([left, top])).reshape(-1)] for loop in found]


def loops(pixels: NDArray[np.bool_]) -> list[Loop]:
    """The borders of a mask (h w) as closed lines; pixels that touch at a corner only are apart."""
    inside = np.pad(pixels, 1)
    core = inside[1:-1, 1:-1]
    ahead: dict[tuple[int, int], list[int]] = {}
    # Of each side of a pixel where it begins and which way it goes: around the pixel clockwise.
    for way, (beyond, dx, dy) in enumerate(
        ((inside[:-2, 1:-1], 0, 0), (inside[1:-1, 2:], 1, 0), (inside[2:, 1:-1], 1, 1), (inside[1:-1, :-2], 0, 1))
    ):
        rows, columns = np.nonzero(core & ~beyond)
        for corner in zip((columns + dx).tolist(), (rows + dy).tolist(), strict=True):
            ahead.setdefault(corner, []).append(way)
    found = []
    for first in sorted(ahead):
        while ahead[first]:
            found.append(_followed(ahead, first))
    return found


def _followed(ahead: dict[tuple[int, int], list[int]], first: tuple[int, int]) -> Loop:
    """One border from its leftmost corner on, its sides taken out of `ahead`; only the corners where it turns."""
    corners, place, way = [first], first, ahead[first].pop()
    while True:
        dx, dy = _STEPS[way]
        place = place[0] + dx, place[1] + dy
        if place == first:
            return np.array(corners, np.int32)
        right = (way + 1) % 4  # around the same pixel, where another one touches it
        following = right if right in ahead[place] else ahead[place][0]
        ahead[place].remove(following)
        if following != way:
            corners.append(place)
        way = following


def _area(loop: NDArray[np.int32]) -> float:
    """By the shoelace formula; of a hole negative."""
    x, y = loop.T.astype(np.float64)
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _simple(loop: Loop, tolerance: float) -> Loop:
    """With fewer corners; as it is where too little would be left."""
    if tolerance == 0:
        return loop
    fewer: Loop = cv2.approxPolyDP(loop[:, None], tolerance, closed=True)[:, 0].astype(np.int32)
    return fewer if len(fewer) > 2 and _area(fewer) * _area(loop) > 0 else loop


def _holds(piece: Loop, hole: Loop) -> bool:
    """Whether a hole lies in a piece: the pixel at its leftmost corner, of these the topmost, is one of the hole's."""
    x, y = min(hole.tolist())
    return cv2.pointPolygonTest(piece[:, None].astype(np.float32), (x + 0.5, y + 0.5), False) > 0


def _joined(piece: Loop, hole: Loop) -> Loop:
    """One line around a piece and, over a seam between their nearest corners and back, around its hole."""
    apart = ((piece[:, None] - hole[None]) ** 2).sum(axis=2)
    i, j = np.unravel_index(int(apart.argmin()), apart.shape)
    return np.concatenate([piece[: i + 1], np.roll(hole, -j, axis=0), hole[j : j + 1], piece[i:]])
