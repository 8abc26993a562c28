"""BoxInst (Tian et al. 2021): projection loss, and a pairwise loss that gives neighbors of similar color one label.

L = L_projection + ramp · Σ −log P(y_i = y_k) / pairs, over pairs of similar color whose pixel i is in the box.
Constants are those of AdelaiDet, the published code. mmdet's implementation is the student "boxinst".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from misa.experiment import Needs
from misa.objectives.base import BoxObjective, Ramp, Step, Term

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class BoxInst(BoxObjective):
    """Weights, threshold of the color similarity, and warm-up of the pairwise loss.

    bottom_rows: mask rows at the lower edge of an image that form no pairs: some COCO images have a black stripe there.
        3 are mmdet's 10 pixels at stride 4; AdelaiDet takes 10 pixels at the image's original size.
    """

    projection_weight: float = 1.0
    pair_weight: float = 1.0
    similarity: float = 0.3
    ramp: Ramp = field(default_factory=lambda: Ramp(0, 10000))
    bottom_rows: int = 3

    @property
    def needs(self) -> Needs:
        """The colors of the images."""
        return Needs(colors=True)

    def losses(self, step: Step, memory: nn.Module | None = None) -> dict[str, Term]:
        """`loss_projection`, a mean over instances, and `loss_pairs`, a mean over the pairs of all instances."""
        from misa.losses.pairs import edge_error

        return self.box_terms(step, edge_error(step.positives.mask_logits))

    def box_terms(self, step: Step, error: Tensor) -> dict[str, Term]:
        """Both terms, given the pairs' errors −log P(y_i = y_k) (n 8 h w)."""
        from misa.losses.pairs import pair_loss
        from misa.losses.projection import projection_loss

        logits, boxes = step.positives.mask_logits, step.positives.box_masks
        projection = projection_loss(logits.sigmoid(), boxes)
        alike = self.likeness(step) >= self.similarity
        keep = alike[step.positives.image.to(logits.device, non_blocking=True)] & boxes[:, None]
        pairs = pair_loss(error, keep)
        return {
            "loss_projection": Term(self.projection_weight * projection.sum() / max(len(projection), 1)),
            "loss_pairs": Term(self.pair_weight * step.ramp(self.ramp) * pairs, keep.sum()),
        }

    def likeness(self, step: Step) -> Tensor:
        """Similarity of neighbors (b 8 h w) in [0, 1]: that of their colors."""
        return color_pairs(step, self.bottom_rows)


def color_pairs(step: Step, bottom_rows: int) -> Tensor:
    """Similarity of neighbors' L*a*b* colors (b 8 h w); 0 where the neighbor is padding or in the bottom rows."""
    from misa.ops.lab import rgb_to_lab
    from misa.ops.pairs import pair_similarity

    assert step.colors is not None
    lab = rgb_to_lab(step.colors.clamp(0, 255).floor())
    return pair_similarity(lab, without_bottom_rows(step.batch.valid, bottom_rows), scale=0.5)


def without_bottom_rows(valid: Tensor, bottom_rows: int) -> Tensor:
    """The valid cells (b h w) of each image but for those in its last rows."""
    import torch

    rows = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid.any(dim=2), rows, -1).amax(dim=1)  # of every image
    above = rows <= (last - bottom_rows)[:, None]
    return valid & above[:, :, None]
