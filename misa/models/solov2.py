"""SOLOv2 as a box-supervised student (Eq. 2): mmdet's head, with `Positives` in place of mask targets."""

from typing import NamedTuple

import torch
from mmdet.models.dense_heads import SOLOV2Head
from mmengine.dist import get_world_size
from mmengine.structures import InstanceData
from torch import Tensor

from misa.losses.inputs import Positives
from misa.models._parallel import share
from misa.ops.boxes import box_masks, positive_cells


class Cells(NamedTuple):
    """Which grid cells fire in a batch, image by image. Made on the host before the network runs, to wait but once.

    `position` is a cell's place in all levels of its image strung together; `instance` its box; `counts` how many
    cells each image has; `targets` (b cells) the class of every cell, the number of classes where none fires.
    """

    position: Tensor
    instance: Tensor
    labels: Tensor
    image: Tensor
    counts: list[int]
    targets: Tensor


class BoxSOLOv2Head(SOLOV2Head):
    """SOLOv2's head that learns which cells fire from boxes and hands its masks over as `Positives`."""

    def assign(self, instances: list[InstanceData], size: tuple[int, int]) -> Cells:
        """The cells that fire for each image's `bboxes` (n, 4) and `labels` (n,); `size`: the padded input's (h, w)."""
        found = [self._assign_image(truth.bboxes.cpu(), size) for truth in instances]
        labels = [truth.labels.cpu() for truth in instances]
        cells = sum(grid * grid for grid in self.num_grids)
        return Cells(
            position=torch.cat([position for position, _ in found]),
            instance=torch.cat([instance for _, instance in found]),
            labels=torch.cat([own[instance] for own, (_, instance) in zip(labels, found, strict=True)]),
            image=torch.cat([torch.full_like(instance, b) for b, (_, instance) in enumerate(found)]),
            counts=[len(position) for position, _ in found],
            targets=torch.stack(
                [
                    _cell_labels(own, instance, position, cells, self.num_classes)
                    for own, (position, instance) in zip(labels, found, strict=True)
                ]
            ),
        )

    def _assign_image(self, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        positions, instances, start = [], [], 0
        for grid, scale_range in zip(self.num_grids, self.scale_ranges, strict=True):
            instance, cell = positive_cells(boxes, size, grid, scale_range, shrink=self.pos_scale)
            positions.append(start + cell)
            instances.append(instance)
            start += grid * grid
        return torch.cat(positions), torch.cat(instances)

    def match(
        self, features: tuple[Tensor, ...], cells: Cells, instances: list[InstanceData]
    ) -> tuple[Positives, Tensor, dict[str, Tensor]]:
        """The positives, the dense feature I (b d h w) and the classification loss of a batch."""
        kernels, scores, mask_features = self(features)
        device = mask_features.device
        h, w = mask_features.shape[-2:]
        image = cells.image.to(device, non_blocking=True)
        position = cells.position.to(device, non_blocking=True)
        strung = torch.cat([level.flatten(2) for level in kernels], dim=2)
        chosen = strung.transpose(1, 2)[image, position]
        with torch.autocast(device.type, enabled=False):  # a sum over hundreds of channels: too large for float16
            masks = [
                (kernel @ dense).view(-1, h, w)
                for kernel, dense in zip(
                    chosen.float().split(cells.counts), mask_features.float().flatten(2), strict=True
                )
            ]
        boxes = [
            box_masks(truth.bboxes, h, w, stride=self.mask_stride)[own.to(device, non_blocking=True)]
            for truth, own in zip(instances, cells.instance.split(cells.counts), strict=True)
        ]
        logits = torch.cat([level.flatten(2) for level in scores], dim=2).transpose(1, 2).flatten(0, 1)
        targets = cells.targets.flatten().to(device, non_blocking=True)
        # One more than the positives, as mmdet has it: a batch without any still teaches the background.
        count = len(cells.position) + 1 / get_world_size()
        loss = self.loss_cls(logits.float(), targets, avg_factor=count) * share(count, device)
        positives = Positives(torch.cat(masks), torch.cat(boxes), cells.labels, cells.image)
        return positives, mask_features, {"loss_cls": loss}


def _cell_labels(labels: Tensor, instance: Tensor, cell: Tensor, cells: int, background: int) -> Tensor:
    """The class of every cell (cells,): the later instance wins a shared cell, `background` where none fires."""
    winner = labels.new_full((cells,), -1).scatter_reduce(0, cell, instance, "amax")
    return torch.cat([labels, labels.new_full((1,), background)])[winner]
