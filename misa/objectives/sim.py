"""SIM (Li et al. 2023, "SIM: Semantic-aware Instance Mask Generation for Box-Supervised Instance Segmentation").

L = L_projection + ramp · pairs + 0.3 · ramp · focal(p, y; V). Pairs are BoxInst's, alike in color and in the copy's
dense feature. y mixes M_I, the mean of the copy's masks of an object, with M_S, how near its pixels are to prototypes
of its class; what is neither surely object nor surely not is ignored (V).

Constants and forms are the published code's, whose three evident slips decide its numbers: a switch has the intended
form of each beside the published one. Other than there: the copy is one of the whole student and begins as it, while
the published one begins with weights of its own.

With `paste` objects of earlier images, cut out by M_I, are put over half of the batches once that many images are
kept: what they cover is no longer the others', and their masks are known (L_paste). No mask of the data is read. Other
than published: each image is kept once, as the networks saw it (there the last one of a process's batch is kept twice),
without objects of which M_I is nowhere sure. As published each process keeps its own images; a resumed training goes on
with the first one's in all of them.

Axes: b image · n instance · g object that has an instance · c class · q prototype · d channel · h row · w column.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from misa.experiment import Needs
from misa.objectives.base import Prepared, Ramp, Step, Term
from misa.objectives.boxinst import BoxInst, color_pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from mmengine.structures import InstanceData
    from torch import Tensor, nn

    from misa.ops.paste import Picture, PictureQueue

Form = Literal["official", "intended"]


class Objects(NamedTuple):
    """The objects that have an instance: M_I (g h w), their boxes (g h w), labels and image (g) on the host.

    instances: how many each has (g). where: which object an instance is of (n). truth: its box among the batch's (g).
    """

    masks: Tensor
    boxes: Tensor
    labels: Tensor
    image: Tensor
    instances: Tensor
    where: Tensor
    truth: Tensor


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
    paste: images that are kept to paste from, 50 in the published code; 0: without pasting. 50 of 800 x 1333 pixels
    take 0.16 GB of every process's host and of every checkpoint, and each object in them 0.13 MB. paste_rate: the
    share of the steps in which objects are pasted.
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
    paste: int = field(default=0, metadata={"later": True})
    paste_rate: float = field(default=0.5, metadata={"later": True})
    paste_weight: float = field(default=1.0, metadata={"later": True})

    @property
    def needs(self) -> Needs:
        """The images' colors and the copy's masks and dense feature."""
        return Needs(colors=True, shadow=True)

    def memory(self, classes: int, channels: int) -> nn.Module:
        """`prototypes` (c q d); with pasting the pictures, on the host."""
        import torch

        from misa.ops.paste import PictureQueue

        memory = torch.nn.Module()
        drawn = torch.nn.init.trunc_normal_(torch.empty(classes, self.prototypes, channels), std=0.02)
        memory.register_buffer("prototypes", drawn)
        if self.paste:
            memory.on_host = PictureQueue(self.paste)  # type: ignore[assignment]
        return memory

    def prepare(
        self,
        images: Tensor,
        instances: list[InstanceData],
        memory: nn.Module | None,
        generators: Sequence[torch.Generator],
    ) -> Prepared:
        """With pasting: objects of a picture of its own over each image of some of the batches."""
        import torch

        queue = self.pictures(memory)
        if queue is None or not queue.full or torch.rand(1, generator=generators[0]) >= self.paste_rate:
            return Prepared(images, instances, images)
        pasted, others = [], []
        for image, own, generator in zip(images, instances, generators, strict=True):
            which = int(torch.randint(queue.size, (1,), generator=generator))
            changed, known = self.pasted(image, own, queue.pictures[which], generator)
            pasted.append(changed)
            others.append(known)
        together = torch.stack(pasted)
        return Prepared(together, others, together)

    @staticmethod
    def pictures(memory: nn.Module | None) -> PictureQueue | None:
        """What is kept to paste from."""
        queue: PictureQueue | None = getattr(memory, "on_host", None)
        return queue

    def pasted(
        self, image: Tensor, own: InstanceData, picture: Picture, generator: torch.Generator
    ) -> tuple[Tensor, InstanceData]:
        """An image (3 h w) with objects of a picture over it, and the instances that are then seen, theirs at last."""
        import torch
        from mmengine.structures import InstanceData

        from misa.ops.boxes import box_masks, extents
        from misa.ops.paste import cut_out, onto, uncovered
        from misa.ops.sent import noted, on_host, sent
        from misa.ops.strong import normalised

        size = (image.shape[-2], image.shape[-1])
        inner = own.img_shape if "img_shape" in own else size  # nothing is pasted over padding
        labels, masks = cut_out(picture, inner, generator, sure=self.sure)
        masks = onto(masks, size)
        left, whose = uncovered(on_host(own.bboxes), masks.any(dim=0))
        hosted = torch.cat([left, extents(masks.to(left.dtype))]), torch.cat([on_host(own.labels)[whose], labels])
        boxes, kinds = (noted(sent(values, image.device), values) for values in hosted)
        there = sent(masks, image.device)
        covered = there.any(dim=0)
        pixels = normalised(sent(onto(picture.pixels, size), image.device)).to(image.dtype)
        within = torch.cat([box_masks(boxes[: len(left)], *size) & ~covered, there])
        new = torch.arange(len(boxes)) >= len(left)
        seen = InstanceData(bboxes=boxes, labels=kinds, within=within, pasted=new)
        return torch.where(covered, pixels, image), seen

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
        """BoxInst's two, and `loss_pseudo`, over the pixels that the pseudo masks speak of; 0 before it starts.

        With pasting also `loss_paste`, over the instances, and `loss_paste_focal`, over the pixels of the pasted ones;
        0 in a step that pastes nothing.
        """
        from misa.losses.pseudo import focal_on

        terms = super().losses(step, memory) | self.paste_terms(step)
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

    def paste_terms(self, step: Step) -> dict[str, Term]:
        """A dice and SIM's focal loss of the pasted instances to the masks that were pasted.

        As published the dice is a mean over all instances, in which each that is not pasted counts a constant 1.
        """
        from misa.losses.pseudo import dice, focal_on

        if not self.paste:
            return {}
        masks = step.positives.mask_logits.sigmoid()
        if step.truth is None or step.truth.pasted is None or len(masks) == 0:
            return {"loss_paste": Term(0 * masks.sum()), "loss_paste_focal": Term(0 * masks.sum(), masks.new_ones(()))}
        pasted = step.truth.pasted[step.positives.instance].to(masks.device, non_blocking=True)[:, None, None]
        target, where = step.positives.box_masks & pasted, pasted.expand_as(masks)
        overlap = dice(masks * pasted, target.to(masks.dtype)).sum() / len(masks)
        focal = focal_on(masks, target, where, form=self.focal)
        return {
            "loss_paste": Term(self.paste_weight * overlap),
            "loss_paste_focal": Term(self.paste_weight * focal, where.sum() + 1),
        }

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
        from misa.ops.strong import denormalised

        assert memory is not None
        assert step.features is not None
        assert step.shadow_features is not None
        stored = memory.get_buffer("prototypes")
        prototypes = self.normalised(stored)
        objects = objects_of(step)
        queue, pixels = self.pictures(memory), None
        if queue is not None and step.ramp(self.pseudo_start) == 1:
            assert step.seen is not None
            pixels = denormalised(step.seen).to("cpu", non_blocking=True)  # is there once the masks are
        # The sign says where the box is.
        signed = torch.where(objects.boxes, objects.masks, -objects.masks).cpu()
        surely = signed > self.sure
        if queue is not None and pixels is not None:
            self.keep(queue, pixels, signed.abs(), objects, step)
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

    def keep(self, queue: PictureQueue, pixels: Tensor, masks: Tensor, objects: Objects, step: Step) -> None:
        """The images of a batch (b 3 h w, of 8 bits) and M_I (g h w), both on the host, into the queue."""
        from misa.ops.paste import Picture

        assert step.truth is not None
        for b, image in enumerate(pixels):
            here = objects.image == b
            boxes = step.truth.boxes[objects.truth[here]]
            queue.put(Picture(image.clone(), masks[here], boxes, objects.labels[here]), sure=self.sure)


def objects_of(step: Step) -> Objects:
    """The objects of a batch that have an instance, with the mean of the copy's masks of it."""
    import torch

    assert step.shadow is not None
    own = step.positives
    truth, where, count = own.instance.unique(return_inverse=True, return_counts=True)
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
        truth,
    )
