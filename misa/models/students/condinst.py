"""CondInst as a box-supervised student: mmdet's FCOS and mask heads, with `Positives` in place of mask targets.

It is BoxInst's detector. The widths of the dynamic layers are those of AdelaiDet, its published code: 16 mask features
and 8 dynamic channels, 233 parameters per location. Predictions are mmdet's: the threshold is on the class probability,
and the center-ness enters the score after it, not before as in AdelaiDet, which has fewer detections of low scores.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from mmdet.models.dense_heads.condinst_head import CondInstBboxHead, CondInstMaskHead
from mmdet.models.detectors import CondInst
from mmdet.models.utils import aligned_bilinear
from mmdet.utils import reduce_mean
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from misa.experiment import Experiment
from misa.losses.boxes import box_loss
from misa.losses.inputs import Positives
from misa.losses.pseudo import quality
from misa.models.students.base import BoxMasks, BoxSupervised, StudentOutput
from misa.models.students.baselines import dynamic_masks
from misa.models.students.common import mmdet_model, objectives
from misa.models.students.table import Implementation
from misa.objectives.base import Detected
from misa.ops.boxes import box_masks
from misa.ops.transfer import on_host, to_device

MASK_FEATURES, DYNAMIC = 16, 8  # channels


class BoxCondInstMaskHead(CondInstMaskHead):
    """CondInst's mask head for any number of dynamic channels; mmdet's requires as many as mask features."""

    def parse_dynamic_params(self, params: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Split params (n, num_params) into every layer's weights (n · out, in, 1, 1) and biases (n · out)."""
        n = len(params)
        parts = params.split([*self.weight_nums, *self.bias_nums], dim=1)
        weights, biases = parts[: self.num_layers], parts[self.num_layers :]
        return (
            [w.reshape(n * out, -1, 1, 1) for w, out in zip(weights, self.bias_nums, strict=True)],
            [b.reshape(n * out) for b, out in zip(biases, self.bias_nums, strict=True)],
        )

    def predict_by_feat(
        self, mask_preds: list[Tensor], results_list: list[InstanceData], *args: Any, **kwargs: Any
    ) -> list[InstanceData]:
        """mmdet's; with `test_cfg.rescore` scores are sqrt(sqrt(class · center-ness) · `quality` of the mask)."""
        if self.test_cfg.get("rescore"):
            for found, logits in zip(results_list, mask_preds, strict=True):
                masks = logits.reshape(-1, *logits.shape[-2:])
                found.scores = (found.scores.sqrt() * quality(masks.float().sigmoid())).sqrt()
        rescored: list[InstanceData] = super().predict_by_feat(mask_preds, results_list, *args, **kwargs)
        return rescored

    def _predict_by_feat_single(
        self, mask_preds: Tensor, bboxes: Tensor, img_meta: dict[str, Any], rescale: bool, cfg: Any = None
    ) -> Tensor:
        """Return the masks (n h w) of logits (n h w); mmdet's, but that a cell's center is where the losses have it.

        mmdet's `aligned_bilinear` has it half a pixel of the test image further right and down, which fits its targets
        from masks, every fourth pixel from the third.
        """
        h, w = img_meta["img_shape"][:2]
        stride = self.mask_out_stride
        fine = F.interpolate(mask_preds.sigmoid()[None], scale_factor=stride, mode="bilinear", align_corners=False)
        fine = fine[..., :h, :w]
        if rescale:  # the boxes in place, as mmdet
            bboxes /= bboxes.new_tensor(img_meta["scale_factor"]).repeat(1, 2)
            fine = F.interpolate(fine, img_meta["ori_shape"][:2], mode="bilinear", align_corners=False)
        return fine[0] > (self.test_cfg if cfg is None else cfg).mask_thr


