"""SIM (Li et al. 2023, "SIM: Semantic-aware Instance Mask Generation for Box-Supervised Instance Segmentation").

L = L_projection + ramp · pairs + 0.3 · ramp · focal(p, y; V). Pairs are BoxInst's, similar in color and in the dense
feature of the EMA model. The pseudo mask y averages M_I, the mean of the EMA model's masks of an object, and M_S, the
similarity of its pixels to prototypes of its class; uncertain pixels (outside V) are ignored.

Constants and forms are the published code's. Three evident bugs of it affect its results; for each, an option chooses
between the published ("official") and the intended form. Different from it: the EMA model starts as a copy of the whole
student, the published one from its own initialization.

With `paste`, objects of earlier images, cut out by M_I, are pasted into half of the batches, once that many images are
stored: pixels that they cover are removed from the other objects, and their masks are known (L_paste). Ground-truth
masks are not read. Different from the published code: each image is stored once, as the networks saw it (there the last
one of a process's batch is stored twice), without objects for which M_I has no confident pixel, and the visible part of
a box is the cells that it covers half, not those whose third pixel it covers. As published, each process has its own
queue; a resume loads rank 0's into all.

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
    """The objects with at least one positive: M_I (g h w), boxes as masks (g h w), labels and image (g) on the host.

    instances: positives per object (g). where: each positive's object (n). truth: index of the object's box in the
    batch (g).
    """

    masks: Tensor
    boxes: Tensor
    labels: Tensor
    image: Tensor
    instances: Tensor
    where: Tensor
    truth: Tensor


class Pseudo(NamedTuple):
    """Pseudo mask of each object, and the pixels at which it is certain (both g h w, bool)."""

    target: Tensor
    sure: Tensor


@dataclass(frozen=True)
class SIM(BoxInst):
    """Constants of BoxInst, with one threshold on the product of color and feature similarity, and of the pseudo masks.

    sure: M_I above which a pixel is certainly foreground; the threshold of y is clamped to sure..ceiling; below
    `nothing` a pixel is certainly background. share: update rate of the prototypes; processes average theirs.
    prototype_norm: "official" divides each channel by its norm over the prototypes, "intended" each prototype by its
    own. assignment: see `misa.ops.assignment.hard_assignment`. focal: see `misa.losses.pseudo.focal_on`.
    paste: size of the queue of images, 50 in the published code; 0 disables pasting. 50 images of 800 x 1333 pixels
    take 0.16 GB of every process's host memory and of every checkpoint, and each object in them 0.13 MB. paste_rate:
    probability that a step pastes objects.
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
    def described(self) -> str:
        """With or without pasting."""
        return "SIM with pasting" if self.paste else "SIM"

    @property
    def needs(self) -> Needs:
        """The colors of the images, and the EMA model's masks and dense feature."""
        return Needs(colors=True, shadow=True)

    def memory(self, classes: int, channels: int) -> nn.Module:
        """The buffer `prototypes` (c q d); with pasting also the queue of images, on the host."""
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
        """With probability `paste_rate`, paste the objects of a random stored image into each image of the batch."""
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
        """The queue of images to paste from, None without pasting."""
        queue: PictureQueue | None = getattr(memory, "on_host", None)
        return queue

    def pasted(
        self, image: Tensor, own: InstanceData, picture: Picture, generator: torch.Generator
    ) -> tuple[Tensor, InstanceData]:
        """Return the image (3 h w) with a picture's objects pasted in, and the instances still visible, pasted last."""
        import torch
        from mmengine.structures import InstanceData

        from misa.ops.boxes import box_masks, extents
        from misa.ops.paste import cut_out, onto, uncovered
        from misa.ops.strong import normalised
        from misa.ops.transfer import on_host, to_device, with_host_copy

        size = (image.shape[-2], image.shape[-1])
        inner = own.img_shape if "img_shape" in own else size  # nothing is pasted over padding
        labels, masks = cut_out(picture, inner, generator, sure=self.sure)
        masks = onto(masks, size)
        left, whose = uncovered(on_host(own.bboxes), masks.any(dim=0))
        hosted = torch.cat([left, extents(masks.to(left.dtype))]), torch.cat([on_host(own.labels)[whose], labels])
        boxes, kinds = (with_host_copy(to_device(values, image.device), values) for values in hosted)
        there = to_device(masks, image.device)
        covered = there.any(dim=0)
        pixels = normalised(to_device(onto(picture.pixels, size), image.device)).to(image.dtype)
        within = torch.cat([box_masks(boxes[: len(left)], *size) & ~covered, there])
        new = torch.arange(len(boxes)) >= len(left)
        seen = InstanceData(bboxes=boxes, labels=kinds, within=within, pasted=new)
        return torch.where(covered, pixels, image), seen

    def shadow_momentum(self, iteration: int, total: int) -> float:
        """min(momentum, 1 − 1/(t + 1)): first the mean of all weights so far, later a moving average."""
        return min(self.momentum, iteration / (iteration + 1))

    def likeness(self, step: Step) -> Tensor:
        """Color similarity times exp(−distance) of the EMA model's features (b 8 h w)."""
        from misa.ops.pairs import pair_similarity

        assert step.shadow_features is not None
        features = pair_similarity(step.shadow_features.float(), step.batch.valid, scale=1.0)
        return color_pairs(step, self.bottom_rows) * features

    def losses(self, step: Step, memory: nn.Module | None = None) -> dict[str, Term]:
        """BoxInst's terms, and `loss_pseudo`, a mean over the certain pixels of the pseudo masks; 0 before its start.

        With pasting also `loss_paste`, a mean over instances, and `loss_paste_focal`, a mean over the pixels of the
        pasted ones; both 0 in a step without pasting.
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
        """Dice and SIM's focal loss between the pasted instances and their known masks.

        As published, the dice is averaged over all instances; one that is not pasted contributes a constant 1.
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
        """The prototypes (c q d), normalized as `prototype_norm` defines."""
        import torch.nn.functional as F

        return F.normalize(prototypes, dim=1 if self.prototype_norm == "official" else 2)

    def pseudo_masks(self, step: Step, prototypes: Tensor, objects: Objects) -> Pseudo:
        """Threshold s = (M_S + M_I) / 2 within the boxes.

        The threshold is the value of s that as many pixels exceed as there are with M_I > sure, clamped to
        [sure, ceiling].
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
        """Move the prototypes of the batch's classes towards the student's features at certain foreground pixels.

        One transfer to the host per step tells which pixels these are, since as many random numbers are drawn.
        """
        import torch
        import torch.nn.functional as F

        from misa.ops.assignment import balanced, hard_assignment
        from misa.ops.strong import denormalised
        from misa.ops.transfer import to_device

        assert memory is not None
        assert step.features is not None
        assert step.shadow_features is not None
        stored = memory.get_buffer("prototypes")
        prototypes = self.normalised(stored)
        objects = objects_of(step)
        queue, pixels = self.pictures(memory), None
        if queue is not None and step.ramp(self.pseudo_start) == 1:
            assert step.weak_view is not None
            pixels = denormalised(step.weak_view).to("cpu", non_blocking=True)  # complete after the next copy
        # The sign encodes the box: positive inside.
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
                # A pixel counts once for every positive of its object, of one prediction.
                times = sum(-(-int(objects.instances[g]) // step.repeats) * surely[g].long() for g in mine)
                assert torch.is_tensor(times)
                place = times.flatten().nonzero().flatten().repeat_interleave(times.flatten()[times.flatten() > 0])
                if len(place) == 0:
                    continue
                place = to_device(place, stored.device)
                shares = balanced(before[label] @ theirs.flatten(1)[:, place])
                chosen = hard_assignment(shares, form=self.assignment, generator=generator)
                total = torch.zeros_like(prototypes[label]).index_add(0, chosen, own.flatten(1)[:, place].T)
                moved = torch.zeros_like(total[:, :1], dtype=torch.bool).index_fill(0, chosen, True)
                pulled = prototypes[label].lerp(F.normalize(total, dim=1), self.share)
                prototypes[label] = torch.where(moved, pulled, prototypes[label])
            prototypes = self.normalised(prototypes)
        stored.copy_(step.across(prototypes))

    def keep(self, queue: PictureQueue, pixels: Tensor, masks: Tensor, objects: Objects, step: Step) -> None:
        """Put the images of a batch (b 3 h w, uint8) and M_I (g h w), both on the host, into the queue."""
        from misa.ops.paste import Picture

        assert step.truth is not None
        for b, image in enumerate(pixels):
            here = objects.image == b
            boxes = step.truth.boxes[objects.truth[here]]
            queue.put(Picture(image.clone(), masks[here], boxes, objects.labels[here]), sure=self.sure)


def objects_of(step: Step) -> Objects:
    """Group the positives of a batch by object, and average the EMA model's masks of each."""
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
