"""Masks of an image's boxes by a box-supervised student, with their quality.

Axes: n box · h row · w column.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.structures import InstanceData
from numpy.typing import NDArray

from misa.data.pipeline import at_test_size
from misa.data.rle import Part
from misa.errors import UserError
from misa.evaluation.quality import mask_quality
from misa.losses.inputs import shrink, union_of_boxes
from misa.models.students.base import BoxSupervised
from misa.models.students.inference import Image, Student, bgr_tensor, within
from misa.models.students.solov2_decode import enlarge, enlargement
from misa.models.students.table import implementation
from misa.ops.boxes import box_masks
from misa.ops.propagation import propagate_local

FALLBACK, FALLBACK_QUALITY = 0.2, 0.5
"""A mask that covers less than this share of its box is replaced by the box, with this quality.

On 120 training photographs such masks have an IoU of 0.14 with the ground truth, their boxes 0.52 (docs/results.md).
"""


class BoxMask(NamedTuple):
    """The mask of a box, its quality in 0..1, and whether the box replaces it."""

    part: Part
    quality: float
    fallback: bool


def require_knows(student: Student, classes: Sequence[str], *, advice: str) -> None:
    """Raise UserError, with `advice`, if a student cannot predict masks for boxes of these classes."""
    if not isinstance(student.model, BoxSupervised):
        raise UserError(
            f"{student.path} is a {student.experiment.student} that did not learn from boxes; masks of known boxes "
            "come from a student of a row such as photos:box."
        )
    unknown = [name for name in classes if name not in student.classes]
    if unknown:
        raise UserError(
            f"{student.path} knows no class {unknown[0]!r} (it knows {', '.join(student.classes)}); {advice}."
        )


@torch.no_grad()
def answers(student: Student, image: Image, boxes: NDArray[np.float64], labels: Sequence[str]) -> list[BoxMask]:
    """Predict the mask of each box (n 4, x1 y1 x2 y2 within the RGB image), clipped to it, cut as its predictions are.

    Masks are `BoxSupervised.masks_of_boxes`; the quality compares them with their propagation by color, five steps in
    windows of 3 x 3 cells (docs/results.md compares this with alternatives).
    """
    half = implementation(student.experiment.student).mask_threshold == "half"
    least = 0.5 if half else student.experiment.inference.mask
    small, size = at_test_size(image, student.experiment.augmentation), (image.shape[0], image.shape[1])
    resized = (small.shape[0], small.shape[1])
    model: Any = student.model
    inputs = model.data_preprocessor({"inputs": [bgr_tensor(small)], "data_samples": None}, False)["inputs"]
    scale = np.array([resized[1] / size[1], resized[0] / size[0]] * 2)
    corners = torch.as_tensor(boxes * scale, dtype=torch.float32, device=student.device)
    known = InstanceData(bboxes=corners, labels=torch.tensor([student.classes.index(name) for name in labels]))
    (found,) = model.masks_of_boxes(inputs, [known.to(student.device)])
    masks = found.probabilities.float()
    h, w = masks.shape[-2:]
    stride = inputs.shape[-2] // h
    inside = box_masks(corners, h, w, stride=stride)
    batch = shrink(inputs, [resized], union_of_boxes([corners], masks[None], stride))
    hard = ((masks > least) & inside).float()
    colors, valid = batch.images[0], batch.valid[0]
    spread = propagate_local(hard, colors, box_masks=inside, window=3, steps=5, valid=valid)
    quality = mask_quality(masks.cpu(), spread.cpu(), inside.cpu(), threshold=least)
    by = enlargement((h, w), stride=stride, resized=resized, original=size, like=masks)
    parts = (within(part, box) for part, box in zip(enlarge(masks, by, least), boxes, strict=True))
    return [or_box(part, box, float(q)) for part, box, q in zip(parts, boxes, quality, strict=True)]


def or_box(part: Part, box: NDArray[np.float64], quality: float) -> BoxMask:
    """Returns the mask, or, if it is almost empty, all pixels that the box (x1 y1 x2 y2) touches."""
    near = np.round(box, 2)  # without the rounding errors of shares of the image, which have six decimals
    near = near if (np.ceil(near[2:]) > np.floor(near[:2])).all() else box
    left, top = (int(side) for side in np.floor(near[:2]))
    right, bottom = (int(side) for side in np.ceil(near[2:]))
    whole = Part(top, left, np.ones((bottom - top, right - left), bool))
    if part.pixels.sum() < FALLBACK * whole.pixels.size:
        return BoxMask(whole, FALLBACK_QUALITY, True)
    return BoxMask(part, round(quality, 4), False)
