"""Masks of boxes that are known already: candidates from the grid cells that own each box, matched to the boxes.

Axes: n box · m proposal · h row · w column.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

from misa.data.rle import decode_part, encode_part
from misa.engine.prediction.student import Image, Instances, Student, View, extent, find, views
from misa.errors import UserError
from misa.models.students.solov2_decode import Part, cell_masks, enlarge, enlargement
from misa.ops.boxes import box_masks, positive_cells


@torch.inference_mode()
def find_boxes(
    student: Student,
    image: Image,
    boxes: NDArray[np.float64],
    labels: Sequence[str | None] | None = None,
    *,
    mask: float | None = None,
) -> Instances:
    """The mask of each given box of an RGB image (h w 3), in the order of the boxes.

    The cells in the middle of a box, on every level, propose masks. A proposal fits as far as its extent fills the box
    and its pixels stay within, the product of both; boxes and proposals are matched one to one so that they fit best
    (Hungarian method). What a mask has outside its box is cut off. The score is the fit times the mean probability of
    the mask's pixels. A box for which nothing is proposed is left out: `prompts` names the boxes that were answered.
    A label that is None is predicted.

    Students other than SOLOv2 have no cells: there the instances that they find are matched to the boxes.

    boxes: (n 4) x1 y1 x2 y2 in pixels of the image. mask: least probability of a pixel (default: the row's).

    Raises:
        UserError: boxes of no area or outside the image, or a label that the student does not know.
    """
    size = (image.shape[0], image.shape[1])
    boxes = _checked(boxes, size)
    wanted = [None] * len(boxes) if labels is None else list(labels)
    if len(wanted) != len(boxes):
        raise UserError(f"there are {len(boxes)} boxes and {len(wanted)} labels; give a label a box, or none.")
    for name in wanted:
        if name is not None and name not in student.classes:
            raise UserError(f"the student knows no class {name!r}; its classes are {', '.join(student.classes)}.")
    if student.experiment.student != "solov2":
        return _answers(find(student, [image], score=0.0, mask=mask)[0], boxes, wanted)
    threshold = student.experiment.inference.mask if mask is None else mask
    (view,) = views(student, [image])
    chosen = _matched(student, view, boxes, size, threshold)
    by = enlargement(
        (view.dense.features.shape[-2], view.dense.features.shape[-1]),
        stride=student.mask_stride,
        resized=view.resized,
        original=size,
        like=view.dense.features,
    )
    cells = torch.tensor([cell for _, cell, _ in chosen], dtype=torch.long, device=student.device)
    parts = [
        _within(part, boxes[box])
        for (box, _, _), part in zip(chosen, enlarge(cell_masks(view.dense, cells), by, threshold), strict=True)
    ]
    kept = [(*choice, part) for choice, part in zip(chosen, parts, strict=True) if part.pixels.any()]
    return Instances(
        size,
        np.array([score for _, _, score, _ in kept], dtype=float),
        tuple(wanted[box] or _best_class(student, view, cell) for box, cell, _, _ in kept),
        np.array([extent(part) for *_, part in kept], dtype=float).reshape(-1, 4),
        tuple(encode_part(part.pixels, part.top, part.left, size) for *_, part in kept),
        tuple(box for box, *_ in kept),
    )


def _matched(
    student: Student, view: View, boxes: NDArray[np.float64], size: tuple[int, int], threshold: float
) -> list[tuple[int, int, float]]:
    """Box, cell and score of the best one-to-one match; boxes without a proposal that fits are left out."""
    scale = np.array([view.resized[1] / size[1], view.resized[0] / size[0]] * 2)
    resized = torch.as_tensor(boxes * scale, dtype=torch.float32)
    own: list[set[int]] = [set() for _ in boxes]
    start = 0
    for grid in student.experiment.network.grids:
        box, cell = positive_cells(resized, view.padded, grid, (0.0, float("inf")))
        for i, j in zip(box.tolist(), (start + cell).tolist(), strict=True):
            own[i].add(j)
        start += grid * grid
    column = {cell: k for k, cell in enumerate(sorted(set().union(*own)))}
    fits, scores = np.zeros((2, len(boxes), len(column)))
    h, w = view.dense.features.shape[-2:]
    inside = box_masks(resized.to(student.device), h, w, stride=student.mask_stride)
    for i, mine in enumerate(own):
        cells = sorted(mine)
        masks = cell_masks(view.dense, torch.tensor(cells, device=student.device))
        fit, sure = _fit(masks, inside[i], threshold)
        fits[i, [column[cell] for cell in cells]] = fit.cpu().numpy()
        scores[i, [column[cell] for cell in cells]] = (fit * sure).cpu().numpy()
    cells = sorted(column)
    rows, columns = linear_sum_assignment(fits, maximize=True)
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return [(i, cells[k], float(scores[i, k])) for i, k in pairs if fits[i, k] > 0]


def _fit(masks: Tensor, inside: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """How well masks (m h w) fit a box (h w), and the mean probability of their pixels; each (m), 0 to 1."""
    shapes = masks > threshold
    within = shapes & inside
    area = shapes.sum(dim=(1, 2)).clamp(min=1)
    filled = _span(within.any(dim=2)) * _span(within.any(dim=1)) / inside.sum()
    return filled * within.sum(dim=(1, 2)) / area, (masks * shapes).sum(dim=(1, 2)) / area


def _span(touched: Tensor) -> Tensor:
    """From the first to the last that is touched (m k), 0 where none is."""
    length = touched.shape[1]
    first = touched.int().argmax(dim=1)
    last = length - 1 - touched.flip(1).int().argmax(dim=1)
    return torch.where(touched.any(dim=1), last - first + 1, 0)


def _answers(found: Instances, boxes: NDArray[np.float64], wanted: Sequence[str | None]) -> Instances:
    """Of the instances found in an image the one that answers each box, where there is one."""
    overlap = box_iou(torch.as_tensor(boxes), torch.as_tensor(found.boxes)).numpy() if len(found) else np.zeros((0, 0))
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    pairs = [(i, k) for i, k in zip(rows.tolist(), columns.tolist(), strict=True) if overlap[i, k] > 0]
    parts = [_within(Part(*decode_part(found.runs[k])), boxes[i]) for i, k in pairs]
    kept = [(i, k, part) for (i, k), part in zip(pairs, parts, strict=True) if part.pixels.any()]
    return Instances(
        found.size,
        np.array([overlap[i, k] * found.scores[k] for i, k, _ in kept], dtype=float),
        tuple(wanted[i] or found.labels[k] for i, k, _ in kept),
        np.array([extent(part) for *_, part in kept], dtype=float).reshape(-1, 4),
        tuple(encode_part(part.pixels, part.top, part.left, found.size) for *_, part in kept),
        tuple(i for i, *_ in kept),
    )


def _checked(boxes: Any, size: tuple[int, int]) -> NDArray[np.float64]:
    """The boxes clipped to the image."""
    wrong = UserError("boxes must be an array (n 4) of finite x1 y1 x2 y2 in pixels.")
    try:
        boxes = np.asarray(boxes, dtype=float)
    except (ValueError, TypeError) as error:  # rows of different lengths, or no numbers
        raise wrong from error
    if boxes.size == 0:
        return np.zeros((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise wrong
    clipped = boxes.clip(0, [size[1], size[0], size[1], size[0]])
    for given, left in zip(boxes, clipped, strict=True):
        if left[0] >= left[2] or left[1] >= left[3]:
            raise UserError(
                f"the box {given.tolist()} has no area in the image of {size[1]} x {size[0]} pixels; give x1 y1 x2 y2."
            )
    return clipped


def _within(part: Part, box: NDArray[np.float64]) -> Part:
    """The pixels whose centre is in the box."""
    x1, y1, x2, y2 = box
    rows, columns = part.top + np.arange(part.pixels.shape[0]) + 0.5, part.left + np.arange(part.pixels.shape[1]) + 0.5
    cut = part.pixels & ((rows >= y1) & (rows < y2))[:, None] & ((columns >= x1) & (columns < x2))[None]
    y, x = np.nonzero(cut.any(axis=1))[0], np.nonzero(cut.any(axis=0))[0]
    if len(y) == 0:
        return Part(0, 0, np.zeros((0, 0), bool))
    return Part(part.top + int(y[0]), part.left + int(x[0]), cut[y[0] : y[-1] + 1, x[0] : x[-1] + 1])


def _best_class(student: Student, view: View, cell: int) -> str:
    return student.classes[int(view.dense.scores[cell].argmax())]
