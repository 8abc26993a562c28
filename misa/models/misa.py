"""MISA's detector: a student and the box objectives that train it (Figure 2)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.detectors import SOLOv2
from mmdet.structures import DetDataSample
from torch import Tensor

from misa.losses.inputs import Batch
from misa.losses.total import box_objectives


class MISA(SOLOv2):
    """A SOLOv2 student trained from boxes alone.

    `projection_weight` and `affinity` are the arguments of `box_objectives`.
    """

    def __init__(self, *args: Any, projection_weight: float, affinity: Mapping[str, Any] | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.projection_weight = projection_weight
        self.affinity = affinity

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample], **_: Any) -> dict[str, Tensor]:
        """The named losses of a batch (b 3 h w); no ground-truth mask is read."""
        size = (batch_inputs.shape[-2], batch_inputs.shape[-1])
        instances = [sample.gt_instances for sample in batch_data_samples]
        cells = self.mask_head.assign(instances, size)
        positives, features, losses = self.mask_head.match(self.extract_feat(batch_inputs), cells, instances)
        shapes = [sample.img_shape for sample in batch_data_samples]
        batch = _shrink(batch_inputs, shapes, (features.shape[-2], features.shape[-1]))
        return losses | box_objectives(
            positives, batch, projection_weight=self.projection_weight, affinity=self.affinity
        )


def _shrink(images: Tensor, shapes: list[tuple[int, int]], size: tuple[int, int]) -> Batch:
    """The images at the masks' size (bilinear without antialiasing, as APro) and where they are not padding."""
    stride = images.shape[-2] / size[0], images.shape[-1] / size[1]
    valid = torch.zeros((len(images), *size), dtype=torch.bool, device=images.device)
    for mask, (h, w, *_) in zip(valid, shapes, strict=True):
        mask[: round(h / stride[0]), : round(w / stride[1])] = True
    return Batch(F.interpolate(images, size=size, mode="bilinear", align_corners=False), valid)
