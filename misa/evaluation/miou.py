"""Mean IoU of label maps (Figure 1) from a confusion matrix.

Axes: t true class, p predicted class; both include the background. Ground truth of 255 is void and ignored.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

VOID = 255


def confusion(truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Return the confusion matrix: pixels of each true class (rows) predicted as each class (columns)."""
    if truth.shape != predicted.shape:
        raise ValueError(f"truth and prediction need one size: they are {truth.shape} and {predicted.shape}.")
    known = truth != VOID
    pairs = truth[known].astype(np.int64) * classes + predicted[known]
    if pairs.size and (predicted[known].max() >= classes or truth[known].max() >= classes):
        raise ValueError(f"label maps must hold classes 0 to {classes - 1}, or 255 for void in the truth.")
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def iou(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the IoU of every class; NaN for a class that is neither in the ground truth nor predicted."""
    hit = np.diag(matrix).astype(float)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - hit
    return np.divide(hit, union, out=np.full(len(matrix), np.nan), where=union > 0)


def miou(pairs: Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8]]], names: Sequence[str]) -> dict[str, Any]:
    """Return scores in percent of (ground truth, prediction) label maps; classes are `names`, then the background.

    `miou` is the mean over all classes and the background, as in VOC; `miou_foreground` excludes it. A class that is
    neither in the ground truth nor predicted is None in `iou` and excluded from the means.
    """
    matrix = np.zeros((len(names) + 1, len(names) + 1), np.int64)
    for truth, predicted in pairs:
        matrix += confusion(truth, predicted, len(matrix))
    values = 100 * iou(matrix)
    named = zip((*names, background_name(names)), values, strict=True)
    return {
        "miou": _mean(values),
        "miou_foreground": _mean(values[:-1]),
        "iou": {name: None if np.isnan(value) else float(value) for name, value in named},
        "pixel_accuracy": 100 * float(np.diag(matrix).sum() / max(matrix.sum(), 1)),
    }


def background_name(names: Sequence[str]) -> str:
    """Return a name for the background that none of these classes has."""
    name = "background"
    while name in names:
        name += " (no object)"
    return name


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(np.nanmean(values)) if np.isfinite(values).any() else None
