"""Label maps for the semantic teacher: targets from boxes, true masks or a student, and ground truth for evaluation.

A label map (h w) uint8 holds the category, 0 to c - 1 in the order of the data's classes, c for the background and
255 for void (ignored). Boxes are (x1, y1, x2, y2) in pixels. Pure numpy and OpenCV.

Axes: n instance · h row · w column.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from misa.errors import UserError
from misa.files import atomic_write

VOID = 255
MOST_CLASSES = 254
# Alphabetical: the palette of VOC's SegmentationClass numbers them in this order from 1.
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

LabelMap = NDArray[np.uint8]
Boxes = NDArray[np.float64]


def fill_boxes(boxes: Boxes, labels: Sequence[int], size: tuple[int, int], *, background: int) -> LabelMap:
    """Fill every box with its class; where boxes overlap the smaller one is on top."""
    canvas = _blank(size, background)
    for i in _large_to_small(boxes):
        canvas[_window(boxes[i], size)] = labels[i]
    return canvas


def rasterise(masks: Sequence[NDArray[np.bool_]], labels: Sequence[int], size: tuple[int, int], *, background: int,
              void: Sequence[NDArray[np.bool_]] = ()) -> LabelMap:  # fmt: skip
    """Combine masks into one label map, the smaller one on top; masks of `void` apply where no other mask is."""
    canvas = _blank(size, background)
    for mask in void:
        canvas[np.asarray(mask, bool)] = VOID
    for i in sorted(range(len(masks)), key=lambda i: -int(np.count_nonzero(masks[i]))):
        canvas[np.asarray(masks[i], bool)] = labels[i]
    return canvas


def merge_by_score(
    masks: Sequence[NDArray[np.bool_]],
    labels: Sequence[int],
    scores: Sequence[float],
    size: tuple[int, int],
    *,
    background: int,
    threshold: float,
) -> LabelMap:
    """Combine instances that score at least `threshold`, the better one on top (ties: the earlier)."""
    canvas = _blank(size, background)
    for i in sorted(range(len(masks)), key=lambda i: (scores[i], -i)):
        if scores[i] >= threshold:
            canvas[np.asarray(masks[i], bool)] = labels[i]
    return canvas


def merge_probabilities(
    masks: NDArray[np.float32], boxes: Boxes, labels: Sequence[int], *, background: int, low: float, high: float
) -> LabelMap:
    """Combine mask probabilities (n h w) of given boxes, each within its own box, into one label map.

    A pixel takes the class of its most probable mask if that probability is at least `high`, background if it is
    below `low`, and is void in between.
    """
    size = masks.shape[-2:]
    best, winner = np.zeros(size, np.float32), np.full(size, background, np.uint8)
    for mask, box, label in zip(masks, boxes, labels, strict=True):
        window = _window(box, size)
        better = mask[window] > best[window]
        best[window] = np.where(better, mask[window], best[window])
        winner[window] = np.where(better, label, winner[window])
    return np.where(best >= high, winner, np.where(best < low, background, VOID)).astype(np.uint8)


def grabcut_boxes(
    image: NDArray[np.uint8],
    boxes: Boxes,
    labels: Sequence[int],
    *,
    background: int,
    margins: Sequence[float] = (0.1, 0.3, 0.6),
    steps: int = 5,
    least: float = 0.1,
    most: float = 0.95,
) -> LabelMap:
    """GrabCut (Rother et al. 2004) in every box of an RGB or BGR image (h w 3).

    For each of `margins` the box's surroundings up to that share of its sides are the known background. Pixels on
    which the results differ are void; a box is void altogether if the mean foreground share of the results is below
    `least` or above `most`. Outside boxes is background; the smaller box is on top. Deterministic.
    """
    canvas = _blank(image.shape[:2], background)
    for i in _large_to_small(boxes):
        window = _window(boxes[i], image.shape[:2])
        answers = np.stack([_grabcut(image, window, margin, steps) for margin in margins])
        agreed, share = answers.all(axis=0), float(answers.mean())
        inside = np.where(agreed, labels[i], np.where(answers.any(axis=0), VOID, background))
        # Background of this box may still belong to a larger box below it.
        below = canvas[window]
        inside = np.where((inside == background) & (below != background), below, inside)
        canvas[window] = inside if least <= share <= most else VOID
    return canvas


def _grabcut(image: NDArray[np.uint8], window: tuple[slice, slice], margin: float, steps: int) -> NDArray[np.bool_]:
    """Returns the foreground of one window (h w), with its surroundings as known background."""
    rows, columns = window
    dy = max(2, round(margin * (rows.stop - rows.start)))
    dx = max(2, round(margin * (columns.stop - columns.start)))
    top, left = max(rows.start - dy, 0), max(columns.start - dx, 0)
    crop = np.ascontiguousarray(image[top : rows.stop + dy, left : columns.stop + dx])
    inner = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    state = np.full(crop.shape[:2], cv2.GC_BGD, np.uint8)
    state[inner] = cv2.GC_PR_FGD
    # Both color models need some pixels; a box that fills the image has no known background.
    if min(np.count_nonzero(state == cv2.GC_BGD), np.count_nonzero(state)) < 10:
        return np.ones(state[inner].shape, bool)
    cv2.setRNGSeed(0)
    colours = np.zeros((1, 65)), np.zeros((1, 65))  # filled by OpenCV
    cv2.grabCut(crop, state, (0, 0, 1, 1), colours[0], colours[1], steps, cv2.GC_INIT_WITH_MASK)
    return np.asarray(state[inner] == cv2.GC_PR_FGD)


def read_label_map(path: Path) -> LabelMap:
    """Read a label map of `write_label_map`."""
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.uint8)


def write_label_map(path: Path, labels: LabelMap) -> None:
    """Write a label map as an 8-bit PNG, atomically."""
    with atomic_write(path) as partial:
        Image.fromarray(labels).save(partial, format="PNG")


def read_voc_label_map(path: Path, classes: Sequence[str]) -> LabelMap:
    """Read a PNG of VOC's SegmentationClass with labels in the order of `classes`; the void border stays void.

    UserError if it is not a palette image or `classes` holds a name that is not one of VOC's.
    """
    unknown = [name for name in classes if name not in VOC_CLASSES]
    if unknown:
        raise UserError(f"VOC has no class {unknown[0]!r}; its classes are {', '.join(VOC_CLASSES)}.")
    with Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise UserError(f"{path} is a {image.mode} image; SegmentationClass has palette images, a class a pixel.")
        index = np.asarray(image, dtype=np.uint8)
    table = np.full(256, len(classes), np.uint8)  # a VOC class that is not in `classes` is background
    for label, name in enumerate(classes):
        table[VOC_CLASSES.index(name) + 1] = label
    table[VOID] = VOID
    return np.asarray(table[index])


def _blank(size: tuple[int, ...], background: int) -> LabelMap:
    return np.full(size[:2], background, np.uint8)


def _large_to_small(boxes: Boxes) -> list[int]:
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return [int(i) for i in np.argsort(-areas, kind="stable")]


def _window(box: NDArray[np.float64], size: tuple[int, ...]) -> tuple[slice, slice]:
    """Returns the window of pixels whose center lies in a box, at least one."""
    spans = []
    for low, high, side in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
        first = min(max(int(np.ceil(low - 0.5)), 0), side - 1)
        spans.append(slice(first, max(min(int(np.ceil(high - 0.5)), side), first + 1)))
    return spans[0], spans[1]
