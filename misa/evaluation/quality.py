"""Quality estimate for predicted masks without ground truth: an estimate of their IoU, from box and colors.

Axes: n object · h row · w column, at the resolution of the student's masks.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from misa.evaluation.guidance import Floats, iou
from misa.ops.axes import check_shapes

_FREE = 0.15  # share of the box outside the mask above which the bound for box-filling masks does not apply
_CROSS = ndimage.generate_binary_structure(2, 1)[None]  # 4-connectivity within each mask


def mask_quality(masks: ArrayLike, propagated: ArrayLike, boxes: ArrayLike, *, threshold: float = 0.5) -> Floats:
    """Return the quality (n) of masks in [0, 1]: the geometric mean of four agreements, at most 0.5 for a full box.

    With the probabilities P, M = P inside the box B and 0 outside, m the pixels of M above the threshold, and M̂ the
    propagation of m along an affinity inside B:

        quality = min((student · propagation · box · border)^(1/4), (1 + (1 - |m| / |B|) / 0.15) / 2)

        student      Σ min(M, m) / Σ max(M, m)            is the student confident of every pixel?
        propagation  IoU(m, M̂ > threshold)                does propagation along colors keep the mask?
        box          IoU of B and the bounding box of m, times the share of P > threshold inside B
        border       (|eroded m| + |m|) / (|m| + |dilated m|), by one cell: the effect of half a cell's error

    A factor is 1 if nothing contradicts the mask; an empty mask has quality 0. The first three are the paper's signals
    (Eq. 2, Eq. 14 and the projection on the box), the fourth is the resolution of the masks. A mask that fills its box,
    as an untrained student's, agrees with the box and with its propagation for any shape of the object: its quality is
    bounded by 0.5, the score of a box in `misa label`, and the bound rises with the share of the box outside the mask.

    masks: P (n h w), the student's probabilities. propagated: M̂ (n h w), in [0, 1]. boxes: B (n h w), bool. threshold:
    foreground threshold.
    Raises ValueError: shapes differ.
    """
    p, spread, b = np.asarray(masks, np.float64), np.asarray(propagated, np.float64), np.asarray(boxes, bool)
    check_shapes("mask_quality", masks=(p, "n h w"), propagated=(spread, "n h w"), boxes=(b, "n h w"))
    soft, sure = p * b, (p > threshold) & b
    area = sure.sum(axis=(1, 2))
    student = _share(np.minimum(soft, sure).sum(axis=(1, 2)), np.maximum(soft, sure).sum(axis=(1, 2)))
    propagation = np.nan_to_num(iou(sure, spread > threshold, b))
    box = _share(_extent(sure), b.sum(axis=(1, 2))) * _share(area, (p > threshold).sum(axis=(1, 2)))
    # Outside the image counts as foreground in the erosion: touching the border costs nothing.
    inner = ndimage.binary_erosion(sure, _CROSS, border_value=1).sum(axis=(1, 2))
    outer = ndimage.binary_dilation(sure, _CROSS).sum(axis=(1, 2))
    agreement: Floats = (student * propagation * box * _share(inner + area, area + outer)) ** 0.25
    free = 1 - _share(area, b.sum(axis=(1, 2)))
    found: Floats = np.minimum(agreement, (1 + free / _FREE) / 2)
    return found


def _extent(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the area (n) of each mask's bounding box, 0 if empty; masks lie inside B, so it is the intersection."""
    sides = []
    for axis in (1, 2):
        touched: NDArray[np.bool_] = np.any(masks, axis=axis)
        last = touched.shape[1] - touched[:, ::-1].argmax(axis=1)
        sides.append(np.where(touched.any(axis=1), last - touched.argmax(axis=1), 0))
    return sides[0] * sides[1]


def _share(part: NDArray[np.generic], whole: NDArray[np.generic]) -> Floats:
    """Return part / whole, 0 where whole is 0."""
    below = np.asarray(whole, np.float64)
    return np.divide(part, below, out=np.zeros(len(below)), where=below > 0)
