"""The level-set energy against loops, Otsu's variance and the closed form of its gradient."""

import pytest
import torch
from torch.testing import assert_close

from misa.losses.levelset import border_length, region_energy


def slow_energy(p, f, box):
    c, h, w = f.shape
    pixels = [(y, x) for y in range(h) for x in range(w)]
    total = 0.0
    for channel in range(c):
        for part in (lambda y, x: p[y][x], lambda y, x: 1 - p[y][x]):
            weight = {(y, x): part(y, x) * box[y][x] for y, x in pixels}
            seen = {(y, x): float(f[channel, y, x]) * box[y][x] for y, x in pixels}
            mean = sum(weight[i] * seen[i] for i in pixels) / max(sum(weight.values()), 1e-5)
            total += sum(weight[i] * (seen[i] - mean) ** 2 for i in pixels)
    return total / (c * max(sum(map(sum, box)), 1))


def case(rng, n=3, c=2, h=6, w=7):
    boxes = torch.zeros(n, h, w, dtype=torch.bool)
    boxes[0, 1:5, 2:6] = True
    boxes[1] = True
    boxes[2, 3:, :3] = True
    return (
        torch.rand(n, h, w, generator=rng, dtype=torch.float64),
        torch.randn(n, c, h, w, generator=rng, dtype=torch.float64),
        boxes,
    )


def test_equals_the_loop(rng, device):
    masks, features, boxes = case(rng)
    for box in (boxes, torch.rand(3, 6, 7, generator=rng, dtype=torch.float64)):
        expected = [slow_energy(*x) for x in zip(masks.tolist(), features, box.double().tolist(), strict=True)]
        got = region_energy(masks.to(device), features.to(device), box.to(device)).cpu()
        assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_is_otsus_variance(rng):
    masks, features, boxes = case(rng)
    for p, f, box, energy in zip(masks, features, boxes, region_energy(masks, features, boxes), strict=True):
        p, f = p[box], f[:, box]
        a, u, v = p.mean(), (p * f).sum(dim=1) / p.sum(), ((1 - p) * f).sum(dim=1) / (1 - p).sum()
        assert_close(energy, (f.var(dim=1, correction=0) - a * (1 - a) * (u - v) ** 2).mean())


def test_the_gradient_is_the_closed_form(rng):
    masks, features, boxes = case(rng)
    masks.requires_grad_()
    region_energy(masks, features, boxes).sum().backward()
    for p, f, box, got in zip(masks.detach(), features, boxes, masks.grad, strict=True):
        u = (p * f * box).sum(dim=(1, 2), keepdim=True) / (p * box).sum()
        v = ((1 - p) * f * box).sum(dim=(1, 2), keepdim=True) / ((1 - p) * box).sum()
        assert_close(got, ((f - u) ** 2 - (f - v) ** 2).mean(dim=0) * box / box.sum())
        assert (got[~box] == 0).all()


def test_gradcheck_in_masks_and_features(rng):
    """The backward pass treats the means as constants; in the numerical gradient they vary."""
    masks, features, boxes = case(rng, h=5, w=6, n=3)
    inputs = (masks[:2].requires_grad_(), features[:2].requires_grad_())
    assert torch.autograd.gradcheck(lambda p, f: region_energy(p, f, boxes[:2]), inputs)


def test_the_complement_costs_the_same_and_a_constant_the_variance(rng):
    masks, features, boxes = case(rng)
    energy = region_energy(masks, features, boxes)
    assert_close(region_energy(1 - masks, features, boxes), energy)
    flat = torch.full_like(masks, 0.3).requires_grad_()
    variance = region_energy(flat, features, boxes)
    assert_close(
        variance, torch.stack([f[:, b].var(dim=1, correction=0).mean() for f, b in zip(features, boxes, strict=True)])
    )
    assert (energy < variance).all()
    variance.sum().backward()
    assert_close(flat.grad, torch.zeros_like(flat))


