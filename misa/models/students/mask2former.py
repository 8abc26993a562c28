"""Mask2Former as a box-supervised student (Eq. 2): mmdet's head, with `Positives` in place of mask targets.

Every prediction of the decoder, that of the initial queries included, is matched and supervised on its own. As in
APro, no points are sampled: costs and losses use whole masks. APro matches at the input's size; here it is done at
the masks' own, a quarter of it, where boxes are drawn and losses are computed as well.

The EMA model's mask of an object is that of the query which its own last prediction matches to the box, not that of the
query which the student matches: a query has no place in the image, and the same one may answer another object in both
networks. It is the last prediction's for all predictions of the student, as this is what a Mask2Former predicts.

Axes: l prediction · b image · q query · n instance · h row · w column.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from mmdet.models.dense_heads import Mask2FormerHead
from mmdet.models.detectors import Mask2Former
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from misa.errors import Diverged, option_name
from misa.experiment import Experiment, Network
from misa.losses.inputs import Positives
from misa.losses.pseudo import quality
from misa.models.backbones import SWINS
from misa.models.students.base import BoxMasks, BoxSupervised, StudentOutput
from misa.models.students.batch_means import share
from misa.models.students.common import mmdet_model, objectives, stage_widths
from misa.models.students.pixel_decoder import PixelDecoder
from misa.models.students.table import Implementation
from misa.objectives.base import Detected, PerBox
from misa.ops.boxes import box_masks, extents
from misa.ops.transfer import on_host

CLASS_COST, PROJECTION_COST = 2.0, 5.0  # APro's
CLASS_WEIGHT, NO_OBJECT = 2.0, 0.1  # of the classification loss, and of "no object" in it: mmdet's and APro's


class Match(NamedTuple):
    """The matches of queries to instances for every prediction, on the host."""

    prediction: Int[Tensor, " m"]
    image: Int[Tensor, " m"]
    query: Int[Tensor, " m"]
    instance: Int[Tensor, " m"]  # within its image


class Predicted(NamedTuple):
    """All predictions of a batch, and the dense feature I."""

    scores: Float[Tensor, "l b q e"]
    logits: Float[Tensor, "l b q h w"]
    features: Float[Tensor, "b d h w"]


class BoxMask2FormerHead(Mask2FormerHead):
    """Mask2Former's head with queries matched to boxes; it returns their masks as `Positives`."""

    def predict_all(self, features: tuple[Tensor, ...]) -> Predicted:
        """Compute all predictions of a batch and the dense feature, in float32."""
        kept: list[Tensor] = []

        def surface(module: object, inputs: object, output: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
            """Keep I, which mmdet discards; cast to float32 once instead of for each of ten predictions."""
            kept.append(output[0].float())
            return kept[0], output[1]

        with self.pixel_decoder.register_forward_hook(surface):
            scores, logits = self(features, [])
        return Predicted(torch.stack(scores).float(), torch.stack(logits).float(), kept[0])

    def match(
        self, found: Predicted, boxes: list[Tensor], instances: list[InstanceData]
    ) -> tuple[Match, StudentOutput]:
        """Match all predictions to each image's boxes (n h w); the match and the output.

        Every prediction has as many positives as the others, so that a mean over all of them is a tenth of the sum over
        ten predictions.
        """
        scores, masks, features = found
        labels = [truth.labels for truth in instances]
        match = assign(scores, masks, boxes, labels)
        here = Match(*(index.to(masks.device, non_blocking=True) for index in match))
        first = torch.tensor([0, *(len(own) for own in labels)]).cumsum(0)[:-1]
        instance = first[match.image] + match.instance
        chosen = instance.to(masks.device, non_blocking=True)
        target = scores.new_full(scores.shape[:3], self.num_classes, dtype=torch.long)
        target[here.prediction, here.image, here.query] = torch.cat(labels)[chosen]
        positives = Positives(
            masks[here.prediction, here.image, here.query],
            torch.cat(boxes)[chosen],
            torch.cat([on_host(own) for own in labels])[instance],
            match.image,
            instance,
        )
        losses = {"loss_cls": self._class_loss(scores, target, len(match.image))}
        return match, StudentOutput(positives, features, losses, repeats=len(scores), places=instance)

    def _forward_head(
        self, decoder_out: Tensor, mask_feature: Tensor, attn_mask_target_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict in float32: a mask is a sum over hundreds of channels, which may overflow float16."""
        with torch.autocast(decoder_out.device.type, enabled=False):
            predicted: tuple[Tensor, Tensor, Tensor] = super()._forward_head(
                decoder_out.float(), mask_feature.float(), attn_mask_target_size
            )
        return predicted

    def _class_loss(
        self, scores: Float[Tensor, "l b q e"], target: Int[Tensor, "l b q"], matched: int
    ) -> Float[Tensor, ""]:
        """Cross-entropy with weight `NO_OBJECT` of "no object", summed over the predictions."""
        weight = scores.new_ones(self.num_classes + 1)
        weight[-1] = NO_OBJECT
        total = F.cross_entropy(scores.flatten(0, 2), target.flatten(), weight=weight, reduction="sum")
        whole = matched + NO_OBJECT * (target.numel() - matched)  # of all predictions: each has the same
        return CLASS_WEIGHT * len(scores) * total / whole * share(whole, scores.device)


@torch.no_grad()
def match_costs(
    scores: Float[Tensor, "l b q e"], logits: Float[Tensor, "l b q h w"], boxes: list[Tensor], labels: list[Tensor]
) -> list[Tensor]:
    """The costs of matching each query to each box, per image: (l q n); boxes: (n h w) per image.

    cost = 2 · (−p_class) + 5 · (dice of the row projections + dice of the column projections), as APro.
    """
    masks = logits.sigmoid()
    columns, rows = masks.amax(dim=-2), masks.amax(dim=-1)
    probabilities = scores.softmax(dim=-1)
    costs = []
    for b, (own, classes) in enumerate(zip(boxes, labels, strict=True)):
        own = own.to(masks.dtype)
        overlap = _dice(columns[:, b], own.amax(dim=-2)) + _dice(rows[:, b], own.amax(dim=-1))
        costs.append(PROJECTION_COST * overlap - CLASS_COST * probabilities[:, b][..., classes])
    return costs


def assign(
    scores: Float[Tensor, "l b q e"], logits: Float[Tensor, "l b q h w"], boxes: list[Tensor], labels: list[Tensor]
) -> Match:
    """Match queries one to one to each image's boxes (n h w) at minimum cost, separately for every prediction.

    One transfer to the host for the whole batch.
    """
    table = torch.cat(match_costs(scores, logits, boxes, labels), dim=-1).cpu()
    if not table.isfinite().all():
        raise Diverged(
            f"the queries' masks or scores became NaN; lower the learning rate, in another {option_name('work_dir')}."
        )
    found = []
    for b, part in enumerate(table.split([len(own) for own in labels], dim=-1)):
        for prediction, cost in enumerate(part):
            query, instance = (torch.as_tensor(index) for index in linear_sum_assignment(cost))
            found.append((torch.full_like(query, prediction), torch.full_like(query, b), query, instance))
    return Match(*(torch.cat(index) for index in zip(*found, strict=True)))


def each_box(found: Predicted, match: Match, boxes: list[Tensor], instances: list[InstanceData]) -> Positives:
    """One mask per box, in the boxes' order: that of the query which the last prediction's match assigns to it.

    A box without a match, which exists where there are more boxes than queries, has the query of least cost.
    """
    last, queries, images = len(found.scores) - 1, [], []
    for b, (own, truth) in enumerate(zip(boxes, instances, strict=True)):
        mine = (match.image == b) & (match.prediction == last)
        query, instance = (index[mine].to(own.device, non_blocking=True) for index in (match.query, match.instance))
        every = torch.zeros(len(own), dtype=torch.long, device=own.device)
        if len(own) > len(query):
            scores, logits = (each[-1:, b : b + 1] for each in found[:2])
            every = match_costs(scores, logits, [own], [truth.labels])[0][0].argmin(dim=0)
        queries.append(every.index_copy(0, instance, query))
        images.append(torch.full((len(own),), b))
    image, labels = torch.cat(images), torch.cat([on_host(truth.labels) for truth in instances])
    there = image.to(found.logits.device, non_blocking=True)
    masks = found.logits[-1][there, torch.cat(queries)]
    return Positives(masks, torch.cat(boxes), labels, image, torch.arange(len(image)))


def _answered(found: Predicted, boxes: list[Tensor], instances: list[InstanceData], places: Tensor) -> StudentOutput:
    """The EMA model's output: one mask for each of the student's positives, whose boxes are `places` (n, host)."""
    last = found._replace(scores=found.scores[-1:], logits=found.logits[-1:])
    match = assign(last.scores, last.logits, boxes, [truth.labels for truth in instances])
    every = each_box(last, match, boxes, instances)
    here = places.to(every.mask_logits.device, non_blocking=True)
    masks, own = every.mask_logits[here], every.box_masks[here]
    positives = Positives(masks, own, every.labels[places], every.image[places], places)
    return StudentOutput(positives, found.features, {}, per_box=PerBox(every, found.features))


def _dice(a: Float[Tensor, "l q k"], b: Float[Tensor, "n k"], eps: float = 1.0) -> Float[Tensor, "l q n"]:
    """Pairwise Dice distance of projections, with squared denominators and eps in numerator and denominator."""
    overlap = torch.einsum("lqk,nk->lqn", a, b)
    return 1 - (2 * overlap + eps) / (a.square().sum(-1)[..., None] + b.square().sum(-1) + eps)


def mask2former_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """The detector's config."""
    network = experiment.network
    model = mmdet_model("mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", Mask2Former, experiment)
    if network.norm_eval and "norm_cfg" in model.backbone:
        model.backbone.norm_cfg.requires_grad = False
    _set_head(model.panoptic_head, network, len(classes))
    model.panoptic_fusion_head.num_things_classes = len(classes)
    model.train_cfg.num_points = network.points
    model.test_cfg.max_per_image = min(experiment.inference.per_image, network.queries * len(classes))
    if experiment.supervision == "box":
        model.type, model.panoptic_head.type = MISAMask2Former, BoxMask2FormerHead
        del model.train_cfg  # of the match to masks
        model.update(objectives(experiment, len(classes)))
    return model


def _set_head(head: ConfigDict, network: Network, classes: int) -> None:
    """Set the sizes of the pixel decoder, the queries and the decoder."""
    d = network.feature_channels
    head.update(
        in_channels=stage_widths(network),
        feat_channels=d,
        out_channels=d,
        num_queries=network.queries,
        num_things_classes=classes,
    )
    head.loss_cls.class_weight = [1.0] * classes + [NO_OBJECT]
    head.positional_encoding.num_feats = head.pixel_decoder.positional_encoding.num_feats = d // 2
    head.pixel_decoder.type = PixelDecoder
    encoder, decoder = head.pixel_decoder.encoder, head.transformer_decoder
    encoder.num_layers, decoder.num_layers = network.encoder_layers, network.decoder_layers
    encoder.layer_cfg.self_attn_cfg.embed_dims = d
    encoder.layer_cfg.ffn_cfg.update(embed_dims=d, feedforward_channels=4 * d)
    decoder.layer_cfg.ffn_cfg.update(embed_dims=d, feedforward_channels=8 * d)
    for attention in (decoder.layer_cfg.self_attn_cfg, decoder.layer_cfg.cross_attn_cfg):
        attention.embed_dims = d
        del attention.dropout  # 0.0 as by default; mmcv warns of the name


class MISAMask2Former(BoxSupervised, Mask2Former):
    """Mask2Former as the student."""

    panoptic_head: BoxMask2FormerHead
    test_cfg: ConfigDict
    lacks: ClassVar[dict[str, str]] = {}

    def feature_channels(self) -> int:
        """The channels of a query and of every map."""
        return int(self.panoptic_head.decoder_embed_dims)

    def dense_feature(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The pixel decoder's finest map, with which every query is multiplied."""
        return _dense_feature(self, maps).float()

    def training_output(self, images: Tensor, instances: list[InstanceData], places: Any = None) -> StudentOutput:
        """Hand over the matched queries of the initial prediction and of every decoder layer; places: their boxes (n).

        The last prediction has the one mask per box; the finest map is I.
        """
        found = self.panoptic_head.predict_all(self.extract_feat(images))
        h, w = found.logits.shape[-2:]
        boxes = [box_masks(truth.bboxes, h, w, stride=images.shape[-2] // h) for truth in instances]
        with torch.autocast(images.device.type, enabled=False):
            if places is not None:
                return _answered(found, boxes, instances, places)
            match, handed = self.panoptic_head.match(found, boxes, instances)
            if self.objective.needs.per_box:
                handed = handed._replace(per_box=PerBox(each_box(found, match, boxes, instances), found.features))
        return handed

    def detect(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Detected]:
        """Detect by the top-scoring (query, class) pairs of the last decoder layer; boxes are the masks' extents."""
        scores, logits = (each[-1].float() for each in self.panoptic_head(self.extract_feat(images), []))
        stride, found = images.shape[-2] // logits.shape[-2], []
        for own, masks in zip(scores.softmax(dim=-1)[..., :-1], logits.sigmoid(), strict=True):
            score, place = own.flatten().topk(min(self.test_cfg.max_per_image, own.numel()))
            chosen = masks[place // own.shape[1]]
            found.append(Detected(extents(chosen) * stride, score * quality(chosen), chosen))
        return found

    def masks_of_boxes(self, images: Tensor, instances: list[InstanceData]) -> list[BoxMasks]:
        """The mask of the last decoder layer's query matched to a box; none for boxes beyond the number of queries."""
        scores, logits = (each[-1].float() for each in self.panoptic_head(self.extract_feat(images), []))
        h, w = logits.shape[-2:]
        boxes = [box_masks(truth.bboxes, h, w, stride=images.shape[-2] // h) for truth in instances]
        match = assign(scores[None], logits[None], boxes, [truth.labels for truth in instances])
        found = []
        for b, own in enumerate(boxes):
            mine = match.image == b
            query, instance = (index[mine].to(logits.device) for index in (match.query, match.instance))
            probabilities = logits.new_zeros(own.shape).index_copy(0, instance, logits[b, query].sigmoid())
            answered = torch.zeros(len(own), dtype=torch.bool, device=logits.device).index_fill(0, instance, True)
            found.append(BoxMasks(probabilities, answered))
        return found


def _dense_feature(model: Mask2Former, maps: tuple[Tensor, ...]) -> Tensor:
    """`MISAMask2Former.dense_feature`, also for mmdet's Mask2Former trained from masks."""
    features: Tensor = model.panoptic_head.pixel_decoder(maps)[0]
    return features


def parameter_groups(experiment: Experiment) -> dict[str, dict[str, float]]:
    """Parameters with a lower learning rate or no weight decay, by parts of their names, as in mmdet's Mask2Former."""
    slow = experiment.schedule.backbone_lr
    keys = {name: {"decay_mult": 0.0} for name in ("query_embed", "query_feat", "level_embed")}
    if slow == 1:
        return keys
    keys["backbone"] = {"lr_mult": slow}
    if experiment.network.backbone in SWINS:
        # A name that matches here is not looked at for `norm_decay_mult` any more.
        depths = SWINS[experiment.network.backbone][1]
        blocks = [f"stages.{stage}.blocks.{block}.norm" for stage, n in enumerate(depths) for block in range(n)]
        downs = [f"stages.{stage}.downsample.norm" for stage in range(len(depths) - 1)]
        still = [] if experiment.schedule.norm_decay else ["patch_embed.norm", "norm", *blocks, *downs]
        keys |= {f"backbone.{name}": {"lr_mult": slow, "decay_mult": 0.0} for name in still}
        keys |= {
            name: {"lr_mult": slow, "decay_mult": 0.0}
            for name in ("absolute_pos_embed", "relative_position_bias_table")
        }
    return keys


mask2former = Implementation(mask2former_config, parameter_groups, dense_feature=_dense_feature, mask_threshold="half")
