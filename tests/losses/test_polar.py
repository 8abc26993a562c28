"""PolarMask's losses against a loop, and properties of a ratio of areas."""

import math

import cv2
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from misa.losses.polar import polar_centerness, polar_iou_loss
from misa.ops.rays import polygons


def test_equal_the_loop(rng, device):
    d, aim = 1 + 9 * torch.rand(2, 4, 36, generator=rng, dtype=torch.float64)
    expected = [
        math.log(sum(map(max, x, y)) / sum(map(min, x, y))) for x, y in zip(d.tolist(), aim.tolist(), strict=True)
    ]
    assert_close(polar_iou_loss(d.to(device), aim.to(device)).cpu(), torch.tensor(expected, dtype=torch.float64))
    centre = [math.sqrt(min(y) / max(y)) for y in aim.tolist()]
    assert_close(polar_centerness(aim.to(device)).cpu(), torch.tensor(centre, dtype=torch.float64))


def test_the_factor_between_two_shapes_is_what_it_costs(rng):
    d = 1 + torch.rand(3, 36, generator=rng, dtype=torch.float64)
    assert torch.equal(polar_iou_loss(d, d), torch.zeros(3, dtype=torch.float64))
    for factor in (1.1, 0.5):
        assert_close(polar_iou_loss(factor * d, d), torch.full((3,), abs(math.log(factor)), dtype=torch.float64))
    other = 1 + torch.rand(3, 36, generator=rng, dtype=torch.float64)
    assert_close(polar_iou_loss(d, other), polar_iou_loss(other, d))
    assert_close(polar_iou_loss(7 * d, 7 * other), polar_iou_loss(d, other))


def test_the_overlap_of_two_areas_is_the_square_of_that_of_their_rays(rng):
    """A loss of 0.144 is an IoU of 0.75, for nested polygons drawn on a fine grid."""
    aim = 300 + 40 * torch.rand(1, 36, generator=rng, dtype=torch.float64)
    areas = []
    for lengths in (aim, aim * math.exp(-0.144)):
        canvas = np.zeros((800, 800), np.uint8)
        corners = polygons(torch.full((1, 2), 400.0, dtype=torch.float64), lengths)[0].round().int().numpy()
        areas.append(cv2.fillPoly(canvas, [corners], [1]).astype(bool))
    overlap = (areas[0] & areas[1]).sum() / (areas[0] | areas[1]).sum()
    assert overlap == pytest.approx(0.75, abs=0.005)


def test_gradcheck(rng):
    d, aim = 1 + 9 * torch.rand(2, 3, 36, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: polar_iou_loss(x, aim), (d.requires_grad_(),))


def test_missing_rays_are_finite_and_weigh_nothing():
    aim = torch.full((3, 36), 50.0)
    aim[1, 5] = 1e-6
    aim[2] = 0
    d = torch.full((3, 36), 40.0, requires_grad=True)
    loss, weight = polar_iou_loss(d, aim), polar_centerness(aim)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert d.grad.isfinite().all()
    assert weight[0] == 1
    assert weight[1] < 1e-3
    assert weight[2] == 1  # no rays: equal lengths everywhere


def test_no_positives():
    d = torch.zeros(0, 36, requires_grad=True)
    polar_iou_loss(d, d.detach()).sum().backward()
    assert polar_centerness(d.detach()).shape == (0,)


def test_says_what_it_needs():
    with pytest.raises(ValueError, match="polar_iou_loss needs lengths"):
        polar_iou_loss(torch.ones(2, 36), torch.ones(2, 35))
    with pytest.raises(ValueError, match="polar_centerness needs"):
        polar_centerness(torch.ones(36))
