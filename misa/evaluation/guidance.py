"""Quality of the pseudo masks of a pairwise loss (Eq. 15), measured without training.

Propagation turns a mask M into a pseudo mask M̂, and the loss moves M towards M̂ inside the object's box. With the
ground truth mask T we measure for each object whether M̂ is the better mask, and whether M̂ − M points to T:

    pull = Σ (M̂ − M) · (2T − 1) / Σ |M̂ − M|        over the pixels of the box

is 1 if all movement is towards the ground truth, 0 if as much is away from it, −1 if all of it is.

These are of one step. What many steps do depends on the growth Σ (M̂ − M), too: the projection loss only ever enlarges
a mask inside its box, so a training needs pseudo masks that do not grow, or masks fill their boxes in the end.

Axes: n object · h row · w column.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from misa.ops.axes import check_shapes

Floats = NDArray[np.float64]
FEWEST = 10
"""Images that an interval needs: over fewer a bootstrap is far too narrow."""


class Pull(NamedTuple):
    """The effect of propagation on each mask (n): see `pull_of`."""

    iou: Floats  # of the pseudo mask at 0.5 with the ground truth, inside the box
    gain: Floats  # over the mask's own IoU
    towards: Floats  # Σ (M̂ − M)(2T − 1) / area of the box
    moved: Floats  # Σ |M̂ − M| / area of the box
    growth: Floats  # Σ (M̂ − M) / area of the box


class Figure(NamedTuple):
    """A mean or ratio over objects, and its 95 % interval over images."""

    value: float
    low: float
    high: float


def pull_of(masks: ArrayLike, pseudo: ArrayLike, truth: ArrayLike, boxes: ArrayLike) -> Pull:
    """Return `Pull` of masks and pseudo masks (n h w, probabilities) for ground truth and boxes (n h w, bool).

    Only pixels inside an object's box count, as in the loss. Raises ValueError on an empty box.
    """
    m, p = np.asarray(masks, np.float64), np.asarray(pseudo, np.float64)
    t, b = np.asarray(truth, bool), np.asarray(boxes, bool)
    shapes = {"masks": (m, "n h w"), "pseudo": (p, "n h w"), "truth": (t, "n h w"), "boxes": (b, "n h w")}
    check_shapes("pull_of", **shapes)
    area = b.sum(axis=(1, 2))
    if not area.all():
        raise ValueError(f"pull_of: object {int(np.argmin(area))} has a box without a pixel.")
    change = (p - m) * b
    better = iou(p > 0.5, t, b)
    return Pull(
        better,
        better - iou(m > 0.5, t, b),
        (change * np.where(t, 1.0, -1.0)).sum(axis=(1, 2)) / area,
        np.abs(change).sum(axis=(1, 2)) / area,
        change.sum(axis=(1, 2)) / area,
    )


def iou(masks: NDArray[np.bool_], truth: NDArray[np.bool_], boxes: NDArray[np.bool_]) -> Floats:
    """Return the IoU of each pair of masks (n h w) inside the boxes; NaN if both are empty there."""
    m, t = masks & boxes, truth & boxes
    union = (m | t).sum(axis=(1, 2))
    both = (m & t).sum(axis=(1, 2))
    return np.divide(both, union, out=np.full(len(union), np.nan), where=union > 0)


def ratio(
    above: ArrayLike,
    below: ArrayLike,
    images: Sequence[int] | NDArray[np.int64],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Figure:
    """Return Σ above / Σ below over objects (n), with the 95 % percentile bootstrap interval over images.

    `images` (n) is each object's image, since the objects of one image are not independent. Objects with NaN in either
    are skipped. NaN without objects or if Σ below is 0; no interval with fewer than `FEWEST` images.
    """
    a, b = np.asarray(above, np.float64), np.asarray(below, np.float64)
    known = np.isfinite(a) & np.isfinite(b)
    _, place = np.unique(np.asarray(images)[known], return_inverse=True)
    count = int(place.max()) + 1 if place.size else 0
    tops = np.bincount(place, weights=a[known], minlength=count)
    bottoms = np.bincount(place, weights=b[known], minlength=count)
    total = bottoms.sum()
    value = float(tops.sum() / total) if total > 0 else float("nan")
    if count < FEWEST or not total > 0:
        return Figure(value, float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    sums = drawn @ bottoms
    ratios = np.divide(drawn @ tops, sums, out=np.full(len(sums), np.nan), where=sums > 0)
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return Figure(value, float(low), float(high))


def summary(
    pull: Pull, images: Sequence[int] | NDArray[np.int64], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """Return the means of "iou", "gain", "moved" and "growth" over objects, and their overall "pull".

    The pull weights an object by how far its mask is moved, as the loss does.
    """
    ones = np.ones_like(pull.iou)
    options = {"resamples": resamples, "seed": seed}
    return {
        "iou": ratio(pull.iou, ones, images, **options),
        "gain": ratio(pull.gain, ones, images, **options),
        "pull": ratio(pull.towards, pull.moved, images, **options),
        "moved": ratio(pull.moved, ones, images, **options),
        "growth": ratio(pull.growth, ones, images, **options),
    }
