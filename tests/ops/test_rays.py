"""PolarMask's rays against loops, discs and squares, and against OpenCV's moments."""

import math

import cv2
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from misa.ops.rays import centre, contour, polygons, ray_lengths


def disc(radius, size=None, at=None):
    size = size or 2 * radius + 11
    cx, cy = at or (size // 2, size // 2)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (x - cx) ** 2 + (y - cy) ** 2 <= radius**2, torch.tensor([[float(cx), float(cy)]])


def area(points):
    x, y = points[0].double().T
    return ((x * y.roll(-1) - x.roll(-1) * y).sum().abs() / 2).item()


def slow_rays(points, here):
    """The published rule: bins of one degree in a dictionary, of which seven are tried in turn."""
    bins = {}
    for x, y in points.tolist():
        angle = math.degrees(math.atan2(x - here[0], y - here[1]))
        angle = int(angle + 360 if angle < 0 else angle)
        bins[angle] = max(bins.get(angle, 0.0), math.hypot(x - here[0], y - here[1]))
    lengths = []
    for ray in range(0, 360, 10):
        near = [ray + d for d in (0, 1, -1, 2, -2, 3, -3) if ray + d in bins]
        lengths.append(max(bins[near[0]], 1e-6) if near else 1e-6)
    return lengths


@pytest.mark.parametrize("radius", [3, 8, 20])
def test_official_rays_equal_the_loop(rng, radius):
    mask, middle = disc(radius)
    mask &= torch.rand(mask.shape, generator=rng) > 0.02
    points = contour(mask)
    centres = middle + torch.randint(-radius // 2, radius // 2 + 1, (5, 2), generator=rng)
    expected = torch.tensor([slow_rays(points, here.tolist()) for here in centres])
    assert_close(ray_lengths(points, centres), expected)


@pytest.mark.parametrize(("radius", "missing"), [(5, 24), (8, 8), (10, 4), (15, 0), (30, 0)])
def test_rays_of_a_disc(radius, missing):
    mask, middle = disc(radius)
    official, cast = (ray_lengths(contour(mask), middle, rule=rule)[0] for rule in ("official", "cast"))
    assert (official <= 1e-6).sum() == missing
    for lengths in (official[official > 1e-6], cast):
        assert ((lengths >= radius - 1.5) & (lengths <= radius)).all()


def test_a_half_ring_from_its_centre_of_curvature():
    mask, middle = disc(40)
    mask &= ~disc(30, size=mask.shape[0])[0]
    mask[: mask.shape[0] // 2] = False
    assert (ray_lengths(contour(mask), middle)[0] <= 1e-6).sum() == 17


@pytest.mark.parametrize("rule", ["official", "cast"])
def test_a_square_from_its_centre(rule):
    """Ideal rays: half the side over the larger of |cos| and |sin|; off the grid the rule may be 3 degrees off."""
    mask = torch.zeros(221, 221, dtype=torch.bool)
    mask[10:211, 10:211] = True
    lengths = ray_lengths(contour(mask), torch.tensor([[110.0, 110.0]]), rule=rule)[0]
    angle = torch.arange(36) * math.pi / 18
    ideal = 100 / torch.maximum(angle.cos().abs(), angle.sin().abs())
    assert_close(lengths, ideal, rtol=1e-5 if rule == "cast" else 0.02, atol=0)
    share = area(polygons(torch.tensor([[110.0, 110.0]]), lengths[None])) / 200**2
    cut = (1 - math.tan(math.radians(40))) ** 2 / 2  # the corners at 45 degrees, between rays 4 and 5
    assert abs(share - (1 - cut)) < (1e-5 if rule == "cast" else 0.02)


@pytest.mark.parametrize("rule", ["official", "cast"])
@pytest.mark.parametrize(("step", "ray"), [((0, 1), 0), ((1, 0), 9), ((0, -1), 18), ((-1, 0), 27)])
def test_ray_0_is_down_and_ray_9_to_the_right(rule, step, ray):
    mask, middle = disc(20)
    plain = ray_lengths(contour(mask), middle, rule=rule)[0]
    x, y = (int(v) + 21 * s for v, s in zip(middle[0], step, strict=True))
    mask[y, x] = True
    bumped = ray_lengths(contour(mask), middle, rule=rule)[0]
    assert (bumped != plain).nonzero().flatten().tolist() == [ray]
    assert_close(bumped[ray].item(), 21.0)


def test_moving_mask_and_location_together_changes_nothing():
    (one, here), (two, there) = disc(17, size=80, at=(30, 35)), disc(17, size=80, at=(41, 38))
    assert torch.equal(ray_lengths(contour(one), here), ray_lengths(contour(two), there))


def rasterised(points, size):
    canvas = np.zeros((size, size), np.uint8)
    return torch.from_numpy(cv2.fillPoly(canvas, [points[0].numpy().astype(np.int32)], 1)).bool()


def iou(a, b):
    return ((a & b).sum() / (a | b).sum()).item()


@pytest.mark.parametrize(("radius", "least"), [(15, 0.92), (30, 0.96), (60, 0.98), (120, 0.99)])
def test_a_disc_and_back(radius, least):
    mask, middle = disc(radius)
    lengths = ray_lengths(contour(mask), middle)
    assert iou(rasterised(polygons(middle, lengths), mask.shape[0]), mask) > least


def test_the_polygon_of_equal_rays_has_its_area():
    points = polygons(torch.zeros(1, 2), torch.full((1, 36), 10.0))
    assert_close(area(points), 18 * math.sin(math.radians(10)) * 100, rtol=1e-5, atol=0)
    assert_close(points[0, 0], torch.tensor([0.0, 10.0]))
    assert_close(points[0, 9], torch.tensor([10.0, 0.0]), atol=1e-5, rtol=0)


def test_the_largest_outline_is_the_object():
    mask = torch.zeros(60, 60, dtype=torch.bool)
    mask[5:15, 5:15] = True
    mask[20:50, 20:50] = True
    mask[25:45, 25:45] = False  # a hole
    mask[30:40, 30:40] = True  # an island in it
    points = contour(mask)
    assert points.amin(dim=0).tolist() == [20, 20]
    assert points.amax(dim=0).tolist() == [49, 49]
    assert len(points) == 4 * 29
    assert centre(points).tolist() == [34, 34]


def test_the_centre_is_opencvs(rng):
    for radius in (4, 11, 23):
        mask, _ = disc(radius, size=70, at=(31, 33))
        mask[:, :30] &= torch.rand(70, 30, generator=rng) > 0.3
        points = contour(mask)
        moments = cv2.moments(points[:, None].int().numpy())
        expected = [int(moments["m10"] / moments["m00"]), int(moments["m01"] / moments["m00"])]
        assert centre(points).tolist() == expected


def test_lines_points_and_nothing():
    line = torch.zeros(9, 9, dtype=torch.bool)
    line[4, 2:7] = True
    assert centre(contour(line)).tolist() == [4, 4]
    for rule in ("official", "cast"):
        alone = ray_lengths(torch.tensor([[3, 3]]), torch.tensor([[3.0, 3.0]]), rule=rule)
        assert_close(alone, torch.full((1, 36), 1e-6))
    nothing = contour(torch.zeros(5, 5, dtype=torch.bool))
    assert nothing.shape == (0, 2)
    assert_close(ray_lengths(nothing, torch.zeros(2, 2)), torch.full((2, 36), 1e-6))
    assert ray_lengths(contour(line), torch.zeros(0, 2)).shape == (0, 36)
    with pytest.raises(ValueError, match="centre needs"):
        centre(nothing)


def test_says_what_it_needs():
    with pytest.raises(ValueError, match="contour needs"):
        contour(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="rules"):
        ray_lengths(torch.zeros(1, 2).long(), torch.zeros(1, 2), rule="segment")
    with pytest.raises(ValueError, match="polygons needs"):
        polygons(torch.zeros(1, 2), torch.zeros(1, 35))
