"""Training of the semantic teacher as a model of mmengine, from boxes or from label maps."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from torch import Tensor

from misa.losses.inputs import Batch, shrink
from misa.losses.semantic import Boxes, SemanticTerms, label_map_loss, semantic_objectives
from misa.models.teacher.contract import SemanticMaps, TeacherNetwork
from misa.ops.boxes import box_masks
from misa.ops.transfer import on_host


class SemanticTeacher(BaseModel):
    """A teacher network with its losses.

    network: the config of a `TeacherNetwork`.
    objectives: box objectives; None: cross-entropy on label maps.
    stage_weight: weight of the auxiliary loss on the summed stage maps, which has no pairwise term.
    loss_stride: input pixels per pixel of the maps on which the box objectives are computed.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        objectives: SemanticTerms | None,
        stage_weight: float,
        loss_stride: int,
        data_preprocessor: Any = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.network: TeacherNetwork = MODELS.build(network)
        self.objectives = objectives
        self.stage_weight = stage_weight
        self.loss_stride = loss_stride

    def forward(
        self,
        inputs: Tensor,
        data_samples: list[DetDataSample] | None = None,
        mode: Literal["loss", "predict", "tensor"] = "tensor",
    ) -> Any:
        """Return named losses, data samples with `pred_sem_seg`, or `SemanticMaps`, by mmengine's `mode`."""
        maps = self.network(inputs)
        if mode == "tensor" or data_samples is None:
            return maps
        if mode == "predict":
            return self._predictions(maps, inputs, data_samples)
        return (
            self._from_boxes(maps, inputs, data_samples) if self.objectives else self._from_labels(maps, data_samples)
        )

    def _from_boxes(self, maps: SemanticMaps, inputs: Tensor, samples: list[DetDataSample]) -> dict[str, Tensor]:
        assert self.objectives is not None
        size = (-(-inputs.shape[-2] // self.loss_stride), -(-inputs.shape[-1] // self.loss_stride))
        masks, labels, images, crowds = [], [], [], []
        for b, sample in enumerate(samples):
            truth, ignored = sample.gt_instances, sample.ignored_instances
            masks.append(box_masks(truth.bboxes, *size, stride=self.loss_stride))
            labels.append(on_host(truth.labels))
            images.append(torch.full_like(labels[-1], b))
            crowds.append(box_masks(ignored.bboxes, *size, stride=self.loss_stride).any(dim=0))
        union = torch.stack([own.any(dim=0, keepdim=True) for own in masks])
        batch = shrink(inputs, [sample.img_shape for sample in samples], union)
        # Inside a crowd's box neither foreground nor background is known.
        batch = Batch(batch.images, batch.valid & (~torch.stack(crowds) | union[:, 0]))
        boxes = Boxes(torch.cat(masks), torch.cat(labels), torch.cat(images))
        terms, background = self.objectives, self.network.contract.background
        main = semantic_objectives(_sized(maps.logits, size), boxes, batch, terms, background=background)
        terms = replace(terms, affinity=None)
        stages = semantic_objectives(_sized(maps.stage_logits, size), boxes, batch, terms, background=background)
        return main | {"loss_stages": self.stage_weight * torch.stack(list(stages.values())).sum()}

    def _from_labels(self, maps: SemanticMaps, samples: list[DetDataSample]) -> dict[str, Tensor]:
        """SeMask's published losses: cross-entropy of the output, and of the summed stage maps."""
        labels = torch.cat([sample.gt_sem_seg.sem_seg for sample in samples]).long()
        main, stages = (
            label_map_loss(_in_label_order(logits, self.network.contract.background), labels)
            for logits in (maps.logits, maps.stage_logits)
        )
        return {"loss_labels": main, "loss_stages": self.stage_weight * stages}

    def _predictions(self, maps: SemanticMaps, inputs: Tensor, samples: list[DetDataSample]) -> list[DetDataSample]:
        """Set `pred_sem_seg.sem_seg` (1 h w), the most probable class of every pixel of the original image."""
        logits = _sized(maps.logits, (inputs.shape[-2], inputs.shape[-1]))
        background = self.network.contract.background
        for scores, sample in zip(logits, samples, strict=True):
            h, w = sample.img_shape[:2]
            whole = _in_label_order(_sized(scores[None, :, :h, :w], tuple(sample.ori_shape[:2])), background)
            sample.pred_sem_seg = PixelData(sem_seg=whole.argmax(dim=1).to(torch.uint8))
        return samples


def _in_label_order(logits: Tensor, background: int) -> Tensor:
    """Put the rows (b c+1 h w) in the order of label maps, where the background follows the classes."""
    if background == logits.shape[1] - 1:
        return logits
    return torch.cat([logits[:, :background], logits[:, background + 1 :], logits[:, background, None]], dim=1)


def _sized(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(logits.shape[-2:]) == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
