"""HTML page of masks to review, in increasing order of quality: a crop with contour and box each.

Axes: h row · w column.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from misa.data.images import read_image
from misa.data.rle import decode
from misa.engine.labelling.annotations import Mask, Target
from misa.figures.overlay import overlay, whole
from misa.figures.page import render

SIDE, MARGIN = 220, 0.2  # a crop's longer side in pixels; the margin around the box as a share of its longer side
_STEPS = 10


def write_sheet(
    title: str,
    targets: Sequence[Target],
    masks: Mapping[int, Mask],
    names: Mapping[int, str],
    *,
    most: int,
    warning: str = "",
) -> str:
    """Return the HTML page with at most `most` masks, ordered by quality, then id, below a warning."""
    every = sorted(
        (masks[row["id"]].quality, row["id"], i, n)
        for i, target in enumerate(targets)
        for n, row in enumerate(target.rows)
    )
    shown: dict[int, Any] = {}
    by_image: dict[int, list[int]] = {}
    for place, (_, _, i, _) in enumerate(every[:most]):
        by_image.setdefault(i, []).append(place)
    for i, places in by_image.items():
        image = read_image(targets[i].path)
        for place in places:
            quality, key, _, n = every[place]
            row, mask = targets[i].rows[n], masks[key]
            shown[place] = {
                "picture": crop(image, decode(mask.runs), targets[i].boxes[n]),
                "quality": quality,
                "name": names[row["category_id"]],
                "file": targets[i].image["file_name"],
                "id": key,
                "fallback": mask.fallback,
            }
    counts, _ = np.histogram([quality for quality, *_ in every], bins=_STEPS, range=(0, 1))
    return render(
        "label.html.j2",
        title=f"Masks of {title}",
        warning=warning,
        total=len(every),
        counts=[(i / _STEPS, int(count), count / max(counts.max(), 1)) for i, count in enumerate(counts)],
        shown=[shown[place] for place in sorted(shown)],
    )


def crop(image: NDArray[np.uint8], mask: NDArray[np.bool_], box: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Crop around a box of an RGB image (h w 3), with the outlines of box and mask (h w), resized to `SIDE`."""
    reach = MARGIN * max(box[2:] - box[:2])
    left, top = np.maximum(np.floor(box[:2] - reach), 0).astype(int)
    right, bottom = np.minimum(np.ceil(box[2:] + reach), image.shape[1::-1]).astype(int)
    part, inner = image[top:bottom, left:right], mask[top:bottom, left:right].astype(np.uint8)
    by = SIDE / max(part.shape[:2])
    size = max(round(by * part.shape[1]), 1), max(round(by * part.shape[0]), 1)
    pixels = cv2.resize(part, size, interpolation=cv2.INTER_AREA if by < 1 else cv2.INTER_CUBIC)
    shape = cv2.resize(inner, size, interpolation=cv2.INTER_NEAREST).astype(bool)
    frame = (box - [left, top, left, top]) * np.tile(np.array(size) / part.shape[1::-1], 2)
    framed = overlay(np.asarray(pixels, np.uint8), boxes=[frame], colors=["white"], readable=1)
    return overlay(framed, whole([shape]), colors=[1], opacity=0.25, readable=1)
