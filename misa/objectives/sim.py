"""SIM (Li et al. 2023, "SIM: Semantic-aware Instance Mask Generation for Box-Supervised Instance Segmentation").

L = L_projection + ramp · pairs + 0.3 · ramp · focal(p, y; V). Pairs are BoxInst's, alike in color and in the copy's
dense feature. y mixes M_I, the mean of the copy's masks of an object, with M_S, how near its pixels are to prototypes
of its class; what is neither surely object nor surely not is ignored (V).

Constants and forms are the published code's, whose three evident slips decide its numbers: a switch has the intended
form of each beside the published one. Other than there: the copy is one of the whole student and begins as it, while
the published one begins with weights of its own; pasting objects of earlier images, which is on from a third of the
published training, is left out.

Axes: b image · n instance · g object that has an instance · c class · q prototype · d channel · h row · w column.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from misa.experiment import Needs
from misa.objectives.base import Ramp, Step, Term
from misa.objectives.boxinst import BoxInst, color_pairs

if TYPE_CHECKING:
    from torch import Tensor, nn

Form = Literal["official", "intended"]


class Objects(NamedTuple):
    """The objects that have an instance: M_I (g h w), their boxes (g h w), labels and image (g) on the host.

    instances: how many each has (g). where: which object an instance is of (n).
    """

    masks: Tensor
    boxes: Tensor
    labels: Tensor
    image: Tensor
    instances: Tensor
    where: Tensor


class Pseudo(NamedTuple):
    """Each object's pseudo mask and the pixels that it speaks of (both g h w)."""

    target: Tensor
    sure: Tensor


