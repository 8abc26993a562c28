"""MISA's detector: a student and the box objectives that train it (Figure 2)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.detectors import SOLOv2
from mmdet.structures import DetDataSample
from torch import Tensor

from misa.errors import Diverged
from misa.losses.distillation import distillation_loss
from misa.losses.inputs import Batch, SemanticPrior
from misa.losses.total import box_objectives
from misa.models.adapter import Adapter
from misa.models.semask import SeMask
from misa.ops.boxes import box_masks


class MISA(SOLOv2):
    """A SOLOv2 student trained from boxes alone, with or without a semantic teacher beside it.

    projection_weight, affinity: the arguments of `box_objectives`.
    distillation: the arguments of `distillation_loss` and a `weight`; None leaves FSD out.
    semantic: whether the teacher's prior joins the affinity (SEPA).
    teacher_channels: of the teacher's dense feature S; needed for the adapter of FSD.

    The teacher is attached, not owned: it is no part of the state dict, of `parameters()` or of inference.
    """

    teacher: SeMask | None = None

    def __init__(
        self,
        *args: Any,
        projection_weight: float,
        affinity: Mapping[str, Any] | None,
        distillation: Mapping[str, Any] | None = None,
        semantic: bool = False,
        teacher_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.projection_weight = projection_weight
        self.affinity = affinity
        self.distillation = None if distillation is None else dict(distillation)
        self.semantic = semantic
        if self.distillation is not None:
            assert teacher_channels is not None, "FSD needs the teacher's number of channels"
            # The student's own weights are drawn as without an adapter, so that rows of one seed start alike.
            with torch.random.fork_rng(devices=[]):
                self.adapter = Adapter(self.mask_head.mask_feature_head.out_channels, teacher_channels)

    def attach(self, teacher: SeMask) -> None:
        """Put a frozen teacher beside the student, on its device."""
        frozen = teacher.eval().requires_grad_(False).to(next(self.parameters()).device)
        object.__setattr__(self, "teacher", frozen)  # past nn.Module, which would make it a part of this one

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample], **_: Any) -> dict[str, Tensor]:
        """The named losses of a batch (b 3 h w); no ground-truth mask is read."""
        size = (batch_inputs.shape[-2], batch_inputs.shape[-1])
        instances = [sample.gt_instances for sample in batch_data_samples]
        cells = self.mask_head.assign(instances, size)
        positives, features, losses = self.mask_head.match(self.extract_feat(batch_inputs), cells, instances)
        if batch_inputs.device.type == "cpu" and not positives.mask_logits.isfinite().all():  # elsewhere it would wait
            raise Diverged("the masks became NaN or infinite; lower the learning rate, in another work_dir.")
        shapes = [sample.img_shape for sample in batch_data_samples]
        batch = _shrink(batch_inputs, shapes, (features.shape[-2], features.shape[-1]))
        prior = self._prior(batch_inputs, (features.shape[-2], features.shape[-1]))
        losses |= box_objectives(
            positives,
            batch,
            projection_weight=self.projection_weight,
            affinity=self.affinity,
            prior=prior if self.semantic else None,
        )
        if self.distillation is not None:
            assert prior is not None
            options = dict(self.distillation)
            weight = options.pop("weight")
            union = union_of_boxes([truth.bboxes for truth in instances], features, self.mask_head.mask_stride)
            error = distillation_loss(
                self.adapter(features), prior.features, union, valid=batch.valid[:, None], **options
            )
            losses["loss_distillation"] = weight * error
        return losses

    def _prior(self, images: Tensor, size: tuple[int, int]) -> SemanticPrior | None:
        """S at the size of the masks and K, without gradient; None where no term asks for them."""
        if self.distillation is None and not self.semantic:
            return None
        if self.teacher is None:
            raise RuntimeError("this student learns from a semantic teacher: attach one before training.")
        features, factors = self.teacher.prior(images)
        if features.shape[-2:] != size:
            features = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
        return SemanticPrior(features, factors)


def union_of_boxes(boxes: list[Tensor], features: Tensor, stride: int) -> Tensor:
    """B of Eq. 5 (b 1 h w): where any of an image's boxes is, at the size of `features`."""
    h, w = features.shape[-2:]
    return torch.stack([box_masks(own, h, w, stride=stride).any(dim=0, keepdim=True) for own in boxes])


def _shrink(images: Tensor, shapes: list[tuple[int, int]], size: tuple[int, int]) -> Batch:
    """The images at the masks' size (bilinear without antialiasing, as APro) and where they are not padding."""
    stride = images.shape[-2] / size[0], images.shape[-1] / size[1]
    valid = torch.zeros((len(images), *size), dtype=torch.bool, device=images.device)
    for mask, (h, w, *_) in zip(valid, shapes, strict=True):
        mask[: round(h / stride[0]), : round(w / stride[1])] = True
    return Batch(F.interpolate(images, size=size, mode="bilinear", align_corners=False), valid)
