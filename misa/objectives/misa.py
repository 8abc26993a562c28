"""MISA's objective (Eq. 15, §3.2, §3.3): projection loss, pairwise loss on propagated masks, distillation.

APro (Li et al. 2023) is the same without the teacher, that is, without its affinity and the distillation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from misa.experiment import Affinity, Distillation, Experiment, Needs
from misa.objectives.base import BoxObjective, Step, Term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from misa.ops.readings import Classifier, Reading


@dataclass(frozen=True)
class MISA(BoxObjective):
    """L = projection_weight · L_projection + L_pairwise + L_trans; None leaves a term out."""

    projection_weight: float = 3.0
    affinity: Affinity | None = field(default_factory=Affinity)
    distillation: Distillation | None = None

    @property
    def needs(self) -> Needs:
        """The teacher's prior for a semantic affinity or the distillation, the adapter for the distillation."""
        distilled = self.distillation is not None
        return Needs(prior=distilled or self._semantic, adapter=distilled)

    @property
    def _semantic(self) -> bool:
        return self.affinity is not None and (self.affinity.feature or self.affinity.saliency)

    def losses(self, step: Step, memory: nn.Module | None = None) -> dict[str, Term]:
        """`loss_projection`, `loss_global` and `loss_local` (or `loss_pamr`), `loss_distillation`."""
        from misa.losses.projection import projection_loss

        masks, boxes = step.positives.mask_logits.sigmoid(), step.positives.box_masks
        projection = projection_loss(masks, boxes)
        terms = {"loss_projection": Term(self.projection_weight * projection.sum() / max(len(projection), 1))}
        if self.affinity is not None:
            terms |= self._pairwise(step, masks, self.affinity)
        if self.distillation is not None:
            terms["loss_distillation"] = Term(_distilled(step, self.distillation), per="batch")
        return terms

    def _pairwise(self, step: Step, masks: Tensor, affinity: Affinity) -> dict[str, Term]:
        from misa.losses.pairwise import pairwise_loss

        reading = None
        if self._semantic:
            assert step.prior is not None
            assert step.classifier is not None
            reading = reading_of(affinity, step.prior.features, step.classifier, step.batch.valid)
        losses = pairwise_loss(
            masks,
            step.positives.box_masks,
            step.batch.images,
            step.positives.image,
            affinity=affinity,
            labels=step.positives.labels,
            prior=reading,
            valid=step.batch.valid,
        )
        return {
            name: Term(loss, "box pixels" if affinity.reduction == "box_ratio" else "instances")
            for name, loss in losses.items()
        }


def _distilled(step: Step, distillation: Distillation) -> Tensor:
    """Weighted FSD loss (Eq. 6) of the student's dense feature after its adapter."""
    from misa.losses.distillation import distillation_loss, in_units_of_spread

    assert step.prior is not None
    assert step.adapted is not None
    assert step.union is not None
    assert step.known is not None
    valid = step.batch.valid[:, None]
    target = step.prior.features
    if distillation.unit == "spread":
        target = in_units_of_spread(target, valid, across=step.across)
    error = distillation_loss(
        step.adapted,
        target,
        step.union,
        radius=distillation.radius,
        scale=distillation.scale,
        bg_weight=distillation.bg_weight,
        fg_weight=distillation.fg_weight,
        frequency=distillation.frequency,
        space=distillation.space,
        valid=valid & step.known,
        across=step.across,
    )
    return distillation.weight * error


def reading_of(affinity: Affinity, features: Tensor, classifier: Classifier, valid: Tensor) -> Reading:
    """Compute S^c of Eq. 11 as `affinity` defines it from S (b d h w) and the teacher's last layer; `valid` (b h w)."""
    from misa.ops.readings import read

    values, norm, factors = affinity.semantic_values, affinity.semantic_norm, affinity.semantic_factors
    return read(features, classifier, values=values, norm=norm, factors=factors, valid=valid)


def objective_of(experiment: Experiment) -> BoxObjective:
    """Return the row's objective, by default MISA's with the row's loss fields.

    Raises TypeError: the row's objective is not a `BoxObjective`.
    """
    if experiment.objective is None:
        return MISA(experiment.projection_weight, experiment.affinity, experiment.distillation)
    if not isinstance(experiment.objective, BoxObjective):
        raise TypeError(f"Experiment.objective is {experiment.objective!r}, no BoxObjective.")
    return experiment.objective
