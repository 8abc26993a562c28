"""Place the objects of an embedded scene: apart, touching, overlapping or cut by the border.

Axes: n instance, h row, w column.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from misa.data.scenes.shapes import stamp

# Minimum number of covered pixels of an object: with fewer its texture cannot be recognized.
_LEAST_PIXELS = 24
_TRIES = 24


class Piece(NamedTuple):
    """One object before it is painted: its class, the covered share of each pixel (h w) and the object it touches."""

    label: int
    alpha: NDArray[np.float32]
    twin: int | None

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The pixels (h w) that the object covers by at least half, occluded ones included."""
        return self.alpha >= 0.5


def paste(patch: NDArray[np.float32], top: int, left: int, size: tuple[int, ...]) -> NDArray[np.float32]:
    """Returns an empty canvas (h w) with the patch at (top, left), cropped to the canvas."""
    canvas = np.zeros(size, np.float32)
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + patch.shape[0], size[0]), min(left + patch.shape[1], size[1])
    if y0 < y1 and x0 < x1:
        canvas[y0:y1, x0:x1] = patch[y0 - top : y1 - top, x0 - left : x1 - left]
    return canvas


def visible(pieces: list[Piece], size: tuple[int, ...]) -> NDArray[np.bool_]:
    """Returns the visible mask of each object (n h w): later objects occlude earlier ones."""
    seen = np.zeros((len(pieces), *size), bool)
    covered = np.zeros(size, bool)
    for index in range(len(pieces) - 1, -1, -1):
        mask = pieces[index].mask
        seen[index] = mask & ~covered
        covered |= mask
    return seen


def _anywhere(side: int, size: tuple[int, int], cut: bool, rng: Generator) -> tuple[int, int]:
    margin = side // 3 if cut else 0
    top = rng.integers(-margin, max(size[0] - side + margin, -margin) + 1)
    left = rng.integers(-margin, max(size[1] - side + margin, -margin) + 1)
    return int(top), int(left)


def _beside(patch: NDArray[np.float32], other: Piece, rng: Generator) -> tuple[int, int]:
    """Returns the position closest to `other` along a random direction at which the two do not overlap."""
    rows, columns = np.nonzero(other.mask)
    angle = rng.uniform(0, 2 * np.pi)
    side = patch.shape[0]
    place = (0, 0)
    reach = int(side + max(np.ptp(rows), np.ptp(columns)))
    for distance in range(reach, -1, -1):
        top = round(rows.mean() + distance * np.sin(angle) - side / 2)
        left = round(columns.mean() + distance * np.cos(angle) - side / 2)
        if (other.mask & (paste(patch, top, left, other.alpha.shape) >= 0.5)).any():
            break
        place = (top, left)
    return place


def _over(patch: NDArray[np.float32], other: Piece, rng: Generator) -> tuple[int, int]:
    """Returns a random position at which the patch covers a part of `other`."""
    rows, columns = np.nonzero(other.mask)
    angle = rng.uniform(0, 2 * np.pi)
    side = patch.shape[0]
    distance = rng.uniform(0.25, 0.5) * (side + max(np.ptp(rows), np.ptp(columns)))
    top = rows.mean() + distance * np.sin(angle) - side / 2
    left = columns.mean() + distance * np.cos(angle) - side / 2
    return round(top), round(left)


def _fits(pieces: list[Piece], new: Piece, least_inside: float, overlap: bool, least_visible: float, gap: int) -> bool:
    inside = new.mask.sum()
    if inside < max(_LEAST_PIXELS, least_inside):
        return False
    if not overlap:
        grown = cv2.dilate(new.mask.astype(np.uint8), np.ones((2 * gap + 1,) * 2, np.uint8)).astype(bool)
        return not any((grown & piece.mask).any() for piece in pieces)
    together = [*pieces, new]
    seen = visible(together, new.alpha.shape).sum(axis=(1, 2))
    whole = np.array([piece.mask.sum() for piece in together])
    return bool((seen >= np.maximum(least_visible * whole, _LEAST_PIXELS)).all())


def arrange(
    rng: Generator,
    *,
    size: tuple[int, int],
    objects: tuple[int, int],
    classes: int,
    scale: tuple[float, float],
    touching: float,
    occlusion: float,
    truncation: float,
    least_visible: float,
) -> list[Piece]:
    """Draw the number, classes and positions of the objects of one scene; later ones lie on top.

    An object that would occlude another too much, or finds no room, is tried at a few other positions, each time a
    little smaller, and then left out: every painted object is annotated.
    """
    pieces: list[Piece] = []
    for _ in range(int(rng.integers(objects[0], objects[1] + 1))):
        touch, over, cut = rng.random(3) < (touching, occlusion, truncation)
        other = int(rng.integers(len(pieces))) if pieces else None
        touch = touch and other is not None
        over = over and other is not None and not touch
        label = pieces[other].label if touch and other is not None else int(rng.integers(classes))
        diameter = min(size) * np.exp(rng.uniform(*np.log(scale)))
        for attempt in range(_TRIES):
            patch = stamp(label, diameter * 0.97**attempt, rng)
            if touch and other is not None:
                top, left = _beside(patch, pieces[other], rng)
            elif over and other is not None:
                top, left = _over(patch, pieces[other], rng)
            else:
                top, left = _anywhere(patch.shape[0], size, bool(cut), rng)
            new = Piece(label, paste(patch, top, left, size), other if touch else None)
            least_inside = (0.6 if cut else 0.97) * float((patch >= 0.5).sum())
            if _fits(pieces, new, least_inside, bool(over), least_visible, gap=0 if touch else 2):
                pieces.append(new)
                break
    return pieces
