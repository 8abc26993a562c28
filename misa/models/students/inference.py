"""Trained students, their predictions, and inference by mmdet's heads.

Axes: n instance · h row · w column.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from numpy.typing import NDArray
from torch import Tensor, nn

from misa.data.pipeline import at_test_size
from misa.data.rle import Part, Runs, encode_part, trimmed
from misa.data.rle import decode as decode_runs
from misa.experiment import Experiment

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Instances:
    """Instances predicted in an image of `size` (h, w), ordered by decreasing score.

    scores (n), labels (n names), boxes (n 4: x1 y1 x2 y2 of the mask's extent in pixels), runs (n masks in COCO's
    run-length encoding). prompts (n): index of the given box that an instance belongs to; None without given boxes.
    """

    size: tuple[int, int]
    scores: NDArray[np.float64]
    labels: tuple[str, ...]
    boxes: NDArray[np.float64]
    runs: tuple[Runs, ...]
    prompts: tuple[int, ...] | None = None

    @classmethod
    def of_parts(
        cls,
        size: tuple[int, int],
        scores: Sequence[float] | NDArray[np.float64],
        labels: Iterable[str],
        parts: Sequence[Part],
        prompts: tuple[int, ...] | None = None,
    ) -> "Instances":
        """Build from masks cropped to their extents."""
        boxes = np.array([extent(part) for part in parts], dtype=float).reshape(-1, 4)
        runs = tuple(encode_part(part.pixels, part.top, part.left, size) for part in parts)
        return cls(size, np.asarray(scores, dtype=float), tuple(labels), boxes, runs, prompts)

    def __len__(self) -> int:
        return len(self.scores)

    def masks(self) -> NDArray[np.bool_]:
        """All masks (n h w)."""
        return np.stack([decode_runs(r) for r in self.runs]) if self.runs else np.zeros((0, *self.size), bool)


@dataclass(frozen=True)
class Student:
    """A trained student, ready to predict, see `load_student`. `digest` is a hash of its weights."""

    model: nn.Module = field(repr=False)
    experiment: Experiment
    classes: tuple[str, ...]
    path: Path
    digest: str

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return next(self.model.parameters()).device

    @property
    def mask_stride(self) -> int:
        """Pixels of the padded input per mask pixel."""
        return int(self.model.mask_head.mask_stride)  # type: ignore[union-attr, arg-type]


def find_by_mmdet(
    student: Student, images: Sequence[Image], *, score: float, mask: float | None, per_image: int | None
) -> list[Instances]:
    """Predict by mmdet's head, one image at a time to limit the memory of full-size masks; it takes no `mask`."""
    assert mask is None, "asked for before"
    with _limits(student, score, per_image):
        return [_found(student, image, score, per_image) for image in images]


@contextmanager
def _limits(student: Student, score: float, per_image: int | None) -> Iterator[None]:
    """Lower the thresholds of mmdet's heads, which apply first, to those of a call."""
    before: list[tuple[Any, dict[str, Any]]] = []
    try:
        for module in student.model.modules():
            limits: Any = getattr(module, "test_cfg", None)
            if not isinstance(limits, dict) or not {"score_thr", "max_per_image"} & set(limits):  # an RPN's is left
                continue
            before.append((limits, dict(limits)))
            for name in {"score_thr", "filter_thr"} & set(limits):
                limits[name] = min(limits[name], score)
            if per_image is not None and "max_per_img" in limits:
                limits["max_per_img"] = max(limits["max_per_img"], per_image)
            if per_image is not None and "max_per_image" in limits:  # Mask2Former: at most all of its answers
                answers = student.experiment.network.queries * len(student.classes)
                limits["max_per_image"] = max(limits["max_per_image"], min(per_image, answers))
        yield
    finally:
        for limits, values in reversed(before):
            limits.update(values)


def _found(student: Student, image: Image, score: float, per_image: int | None) -> Instances:
    resized = at_test_size(image, student.experiment.augmentation)
    h, w = resized.shape[:2]
    meta = {
        "img_shape": (h, w),
        "ori_shape": image.shape[:2],
        "scale_factor": (w / image.shape[1], h / image.shape[0]),
    }
    sample = DetDataSample(metainfo=meta)
    data = student.model.data_preprocessor(  # type: ignore[operator]
        {"inputs": [bgr_tensor(resized)], "data_samples": [sample]}, False
    )
    (answer,) = student.model.predict(data["inputs"], data["data_samples"], rescale=True)  # type: ignore[operator]
    found = answer.pred_instances
    order = found.scores.argsort(descending=True)[:per_image]
    chosen = [i for i in order.tolist() if found.scores[i] >= score and found.masks[i].any()]
    parts = [trimmed(0, 0, found.masks[i].cpu().numpy()) for i in chosen]
    scores, labels = found.scores.double().cpu().numpy()[chosen], [student.classes[found.labels[i]] for i in chosen]
    return Instances.of_parts((image.shape[0], image.shape[1]), scores, labels, parts)


def within(part: Part, box: NDArray[np.float64]) -> Part:
    """Remove the pixels whose center is outside the box."""
    x1, y1, x2, y2 = box
    rows, columns = part.top + np.arange(part.pixels.shape[0]) + 0.5, part.left + np.arange(part.pixels.shape[1]) + 0.5
    cut = part.pixels & ((rows >= y1) & (rows < y2))[:, None] & ((columns >= x1) & (columns < x2))[None]
    return trimmed(part.top, part.left, cut)


def extent(part: Part) -> tuple[int, int, int, int]:
    """The box x1 y1 x2 y2 of a cropped mask."""
    return part.left, part.top, part.left + part.pixels.shape[1], part.top + part.pixels.shape[0]


def bgr_tensor(image: Image) -> Tensor:
    """Convert an RGB image (h w 3) to BGR (3 h w), the format of the data pipeline."""
    # A copy, since torch does not support negative strides.
    return torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)))
