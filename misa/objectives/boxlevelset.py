"""BoxLevelSet (Li et al. 2022, "Box-supervised Instance Segmentation with Level Set Evolution").

L = 3 · L_projection + 0.05 · E(p, I) + 5 · E(p, H). E is Chan and Vese's region energy within the box, on the image I
and on two maps H: the mask filtered along the spanning trees of the image and of a learned structure map G.
Constants and forms are the published code's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from misa.experiment import Needs
from misa.objectives.base import BoxObjective, Step, Term

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BoxLevelSet(BoxObjective):
    """Weights of the terms and constants of the energy on H.

    Since 2023 the published code adds the masks' border length to both energies with weight 1e-5; according to its
    author the paper's results are without it, so `length_weight` is 0.
    """

    projection_weight: float = 3.0
    image_weight: float = 0.05
    structure_weight: float = 5.0
    length_weight: float = 0.0
    color_scale: float = 0.02  # scale of the squared distance of normalized colors along the image's tree
    structure_channels: int = 5

    @property
    def needs(self) -> Needs:
        """The learned structure map G."""
        return Needs(structure=self.structure_channels)

    def losses(self, step: Step, memory: nn.Module | None = None) -> dict[str, Term]:
        """`loss_projection`, `loss_levelset_image` and `loss_levelset_structure`, means over instances."""
        from misa.losses.levelset import border_length, region_energy, structure_masks
        from misa.losses.projection import projection_loss

        assert step.structure is not None
        masks, boxes = step.positives.mask_logits.sigmoid(), step.positives.box_masks
        image = step.positives.image
        maps = structure_masks(
            masks,
            step.batch.images,
            step.structure.float(),
            image.tolist(),
            valid=step.batch.valid,
            color_scale=self.color_scale,
        )
        length = self.length_weight * border_length(masks, boxes)
        images = step.batch.images[image.to(masks.device, non_blocking=True)]
        terms = {
            "projection": self.projection_weight * projection_loss(masks, boxes),
            "levelset_image": self.image_weight * (region_energy(masks, images, boxes) + length),
            "levelset_structure": self.structure_weight * (region_energy(masks, maps, boxes) + length),
        }
        return {f"loss_{name}": Term(each.sum() / max(len(each), 1)) for name, each in terms.items()}
