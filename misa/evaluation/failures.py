"""Error type of each object: missed, wrong class, merged, leaked beyond it, or incomplete; and false positives.

`TIDE` gives the terms of Bolya et al. 2020: Cls, Loc, Miss, Bkg. Its Loc is split here by what is wrong with the mask,
which is what matters in box supervision.

Axes: d detection · n object.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools import mask as rle

from misa.evaluation.ap import TOUCH

Kind = Literal["found", "wrong class", "missed", "merged", "leaked", "incomplete"]
KINDS: tuple[Kind, ...] = ("found", "wrong class", "missed", "merged", "leaked", "incomplete")
BACKGROUND = "false positives"
"""The name of detections that overlap no object, TIDE's background errors."""
TIDE = {
    "wrong class": "Cls",
    "missed": "Miss",
    "merged": "Loc",
    "leaked": "Loc",
    "incomplete": "Loc",
    BACKGROUND: "Bkg",
}
MEANING: dict[str, str] = {
    "found": "a mask of its class agrees with it",
    "wrong class": "a mask of another class agrees with it, and none of its own",
    "missed": "no mask of its class reaches an IoU of 0.1 with it",
    "merged": "its mask covers half or more of another object too",
    "leaked": "its mask reaches beyond it more than it falls short (under-segmentation)",
    "incomplete": "its mask covers too little of it (over-segmentation)",
    BACKGROUND: "detections that overlap no object, but lie on the background",
}
_COVERS = 0.5  # the least share of an area that counts as covered


class Outcome(NamedTuple):
    """An object's error type: its annotation, the closest detection (None if missed), and their IoU."""

    annotation: dict[str, Any]
    kind: Kind
    detection: dict[str, Any] | None
    iou: float


class ImageErrors(NamedTuple):
    """The outcome of each object of an image, and the false positives: the detections that overlap no object."""

    outcomes: list[Outcome]
    background: list[dict[str, Any]]


def error_types(
    objects: Sequence[dict[str, Any]],
    masks: Sequence[dict[str, Any]],
    detections: Sequence[dict[str, Any]],
    *,
    crowds: Sequence[dict[str, Any]] = (),
    good: float = 0.5,
) -> ImageErrors:
    """Return the error type of each object of one image from RLE masks and the detections above the score threshold.

    good: the IoU threshold for a match. crowds: masks of crowd regions, in which a detection is no false positive.
    """
    found = [d["segmentation"] for d in detections]
    shape = (len(detections), len(objects))
    plain = [0] * len(objects)
    ious = np.reshape(rle.iou(found, list(masks), plain), shape) if all(shape) else np.zeros(shape)
    area = np.array(rle.area(found), dtype=float) if found else np.zeros(0)
    # pycocotools' IoU with a crowd is the share of the detection inside it.
    within = np.reshape(rle.iou(found, list(masks), [1] * len(objects)), shape) if all(shape) else np.zeros(shape)
    sizes = np.array(rle.area(list(masks)), dtype=float) if len(objects) else np.zeros(0)
    covered = within * area[:, None] / np.maximum(sizes, 1)[None]
    label = np.array([d["category_id"] for d in detections], dtype=int)
    outcomes = [
        _outcome(n, annotation, detections, label, ious, within, covered, good) for n, annotation in enumerate(objects)
    ]
    crowded = (
        np.reshape(rle.iou(found, list(crowds), [1] * len(crowds)), (len(found), len(crowds))).max(axis=1) >= _COVERS
        if found and len(crowds)
        else np.zeros(len(found), bool)
    )
    touches = ious.max(axis=1, initial=0.0) >= TOUCH
    return ImageErrors(
        outcomes, [d for d, hit, many in zip(detections, touches, crowded, strict=True) if not hit | many]
    )


def _outcome(
    n: int,
    annotation: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    label: Any,
    ious: Any,
    within: Any,
    covered: Any,
    good: float,
) -> Outcome:
    own = np.flatnonzero(label == annotation["category_id"])
    best = int(own[ious[own, n].argmax()]) if len(own) else -1
    iou = float(ious[best, n]) if len(own) else 0.0
    if iou >= good:
        return Outcome(annotation, "found", detections[best], iou)
    others = np.flatnonzero((label != annotation["category_id"]) & (ious[:, n] >= good))
    if len(others):
        other = int(others[ious[others, n].argmax()])
        return Outcome(annotation, "wrong class", detections[other], float(ious[other, n]))
    if iou < TOUCH:
        return Outcome(annotation, "missed", None, iou)
    rest = np.delete(covered[best], n)
    kind: Kind = "leaked" if covered[best, n] >= within[best, n] else "incomplete"
    if (rest >= _COVERS).any() and covered[best, n] >= _COVERS:
        kind = "merged"
    return Outcome(annotation, kind, detections[best], iou)
