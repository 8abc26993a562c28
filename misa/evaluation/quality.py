"""How far a mask that nobody drew can be trusted: an estimate of its IoU with the true one, from box and colors.

Axes: n object · h row · w column, at the resolution of the student's masks.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from misa.evaluation.guidance import Floats, iou
from misa.ops.axes import check_shapes

_FREE = 0.15  # from this share of the box on that a mask leaves free, its quality is bounded by nothing else
_CROSS = ndimage.generate_binary_structure(2, 1)[None]  # a cell's four neighbours in its own mask


def mask_quality(masks: ArrayLike, propagated: ArrayLike, boxes: ArrayLike, *, threshold: float = 0.5) -> Floats:
    """The quality (n) of masks, 0 to 1: the geometric mean of four agreements, at most 0.5 for a mask that is its box.

    With the probabilities P, P inside the box B alone M, its pixels above the threshold m, and M̂ the propagation of
    m along an affinity inside B:

        quality = min((student · propagation · box · border)^(1/4), (1 + (1 - |m| / |B|) / 0.15) / 2)

        student      Σ min(M, m) / Σ max(M, m)            is the student sure of every pixel?
        propagation  IoU(m, M̂ > threshold)                do colors tell the same pixels apart?
        box          IoU of B and the smallest rectangle around m, times the share of P > threshold that is in B
        border       (|eroded m| + |m|) / (|m| + |dilated m|), by a cell: what half a cell's error would cost

    Every factor is 1 where nothing contradicts the mask; a mask without pixels has 0. The first three are the paper's
    own signals (Eq. 2, Eq. 14 and the projection on the box), the fourth is the resolution of the masks. A mask that
    fills its box agrees with it and with its propagation whatever the object's shape is, as one of an untrained
    student does: alone this is worth 0.5, as the box itself is in `misa label`, and more the more of the box is free.

    Args:
        masks: P (n h w), the student's probabilities.
        propagated: M̂ (n h w), 0 to 1.
        boxes: B (n h w), bool.
        threshold: from which on a pixel is the object's.

    Raises:
        ValueError: shapes differ.
    """
    p, spread, b = np.asarray(masks, np.float64), np.asarray(propagated, np.float64), np.asarray(boxes, bool)
    check_shapes("mask_quality", masks=(p, "n h w"), propagated=(spread, "n h w"), boxes=(b, "n h w"))
    soft, sure = p * b, (p > threshold) & b
    area = sure.sum(axis=(1, 2))
    student = _share(np.minimum(soft, sure).sum(axis=(1, 2)), np.maximum(soft, sure).sum(axis=(1, 2)))
    propagation = np.nan_to_num(iou(sure, spread > threshold, b))
    box = _share(_extent(sure), b.sum(axis=(1, 2))) * _share(area, (p > threshold).sum(axis=(1, 2)))
    # Beyond the image nothing is known: an object at its edge loses nothing there.
    inner = ndimage.binary_erosion(sure, _CROSS, border_value=1).sum(axis=(1, 2))
    outer = ndimage.binary_dilation(sure, _CROSS).sum(axis=(1, 2))
    agreement: Floats = (student * propagation * box * _share(inner + area, area + outer)) ** 0.25
    free = 1 - _share(area, b.sum(axis=(1, 2)))
    found: Floats = np.minimum(agreement, (1 + free / _FREE) / 2)
    return found


def _extent(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The area (n) of the smallest rectangle around each mask (n h w), 0 of none; inside its box, so their overlap."""
    sides = []
    for axis in (1, 2):
        touched: NDArray[np.bool_] = np.any(masks, axis=axis)
        last = touched.shape[1] - touched[:, ::-1].argmax(axis=1)
        sides.append(np.where(touched.any(axis=1), last - touched.argmax(axis=1), 0))
    return sides[0] * sides[1]


def _share(part: NDArray[np.generic], whole: NDArray[np.generic]) -> Floats:
    """part / whole, 0 where there is no whole."""
    below = np.asarray(whole, np.float64)
    return np.divide(part, below, out=np.zeros(len(below)), where=below > 0)
