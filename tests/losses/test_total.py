"""The sum of the box objectives: each term once, with its weight."""

import torch
from torch.testing import assert_close

from misa.losses.inputs import Batch, Positives
from misa.losses.projection import projection_loss
from misa.losses.total import box_objectives


def given(rng, n=3):
    boxes = torch.zeros(n, 8, 9, dtype=torch.bool)
    boxes[:, 2:6, 1:7] = True
    positives = Positives(torch.randn(n, 8, 9, generator=rng), boxes, torch.zeros(n).long(), torch.zeros(n).long())
    return positives, Batch(torch.randn(1, 3, 8, 9, generator=rng), torch.ones(1, 8, 9, dtype=torch.bool))


def test_the_projection_term_is_the_weighted_mean(rng):
    positives, batch = given(rng)
    losses = box_objectives(positives, batch, projection_weight=2.5)
    assert list(losses) == ["loss_projection"]
    expected = 2.5 * projection_loss(positives.mask_logits.sigmoid(), positives.box_masks).mean()
    assert_close(losses["loss_projection"], expected)


def test_the_pairwise_terms_join_with_their_weights(rng):
    positives, batch = given(rng)
    once = box_objectives(positives, batch, affinity={"global_weight": 1.0, "local_weight": 1.0})
    more = box_objectives(positives, batch, affinity={"global_weight": 3.0, "local_weight": 2.0})
    assert once["loss_local"] > 0
    assert_close(more["loss_global"], 3 * once["loss_global"])
    assert_close(more["loss_local"], 2 * once["loss_local"])


def test_without_positives_every_term_is_a_zero_with_a_gradient(rng):
    positives, batch = given(rng, n=0)
    logits = positives.mask_logits.requires_grad_()
    losses = box_objectives(positives._replace(mask_logits=logits), batch, affinity={})
    assert all(value == 0 for value in losses.values())
    sum(losses.values()).backward()
    assert logits.grad is not None
