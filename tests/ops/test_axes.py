"""Batch convention: the leading axis is optional in every public function and does not change the values."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from misa.losses.distillation import distillation_loss
from misa.losses.projection import projection_loss
from misa.ops.affinity import pairwise_affinity, saliency_affinity
from misa.ops.frequency import high_pass, low_pass
from misa.ops.propagation import SemanticGuide, propagate_global, propagate_local, propagate_pamr
from misa.ops.tree import minimum_spanning_tree

H, W = 6, 9
PAMR = {"dilations": (1, 2), "steps": 2}


def drawn(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def boxes(*shape):
    return drawn(*shape) > 0.5


# A function with its tensors including the batch axis, here of length 1.
SINGLE = {
    "high_pass": (high_pass, {"features": drawn(1, 4, H, W)}),
    "low_pass": (low_pass, {"features": drawn(1, 4, H, W)}),
    "distillation_loss": (
        distillation_loss,
        {
            "student": drawn(1, 4, H, W),
            "teacher": drawn(1, 4, H, W) * 2,
            "box_mask": boxes(1, 1, H, W),
            "valid": drawn(1, 1, H, W) > 0.2,
        },
    ),
    "projection_loss": (projection_loss, {"masks": drawn(1, H, W), "box_masks": boxes(1, H, W)}),
    "pairwise_affinity": (pairwise_affinity, {"values": drawn(1, 3, H, W)}),
    "propagate_global": (partial(propagate_global, guide=drawn(3, H, W), bandwidth=0.3), {"masks": drawn(1, H, W)}),
    "propagate_local": (
        partial(propagate_local, guide=drawn(3, H, W)),
        {"masks": drawn(1, H, W), "box_masks": boxes(1, H, W)},
    ),
    "propagate_pamr": (
        partial(propagate_pamr, guide=drawn(3, H, W), **PAMR),
        {"masks": drawn(1, H, W), "box_masks": boxes(1, H, W)},
    ),
    "propagate_local, semantic": (
        partial(propagate_local, guide=drawn(3, H, W), semantic=SemanticGuide(drawn(4, H, W), drawn(2, 4))),
        {"masks": drawn(1, H, W), "labels": torch.tensor([1])},
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_the_first_axis_may_be_left_out(name):
    function, tensors = SINGLE[name]
    batched = function(**tensors)
    alone = function(**{key: x[0] for key, x in tensors.items()})
    expected = batched[0] if batched.dim() else batched
    assert alone.shape == expected.shape
    assert_close(alone, expected, rtol=0, atol=0)
    assert alone.abs().max() > 0


@pytest.mark.parametrize("name", [name for name, (_, tensors) in SINGLE.items() if len(tensors) > 1])
def test_it_is_left_out_of_all_tensors_or_of_none(name):
    function, tensors = SINGLE[name]
    first, *others = tensors
    mixed = {first: tensors[first][0], **{key: tensors[key] for key in others}}
    with pytest.raises(ValueError, match=f"needs {others[0]} without its first axis like {first}: it has shape"):
        function(**mixed)


def semantic(i):
    return SemanticGuide(drawn(2, 4, H, W)[i], drawn(3, 4))


# A function of one image: the arguments that belong to an image, for two images.
SOME = {"masks": drawn(2, 3, H, W), "guide": drawn(2, 5, H, W)}
LABELLED = SOME | {"semantic": [semantic(0), semantic(1)], "labels": torch.tensor([[0, 1, 2], [2, 0, 0]])}
IMAGES = {
    "saliency_affinity": (partial(saliency_affinity, saliency_factors=drawn(3, 4)), {"features": drawn(2, 4, H, W)}),
    "minimum_spanning_tree": (minimum_spanning_tree, {"guide": drawn(2, 3, H, W)}),
    "propagate_global": (partial(propagate_global, bandwidth=0.3), LABELLED),
    "propagate_global, a guide a mask": (
        partial(propagate_global, bandwidth=0.3),
        {"masks": drawn(2, 3, H, W), "guide": drawn(2, 3, 5, H, W)},
    ),
    "propagate_global, a tree": (
        partial(propagate_global, bandwidth=0.3),
        SOME | {"tree": minimum_spanning_tree(drawn(2, 4, H, W))},
    ),
    "propagate_local": (propagate_local, LABELLED | {"box_masks": boxes(2, 3, H, W)}),
    "propagate_pamr": (partial(propagate_pamr, **PAMR), SOME | {"valid": drawn(2, H, W) > 0.1}),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_may_stand_in_front(name):
    function, each = IMAGES[name]
    together = function(**each)
    assert len(together) == 2
    for i in range(2):
        alone = function(**{key: x[i] for key, x in each.items()})
        if name == "minimum_spanning_tree":
            assert torch.equal(together[i].edges, alone.edges)
        else:
            assert together[i].shape == alone.shape
            assert_close(together[i], alone, rtol=0, atol=0)


def test_nothing_of_one_image_is_taken_for_all():
    for wrong in ({"guide": SOME["guide"][0]}, {"semantic": semantic(0)}, {"labels": LABELLED["labels"][0]}):
        with pytest.raises(ValueError, match=f"needs {next(iter(wrong))} for each of the 2 images of masks: it"):
            propagate_local(**(LABELLED | wrong))


def test_gradients_pass():
    teacher, box = drawn(1, 4, H, W), boxes(1, 1, H, W)
    alone, batched = drawn(4, H, W).requires_grad_(), drawn(4, H, W)[None].requires_grad_()
    distillation_loss(alone, teacher[0], box[0]).backward()
    distillation_loss(batched, teacher, box).backward()
    assert_close(alone.grad, batched.grad[0], rtol=0, atol=0)
    assert alone.grad.abs().max() > 0
