"""IoU and GIoU losses of paired boxes, equal to mmdet's but without its synchronization with the device.

mmdet's losses test whether any weight is positive, and its `bbox_overlaps` copies eps to the device at every call.

Axes: n box. Boxes are (x1, y1, x2, y2).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def overlaps(
    boxes: Float[Tensor, "n 4"],
    others: Float[Tensor, "n 4"],
    *,
    form: Literal["iou", "giou"] = "iou",
    eps: float = 1e-6,
) -> Float[Tensor, " n"]:
    """Return the IoU, or GIoU (Rezatofighi et al. 2019), of each pair; union and hull are `eps` at least."""
    areas = [(own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1]) for own in (boxes, others)]
    common = (boxes[:, 2:].minimum(others[:, 2:]) - boxes[:, :2].maximum(others[:, :2])).clamp(min=0)
    inner = common[:, 0] * common[:, 1]
    union = (areas[0] + areas[1] - inner).clamp(min=eps)
    if form == "iou":
        return inner / union
    around = (boxes[:, 2:].maximum(others[:, 2:]) - boxes[:, :2].minimum(others[:, :2])).clamp(min=0)
    hull = (around[:, 0] * around[:, 1]).clamp(min=eps)
    return inner / union - (hull - union) / hull


def box_loss(
    boxes: Float[Tensor, "n 4"],
    others: Float[Tensor, "n 4"],
    weight: Float[Tensor, " n"],
    total: Float[Tensor, ""],
    *,
    form: Literal["iou", "giou"],
) -> Float[Tensor, ""]:
    """Return Σ weight · error / total; the error is −log IoU ("iou", Yu et al. 2016) or 1 − GIoU."""
    overlap = overlaps(boxes, others, form=form)
    error = -overlap.clamp(min=1e-6).log() if form == "iou" else 1 - overlap
    return (error * weight).sum() / (total + torch.finfo(torch.float32).eps)