class BoxCondInstBboxHead(CondInstBboxHead):
    """mmdet's FCOS head with targets computed from the host's boxes and labels, without synchronizing with the host."""

    def match(
        self, outputs: tuple[list[Tensor], ...], instances: list[InstanceData], at_most: int
    ) -> tuple[dict[str, Tensor], list["Place"]]:
        """Return mmdet's three losses of a batch, and the `best` of every image's positive locations."""
        scores, boxes, centernesses, _ = outputs
        device, background = scores[0].device, self.num_classes
        priors = self.prior_generator.grid_priors([x.shape[-2:] for x in scores], device="cpu", with_stride=True)
        points = [level[:, :2] for level in priors]
        given = [InstanceData(bboxes=on_host(own.bboxes), labels=on_host(own.labels)) for own in instances]
        by_level, aims, places, owners = self.get_targets(points, given)
        labels = torch.cat(by_level)
        positive = (labels < background).nonzero().flatten()
        aims = torch.cat(aims)[positive]
        at = torch.cat([level.repeat(len(instances), 1) for level in points])[positive]
        hosted = (positive, labels, self.centerness_target(aims), self.bbox_coder.decode(at, aims), at)
        chosen, labels, weight, theirs, at = (to_device(x, device) for x in hosted)
        count = reduce_mean(torch.tensor(float(len(positive))).to(device, non_blocking=True)).clamp(min=1)
        total = reduce_mean(weight.sum()).clamp(min=1e-6)
        classes, distances, central = (_listed(x) for x in (scores, boxes, centernesses))
        found = box_loss(self.bbox_coder.decode(at, distances[chosen]), theirs, weight, total, form="giou")
        losses = {
            "loss_cls": self.loss_cls(classes, labels, avg_factor=count),
            "loss_bbox": self.loss_bbox.loss_weight * found,
            "loss_centerness": self.loss_centerness(central[chosen].flatten(), weight, avg_factor=count),
        }
        every = torch.cat(priors)
        sure = (_concatenated(scores).sigmoid().amax(dim=2) * _concatenated(centernesses).sigmoid()[..., 0]).detach()
        kept = []
        for own, where, owner in zip(sure, places, owners, strict=True):
            here = to_device(where, device)
            number, owner = best(owner, own[here], at_most)
            x, y, stride = to_device(every[where, :3], device)[number].unbind(dim=1)
            kept.append(Place(here[number], torch.stack([x, y], dim=1), stride, owner))
        return losses, kept


class Place(NamedTuple):
    """Locations of an image: index into the concatenated levels, x and y, stride; and, on the host, each one's box."""

    position: Tensor
    points: Tensor
    strides: Tensor
    owner: Tensor


