"""Mask2Former as a box-supervised student (Eq. 2): mmdet's head, with `Positives` in place of mask targets.

Every prediction of the decoder, that of the initial queries included, is matched and supervised on its own. As in
APro, no points are sampled: costs and losses look at whole masks. APro matches at the input's size; here it is done at
the masks' own, a quarter of it, where boxes are drawn and losses are computed as well.

Axes: l prediction · b image · q query · n instance · h row · w column.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from mmdet.models.dense_heads import Mask2FormerHead
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from misa.errors import Diverged
from misa.losses.inputs import Positives
from misa.models._parallel import share
from misa.ops.boxes import box_masks

CLASS_COST, PROJECTION_COST = 2.0, 5.0  # APro's
CLASS_WEIGHT, NO_OBJECT = 2.0, 0.1  # of the classification loss, and of "no object" in it: mmdet's and APro's


class Match(NamedTuple):
    """Which query of which prediction stands for which instance; on the host."""

    prediction: Int[Tensor, " m"]
    image: Int[Tensor, " m"]
    query: Int[Tensor, " m"]
    instance: Int[Tensor, " m"]  # within its image


class BoxMask2FormerHead(Mask2FormerHead):
    """Mask2Former's head that matches queries to boxes and hands their masks over as `Positives`."""

    def match(
        self, features: tuple[Tensor, ...], instances: list[InstanceData], size: tuple[int, int]
    ) -> tuple[Positives, Tensor, dict[str, Tensor]]:
        """The positives of all predictions, the dense feature I (b d h w) and the classification loss.

        `size` is the padded input's (h, w). Every prediction has as many positives as the others, so that a mean over
        all of them is a tenth of the sum over ten predictions.
        """
        kept: list[Tensor] = []

        def surface(module: object, inputs: object, output: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
            """mmdet computes I in its forward pass and drops it. Made float32 once, not for each of ten predictions."""
            kept.append(output[0].float())
            return kept[0], output[1]

        with self.pixel_decoder.register_forward_hook(surface):
            scores, logits = self(features, [])
        (mask_features,) = kept
        with torch.autocast(mask_features.device.type, enabled=False):
            classes, masks = torch.stack(scores).float(), torch.stack(logits).float()
            h, w = masks.shape[-2:]
            stride = size[0] // h
            boxes = [box_masks(truth.bboxes, h, w, stride=stride) for truth in instances]
            labels = [truth.labels for truth in instances]
            found = assign(classes, masks, boxes, labels)
            here = Match(*(index.to(masks.device, non_blocking=True) for index in found))
            first = torch.tensor([0, *(len(own) for own in labels)]).cumsum(0)[:-1]
            chosen = (first[found.image] + found.instance).to(masks.device, non_blocking=True)
            target = classes.new_full(classes.shape[:3], self.num_classes, dtype=torch.long)
            target[here.prediction, here.image, here.query] = torch.cat(labels)[chosen]
            losses = {"loss_cls": self._class_loss(classes, target, len(found.image))}
            positives = Positives(
                masks[here.prediction, here.image, here.query],
                torch.cat(boxes)[chosen],
                torch.cat([own.cpu() for own in labels])[first[found.image] + found.instance],
                found.image,
            )
        return positives, mask_features, losses

    def _forward_head(
        self, decoder_out: Tensor, mask_feature: Tensor, attn_mask_target_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A prediction in float32: a mask sums hundreds of products, which may be too large for float16."""
        with torch.autocast(decoder_out.device.type, enabled=False):
            predicted: tuple[Tensor, Tensor, Tensor] = super()._forward_head(
                decoder_out.float(), mask_feature.float(), attn_mask_target_size
            )
        return predicted

    def _class_loss(
        self, scores: Float[Tensor, "l b q e"], target: Int[Tensor, "l b q"], matched: int
    ) -> Float[Tensor, ""]:
        """Cross-entropy with little weight on "no object", summed over the predictions."""
        weight = scores.new_ones(self.num_classes + 1)
        weight[-1] = NO_OBJECT
        total = F.cross_entropy(scores.flatten(0, 2), target.flatten(), weight=weight, reduction="sum")
        whole = matched + NO_OBJECT * (target.numel() - matched)  # of all predictions: each has the same
        return CLASS_WEIGHT * len(scores) * total / whole * share(whole, scores.device)


@torch.no_grad()
def assign(
    scores: Float[Tensor, "l b q e"],
    logits: Float[Tensor, "l b q h w"],
    boxes: list[Tensor],
    labels: list[Tensor],
) -> Match:
    """The cheapest one-to-one match of queries to each image's boxes (n h w), prediction by prediction.

    cost = 2 · (−p_class) + 5 · (dice of the row projections + dice of the column projections), as APro. One transfer
    to the host for the whole batch.
    """
    masks = logits.sigmoid()
    columns, rows = masks.amax(dim=-2), masks.amax(dim=-1)
    probabilities = scores.softmax(dim=-1)
    costs = []
    for b, (own, classes) in enumerate(zip(boxes, labels, strict=True)):
        own = own.to(masks.dtype)
        overlap = _dice(columns[:, b], own.amax(dim=-2)) + _dice(rows[:, b], own.amax(dim=-1))
        costs.append(PROJECTION_COST * overlap - CLASS_COST * probabilities[:, b][..., classes])
    table = torch.cat(costs, dim=-1).cpu()
    if not table.isfinite().all():
        raise Diverged("the queries' masks or scores became NaN; lower the learning rate, in another work_dir.")
    found = []
    for b, part in enumerate(table.split([len(own) for own in labels], dim=-1)):
        for prediction, cost in enumerate(part):
            query, instance = (torch.as_tensor(index) for index in linear_sum_assignment(cost))
            found.append((torch.full_like(query, prediction), torch.full_like(query, b), query, instance))
    return Match(*(torch.cat(index) for index in zip(*found, strict=True)))


def _dice(a: Float[Tensor, "l q k"], b: Float[Tensor, "n k"], eps: float = 1.0) -> Float[Tensor, "l q n"]:
    """Dice distance of every projection to every other, squared denominators, eps in both parts."""
    overlap = torch.einsum("lqk,nk->lqn", a, b)
    return 1 - (2 * overlap + eps) / (a.square().sum(-1)[..., None] + b.square().sum(-1) + eps)
