"""Dice against loops and the focal loss against torchvision's and a table by hand."""

import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from misa.losses.pseudo import dice, focal_on, quality


def test_dice_equals_the_loop(rng, device):
    a, b = torch.rand(2, 3, 5, 4, generator=rng, dtype=torch.float64)
    expected = []
    for x, y in zip(a.flatten(1).tolist(), b.flatten(1).tolist(), strict=True):
        squares = sum(i * i for i in x) + sum(j * j for j in y) + 2e-3
        expected.append(1 - 2 * sum(i * j for i, j in zip(x, y, strict=True)) / squares)
    assert_close(dice(a.to(device), b.to(device), 2e-3).cpu(), torch.tensor(expected, dtype=torch.float64))


def test_dice_of_a_mask_with_itself_is_about_eps_over_twice_its_area():
    mask = torch.zeros(1, 10, 10, dtype=torch.float64)
    mask[:, :4, :5] = 1
    assert_close(dice(mask, mask, 2e-3).item(), 1e-3 / 20, rtol=1e-3, atol=0)
    assert dice(mask, torch.zeros_like(mask)).item() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_can_count_a_large_mask(device, dtype):
    """90,000 pixels are beyond float16."""
    low, high = torch.full((1, 300, 300), 0.25, device=device), torch.full((1, 300, 300), 0.75, device=device)
    for measure in (
        lambda a, b: dice(a, b),
        lambda a, b: quality(b),
        lambda a, b: focal_on(a, b > 0.5, torch.ones_like(a)),
    ):
        expected, found = measure(low, high), measure(low.to(dtype), high.to(dtype))
        assert found.dtype == torch.float32
        assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert 0 < expected.item() < 1


def test_dice_gradcheck(rng):
    a, b = torch.rand(2, 2, 3, 4, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(dice, (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize(
    ("p", "target", "value"),
    [(0.1, 1, 0.131), (0.5, 1, 0.030), (0.9, 1, 0.0009), (0.1, 0, 0.006), (0.5, 0, 0.183), (0.9, 0, 0.754)],
)
def test_the_official_focal_takes_probabilities_for_logits(p, target, value):
    """α_t · softplus(∓p) · (1 − p_t)², over the one pixel and 1 more."""
    got = focal_on(torch.tensor([[p]]), torch.tensor([[target]]).bool(), torch.ones(1, 1)) * 2
    p_t = p if target else 1 - p
    expected = (0.25 if target else 0.75) * math.log1p(math.exp(-p if target else p)) * (1 - p_t) ** 2
    assert_close(got.item(), expected, rtol=1e-5, atol=0)
    assert abs(got.item() - value) < 6e-4


def test_the_intended_focal_is_torchvisions(rng):
    logits = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)
    target, weight = torch.rand(2, 2, 4, 5, generator=rng) > 0.5
    expected = (sigmoid_focal_loss(logits, target.double(), alpha=0.25, gamma=2) * weight).sum() / (weight.sum() + 1)
    assert_close(focal_on(logits.sigmoid(), target, weight, form="intended"), expected)


@pytest.mark.parametrize("form", ["official", "intended"])
def test_focal_gradient(rng, form):
    p = (0.05 + 0.9 * torch.rand(2, 3, 4, generator=rng, dtype=torch.float64)).requires_grad_()
    target, weight = torch.rand(2, 2, 3, 4, generator=rng) > 0.5
    assert torch.autograd.gradcheck(lambda x: focal_on(x, target, weight, form=form), (p,))
    focal_on(p, target, weight, form=form).backward()
    assert (p.grad[weight & target] < 0).all()
    assert (p.grad[weight & ~target] > 0).all()
    assert (p.grad[~weight] == 0).all()


def test_nothing_chosen_and_sure_pixels_are_finite():
    p = torch.tensor([[0.0, 1.0]], requires_grad=True)
    target = torch.tensor([[True, False]])
    focal_on(p, target, torch.ones(1, 2), form="intended").backward()
    assert p.grad.isfinite().all()
    assert focal_on(p, target, torch.zeros(1, 2)).item() == 0


def test_says_what_it_needs():
    with pytest.raises(ValueError, match="dice needs"):
        dice(torch.zeros(1, 3), torch.zeros(1, 4))
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="focal_on needs"):
        focal_on(x, torch.zeros(1, 4).bool(), x)
    with pytest.raises(ValueError, match="forms"):
        focal_on(x, x.bool(), x, form="logits")
    with pytest.raises(ValueError, match="Logits"):
        focal_on(x + 3, x.bool(), x)
