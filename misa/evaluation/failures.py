"""What went wrong with each object: missed, taken for another class, merged, leaked beyond it, or stopped early.

Axes: d detection · n object.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools import mask as rle

Kind = Literal["found", "wrong class", "missed", "merged", "leaked", "stopped early"]
KINDS: tuple[Kind, ...] = ("found", "wrong class", "missed", "merged", "leaked", "stopped early")
MEANING: dict[Kind, str] = {
    "found": "a mask of its class agrees with it",
    "wrong class": "a mask of another class agrees with it, and none of its own",
    "missed": "no mask of its class touches it to speak of",
    "merged": "its mask covers half or more of another object too",
    "leaked": "its mask goes beyond it further than it falls short",
    "stopped early": "its mask covers too little of it",
}
# Less intersection over union than this is a chance touch.
_TOUCH = 0.1
_COVERS = 0.5


class Verdict(NamedTuple):
    """An object's fate: the annotation, the detection that comes nearest to it (None if missed), and their IoU."""

    annotation: dict[str, Any]
    kind: Kind
    detection: dict[str, Any] | None
    iou: float


class Judged(NamedTuple):
    """The verdict of each object of an image, and the detections that are of no object at all."""

    verdicts: list[Verdict]
    invented: list[dict[str, Any]]


def judge(
    objects: Sequence[dict[str, Any]],
    masks: Sequence[dict[str, Any]],
    detections: Sequence[dict[str, Any]],
    *,
    crowds: Sequence[dict[str, Any]] = (),
    good: float = 0.5,
) -> Judged:
    """Judge the objects of one image, whose masks are run lengths, by the detections that are taken seriously.

    good: the intersection over union from which on an object is found. crowds: masks of crowds, in which a detection
    is no invention.
    """
    found = [d["segmentation"] for d in detections]
    shape = (len(detections), len(objects))
    plain = [0] * len(objects)
    ious = np.reshape(rle.iou(found, list(masks), plain), shape) if all(shape) else np.zeros(shape)
    area = np.array(rle.area(found), dtype=float) if found else np.zeros(0)
    # pycocotools' overlap with a crowd is the share of the detection that lies within.
    within = np.reshape(rle.iou(found, list(masks), [1] * len(objects)), shape) if all(shape) else np.zeros(shape)
    sizes = np.array(rle.area(list(masks)), dtype=float) if len(objects) else np.zeros(0)
    covered = within * area[:, None] / np.maximum(sizes, 1)[None]
    label = np.array([d["category_id"] for d in detections], dtype=int)
    verdicts = [
        _verdict(n, annotation, detections, label, ious, within, covered, good) for n, annotation in enumerate(objects)
    ]
    crowded = (
        np.reshape(rle.iou(found, list(crowds), [1] * len(crowds)), (len(found), len(crowds))).max(axis=1) >= _COVERS
        if found and len(crowds)
        else np.zeros(len(found), bool)
    )
    touches = ious.max(axis=1, initial=0.0) >= _TOUCH
    return Judged(verdicts, [d for d, hit, many in zip(detections, touches, crowded, strict=True) if not hit | many])


def _verdict(
    n: int,
    annotation: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    label: Any,
    ious: Any,
    within: Any,
    covered: Any,
    good: float,
) -> Verdict:
    own = np.flatnonzero(label == annotation["category_id"])
    best = int(own[ious[own, n].argmax()]) if len(own) else -1
    iou = float(ious[best, n]) if len(own) else 0.0
    if iou >= good:
        return Verdict(annotation, "found", detections[best], iou)
    others = np.flatnonzero((label != annotation["category_id"]) & (ious[:, n] >= good))
    if len(others):
        other = int(others[ious[others, n].argmax()])
        return Verdict(annotation, "wrong class", detections[other], float(ious[other, n]))
    if iou < _TOUCH:
        return Verdict(annotation, "missed", None, iou)
    rest = np.delete(covered[best], n)
    kind: Kind = "leaked" if covered[best, n] >= within[best, n] else "stopped early"
    if (rest >= _COVERS).any() and covered[best, n] >= _COVERS:
        kind = "merged"
    return Verdict(annotation, kind, detections[best], iou)
