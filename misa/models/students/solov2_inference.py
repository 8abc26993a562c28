"""Inference of a SOLOv2 student in images and in given boxes; its dense outputs as a module to export.

Axes: n box · m proposal · h row · w column.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from misa.data.pipeline import at_test_size
from misa.models.students.inference import Image, Instances, Student, bgr_tensor, within
from misa.models.students.solov2_decode import (
    Dense,
    Enlargement,
    Found,
    cell_masks,
    decode,
    dense_outputs,
    each_image,
    enlarge,
    enlargement,
)
from misa.ops.boxes import box_masks, positive_cells


@dataclass(frozen=True)
class View:
    """The network's outputs of an image, and the sizes (h, w) of the resized image and of the padded input."""

    dense: Dense
    resized: tuple[int, int]
    padded: tuple[int, int]

    def enlargement(self, size: tuple[int, int], stride: int) -> Enlargement:
        """From masks at `stride` of the padded input to an image of `size` (h, w)."""
        like = self.dense.features
        h, w = like.shape[-2:]
        return enlargement((h, w), stride=stride, resized=self.resized, original=size, like=like)


def views(student: Student, images: Sequence[Image]) -> list[View]:
    """The network's outputs of RGB images (h w 3)."""
    resized = [at_test_size(image, student.experiment.augmentation) for image in images]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(resized):
        groups.setdefault(image.shape, []).append(i)
    found: dict[int, View] = {}
    for members in groups.values():
        inputs = student.model.data_preprocessor(  # type: ignore[operator]
            {"inputs": [bgr_tensor(resized[i]) for i in members], "data_samples": None}, False
        )["inputs"]
        outputs = each_image(
            dense_outputs(student.model.mask_head(student.model.extract_feat(inputs)))  # type: ignore[operator]
        )
        padded = (inputs.shape[-2], inputs.shape[-1])
        for i, dense in zip(members, outputs, strict=True):
            found[i] = View(dense, (resized[i].shape[0], resized[i].shape[1]), padded)
    return [found[i] for i in range(len(images))]


def as_instances(student: Student, found: Found, view: View, size: tuple[int, int], threshold: float) -> Instances:
    """Convert to instances of an image of `size` (h, w), without those whose mask is empty at that size."""
    parts = list(enlarge(found.masks, view.enlargement(size, student.mask_stride), threshold))
    kept = [i for i, part in enumerate(parts) if part.pixels.size]
    labels = [student.classes[found.labels[i]] for i in kept]
    return Instances.of_parts(size, found.scores.double().cpu().numpy()[kept], labels, [parts[i] for i in kept])


def find_by_cells(
    student: Student, images: Sequence[Image], *, score: float, mask: float | None, per_image: int | None
) -> list[Instances]:
    """Predict in RGB images (h w 3) by matrix NMS. Images of equal input size are batched."""
    inference = student.experiment.inference
    threshold = inference.mask if mask is None else mask
    grids, strides = student.experiment.network.grids, student.experiment.network.strides
    results = []
    for image, view in zip(images, views(student, images), strict=True):
        found = decode(
            view.dense,
            grids=grids,
            strides=strides,
            score=min(inference.score, score),
            keep=score,
            mask=threshold,
            candidates=inference.candidates,
            per_image=per_image or inference.per_image,
        )
        results.append(as_instances(student, found, view, (image.shape[0], image.shape[1]), threshold))
    return results


def find_boxes_by_cells(
    student: Student, image: Image, boxes: NDArray[np.float64], wanted: Sequence[str | None], *, mask: float | None
) -> Instances:
    """Predict the mask of each box (n 4, within the image), and its label if the given one is None.

    The cells at the center of a box, on every level, propose masks. The fit of a proposal is the share of the box that
    its extent fills times the share of its pixels inside; boxes and proposals are matched one to one with the largest
    total fit (Hungarian method). Masks are clipped to their box. The score is the fit times the mean foreground
    probability. A box without a fitting proposal is left out.
    """
    size = (image.shape[0], image.shape[1])
    threshold = student.experiment.inference.mask if mask is None else mask
    (view,) = views(student, [image])
    chosen = _matched(student, view, boxes, size, threshold)
    by = view.enlargement(size, student.mask_stride)
    cells = torch.tensor([cell for _, cell, _ in chosen], dtype=torch.long, device=student.device)
    parts = [
        within(part, boxes[box])
        for (box, _, _), part in zip(chosen, enlarge(cell_masks(view.dense, cells), by, threshold), strict=True)
    ]
    kept = [(*choice, part) for choice, part in zip(chosen, parts, strict=True) if part.pixels.any()]
    return Instances.of_parts(
        size,
        [score for _, _, score, _ in kept],
        [wanted[box] or _best_class(student, view, cell) for box, cell, _, _ in kept],
        [part for *_, part in kept],
        tuple(box for box, *_ in kept),
    )


def _matched(
    student: Student, view: View, boxes: NDArray[np.float64], size: tuple[int, int], threshold: float
) -> list[tuple[int, int, float]]:
    """Box, cell and score of the best one-to-one match, without boxes that no proposal fits."""
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
        masks = cell_masks(view.dense, torch.tensor(cells, dtype=torch.long, device=student.device))
        fit, sure = _fit(masks, inside[i], threshold)
        fits[i, [column[cell] for cell in cells]] = fit.cpu().numpy()
        scores[i, [column[cell] for cell in cells]] = (fit * sure).cpu().numpy()
    cells = sorted(column)
    rows, columns = linear_sum_assignment(fits, maximize=True)
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return [(i, cells[k], float(scores[i, k])) for i, k in pairs if fits[i, k] > 0]


def _fit(masks: Tensor, inside: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the fit of masks (m h w) to a box (h w), and their mean foreground probability; each (m), 0..1."""
    shapes = masks > threshold
    within = shapes & inside
    area = shapes.sum(dim=(1, 2)).clamp(min=1)
    filled = _span(within.any(dim=2)) * _span(within.any(dim=1)) / inside.sum()
    return filled * within.sum(dim=(1, 2)) / area, (masks * shapes).sum(dim=(1, 2)) / area


def _span(touched: Tensor) -> Tensor:
    """Length from the first to the last true element of each row (m k); 0 if there is none."""
    length = touched.shape[1]
    first = touched.int().argmax(dim=1)
    last = length - 1 - touched.flip(1).int().argmax(dim=1)
    return torch.where(touched.any(dim=1), last - first + 1, 0)


def _best_class(student: Student, view: View, cell: int) -> str:
    return student.classes[int(view.dense.scores[cell].argmax())]


class DensePart(nn.Module):
    """The network up to the dense outputs of every grid cell: normalization, backbone, neck and head, no decoding.

    images: RGB (b 3 h w), float, 0..255; h and w multiples of 32. Padding is `mean`, which normalizes to 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.model = student.model
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(student.model.data_preprocessor, name).detach().clone().view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return kernels (b p d), class probabilities (b p c), and the feature (b d h/4 w/4)."""
        features = self.model.extract_feat((images - self.mean) / self.std)  # type: ignore[operator]
        return dense_outputs(self.model.mask_head(features))  # type: ignore[operator]
