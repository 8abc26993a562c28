"""BoxTeacher (Cheng et al. 2023): BoxInst, and self-training on the detections of an EMA model of the student.

L = BoxInst + ramp · [0.5 · Σ c · dice(p, Y) + 0.1 · Σ c · −log P(y_i = y_k)] / N. The student's image gets strong
color augmentation, the EMA model's none. Each detection is assigned to the free box that it overlaps most; the pseudo
mask Y is its mask at 0.5 within the box, c a confidence of both, N the number of instances with a pseudo mask.

Constants are the published code's. Different from it: the EMA model detects in the batch at its size, not resized to a
short side of 800; it normalizes by the student's running statistics, not by those of its own batch; scores and
confidences are computed from masks at the size of the losses; a box takes the first detection assigned to it only. The
published student is CondInst; the scores of SOLOv2 and Mask2Former contain their masks' quality already, so that it
counts twice there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from misa.experiment import Needs
from misa.objectives.base import Prepared, Ramp, Step, Term
from misa.objectives.boxinst import BoxInst, without_bottom_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from mmengine.structures import InstanceData
    from torch import Tensor, nn


@dataclass(frozen=True)
class BoxTeacher(BoxInst):
    """BoxInst's constants, weights and ramp of the two self-training terms, and constants of the EMA model.

    momentum: upper limit of the EMA momentum, see `shadow_momentum`. overlap: minimum IoU of a detection with its box.
    blur: probability of blurring the student's image, 0.5 in the published schedules of 270,000 steps.
    """

    pixel_weight: float = 0.5
    affinity_weight: float = 0.1
    pseudo_ramp: Ramp = field(default_factory=lambda: Ramp(0, 10000))
    momentum: float = 0.999
    overlap: float = 0.5
    blur: float = 0.0

    @property
    def needs(self) -> Needs:
        """The colors of the images and the EMA model's detections."""
        return Needs(colors=True, detections=True)

    def shadow_momentum(self, iteration: int, total: int) -> float:
        """min(momentum, 1 − 1/(t + 1)): first the mean of all weights so far, later a moving average."""
        return min(self.momentum, iteration / (iteration + 1))

    def prepare(
        self,
        images: Tensor,
        instances: list[InstanceData],
        memory: nn.Module | None,
        generators: Sequence[torch.Generator],
    ) -> Prepared:
        """Apply strong color augmentation to the student's images."""
        from misa.ops.strong import strong_view

        sizes = [own.img_shape for own in instances if "img_shape" in own]
        return Prepared(strong_view(images, generators, blur=self.blur, sizes=sizes or None), instances, images)

    def losses(self, step: Step, memory: nn.Module | None = None) -> dict[str, Term]:
        """BoxInst's terms, and `loss_pixels` and `loss_affinity`, means over the instances that have a pseudo mask."""
        import torch

        from misa.losses.pairs import edge_error, pair_loss
        from misa.losses.pseudo import dice
        from misa.ops.neighbors import shift, window_offsets
        from misa.ops.pairs import same_side

        logits, boxes, image = step.positives.mask_logits, step.positives.box_masks, step.positives.image
        error = edge_error(logits)
        target, confidence = self.pseudo_masks(step)
        target = target & boxes
        usable = without_bottom_rows(step.batch.valid, self.bottom_rows)
        valid = torch.stack([shift(usable, offset) for offset in window_offsets(3, 2)], dim=1)
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
        """Pseudo mask (n h w, bool) of each instance's box and its confidence (n); 0 if no detection is assigned.

        The assignment runs on the host, after one transfer of all detections of the batch.
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
