"""PolarMask (Xie et al. 2020): FCOS with 36 distances to the contour at every location, trained from masks.

Losses, targets and decoding are the published code's, on mmdet's FCOS. Different from it: images keep their aspect
ratio, box sizes have no "+1", objects of less than 10 x 10 pixels are learned, too, counts are over all processes, a
level's candidates are the top 1,000 by class score alone, scores are divided by 1.5, so that none exceeds 1, and
contours are scaled at the pixels' centers and rounded.

Axes: b image · g ground truth · p location of all levels · c class · k ray · h row · w column.
"""

import copy
from typing import Any, Literal

import cv2
import numpy as np
import torch
from mmdet.models.dense_heads.condinst_head import CondInstBboxHead
from mmdet.models.detectors import FCOS
from mmdet.models.utils import multi_apply
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

from misa.experiment import Experiment
from misa.losses.boxes import box_loss
from misa.losses.polar import polar_centerness, polar_iou_loss
from misa.models.students.batch_means import batch_mean
from misa.models.students.common import mmdet_model
from misa.models.students.table import Implementation
from misa.ops.rays import RAYS, centre, contour, polygons, ray_lengths
from misa.ops.transfer import on_host, to_device

SMALLEST = 15  # minimum mask area in pixels of the network's input (published: of the original image) to be a target
RADIUS = 1.5  # center sampling: distance in strides within which a location is positive
LEAST = 0.5  # offset of the centerness in a score: its factor is (0.5 + centerness) / 1.5


class PolarHead(CondInstBboxHead):
    """FCOS's head with a third tower for the rays.

    rays: definition of the targets, see `misa.ops.rays.ray_lengths`.
    """

    def __init__(self, *args: Any, rays: Literal["official", "cast"] = "official", **kwargs: Any) -> None:
        self.rays = rays
        super().__init__(*args, num_params=RAYS, **kwargs)

    def _init_layers(self) -> None:
        super()._init_layers()
        self.ray_convs = copy.deepcopy(self.reg_convs)
        self.ray_scales = copy.deepcopy(self.scales)

    def forward(self, x: tuple[Tensor, ...]) -> Any:
        """Return class logits, distances to the box, centerness and rays of every level; distances in input pixels."""
        return multi_apply(self._level, x, self.scales, self.ray_scales)

    def _level(self, x: Tensor, scale: nn.Module, ray_scale: nn.Module) -> tuple[Tensor, ...]:
        towers = []
        for tower in (self.cls_convs, self.reg_convs, self.ray_convs):
            features = x
            for layer in tower:
                features = layer(features)
            towers.append(features)
        classes, box, rays = towers
        return (
            self.conv_cls(classes),
            scale(self.conv_reg(box)).float().exp(),
            self.conv_centerness(classes),
            ray_scale(self.controller(rays)).float().exp(),
        )

    def loss_by_feat(
        self,
        classes: list[Tensor],
        boxes: list[Tensor],
        centernesses: list[Tensor],
        rays: list[Tensor],
        instances: list[InstanceData],
        *_: Any,
    ) -> dict[str, Tensor]:
        """Return the four losses of a batch; `instances` have bboxes, labels, masks. Targets are made on the host."""
        device = classes[0].device
        priors = self.prior_generator.grid_priors([x.shape[-2:] for x in classes], device="cpu", with_stride=True)
        points = torch.cat(priors)[:, :3]
        ranges = torch.cat(
            [
                points.new_tensor(own).expand(len(level), 2)
                for own, level in zip(self.regress_ranges, priors, strict=True)
            ]
        )
        found = [assigned(points, ranges, truth, self.num_classes, self.rays) for truth in instances]
        labels, aims, lengths = (torch.cat(parts) for parts in zip(*found, strict=True))
        place = (labels < self.num_classes).nonzero().flatten()
        at = points[:, :2].repeat(len(instances), 1)[place]
        counts = torch.tensor([float(len(place)), float(len(place) + len(instances))])
        chosen, at, aims, lengths, labels, counts = (
            to_device(x, device) for x in (place, at, aims, lengths, labels, counts)
        )
        count, whole = batch_mean(counts)
        weight = polar_centerness(lengths)
        total = batch_mean(weight.sum()).clamp(min=1e-6)
        own, theirs = (self.bbox_coder.decode(at, x) for x in (_concatenated(boxes)[chosen], aims))
        logits = _concatenated(centernesses)[chosen].flatten().float()
        unlike = nn.functional.binary_cross_entropy_with_logits(logits, weight, reduction="sum")
        return {
            "loss_cls": self.loss_cls(_concatenated(classes).float(), labels, avg_factor=whole),
            "loss_bbox": self.loss_bbox.loss_weight * box_loss(own, theirs, weight, total, form="iou"),
            "loss_mask": (weight * polar_iou_loss(_concatenated(rays)[chosen], lengths)).sum() / total,
            "loss_centerness": unlike / count.clamp(min=1),
        }

    def _bbox_post_process(
        self, results: InstanceData, cfg: ConfigDict, rescale: bool, with_nms: bool, img_meta: dict[str, Any]
    ) -> InstanceData:
        """mmdet's post-processing, then the masks of the remaining instances."""
        results.score_factors = (results.score_factors + LEAST) / (1 + LEAST)
        kept = super()._bbox_post_process(
            results=results, cfg=cfg, rescale=rescale, with_nms=with_nms, img_meta=img_meta
        )
        (h, w), (x, y) = img_meta["img_shape"][:2], img_meta["scale_factor"] if rescale else (1.0, 1.0)
        corners = polygons(kept.points, kept.param_preds).clamp(min=0)
        corners = corners.minimum(corners.new_tensor([w - 1, h - 1]))
        corners = (corners + 0.5) / corners.new_tensor([x, y]) - 0.5  # of the pixels' centers, unlike PolarMask's code
        kept.masks = _filled(corners, img_meta["ori_shape"][:2] if rescale else (h, w))
        for name in ("points", "strides", "param_preds"):
            kept.pop(name)
        return kept


