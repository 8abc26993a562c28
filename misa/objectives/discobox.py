"""DiscoBox (Lan et al. 2021): the student learns from its own masks after ten rounds of a mean field on the colors.

L = L_projection + [r < 0.3] · dice(p · dilate(B), y). y is the mean of the student's mask and that of a copy which
follows it, refined within the box ("structured teacher"); r, a running mean of L_projection, keeps it out until masks
fill their boxes. Constants are the published code's. Its contrastive loss between objects of different images is left
out: as coded it is a softmax of a softmax, which teaches next to nothing (`misa.losses.correspondence`), and the
published configuration of VOC with ResNet-101 has none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from misa.experiment import Needs
from misa.objectives.base import BoxObjective, Ramp, Step, Term

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class DiscoBox(BoxObjective):
    """Weights, the gate, and the copy of the student.

    gate: below which running mean of the projection loss the pseudo masks teach.
    momentum: what the copy keeps of itself a step, from the end of `shadow_start` on; until then the student's own
        masks stand in. The published code begins anew after every resume; here the copy is saved.
    """

    projection_weight: float = 1.0
    pseudo_weight: float = 1.0
    gate: float = 0.3
    momentum: float = 0.999
    shadow_start: Ramp = field(default_factory=lambda: Ramp(13000, 13000))
    steps: int = 10
    theta_color: float = 0.5  # in normalised colors
    eps: float = 2e-3  # of both dice losses

    @property
    def needs(self) -> Needs:
        """The copy that follows the student."""
        return Needs(shadow=True)

    def memory(self, classes: int, channels: int) -> nn.Module:
        """`running`, the mean of the projection loss, 2 at first."""
        import torch

        memory = torch.nn.Module()
        memory.register_buffer("running", torch.tensor(2.0))
        return memory

    def shadow_momentum(self, iteration: int, total: int) -> float:
        """A copy of the student at the step at which it begins, and left alone before."""
        begun, before = (self.shadow_start.at(i, total) == 1 for i in (iteration, iteration - 1))
        return (self.momentum if before else 0.0) if begun else 1.0

    def losses(self, step: Step, memory: nn.Module | None = None) -> dict[str, Term]:
        """`loss_projection` and `loss_pseudo`, means over the instances; the second 0 while the gate is shut."""
        import torch

        from misa.losses.projection import projection_loss

        masks, boxes = step.positives.mask_logits.sigmoid(), step.positives.box_masks
        count = max(len(masks), 1)
        projection = projection_loss(masks, boxes, eps=self.eps)
        pseudo = 0 * masks.sum()
        if memory is not None:
            opened = memory.get_buffer("running") < self.gate
            if opened.device.type != "cpu":  # asking would wait for the device
                pseudo = torch.where(opened, self._pseudo(step, masks), pseudo)
            elif opened:
                pseudo = self._pseudo(step, masks)
        return {
            "loss_projection": Term(self.projection_weight * projection.sum() / count),
            "loss_pseudo": Term(self.pseudo_weight * pseudo / count),
        }

    def _pseudo(self, step: Step, masks: Tensor) -> Tensor:
        """Σ dice of the masks, within their boxes and one cell around, to the refined mean of both networks' masks."""
        import torch

        from misa.losses.pseudo import dice
        from misa.ops.meanfield import mean_field, window_kernel

        boxes, theirs = step.positives.box_masks, masks.detach()
        if step.ramp(self.shadow_start) == 1:
            assert step.shadow is not None
            theirs = step.shadow.mask_logits.sigmoid()
        kernel = window_kernel(step.batch.images, valid=step.batch.valid, theta_color=self.theta_color)
        mean = (masks.detach() + theirs) / 2
        refined = mean_field(mean, boxes, kernel, step.positives.image.tolist(), steps=self.steps)
        around = torch.nn.functional.max_pool2d(boxes.to(masks.dtype)[:, None], 3, stride=1, padding=1)[:, 0]
        return dice(masks * around, refined.to(masks.dtype), self.eps).sum()

    def update(self, step: Step, memory: nn.Module | None) -> None:
        """r ← 0.9 r + 0.1 L_projection, the mean over all processes' instances."""
        import torch

        from misa.losses.projection import projection_loss

        assert memory is not None
        projection = projection_loss(step.positives.mask_logits.sigmoid(), step.positives.box_masks, eps=self.eps)
        total, count = step.across(torch.stack([projection.sum(), projection.new_full((), len(projection))]))
        running = memory.get_buffer("running")
        running.copy_(torch.where(count > 0, 0.9 * running + 0.1 * total / count, running))
