"""CondInst as a box-supervised student: mmdet's FCOS and mask heads, with `Positives` in place of mask targets.

BoxInst learns with it. The widths of the dynamic layers are those of AdelaiDet, the code base that it is published in:
16 mask features and 8 dynamic channels, 233 parameters a location.
"""

import torch
from mmdet.models.dense_heads.condinst_head import CondInstBboxHead, CondInstMaskHead
from mmdet.models.detectors import CondInst
from mmdet.models.utils import aligned_bilinear
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from misa.experiment import Experiment
from misa.losses.inputs import Positives
from misa.models.students.base import BoxMasks, BoxSupervised, Handover
from misa.models.students.baselines import dynamic_masks
from misa.models.students.common import mmdet_model, objectives, preprocessor
from misa.models.students.table import Implementation
from misa.ops.boxes import box_masks

MASK_FEATURES, DYNAMIC = 16, 8  # channels


class BoxCondInstMaskHead(CondInstMaskHead):
    """CondInst's mask head for any number of dynamic channels: mmdet's takes as many as there are mask features."""

    def parse_dynamic_params(self, params: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The weights (n · out, in, 1, 1) and biases (n · out) of every layer from params (n, num_params)."""
        n = len(params)
        parts = params.split([*self.weight_nums, *self.bias_nums], dim=1)
        weights, biases = parts[: self.num_layers], parts[self.num_layers :]
        return (
            [w.reshape(n * out, -1, 1, 1) for w, out in zip(weights, self.bias_nums, strict=True)],
            [b.reshape(n * out) for b, out in zip(biases, self.bias_nums, strict=True)],
        )


class MISACondInst(BoxSupervised, CondInst):
    """CondInst as the student. Its locations are found in the middle of the boxes, since there are no masks."""

    bbox_head: CondInstBboxHead
    mask_head: BoxCondInstMaskHead

    def feature_channels(self) -> int:
        """Those of the mask features, at twice their resolution."""
        return int(self.mask_head.in_channels)

    def dense_feature(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The mask features, stretched to the size of the masks."""
        return _dense_feature(self, maps)

    def handover(self, images: Tensor, instances: list[InstanceData]) -> Handover:
        """The locations that fire, of every box the best by class probability times centre-ness, 64 an image in all."""
        maps = self.extract_feat(images)
        plain = [InstanceData(bboxes=truth.bboxes, labels=truth.labels) for truth in instances]
        losses = self.bbox_head.loss_by_feat(*self.bbox_head(maps), plain, [])
        chosen = [best(info, self.mask_head.topk_masks_per_img) for info in self.bbox_head.get_positive_infos()]
        features = self.mask_head.mask_feature_head(maps)
        masks = [self.mask_head.forward_single(own, info)[0] for own, info in zip(features, chosen, strict=True)]
        stride = self.mask_head.mask_out_stride
        h, w = (
            features.shape[-2] * self.mask_head.mask_feat_stride,
            features.shape[-1] * self.mask_head.mask_feat_stride,
        )
        size = (h // stride, w // stride)
        owners = [info.pos_assigned_gt_inds for info in chosen]
        boxes = [
            box_masks(truth.bboxes, *size, stride=stride)[own] for truth, own in zip(instances, owners, strict=True)
        ]
        hosted = [own.cpu() for own in owners]
        first = torch.tensor([0, *(len(truth.bboxes) for truth in instances)]).cumsum(0).tolist()
        positives = Positives(
            torch.cat([own.reshape(-1, *size) for own in masks]),
            torch.cat(boxes),
            torch.cat([truth.labels.cpu()[own] for truth, own in zip(instances, hosted, strict=True)]),
            torch.cat([torch.full_like(own, b) for b, own in enumerate(hosted)]),
            torch.cat([own + start for own, start in zip(hosted, first, strict=False)]),
        )
        return Handover(positives, _stretched(self, features), losses)

    def masks_of_boxes(self, images: Tensor, instances: list[InstanceData]) -> list[BoxMasks]:
        """The mean of the masks of the locations that a box owns."""
        positives = self.handover(images, instances).positives
        found, start = [], 0
        for truth in instances:
            here = start + torch.arange(len(truth.bboxes))
            own = (here[:, None] == positives.instance).to(positives.mask_logits)  # (boxes, locations)
            count = own.sum(dim=1)
            total = torch.einsum("np,phw->nhw", own, positives.mask_logits.sigmoid())
            found.append(BoxMasks(total / count.clamp(min=1)[:, None, None], count > 0))
            start += len(truth.bboxes)
        return found


def best(info: InstanceData, at_most: int) -> InstanceData:
    """The locations of an image that make masks: for every box its best ones, `at_most` / boxes of them, one or more.

    AdelaiDet's rule for BoxInst: a mask for every location would not fit into memory.
    """
    owner = info.pos_assigned_gt_inds
    if len(owner) == 0:
        return info
    score = info.scores.sigmoid().amax(dim=1) * info.centernesses.sigmoid().flatten()
    owners = owner.unique()
    each = max(at_most // len(owners), 1)
    kept = []
    for one in owners:
        mine = (owner == one).nonzero().flatten()
        kept.append(mine if len(mine) <= each else mine[score[mine].topk(each).indices])
    return info[torch.cat(kept)]


def condinst_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """The detector: mmdet's CondInst (Tian et al. 2020) taught by masks, AdelaiDet's widths of it taught by boxes."""
    if experiment.supervision == "mask":
        model = mmdet_model("condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py")
        model.type = CondInst
        model.data_preprocessor = preprocessor(experiment)
        return dynamic_masks(model, experiment, len(classes))
    model = mmdet_model("boxinst/boxinst_r50_fpn_ms-90k_coco.py")
    model.type = MISACondInst
    model.data_preprocessor = preprocessor(experiment)
    dynamic_masks(model, experiment, len(classes))
    model.mask_head.update(type=BoxCondInstMaskHead, feat_channels=DYNAMIC)
    model.mask_head.mask_feature_head.out_channels = MASK_FEATURES
    model.bbox_head.num_params = (MASK_FEATURES + 2 + 1) * DYNAMIC + (DYNAMIC + 1) * DYNAMIC + DYNAMIC + 1
    model.update(objectives(experiment, len(classes)))
    return model


def _stretched(model: CondInst, features: Tensor) -> Tensor:
    """Mask features at the size of the masks."""
    head = model.mask_head
    stretched: Tensor = aligned_bilinear(features, head.mask_feat_stride // head.mask_out_stride)
    return stretched


def _dense_feature(model: CondInst, maps: tuple[Tensor, ...]) -> Tensor:
    """Of a student that learns from masks, too, which is mmdet's own."""
    return _stretched(model, model.mask_head.mask_feature_head(maps))


condinst = Implementation(condinst_config, dense_feature=_dense_feature)
