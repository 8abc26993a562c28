"""The sum of the box objectives: each term once, with its weight and the count of its mean."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from misa.experiment import Affinity, Distillation, Experiment, Needs
from misa.losses.inputs import Batch, Positives, SemanticPrior
from misa.losses.projection import projection_loss
from misa.objectives.base import Step
from misa.objectives.misa import MISA, objective_of
from misa.ops.readings import Classifier


def given(rng, n=3):
    boxes = torch.zeros(n, 8, 9, dtype=torch.bool)
    boxes[:, 2:6, 1:7] = True
    zeros = torch.zeros(n).long()
    positives = Positives(torch.randn(n, 8, 9, generator=rng), boxes, zeros, zeros, zeros)
    return Step(positives, Batch(torch.randn(1, 3, 8, 9, generator=rng), torch.ones(1, 8, 9, dtype=torch.bool)))


def losses(step, **options):
    return {name: term.loss for name, term in MISA(**options).losses(step).items()}


def test_the_projection_term_is_the_weighted_mean(rng):
    step = given(rng)
    found = losses(step, projection_weight=2.5, affinity=None)
    assert list(found) == ["loss_projection"]
    expected = 2.5 * projection_loss(step.positives.mask_logits.sigmoid(), step.positives.box_masks).mean()
    assert_close(found["loss_projection"], expected)


def test_the_pairwise_terms_join_with_their_weights(rng):
    step = given(rng)
    once = losses(step, affinity=Affinity(global_weight=1.0, local_weight=1.0))
    more = losses(step, affinity=Affinity(global_weight=3.0, local_weight=2.0))
    assert once["loss_local"] > 0
    assert_close(more["loss_global"], 3 * once["loss_global"])
    assert_close(more["loss_local"], 2 * once["loss_local"])


def test_without_positives_every_term_is_a_zero_with_a_gradient(rng):
    step = given(rng, n=0)
    logits = step.positives.mask_logits.requires_grad_()
    found = losses(step._replace(positives=step.positives._replace(mask_logits=logits)))
    assert all(value == 0 for value in found.values())
    sum(found.values()).backward()
    assert logits.grad is not None


@pytest.mark.parametrize(("reduction", "per"), [("box_mean", "instances"), ("box_ratio", "box pixels")])
def test_what_a_mean_is_over_stands_beside_each_term(rng, reduction, per):
    union = torch.zeros(1, 1, 8, 9, dtype=torch.bool)
    union[..., 2:6, 1:7] = True
    prior = SemanticPrior(torch.randn(1, 5, 8, 9, generator=rng), torch.randn(2, 5, generator=rng))
    adapted = torch.randn(1, 5, 8, 9, generator=rng)
    step = given(rng)._replace(prior=prior, adapted=adapted, union=union, known=torch.ones_like(union))
    terms = MISA(affinity=Affinity(reduction=reduction), distillation=Distillation()).losses(step)
    assert {name: term.per for name, term in terms.items()} == {
        "loss_projection": "instances",
        "loss_global": per,
        "loss_local": per,
        "loss_distillation": "batch",
    }


def test_it_needs_no_more_than_its_terms():
    plain, saliency = Affinity(), Affinity(saliency=True)
    assert MISA(affinity=plain).needs == Needs()
    assert MISA(affinity=None).needs == Needs()
    assert MISA(affinity=saliency).needs == Needs(prior=True)
    assert MISA(affinity=plain, distillation=Distillation()).needs == Needs(prior=True, adapter=True)


def test_the_prior_stays_out_of_an_affinity_of_colors(rng):
    step = given(rng)
    prior = SemanticPrior(torch.randn(1, 5, 8, 9, generator=rng), torch.randn(2, 5, generator=rng))
    step = step._replace(prior=prior)
    assert losses(step) == losses(step._replace(prior=None))
    layer = Classifier(prior.saliency_factors, torch.zeros(5), torch.zeros(2), torch.zeros(()))
    seen = losses(step._replace(classifier=layer), affinity=Affinity(saliency=True))
    assert seen["loss_local"] != losses(step)["loss_local"]


def test_a_row_without_an_objective_is_misas():
    row = Experiment(projection_weight=2.0, affinity=Affinity(window=3))
    assert objective_of(row) == MISA(2.0, Affinity(window=3), None)
    own = MISA(affinity=None)
    bare = dataclasses.replace(Experiment(), affinity=None, objective=own)
    assert objective_of(bare) is own
