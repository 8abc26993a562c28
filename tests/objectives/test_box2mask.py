"""Box2Mask: BoxLevelSet's terms, its local consistency, and the square that T resizes everything to."""

import pytest
import torch
from torch.nn.functional import interpolate
from torch.testing import assert_close

from misa.losses.consistency import consistency_kernel, local_consistency
from misa.losses.inputs import Batch, Positives
from misa.losses.levelset import region_energy, structure_masks
from misa.objectives.base import Step
from misa.objectives.box2mask import Box2Mask
from misa.objectives.boxlevelset import BoxLevelSet


def given(rng, n=3, h=8, w=10, channels=5):
    boxes = torch.zeros(n, h, w, dtype=torch.bool)
    boxes[:, 2:6, 1:7] = True
    image = torch.tensor([0, 1, 1])[:n]
    logits = torch.randn(n, h, w, generator=rng).requires_grad_()
    positives = Positives(logits, boxes, torch.zeros(n).long(), image, torch.arange(n))
    batch = Batch(torch.randn(2, 3, h, w, generator=rng), torch.ones(2, h, w, dtype=torch.bool))
    return Step(positives, batch, structure=torch.randn(2, channels, h, w, generator=rng).requires_grad_())


def losses(objective, step):
    return {name: term.loss for name, term in objective.losses(step).items()}


def test_at_the_masks_own_size_it_is_boxlevelset_and_the_consistency(rng):
    step = given(rng)
    found, before = losses(Box2Mask(), step), losses(BoxLevelSet(), step)
    for name, value in before.items():
        assert_close(found.pop(name), value)
    masks, boxes = step.positives.mask_logits.sigmoid(), step.positives.box_masks
    kernel = consistency_kernel(step.batch.images)
    expected = 0.2 * local_consistency(masks, boxes, kernel, step.positives.image, steps=1)
    assert_close(found.pop("loss_consistency"), expected)
    assert not found


def test_the_steps_are_a_field(rng):
    step = given(rng)
    one, ten = (losses(Box2Mask(consistency_steps=s), step)["loss_consistency"] for s in (1, 10))
    assert abs(one - ten) > 1e-3


def test_t_filters_at_a_square_and_compares_at_the_masks_size(rng):
    step = given(rng, channels=1)

    def to(x, size):
        return interpolate(x, size=size, mode="bilinear", align_corners=False)

    masks, boxes = step.positives.mask_logits.sigmoid(), step.positives.box_masks
    small, colors, structure = (
        to(masks[:, None], (6, 6))[:, 0],
        to(step.batch.images, (6, 6)),
        to(step.structure, (6, 6)),
    )
    maps = to(structure_masks(small, colors, structure, [0, 1, 1]), (8, 10))
    found = losses(Box2Mask(projection_weight=5.0, structure_channels=1, size=6), step)
    assert_close(found["loss_levelset_structure"], 5 * region_energy(masks, maps, boxes).mean())
    box = to(boxes[:, None].float(), (6, 6))[:, 0]
    expected = 0.2 * local_consistency(small, box, consistency_kernel(colors), step.positives.image, steps=1)
    assert_close(found["loss_consistency"], expected)


def test_a_constant_mask_is_its_own_smoothing(rng):
    step = given(rng)
    flat = step._replace(positives=step.positives._replace(mask_logits=torch.full((3, 8, 10), 0.4)))
    found = losses(Box2Mask(size=5, structure_channels=5), flat)
    assert_close(found["loss_levelset_structure"].item(), 0.0, atol=1e-9, rtol=0)
    assert_close(found["loss_consistency"].item(), 0.0, atol=1e-6, rtol=0)


def test_what_the_means_are_over(rng):
    terms = Box2Mask().losses(given(rng))
    assert {name: term.per for name, term in terms.items()} == {
        "loss_projection": "instances",
        "loss_levelset_image": "instances",
        "loss_levelset_structure": "instances",
        "loss_consistency": "box pixels",
    }


@pytest.mark.parametrize("size", [None, 6])
def test_without_positives_every_term_is_a_zero_with_a_gradient(rng, size):
    step = given(rng, n=0)
    found = losses(Box2Mask(size=size), step)
    assert [value.item() for value in found.values()] == [0, 0, 0, 0]
    sum(found.values()).backward()
    assert step.positives.mask_logits.grad is not None


def test_predictions_of_several_layers_add_up(rng):
    """The mean over the instances of all predictions, times the number of predictions, is the sum over predictions."""
    step = given(rng)
    other = torch.randn(3, 8, 10, generator=rng)
    positives = step.positives
    both = positives._replace(
        mask_logits=torch.cat([positives.mask_logits, other]),
        box_masks=positives.box_masks.repeat(2, 1, 1),
        image=positives.image.repeat(2),
    )
    one, two = (
        losses(Box2Mask(size=6), step),
        losses(Box2Mask(size=6), step._replace(positives=positives._replace(mask_logits=other))),
    )
    together = losses(Box2Mask(size=6), step._replace(positives=both))
    for name, value in together.items():
        assert_close(2 * value, one[name] + two[name])