def test_a_hard_mask_of_two_values_costs_nothing(rng):
    masks, _, boxes = case(rng)
    hard = (masks > 0.5).double()
    assert_close(region_energy(hard, (2 - 5 * hard)[:, None], boxes), torch.zeros(3, dtype=torch.float64))


def test_affine_features(rng):
    masks, features, boxes = case(rng)
    energy = region_energy(masks, features, boxes)
    assert_close(region_energy(masks, 3 * features + 7, boxes), 9 * energy)


def test_blind_outside_the_box(rng):
    masks, features, boxes = case(rng)
    other = torch.where(boxes, masks, 1 - masks)
    outside = torch.where(boxes[:, None], features, features + 100)
    assert torch.equal(region_energy(other, outside, boxes), region_energy(masks, features, boxes))
    assert_close(border_length(other, boxes), border_length(masks, boxes))


def test_empty_and_full_boxes_are_finite():
    masks = torch.ones(2, 4, 4, requires_grad=True)
    boxes = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]).bool()
    energy = region_energy(masks, torch.ones(2, 3, 4, 4), boxes)
    (energy + border_length(masks, boxes)).sum().backward()
    assert energy.tolist() == [0, 0]
    assert masks.grad.isfinite().all()


def test_no_instances():
    masks = torch.zeros(0, 4, 4, requires_grad=True)
    boxes = torch.zeros(0, 4, 4, dtype=torch.bool)
    (region_energy(masks, torch.zeros(0, 2, 4, 4), boxes).sum() + border_length(masks, boxes).sum()).backward()
    assert masks.grad.shape == (0, 4, 4)


def slow_length(p, box):
    h, w = len(p), len(p[0])
    total = 0.0
    for part in ((lambda y, x: p[y][x] * box[y][x]), (lambda y, x: (1 - p[y][x]) * box[y][x])):
        total += sum(abs(part(y + 1, x) - part(y, x)) for y in range(h - 1) for x in range(w))
        total += sum(abs(part(y, x + 1) - part(y, x)) for y in range(h) for x in range(w - 1))
    return total / max(sum(map(sum, box)), 1)


def test_length_equals_the_loop(rng):
    masks, _, boxes = case(rng)
    expected = [slow_length(*x) for x in zip(masks.tolist(), boxes.tolist(), strict=True)]
    assert_close(border_length(masks, boxes), torch.tensor(expected, dtype=torch.float64))


def test_length_counts_the_border_of_mask_and_of_box():
    """A 2 x 2 mask in a 4 x 4 box of a larger map: 8 around the mask twice, 16 around the box once."""
    masks, boxes = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    masks[:, 3:5, 3:5], boxes[:, 2:6, 2:6] = 1, 1
    assert border_length(masks, boxes).item() == (8 + 8 + 16) / 16


def test_length_gradcheck(rng):
    masks, _, boxes = case(rng)
    assert torch.autograd.gradcheck(lambda p: border_length(p, boxes), (masks.requires_grad_(),))


def test_says_what_it_needs():
    x = torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match="region_energy needs masks"):
        region_energy(x, torch.zeros(1, 3, 5, 4), x)
    with pytest.raises(ValueError, match="probabilities"):
        region_energy(x + 2, torch.zeros(1, 3, 4, 4), x)
    with pytest.raises(ValueError, match="border_length needs masks"):
        border_length(x, torch.zeros(1, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(rng, device, dtype):
    """The sum over 160,000 pixels of a mean is beyond float16."""
    masks, boxes = torch.full((1, 400, 400), 0.9), torch.ones(1, 400, 400, dtype=torch.bool)
    given = [x.to(device) for x in (masks, 3 + torch.randn(1, 3, 400, 400, generator=rng), boxes)]
    expected = region_energy(*given)
    with torch.autocast(device.type, dtype=dtype):
        assert torch.equal(region_energy(*given), expected)
