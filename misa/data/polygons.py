"""Convert masks to COCO polygons along pixel edges: without simplification they decode to the same mask.

A pixel (row r, column c) covers c ≤ x < c + 1, r ≤ y < r + 1. COCO has no holes: the polygon around a hole is joined
with it by a seam of zero width, which even-odd filling (pycocotools, OpenCV, annotation tools) ignores.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

Loop = NDArray[np.int32]
"""The corners (k 2: x, y) of a closed contour, clockwise around pixels, counter-clockwise around a hole."""

_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # east, south, west, north as x, y


def polygons(pixels: NDArray[np.bool_], *, top: int = 0, left: int = 0, tolerance: float = 0.0) -> list[list[float]]:
    """Returns the polygons of a mask as flat lists x1 y1 x2 y2 …, the largest connected component first.

    The mask is given by its crop `pixels` (h w) at (`top`, `left`). tolerance: greatest distance in pixels of a dropped
    corner from the polygon (Douglas and Peucker 1973). Components and holes of at most tolerance² pixels are dropped,
    but never the largest component. Every polygon has at least three corners; an empty mask has no polygons.
    """
    if not tolerance >= 0:
        raise ValueError(f"polygons needs a tolerance of 0 or more: it is {tolerance}.")
    traced = sorted(loops(pixels), key=_area, reverse=True)
    pieces = [loop for i, loop in enumerate(traced) if _area(loop) > tolerance**2 or (i == 0 and _area(loop) > 0)]
    found = [_simple(loop, tolerance) for loop in pieces]
    for hole in (loop for loop in traced if _area(loop) < -(tolerance**2)):
        owner = max(i for i, piece in enumerate(pieces) if _holds(piece, hole))  # the smallest that contains it
        found[owner] = _joined(found[owner], _simple(hole, tolerance))
    return [[float(side) for side in (loop + np.array([left, top])).reshape(-1)] for loop in found]


def loops(pixels: NDArray[np.bool_]) -> list[Loop]:
    """Returns the closed contours of a mask (h w), with 4-connectivity."""
    inside = np.pad(pixels, 1)
    core = inside[1:-1, 1:-1]
    ahead: dict[tuple[int, int], list[int]] = {}
    # Start and direction of each border side of a pixel, clockwise around the pixel.
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
    """Follow one contour from its leftmost corner, removing its sides from `ahead`; returns only turning points."""
    corners, place, way = [first], first, ahead[first].pop()
    while True:
        dx, dy = _STEPS[way]
        place = place[0] + dx, place[1] + dy
        if place == first:
            return np.array(corners, np.int32)
        right = (way + 1) % 4  # stays with the same pixel where another one touches it at a corner
        following = right if right in ahead[place] else ahead[place][0]
        ahead[place].remove(following)
        if following != way:
            corners.append(place)
        way = following


def _area(loop: NDArray[np.int32]) -> float:
    """Returns the area by the shoelace formula; negative for a hole."""
    x, y = loop.T.astype(np.float64)
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _simple(loop: Loop, tolerance: float) -> Loop:
    """Simplify a contour; returns it unchanged if too few corners would be left."""
    if tolerance == 0:
        return loop
    fewer: Loop = cv2.approxPolyDP(loop[:, None], tolerance, closed=True)[:, 0].astype(np.int32)
    return fewer if len(fewer) > 2 and _area(fewer) * _area(loop) > 0 else loop


def _holds(piece: Loop, hole: Loop) -> bool:
    """Whether a hole lies in a component, tested by the pixel at the hole's leftmost (then topmost) corner."""
    x, y = min(hole.tolist())
    return cv2.pointPolygonTest(piece[:, None].astype(np.float32), (x + 0.5, y + 0.5), False) > 0


def _joined(piece: Loop, hole: Loop) -> Loop:
    """Join a component's contour with its hole's by a seam between their nearest corners."""
    apart = ((piece[:, None] - hole[None]) ** 2).sum(axis=2)
    i, j = np.unravel_index(int(apart.argmin()), apart.shape)
    return np.concatenate([piece[: i + 1], np.roll(hole, -j, axis=0), hole[j : j + 1], piece[i:]])
