"""Masks of known boxes.

Axes: n box · h row · w column.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

from misa.data.rle import decode_part
from misa.engine.prediction.student import find
from misa.errors import UserError, counted
from misa.models.students.inference import Image, Instances, Student, within
from misa.models.students.table import implementation

_SAME = 0.5  # IoU of a detection and the box of its object
SLACK = 1.0
"""Pixels by which a box may exceed its image: COCO's boxes are rounded, and other tools count from 1."""


@torch.inference_mode()
def find_boxes(
    student: Student,
    image: Image,
    boxes: NDArray[np.float64],
    labels: Sequence[str | None] | None = None,
    *,
    mask: float | None = None,
) -> Instances:
    """Predict the mask of each given box of an RGB image (h w 3), in the order of the boxes.

    SOLOv2 proposes masks for each box (`find_boxes_by_cells`); detections of other students are matched to the boxes
    one to one by IoU, first those of the row's minimum score with an IoU of 0.5, then the others to the boxes left.
    Masks are clipped to their box. Boxes without a mask are left out: `prompts` has the indices of the others. A label
    that is None is predicted.

    boxes: (n 4), or (4) for one, x1 y1 x2 y2 in pixels of the image. mask: binarization threshold (default: the row's).
    Raises UserError: boxes of no area or outside the image, or a label that the student does not know.
    """
    size = (image.shape[0], image.shape[1])
    boxes = _checked(boxes, size)
    wanted = [None] * len(boxes) if labels is None else list(labels)
    if len(wanted) != len(boxes):
        given = f"{counted(len(boxes), 'box is', 'boxes are')} given and {counted(len(wanted), 'label')}"
        raise UserError(f"{given}; give one label for each box, or no labels.")
    for name in wanted:
        require_class(student, name)
    kind = implementation(student.experiment.student)
    if kind.find_boxes is None:
        found = find(student, [image], score=0.0, mask=mask)[0]
        return _answers(found, boxes, wanted, sure=student.experiment.inference.score)
    return kind.find_boxes(student, image, boxes, wanted, mask=mask)


def require_class(student: Student, name: str | None, where: str = "") -> None:
    """Raise UserError if a label is neither None nor one of the student's classes. where: end of the sentence."""
    if name is not None and name not in student.classes:
        raise UserError(f"the student knows no class {name!r}; its classes are {', '.join(student.classes)}{where}.")


def _answers(found: Instances, boxes: NDArray[np.float64], wanted: Sequence[str | None], *, sure: float) -> Instances:
    """Match detections to boxes one to one by IoU, and clip their masks.

    First those with a score of `sure` and half of the box in common, which are of this object and not of a neighbor.
    """
    overlap = np.zeros((len(boxes), len(found)))
    if overlap.size:
        overlap = box_iou(torch.as_tensor(boxes), torch.as_tensor(found.boxes)).numpy()
    pairs = _matched(overlap * (found.scores >= sure) * (overlap >= _SAME))
    left = overlap.copy()
    left[[i for i, _ in pairs]] = 0
    left[:, [k for _, k in pairs]] = 0
    pairs = sorted(pairs + _matched(left))
    parts = [within(decode_part(found.runs[k]), boxes[i]) for i, k in pairs]
    kept = [(i, k, part) for (i, k), part in zip(pairs, parts, strict=True) if part.pixels.any()]
    return Instances.of_parts(
        found.size,
        [overlap[i, k] * found.scores[k] for i, k, _ in kept],
        [wanted[i] or found.labels[k] for i, k, _ in kept],
        [part for *_, part in kept],
        tuple(i for i, *_ in kept),
    )


def _matched(overlap: NDArray[np.float64]) -> list[tuple[int, int]]:
    """The pairs of rows and columns with the largest total overlap, without those that have none."""
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    return [(i, k) for i, k in zip(rows.tolist(), columns.tolist(), strict=True) if overlap[i, k] > 0]


def reaching_beyond(boxes: Any, size: Sequence[int]) -> int:
    """The number of boxes (n 4) that exceed an image (h w) by more than `SLACK`, which is more than rounding."""
    corners, (h, w) = np.asarray(boxes, dtype=float).reshape(-1, 4), size
    over = np.maximum(-corners, corners - [w, h, w, h]).max(axis=1)
    return int((over > SLACK).sum())


def without_area(boxes: Any, size: Sequence[int]) -> NDArray[np.bool_]:
    """Which boxes (n 4) have no area in an image (h w): those outside it, too; none of those that are no numbers."""
    corners, (h, w) = np.asarray(boxes, dtype=float).reshape(-1, 4), size
    x1, y1, x2, y2 = corners.clip(0, [w, h, w, h]).T
    return (x1 >= x2) | (y1 >= y2)


def require_pixels(boxes: NDArray[np.float64]) -> None:
    """Raise UserError if all of the boxes (n 4) lie within one pixel, as shares of an image do."""
    if boxes.size and boxes.min() >= 0 and boxes.max() <= 1:
        raise UserError(
            "boxes are in pixels, and these have no coordinate above 1; if they are shares of the image, multiply x by "
            "its width and y by its height."
        )


def _checked(boxes: Any, size: tuple[int, int]) -> NDArray[np.float64]:
    """Validate boxes and clip them to the image."""
    wrong = UserError("boxes must be an array (n 4) of finite x1 y1 x2 y2 in pixels.")
    try:
        boxes = np.asarray(boxes, dtype=float)
    except (ValueError, TypeError) as error:  # rows of different lengths, or not numeric
        raise wrong from error
    if boxes.size == 0:
        return np.zeros((0, 4))
    boxes = boxes[None] if boxes.shape == (4,) else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise wrong
    require_pixels(boxes)
    clipped = boxes.clip(0, [size[1], size[0], size[1], size[0]])
    for given, left in zip(boxes, clipped, strict=True):
        if left[0] >= left[2] or left[1] >= left[3]:
            raise UserError(
                f"the box {given.tolist()} has no area in the image of {size[1]} x {size[0]} pixels; give x1 y1 x2 y2."
            )
    return clipped
