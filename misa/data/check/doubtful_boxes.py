"""Detect boxes that are not COCO's x y w h but corners, shares of the image, or the sides of the image itself.

A single box is ambiguous; all boxes of a file together are not.
"""

from dataclasses import dataclass
from typing import Any

from misa.data.check.image_files import Listed
from misa.errors import number

_MOST = 0.95  # minimum share of boxes that fit the other format
_SOME = 0.1  # minimum share of boxes that contradict x y w h
_SLACK = 1.0  # tolerance for rounding, in pixels


@dataclass
class Doubts:
    """Counts over all boxes of a file."""

    count: int = 0
    shares: int = 0  # values in [0, 1] in a larger image
    corners: int = 0  # inside the image if read as x1 y1 x2 y2
    beyond: int = 0  # outside the image if read as x y w h
    masks: int = 0  # with polygons
    corners_of_mask: int = 0  # polygons fit x1 y1 x2 y2 and not x y w h
    corner_areas: int = 0  # area fits x1 y1 x2 y2 and not x y w h
    whole_sides: int = 0  # width and height of the image, but not at its origin

    def add(self, row: dict[str, Any], image: Listed) -> None:
        """Count an annotation whose box is four numbers, nominally x y w h."""
        a, b, c, d = row["bbox"]
        self.count += 1
        self.shares += max(a + c, b + d) <= 2 and max(a, b, c, d) <= 1 and min(image.width, image.height) > 2
        fits = a < c <= image.width + _SLACK and b < d <= image.height + _SLACK
        self.corners += fits
        self.beyond += a + c > image.width + _SLACK or b + d > image.height + _SLACK
        self.whole_sides += (c, d) == (image.width, image.height) and (a, b) != (0, 0)
        area: Any = row.get("area")
        if fits and number(area):
            true = (c - a) * (d - b)
            self.corner_areas += abs(area - true) <= 0.01 * true + 1e-6 and abs(area - c * d) > 0.05 * c * d
        extent = _extent(row.get("segmentation"))
        if extent is not None:
            self.masks += 1
            left, top, right, bottom = extent
            slack = 2 * _SLACK + 0.05 * max(right - left, bottom - top)

            def near(x: float, y: float) -> bool:
                return abs(right - x) <= slack and abs(bottom - y) <= slack

            self.corners_of_mask += near(c, d) and not near(a + c, b + d)

    def verdict(self) -> tuple[str, str, str, str] | None:
        """Returns kind, place, message and advice if the boxes have another format; None if they look right."""
        if not self.count:
            return None
        if self.shares >= _MOST * self.count:
            message = "the boxes seem to be shares of the image (all numbers are from 0 to 1)"
            return "box-shares", "", message, "multiply them by the image's width and height"
        if self.whole_sides >= _MOST * self.count:
            message = "every box is as wide and high as its image: width and height seem to be the image's"
            return "box-image-sides", "", message, "give the sides of the box (in a csv: box_width and box_height)"
        by_mask = self.masks and self.corners_of_mask >= 0.5 * self.masks
        fit = self.corners >= _MOST * self.count
        by_area = fit and self.corner_areas >= 0.5 * self.count
        by_border = fit and self.count > 1 and self.beyond >= _SOME * self.count
        if by_mask or by_area or by_border:
            contradicted = "the masks" if by_mask else "the areas" if by_area else "the borders of the images"
            message = (
                f"the boxes seem to be corners x1, y1, x2, y2: as x, y, width, height they contradict {contradicted}"
            )
            advice = "write them as [x, y, width, height] (in a csv: name the columns xmin, ymin, xmax, ymax)"
            return "box-corners", "", message, advice
        return None


def _extent(mask: Any) -> tuple[float, float, float, float] | None:
    """Returns left, top, right and bottom of polygons."""
    if not isinstance(mask, list) or not mask or not all(isinstance(p, list) and len(p) >= 6 for p in mask):
        return None
    try:
        xs, ys = [x for p in mask for x in p[::2]], [y for p in mask for y in p[1::2]]
        return float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))
    except (TypeError, ValueError, OverflowError):  # not numbers, reported by the check of the masks
        return None