@dataclass(frozen=True)
class SIM(BoxInst):
    """BoxInst's constants, with a threshold for colors and features together, and those of the pseudo masks.

    sure: of M_I, from which a pixel is surely the object's; sure to ceiling is the range of the threshold of y; below
    `nothing` a pixel is surely not the object's. share: of a step's features in a prototype; several processes keep the
    mean of theirs.
    prototype_norm: "official" divides each channel by its norm over the prototypes, "intended" each prototype by its
    own. assignment: see `misa.ops.assignment.hard_assignment`. focal: see `misa.losses.pseudo.focal_on`.
    """

    similarity: float = 0.1
    pseudo_weight: float = 0.3
    pseudo_start: Ramp = field(default_factory=lambda: Ramp(10000, 10000))
    pseudo_ramp: Ramp = field(default_factory=lambda: Ramp(0, 270000))
    sure: float = 0.7
    ceiling: float = 0.8
    nothing: float = 0.4
    prototypes: int = 10
    share: float = 0.001
    momentum: float = 0.9999
    prototype_norm: Form = "official"
    assignment: Form = "official"
    focal: Form = "official"

    @property
    def needs(self) -> Needs:
        """The images' colors and the copy's masks and dense feature."""
        return Needs(colors=True, shadow=True)

    def memory(self, classes: int, channels: int) -> nn.Module:
        """`prototypes` (c q d)."""
        import torch

        memory = torch.nn.Module()
        drawn = torch.nn.init.trunc_normal_(torch.empty(classes, self.prototypes, channels), std=0.02)
        memory.register_buffer("prototypes", drawn)
        return memory

    def shadow_momentum(self, iteration: int, total: int) -> float:
        """min(momentum, 1 − 1/(t + 1)): the mean of the weights so far, later a moving average."""
        return min(self.momentum, iteration / (iteration + 1))

    def likeness(self, step: Step) -> Tensor:
        """By colors times exp(−distance) of the copy's features."""
        from misa.ops.pairs import pair_similarity

        assert step.shadow_features is not None
        features = pair_similarity(step.shadow_features.float(), step.batch.valid, scale=1.0)
        return color_pairs(step, self.bottom_rows) * features

    def losses(self, step: Step, memory: nn.Module | None = None) -> dict[str, Term]:
        """BoxInst's two, and `loss_pseudo`, over the pixels that the pseudo masks speak of; 0 before it starts."""
        from misa.losses.pseudo import focal_on

        terms = super().losses(step, memory)
        masks = step.positives.mask_logits.sigmoid()
        if memory is None or step.ramp(self.pseudo_start) < 1 or len(masks) == 0:
            return terms | {"loss_pseudo": Term(0 * masks.sum())}
        objects = objects_of(step)
        pseudo = self.pseudo_masks(step, self.normalised(memory.get_buffer("prototypes")), objects)
        where = objects.where.to(masks.device, non_blocking=True)
        target, sure = pseudo.target[where], pseudo.sure[where]
        loss = focal_on(masks, target, sure, form=self.focal)
        weight = self.pseudo_weight * step.ramp(self.pseudo_ramp)
        return terms | {"loss_pseudo": Term(weight * loss, sure.sum() + 1)}

    def normalised(self, prototypes: Tensor) -> Tensor:
        """The prototypes in the form that `prototype_norm` says."""
        import torch.nn.functional as F

        return F.normalize(prototypes, dim=1 if self.prototype_norm == "official" else 2)

    def pseudo_masks(self, step: Step, prototypes: Tensor, objects: Objects) -> Pseudo:
        """From s = (M_S + M_I) / 2 within the boxes.

        The threshold is the value of s that leaves as many pixels above it as M_I is sure of, kept in [sure, ceiling].
        """
        import torch
        import torch.nn.functional as F

        assert step.shadow_features is not None
        features = F.normalize(step.shadow_features.float(), dim=1)
        semantic = torch.empty_like(objects.masks)
        for b in objects.image.unique().tolist():
            here = (objects.image == b).nonzero().flatten()
            place, label = (x.to(features.device, non_blocking=True) for x in (here, objects.labels[here]))
            near = torch.einsum("gqd,dhw->gqhw", prototypes[label], features[b])
            semantic[place] = near.amax(dim=1).sigmoid()
        both = (semantic + objects.masks) / 2
        descending = (both * objects.boxes).flatten(1).sort(dim=1, descending=True).values
        rank = ((objects.masks > self.sure) & objects.boxes).sum(dim=(1, 2))
        rank = rank.clamp(max=descending.shape[1] - 1)
        threshold = descending.gather(1, rank[:, None]).clamp(self.sure, self.ceiling)[..., None]
        target = (both > threshold) & objects.boxes
        return Pseudo(target, target | ((both < self.nothing) & objects.boxes))

    def update(self, step: Step, memory: nn.Module | None) -> None:
        """Pull the prototypes of each class of the batch to the student's features where the objects surely are.

        Which pixels these are is copied to the host once a step: as many random numbers are drawn.
        """
        import torch
        import torch.nn.functional as F

        from misa.ops.assignment import balanced, hard_assignment
        from misa.ops.sent import sent

        assert memory is not None
        assert step.features is not None
        assert step.shadow_features is not None
        stored = memory.get_buffer("prototypes")
        prototypes = self.normalised(stored)
        objects = objects_of(step)
        surely = ((objects.masks > self.sure) & objects.boxes).cpu()
        for b, generator in enumerate(step.generators):
            own, theirs = (F.normalize(x[b].float(), dim=0) for x in (step.features, step.shadow_features))
            before = prototypes
            prototypes = prototypes.clone()
            for label in objects.labels[objects.image == b].unique().tolist():
                mine = ((objects.image == b) & (objects.labels == label)).nonzero().flatten().tolist()
                # A pixel counts once for every instance of its object.
                times = sum(int(objects.instances[g]) * surely[g].long() for g in mine)
                assert torch.is_tensor(times)
                place = times.flatten().nonzero().flatten().repeat_interleave(times.flatten()[times.flatten() > 0])
                if len(place) == 0:
                    continue
                place = sent(place, stored.device)
                shares = balanced(before[label] @ theirs.flatten(1)[:, place])
                chosen = hard_assignment(shares, form=self.assignment, generator=generator)
                total = torch.zeros_like(prototypes[label]).index_add(0, chosen, own.flatten(1)[:, place].T)
                moved = torch.zeros_like(total[:, :1], dtype=torch.bool).index_fill(0, chosen, True)
                pulled = prototypes[label].lerp(F.normalize(total, dim=1), self.share)
                prototypes[label] = torch.where(moved, pulled, prototypes[label])
            prototypes = self.normalised(prototypes)
        stored.copy_(step.across(prototypes))


def objects_of(step: Step) -> Objects:
    """The objects of a batch that have an instance, with the mean of the copy's masks of it."""
    import torch

    assert step.shadow is not None
    own = step.positives
    _, where, count = own.instance.unique(return_inverse=True, return_counts=True)
    n, g = len(where), len(count)
    first = torch.full((g,), n).scatter_reduce(0, where, torch.arange(n), "amin")
    masks = step.shadow.mask_logits.sigmoid()
    owner, one, times = (x.to(masks.device, non_blocking=True) for x in (where, first, count))
    total = masks.new_zeros(g, *masks.shape[1:]).index_add(0, owner, masks)
    return Objects(
        total / times.to(masks.dtype)[:, None, None],
        own.box_masks[one],
        own.labels[first],
        own.image[first],
        count,
        where,
    )
