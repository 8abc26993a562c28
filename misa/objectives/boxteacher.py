"""BoxTeacher (Cheng et al. 2023): BoxInst, and a copy of the student whose detections are masks to learn from.

L = BoxInst + ramp · [0.5 · Σ c · dice(p, Y) + 0.1 · Σ c · −log P(y_i = y_k)] / N. The copy, a moving average, sees the
plain image and the student one in other colors. Each of its detections takes the free box that it overlaps most; Y is
its mask at 0.5 within the box, c a confidence of detection and mask, N the instances whose box has such a mask.

Constants are the published code's. Other than there: the copy detects in the batch as it is, not resized to a short
side of 800; it normalises by the student's running statistics, not by its own batch's; scores and confidences take the
masks at the size of the losses; a box that the first detection took is closed to others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from misa.experiment import Needs
from misa.objectives.base import Prepared, Ramp, Step, Term
from misa.objectives.boxinst import BoxInst

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from mmengine.structures import InstanceData
    from torch import Tensor, nn


@dataclass(frozen=True)
class BoxTeacher(BoxInst):
    """BoxInst's constants, the weights of both terms, their ramp, and the copy's.

    momentum: at most; before, the copy is the mean of all that the student has been. overlap: least IoU of a detection
    with its box. blur: how often the student's image is blurred, 0.5 in the published schedules of 270,000 steps.
    """

    pixel_weight: float = 0.5
    affinity_weight: float = 0.1
    pseudo_ramp: Ramp = field(default_factory=lambda: Ramp(0, 10000))
    momentum: float = 0.999
    overlap: float = 0.5
    blur: float = 0.0

    @property
    def needs(self) -> Needs:
        """The images' colors and the copy's detections."""
        return Needs(colors=True, detections=True)

    def shadow_momentum(self, iteration: int, total: int) -> float:
        """min(momentum, 1 − 1/(t + 1)): the mean of the weights after each step so far, later a moving average."""
        return min(self.momentum, iteration / (iteration + 1))

    def prepare(
        self,
        images: Tensor,
        instances: list[InstanceData],
        memory: nn.Module | None,
        generators: Sequence[torch.Generator],
    ) -> Prepared:
        """The student's images in other colors."""
        from misa.ops.strong import strong_view

        sizes = [own.img_shape for own in instances if "img_shape" in own]
        return Prepared(strong_view(images, generators, blur=self.blur, sizes=sizes or None), instances, images)

    def losses(self, step: Step, memory: nn.Module | None = None) -> dict[str, Term]:
        """BoxInst's two, and `loss_pixels` and `loss_affinity`, means over the instances that have a pseudo mask."""
        import torch

        from misa.losses.pairs import edge_error, pair_loss
        from misa.losses.pseudo import dice
        from misa.ops.neighbors import shift, window_offsets
        from misa.ops.pairs import same_side

        logits, boxes, image = step.positives.mask_logits, step.positives.box_masks, step.positives.image
        error = edge_error(logits)
        target, confidence = self.pseudo_masks(step)
        target = target & boxes
        valid = torch.stack([shift(step.batch.valid, offset) for offset in window_offsets(3, 2)], dim=1)
        alike = same_side(target) & boxes[:, None] & valid[image.to(logits.device, non_blocking=True)]
        affinity = pair_loss(error, alike, reduction="positive")
        pixels = dice(logits.sigmoid(), target.to(logits.dtype))
        count = (confidence > 0).sum()
        weight = step.ramp(self.pseudo_ramp) / count.clamp(min=1)
        return self.box_terms(step, error) | {
            "loss_pixels": Term(self.pixel_weight * weight * (confidence * pixels).sum(), count),
            "loss_affinity": Term(self.affinity_weight * weight * (confidence * affinity).sum(), count),
        }

    def pseudo_masks(self, step: Step) -> tuple[Tensor, Tensor]:
        """The copy's mask of every instance's box (n h w) and its confidence (n); 0 where nothing was detected.

        Boxes are chosen on the host, for which a batch's detections are copied at once.
        """
        import torch

        from misa.losses.pseudo import quality
        from misa.ops.assignment import greedy_boxes

        assert step.detections is not None
        assert step.truth is not None
        own = step.positives
        target = torch.zeros_like(own.box_masks)
        confidence = own.mask_logits.new_zeros(len(own.image))
        every = [(found, quality(found.masks)) for found in step.detections]
        rows = [torch.cat([f.boxes, (f.scores * sure).sqrt()[:, None]], dim=1) for f, sure in every]
        hosted = torch.cat(rows).cpu().split([len(f.scores) for f, _ in every])
        for b, ((found, sure), seen) in enumerate(zip(every, hosted, strict=True)):
            here = (step.truth.image == b).nonzero().flatten()
            taken = greedy_boxes(seen[:, :4], seen[:, 4], step.truth.boxes[here], iou=self.overlap)
            answer = dict(zip(here.tolist(), taken.tolist(), strict=True))
            pairs = [(n, i) for n, g in enumerate(own.instance.tolist()) if (i := answer.get(g, -1)) >= 0]
            if pairs:
                places, chosen = torch.tensor(pairs).to(target.device, non_blocking=True).T
                target[places] = found.masks[chosen] > 0.5
                confidence[places] = (found.scores.sqrt() * sure).sqrt()[chosen].to(confidence.dtype)
        return target, confidence
