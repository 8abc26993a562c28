"""Box2Mask (Li et al. 2022, "Box2Mask: Box-supervised Instance Segmentation via Level-set Evolution").

BoxLevelSet's three terms and a local consistency: a mask should equal its average over neighbors of similar color.
"C" trains SOLOv2, "T" Mask2Former with deep supervision. Constants are the published code's; its configuration of C is
not published, so size and weight of C's consistency are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from misa.experiment import Needs
from misa.objectives.base import BoxObjective, Step, Term

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Box2Mask(BoxObjective):
    """Weights and constants of the four terms.

    size: side of the square to which masks are resized for the tree filter and the consistency, 96 in T; None keeps
        the masks' size.
    consistency_steps: iterations of averaging. 10 in the paper and in the code since April 2023; before, and so in all
        published weights, a bug applied only one.
    """

    projection_weight: float = 3.0
    image_weight: float = 0.05
    structure_weight: float = 5.0
    consistency_weight: float = 0.2
    consistency_steps: int = 1
    color_scale: float = 0.02
    structure_channels: int = 5
    size: int | None = None

    @property
    def needs(self) -> Needs:
        """The learned structure map G."""
        return Needs(structure=self.structure_channels)

    def losses(self, step: Step, memory: nn.Module | None = None) -> dict[str, Term]:
        """`loss_projection`, `loss_levelset_image`, `loss_levelset_structure` and `loss_consistency`.

        The first three are means over instances, the last is one mean over the pixels of all boxes.
        """
        from misa.losses.consistency import consistency_kernel, local_consistency
        from misa.losses.levelset import region_energy, structure_masks
        from misa.losses.projection import projection_loss
        from misa.ops.resize import resized, resized_within

        assert step.structure is not None
        masks, boxes = step.positives.mask_logits.sigmoid(), step.positives.box_masks
        image, images, valid = step.positives.image, step.batch.images, step.batch.valid
        full = (masks.shape[-2], masks.shape[-1])
        size = full if self.size is None else (self.size, self.size)
        colors, inner = resized_within(images, valid, size)
        structure, _ = resized_within(step.structure.float(), valid, size)
        small = resized(masks, size)
        maps = structure_masks(small, colors, structure, image.tolist(), valid=inner, color_scale=self.color_scale)
        where = image.to(masks.device, non_blocking=True)
        energies = {
            "projection": self.projection_weight * projection_loss(masks, boxes),
            "levelset_image": self.image_weight * region_energy(masks, images[where], boxes),
            "levelset_structure": self.structure_weight * region_energy(masks, resized(maps, full), boxes),
        }
        error = local_consistency(
            small,
            resized(boxes.float(), size),
            consistency_kernel(colors, valid=inner),
            where,
            steps=self.consistency_steps,
            valid=inner,
        )
        terms = {f"loss_{name}": Term(each.sum() / max(len(each), 1)) for name, each in energies.items()}
        return terms | {"loss_consistency": Term(self.consistency_weight * error, "box pixels")}
