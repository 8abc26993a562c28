"""BoxLevelSet: its weights, the inputs of the deep energy, and the flow of gradients."""

import pytest
import torch
from torch.testing import assert_close

from misa.losses.inputs import Batch, Positives
from misa.losses.levelset import border_length, region_energy, structure_masks
from misa.losses.projection import projection_loss
from misa.objectives.base import Step
from misa.objectives.boxlevelset import BoxLevelSet

PARTS = ("loss_projection", "loss_levelset_image", "loss_levelset_structure")


def given(rng, n=3, h=8, w=9, channels=5):
    boxes = torch.zeros(n, h, w, dtype=torch.bool)
    boxes[:, 2:6, 1:7] = True
    image = torch.tensor([0, 1, 1])[:n]
    logits = torch.randn(n, h, w, generator=rng).requires_grad_()
    positives = Positives(logits, boxes, torch.zeros(n).long(), image, torch.arange(n))
    batch = Batch(torch.randn(2, 3, h, w, generator=rng), torch.ones(2, h, w, dtype=torch.bool))
    return Step(positives, batch, structure=torch.randn(2, channels, h, w, generator=rng).requires_grad_())


def losses(step, **options):
    return {name: term.loss for name, term in BoxLevelSet(**options).losses(step).items()}


def test_the_terms_are_the_weighted_means(rng):
    step = given(rng)
    masks, boxes = step.positives.mask_logits.sigmoid(), step.positives.box_masks
    found = losses(step)
    assert tuple(found) == PARTS
    images = step.batch.images[step.positives.image]
    maps = structure_masks(masks, step.batch.images, step.structure, [0, 1, 1])
    assert_close(found["loss_projection"], 3 * projection_loss(masks, boxes).mean())
    assert_close(found["loss_levelset_image"], 0.05 * region_energy(masks, images, boxes).mean())
    assert_close(found["loss_levelset_structure"], 5 * region_energy(masks, maps, boxes).mean())


def test_the_length_is_within_both_energies(rng):
    step = given(rng)
    length = border_length(step.positives.mask_logits.sigmoid(), step.positives.box_masks).mean()
    off, on = losses(step), losses(step, length_weight=1e-2)
    assert_close(on["loss_levelset_image"] - off["loss_levelset_image"], 0.05 * 1e-2 * length, atol=1e-6, rtol=1e-3)
    assert_close(
        on["loss_levelset_structure"] - off["loss_levelset_structure"], 5 * 1e-2 * length, atol=1e-5, rtol=1e-3
    )


def test_the_structure_learns_from_its_own_term_alone(rng):
    step = given(rng)
    found = losses(step)
    for name in PARTS:
        (grad,) = torch.autograd.grad(found[name], step.structure, retain_graph=True, allow_unused=True)
        assert (grad is not None and grad.abs().sum() > 0) == (name == "loss_levelset_structure")


def test_a_mask_of_flat_zones_has_no_deep_energy(rng):
    """A binary mask of one color with matching structure zones is unchanged by smoothing: H = p and E = 0."""
    zone = torch.zeros(1, 8, 9)
    zone[:, 3:5, 2:6] = 1
    step = given(rng, n=1)
    positives = step.positives._replace(mask_logits=200 * (zone - 0.5))
    batch = step.batch._replace(images=10 * zone[:, None].expand(2, 3, 8, 9))
    step = step._replace(positives=positives, batch=batch, structure=10 * zone[:, None].expand(2, 5, 8, 9))
    found = losses(step)
    assert_close(found["loss_levelset_structure"].item(), 0.0, atol=1e-9, rtol=0)
    assert_close(found["loss_levelset_image"].item(), 0.0, atol=1e-9, rtol=0)


def test_the_maps_are_two_filters_in_turn(rng):
    """By definition with dense kernels: products of weights along the paths of both trees."""
    from misa.ops.tree import grid_lengths, spanning_trees
    from misa.ops.treefilter import edge_weights, tree_filter

    step = given(rng)
    masks = step.positives.mask_logits.detach().sigmoid()
    maps = structure_masks(masks, step.batch.images, step.structure, [0, 1, 1], color_scale=0.5)
    for i, image in enumerate([0, 1, 1]):
        colors, structure = step.batch.images[image : image + 1], step.structure[image : image + 1]
        first = spanning_trees(grid_lengths(colors), 8, 9)
        second = spanning_trees(grid_lengths(structure), 8, 9)
        one = tree_filter(masks[i : i + 1], first, edge_weights(first, colors, 0.5), [0])
        two = tree_filter(one, second, edge_weights(second, structure, 1.0), [0])
        assert_close(maps[i], torch.cat([one, two]))


def test_padding_changes_nothing(rng):
    step = given(rng)
    valid = torch.zeros(2, 8, 9, dtype=torch.bool)
    valid[:, :7, :8] = True

    def cut(x):
        return x[..., :7, :8].contiguous()

    batch = Batch(step.batch.images.masked_fill(~valid[:, None], 0), valid)
    boxes = step.positives.box_masks
    cropped = Step(
        step.positives._replace(mask_logits=cut(step.positives.mask_logits), box_masks=cut(boxes)),
        Batch(cut(batch.images), cut(valid)),
        structure=cut(step.structure),
    )
    padded, small = losses(step._replace(batch=batch)), losses(cropped)
    for name in PARTS[1:]:  # the projection uses the whole map
        assert_close(padded[name], small[name])


def test_without_positives_every_term_is_a_zero_with_a_gradient(rng):
    step = given(rng, n=0)
    found = losses(step)
    assert [value.item() for value in found.values()] == [0, 0, 0]
    sum(found.values()).backward()
    assert step.positives.mask_logits.grad is not None


@pytest.mark.parametrize("changes", [{"structure": torch.zeros(2, 5, 4, 4)}, {"structure": torch.zeros(1, 5, 8, 9)}])
def test_says_what_it_needs(rng, changes):
    with pytest.raises(ValueError, match="structure_masks needs"):
        losses(given(rng)._replace(**changes))
