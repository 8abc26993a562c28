"""MISA's objective (Eq. 15, §3.2, §3.3): projection, pairwise loss along affinities, distillation of the teacher.

APro (Li et al. 2023) is the same without the teacher: neither its affinity nor the distillation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from misa.experiment import Affinity, Distillation, Experiment, Needs
from misa.objectives.base import BoxObjective, Step, Term

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class MISA(BoxObjective):
    """L = projection_weight · L_projection + L_pairwise + L_trans; None leaves a term out."""

    projection_weight: float = 3.0
    affinity: Affinity | None = field(default_factory=Affinity)
    distillation: Distillation | None = None

    @property
    def needs(self) -> Needs:
        """The prior where affinity or distillation are the teacher's, the adapter for the distillation."""
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
        from misa.losses.inputs import SemanticPrior
        from misa.losses.pairwise import pairwise_loss
        from misa.ops.readings import read

        options, prior = pairwise_arguments(affinity), None
        if self._semantic:
            assert step.prior is not None
            assert step.classifier is not None
            chosen = reading_arguments(affinity)
            reading = read(step.prior.features, step.classifier, valid=step.batch.valid, **chosen)
            prior, options["semantic_sigma"] = SemanticPrior(reading.values, reading.factors), reading.sigma
        losses = pairwise_loss(
            masks,
            step.positives.box_masks,
            step.batch.images,
            step.positives.image,
            labels=step.positives.labels,
            prior=prior,
            valid=step.batch.valid,
            **options,
        )
        return {
            name: Term(loss, "box pixels" if affinity.reduction == "box_ratio" else "instances")
            for name, loss in losses.items()
        }


def _distilled(step: Step, distillation: Distillation) -> Tensor:
    """FSD of the student's dense feature behind its adapter (Eq. 6), times its weight."""
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


def pairwise_arguments(affinity: Affinity) -> dict[str, Any]:
    """The arguments of `pairwise_loss`; those of `reading_arguments` come before it."""
    arguments = asdict(affinity)
    for name in ("feature", "semantic_values", "semantic_norm", "semantic_factors"):
        del arguments[name]  # what is not of saliency is of the feature
    return arguments


def reading_arguments(affinity: Affinity) -> dict[str, Any]:
    """The arguments of `misa.ops.readings.read`: what S^c is (Eq. 11)."""
    return {part: getattr(affinity, f"semantic_{part}") for part in ("values", "norm", "factors")}


def objective_of(experiment: Experiment) -> BoxObjective:
    """The objective that a row names; where it names none, MISA's terms as its own fields have them.

    Raises:
        TypeError: the row's objective is none of `misa.objectives`.
    """
    if experiment.objective is None:
        return MISA(experiment.projection_weight, experiment.affinity, experiment.distillation)
    if not isinstance(experiment.objective, BoxObjective):
        raise TypeError(f"Experiment.objective is {experiment.objective!r}, no BoxObjective.")
    return experiment.objective
