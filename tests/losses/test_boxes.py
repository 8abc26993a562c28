"""Box losses and their gradients against mmdet's, also without boxes."""

import pytest
import torch
from mmdet.models.losses import GIoULoss, IoULoss
from torch.testing import assert_close

from misa.losses.boxes import box_loss, overlaps


def boxes(rng, n):
    corner, size = 40 * torch.rand(n, 2, generator=rng), 30 * torch.rand(n, 2, generator=rng)
    return torch.cat([corner, corner + size], dim=1)


@pytest.mark.parametrize(("form", "theirs"), [("iou", IoULoss()), ("giou", GIoULoss())])
def test_equals_mmdets_to_the_bit(rng, form, theirs):
    a, b, weight = boxes(rng, 50), boxes(rng, 50), torch.rand(50, generator=rng)
    a[:10, :2] += 100  # disjoint, and with inverted corners
    a[10] = b[10]
    ours, other = a.clone().requires_grad_(), a.clone().requires_grad_()
    total = weight.sum()
    found, expected = box_loss(ours, b, weight, total, form=form), theirs(other, b, weight=weight, avg_factor=total)
    assert torch.equal(found, expected)
    found.backward()
    expected.backward()
    assert torch.equal(ours.grad, other.grad)


@pytest.mark.parametrize("form", ["iou", "giou"])
def test_without_boxes_or_weight_it_is_zero_with_a_gradient(form):
    one = torch.tensor([[0.0, 0, 2, 2]], requires_grad=True)
    for given, weight in ((one, torch.zeros(1)), (one[:0], torch.zeros(0))):
        loss = box_loss(given, given.detach(), weight, torch.tensor(1e-6), form=form)
        loss.backward()
        assert loss == 0
        assert one.grad.abs().sum() == 0


def test_overlaps_of_known_boxes():
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 1, 1]])
    b = torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2], [2, 2, 3, 3]])
    assert_close(overlaps(a, b), torch.tensor([1.0, 1 / 3, 0]))
    assert_close(overlaps(a, b, form="giou"), torch.tensor([1.0, 1 / 3, -7 / 9]))