def _concatenated(levels: list[Tensor]) -> Tensor:
    """Concatenate all levels' maps (b c h w) to (b · p, c)."""
    return torch.cat([x.flatten(2) for x in levels], dim=2).transpose(1, 2).flatten(0, 1)


def assigned(
    points: Tensor, ranges: Tensor, truth: InstanceData, background: int, rule: Literal["official", "cast"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the class of every location (p), and for positive ones distances to the box (n 4) and rays (n 36).

    All on the host. points (p 3): x, y and stride. ranges (p 2): of the largest distance to the box. A location is
    positive for an object if it is within `RADIUS` strides of its center and in its box; the smallest box wins.
    """
    large = [g for g, mask in enumerate(truth.masks.masks) if np.count_nonzero(mask) >= SMALLEST]
    outlines = [contour(torch.from_numpy(truth.masks.masks[g])) for g in large]
    bboxes, labels = on_host(truth.bboxes)[large], on_host(truth.labels)[large]
    every = labels.new_full((len(points),), background)
    if not large:
        return every, bboxes.new_zeros(0, 4), bboxes.new_zeros(0, RAYS)
    centres = torch.stack([centre(outline) for outline in outlines]).to(bboxes)
    x, y, stride = points[:, None].unbind(-1)
    x1, y1, x2, y2 = bboxes.unbind(-1)
    away = torch.stack([x - x1, y - y1, x2 - x, y2 - y], dim=-1)  # (p, g, 4)
    off = (points[:, None, :2] - centres).abs().amax(dim=-1)
    farthest = away.amax(dim=-1)
    inside = (off < RADIUS * stride) & (away.amin(dim=-1) > 0)
    inside &= (farthest >= ranges[:, :1]) & (farthest <= ranges[:, 1:])
    area = (bboxes[:, 2:] - bboxes[:, :2]).prod(dim=1)
    least, owner = torch.where(inside, area, torch.inf).min(dim=1)
    (place,) = least.isfinite().nonzero(as_tuple=True)
    owner = owner[place]
    every[place] = labels[owner]
    lengths = bboxes.new_zeros(len(place), RAYS)
    for g, outline in enumerate(outlines):
        own = owner == g
        lengths[own] = ray_lengths(outline, points[place[own], :2], rule=rule)
    return every, away[place, owner], lengths


def _filled(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Rasterize polygons (n 36 2), rounded to whole pixels and including their outlines, to masks (n h w)."""
    masks = np.zeros((len(corners), *size), np.uint8)
    for mask, polygon in zip(masks, corners.round().int().cpu().numpy(), strict=True):
        cv2.fillPoly(mask, [polygon.reshape(-1, 1, 2)], [1])
    return torch.from_numpy(masks).bool().to(corners.device)


def polarmask_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """The detector's config: mmdet's FCOS with `PolarHead`."""
    network, inference = experiment.network, experiment.inference
    model = mmdet_model("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", FCOS, experiment)
    model.bbox_head.update(
        type=PolarHead,
        rays=network.rays,
        num_classes=len(classes),
        in_channels=network.neck_channels,
        stacked_convs=network.stacked_convs,
        feat_channels=network.head_channels,
    )
    model.test_cfg.update(score_thr=inference.score, max_per_img=inference.per_image)
    return model


polarmask = Implementation(polarmask_config)