class MISACondInst(BoxSupervised, CondInst):
    """CondInst as the student. Positive locations are sampled around the boxes' centers, as there are no masks."""

    bbox_head: BoxCondInstBboxHead
    mask_head: BoxCondInstMaskHead
    lacks: ClassVar[dict[str, str]] = {"per_box": "a small box may have no location of its own"}

    def feature_channels(self) -> int:
        """The channels of the mask features, which I has at twice the resolution."""
        return int(self.mask_head.in_channels)

    def dense_feature(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The mask features, upsampled to the size of the masks."""
        return _dense_feature(self, maps)

    def training_output(self, images: Tensor, instances: list[InstanceData], places: Any = None) -> StudentOutput:
        """Positives are every box's locations with the highest class probability · center-ness, about 64 per image.

        places: one `Place` per image.
        """
        maps = self.extract_feat(images)
        outputs = self.bbox_head(maps)
        losses: dict[str, Tensor] = {}
        if places is None:
            losses, places = self.bbox_head.match(outputs, instances, self.mask_head.topk_masks_per_img)
        chosen = [
            InstanceData(points=place.points, strides=place.strides, param_preds=own[place.position])
            for place, own in zip(places, _concatenated(outputs[-1]), strict=True)
        ]
        features = self.mask_head.mask_feature_head(maps)
        masks = [self.mask_head.forward_single(own, info)[0] for own, info in zip(features, chosen, strict=True)]
        stride, by = self.mask_head.mask_out_stride, self.mask_head.mask_feat_stride
        size = (features.shape[-2] * by // stride, features.shape[-1] * by // stride)
        owners = [place.owner for place in places]
        boxes = [
            box_masks(truth.bboxes, *size, stride=stride)[own.to(images.device, non_blocking=True)]
            for truth, own in zip(instances, owners, strict=True)
        ]
        every = torch.cat([own.reshape(-1, *size) for own in masks])
        if len(every) == 0:  # mmdet's are then outside the graph: no gradient, and parameters unused in this process
            every = every + 0 * (features.sum() + sum(level.sum() for level in outputs[-1]))
        first = torch.tensor([0, *(len(truth.bboxes) for truth in instances)]).cumsum(0).tolist()
        positives = Positives(
            every,
            torch.cat(boxes),
            torch.cat([on_host(truth.labels)[own] for truth, own in zip(instances, owners, strict=True)]),
            torch.cat([torch.full_like(own, b) for b, own in enumerate(owners)]),
            torch.cat([own + start for own, start in zip(owners, first, strict=False)]),
        )
        return StudentOutput(positives, _stretched(self, features), losses, places=places)

    def detect(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Detected]:
        """Detections by sqrt(class probability · center-ness), as AdelaiDet's. In evaluation only.

        The threshold is on the product, as there; mmdet's on the class probability.
        """
        assert not self.training, "mmdet's head measures boxes in strides while it trains"
        maps = self.extract_feat(images)
        metas = [{"img_shape": size} for size in sizes]
        every = self.bbox_head.predict_by_feat(*self.bbox_head(maps), batch_img_metas=metas, rescale=False)
        every = [_above(info, self.bbox_head.test_cfg.score_thr) for info in every]
        features = self.mask_head.mask_feature_head(maps)
        size = tuple(_stretched(self, features).shape[-2:])
        masks = [self.mask_head.forward_single(own, info)[0] for own, info in zip(features, every, strict=True)]
        return [
            Detected(info.bboxes.float(), info.scores.float().sqrt(), own.reshape(-1, *size).float().sigmoid())
            for info, own in zip(every, masks, strict=True)
        ]

    def masks_of_boxes(self, images: Tensor, instances: list[InstanceData]) -> list[BoxMasks]:
        """The mean of the masks of the locations assigned to a box."""
        positives = self.training_output(images, instances).positives
        found, start = [], 0
        for truth in instances:
            here = start + torch.arange(len(truth.bboxes))
            own = (here[:, None] == positives.instance).to(positives.mask_logits)  # (boxes, locations)
            count = own.sum(dim=1)
            total = torch.einsum("np,phw->nhw", own, positives.mask_logits.sigmoid())
            found.append(BoxMasks(total / count.clamp(min=1)[:, None, None], count > 0))
            start += len(truth.bboxes)
        return found


def _concatenated(levels: list[Tensor]) -> Tensor:
    """Concatenate all levels' maps (b c h w) to (b p c), in float32."""
    return torch.cat([x.float().flatten(2) for x in levels], dim=2).transpose(1, 2)


def _listed(levels: list[Tensor]) -> Tensor:
    """Concatenate all levels' maps (b c h w) to (b · p, c), ordered by level first, in float32."""
    return torch.cat([x.float().permute(0, 2, 3, 1).flatten(0, 2) for x in levels])


def best(owner: Int[Tensor, " n"], score: Float[Tensor, " n"], at_most: int) -> tuple[Tensor, Tensor]:
    """Select an image's locations that predict masks: for every box the best `at_most` / boxes, at least one.

    AdelaiDet's rule for BoxInst: masks of all locations would not fit into memory. `owner`, the box of each location,
    is on the host, so that counts are known without a synchronization. Returns the indices of the locations, on the
    score's device, and their owners, on the host.
    """
    owners = owner.unique()
    if len(owners) == 0:
        return owner.to(score.device), owner
    each = max(at_most // len(owners), 1)
    kept, whose = [], []
    for one in owners:
        mine = (owner == one).nonzero().flatten()
        here = mine.to(score.device, non_blocking=True)
        kept.append(here if len(mine) <= each else here[score[here].topk(each).indices])
        whose.append(one.expand(min(len(mine), each)))
    return torch.cat(kept), torch.cat(whose)


def condinst_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """The detector's config: mmdet's CondInst (Tian et al. 2020) for masks, with AdelaiDet's widths for boxes."""
    if experiment.supervision == "mask":
        model = mmdet_model("condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py", CondInst, experiment)
        return dynamic_masks(model, experiment, len(classes))
    model = mmdet_model("boxinst/boxinst_r50_fpn_ms-90k_coco.py", MISACondInst, experiment)
    dynamic_masks(model, experiment, len(classes))
    model.bbox_head.type = BoxCondInstBboxHead
    model.mask_head.update(type=BoxCondInstMaskHead, feat_channels=DYNAMIC)
    model.mask_head.mask_feature_head.out_channels = MASK_FEATURES
    model.bbox_head.num_params = (MASK_FEATURES + 2 + 1) * DYNAMIC + (DYNAMIC + 1) * DYNAMIC + DYNAMIC + 1
    model.test_cfg.rescore = experiment.inference.rescore
    model.update(objectives(experiment, len(classes)))
    return model


def _above(found: InstanceData, limit: float) -> InstanceData:
    """The detections of a score above a limit; one transfer for all of their fields."""
    return found[(found.scores > limit).nonzero().flatten()]


def _stretched(model: CondInst, features: Tensor) -> Tensor:
    """Upsample mask features to the size of the masks."""
    head = model.mask_head
    stretched: Tensor = aligned_bilinear(features, head.mask_feat_stride // head.mask_out_stride)
    return stretched


def _dense_feature(model: CondInst, maps: tuple[Tensor, ...]) -> Tensor:
    """`MISACondInst.dense_feature`, also for mmdet's CondInst trained from masks."""
    return _stretched(model, model.mask_head.mask_feature_head(maps))


condinst = Implementation(condinst_config, dense_feature=_dense_feature)
