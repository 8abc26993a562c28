"""Prediction of very large images in overlapping tiles, whose instances are merged.

Axes: n instance · h row · w column.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from misa.data.rle import Part, decode_part
from misa.engine.prediction.student import Image, Instances, Student, find

# Minimum IoU, within the overlap of two tiles, of two masks of the same object.
_SAME = 0.5


class Tile(NamedTuple):
    """A part of an image: rows `top` to `bottom`, columns `left` to `right`."""

    top: int
    left: int
    bottom: int
    right: int

    def common(self, other: "Tile") -> "Tile":
        """The intersection with another tile."""
        return Tile(*map(max, self[:2], other[:2]), *map(min, self[2:], other[2:]))

    @property
    def area(self) -> int:
        """In pixels; 0 for an empty intersection."""
        return max(self.bottom - self.top, 0) * max(self.right - self.left, 0)


class _Piece(NamedTuple):
    """An instance predicted in a tile: its mask cropped to its extent, in pixels of the whole image."""

    tile: int
    label: str
    score: float
    part: Part

    @property
    def extent(self) -> Tile:
        """Bounding box of its mask."""
        h, w = self.part.pixels.shape
        return Tile(self.part.top, self.part.left, self.part.top + h, self.part.left + w)


def tiles(size: tuple[int, int], side: int, overlap: int) -> list[Tile]:
    """Tile an image of `size` (h, w) by squares of `side` pixels; neighbors overlap by at least `overlap` pixels."""
    if not 0 <= overlap < side:
        raise ValueError(f"overlap must be at least 0 and below side ({side}); got {overlap}.")
    rows, columns = (_starts(length, side, side - overlap) for length in size)
    return [Tile(y, x, min(y + side, size[0]), min(x + side, size[1])) for y in rows for x in columns]


def _starts(length: int, side: int, step: int) -> list[int]:
    if length <= side:
        return [0]
    count = -(-(length - side) // step) + 1
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def find_tiled(
    student: Student,
    image: Image,
    *,
    side: int,
    overlap: int,
    batch: int = 1,
    score: float = 0.3,
    mask: float | None = None,
) -> Instances:
    """Run `find` on tiles of `side` pixels, and merge instances that continue in neighboring tiles.

    Instances of one class are merged if their masks agree in the overlap of two tiles; the highest score is kept. A
    tile must show enough of an object to find it: choose `side` several times larger than the objects. Tiles are
    resized like the row's test images; with `side` equal to the test size they keep their resolution.
    """
    places = tiles((image.shape[0], image.shape[1]), side, overlap)
    pieces: list[_Piece] = []
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        crops = [image[t.top : t.bottom, t.left : t.right] for t in some]
        for i, (tile, found) in enumerate(zip(some, find(student, crops, score=score, mask=mask), strict=True), first):
            for label, value, runs in zip(found.labels, found.scores, found.runs, strict=True):
                top, left, pixels = decode_part(runs)
                pieces.append(_Piece(i, label, float(value), Part(tile.top + top, tile.left + left, pixels)))
    return _joined(pieces, places, (image.shape[0], image.shape[1]))


def _joined(pieces: Sequence[_Piece], places: Sequence[Tile], size: tuple[int, int]) -> Instances:
    mine: dict[int, list[int]] = {}
    for i, piece in enumerate(pieces):
        mine.setdefault(piece.tile, []).append(i)
    sides = np.array(places).reshape(-1, 4)
    pairs = []
    for tile, own in mine.items():
        # Only instances of intersecting tiles can be the same object.
        touching = (sides[:tile, :2] < sides[tile, 2:]).all(axis=1) & (sides[:tile, 2:] > sides[tile, :2]).all(axis=1)
        for other in np.flatnonzero(touching).tolist():
            pairs += [(i, j) for i in own for j in mine.get(other, ()) if _same(pieces[i], pieces[j], places)]
    graph = coo_array((np.ones(len(pairs)), np.array(pairs, int).reshape(-1, 2).T), shape=(len(pieces),) * 2)
    count, groups = connected_components(graph, directed=False) if pieces else (0, np.zeros(0, int))
    members: list[list[_Piece]] = [[] for _ in range(count)]
    for piece, group in zip(pieces, groups.tolist(), strict=True):
        members[group].append(piece)
    whole = [_union(group) for group in members]
    whole.sort(key=lambda piece: -piece.score)
    return Instances.of_parts(size, [p.score for p in whole], [p.label for p in whole], [p.part for p in whole])


def _same(a: _Piece, b: _Piece, places: Sequence[Tile]) -> bool:
    if a.label != b.label or a.tile == b.tile:
        return False
    shared = places[a.tile].common(places[b.tile])
    if not (shared.common(a.extent).area and shared.common(b.extent).area):
        return False
    window = shared.common(_around([a, b]))  # restrict the comparison to their extents
    first, second = _cut(a, window), _cut(b, window)
    union = int((first | second).sum())
    return union > 0 and int((first & second).sum()) >= _SAME * union


def _around(pieces: Sequence[_Piece]) -> Tile:
    tops, lefts, bottoms, rights = zip(*(piece.extent for piece in pieces), strict=True)
    return Tile(min(tops), min(lefts), max(bottoms), max(rights))


def _cut(piece: _Piece, window: Tile) -> NDArray[np.bool_]:
    """Crop a piece's mask to a window of the image."""
    canvas = np.zeros((window.bottom - window.top, window.right - window.left), bool)
    top, left, bottom, right = both = window.common(piece.extent)
    if both.area:
        y, x = piece.part.top, piece.part.left
        inner = piece.part.pixels[top - y : bottom - y, left - x : right - x]
        canvas[top - window.top : bottom - window.top, left - window.left : right - window.left] = inner
    return canvas


def _union(pieces: Sequence[_Piece]) -> _Piece:
    best = max(pieces, key=lambda piece: piece.score)
    if len(pieces) == 1:
        return best
    window = _around(pieces)
    pixels = np.logical_or.reduce([_cut(piece, window) for piece in pieces])
    return best._replace(part=Part(window.top, window.left, pixels))
