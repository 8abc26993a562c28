"""SOLOv2 as a box-supervised student (Eq. 2): mmdet's head, with `Positives` in place of mask targets."""

from typing import Any

import torch
from mmdet.models.dense_heads import SOLOV2Head
from mmengine.structures import InstanceData
from torch import Tensor

from misa.losses.inputs import Positives
from misa.ops.boxes import box_masks, positive_cells


class BoxSOLOv2Head(SOLOV2Head):
    """SOLOv2's head that learns which cells fire from boxes and hands its masks over as `Positives`."""

    def match(
        self, features: tuple[Tensor, ...], instances: list[InstanceData], size: tuple[int, int]
    ) -> tuple[Positives, Tensor, dict[str, Tensor]]:
        """The positives, the dense feature I (b d h w) and the classification loss of a batch.

        `instances` holds each image's `bboxes` (n, 4) and `labels` (n,); `size` is the padded input's (h, w).
        """
        kernels, scores, mask_features = self(features)
        h, w = mask_features.shape[-2:]
        masks, boxes, labels, images, targets = [], [], [], [], []
        for level, grid in enumerate(self.num_grids):
            for b, truth in enumerate(instances):
                instance, cell = positive_cells(
                    truth.bboxes, size, grid, self.scale_ranges[level], shrink=self.pos_scale
                )
                chosen = kernels[level][b].flatten(1)[:, cell].t()
                masks.append((chosen @ mask_features[b].flatten(1)).view(-1, h, w))
                boxes.append(box_masks(truth.bboxes, h, w, stride=self.mask_stride)[instance])
                labels.append(truth.labels[instance])
                images.append(torch.full_like(instance, b))
                targets.append(_cell_labels(truth.labels, instance, cell, grid * grid, self.num_classes))
        positives = Positives(torch.cat(masks), torch.cat(boxes), torch.cat(labels), torch.cat(images))
        logits = torch.cat([s.permute(0, 2, 3, 1).reshape(-1, self.num_classes) for s in scores])
        loss = self.loss_cls(logits, torch.cat(targets), avg_factor=len(positives.labels) + 1)
        return positives, mask_features, {"loss_cls": loss}


def _cell_labels(labels: Tensor, instance: Tensor, cell: Tensor, cells: int, background: int) -> Tensor:
    """The class of every cell (cells,): the later instance wins a shared cell, `background` where none fires."""
    winner = labels.new_full((cells,), -1).scatter_reduce(0, cell, instance, "amax")
    padded: Any = torch.cat([labels, labels.new_full((1,), background)])
    return padded[winner]
