"""The projection loss against its definition in loops, its gradient, and its corner cases."""

import pytest
import torch
from torch.testing import assert_close

from misa.losses.projection import projection_loss


def slow_projection(mask, box):
    """Dice of the maxima over rows and over columns, in float64 loops."""

    def dice(a, b):
        overlap = sum(x * y for x, y in zip(a, b, strict=True))
        return 1 - 2 * overlap / (sum(x * x for x in a) + sum(y * y for y in b) + 1e-5)

    h, w = len(mask), len(mask[0])
    total = 0.0
    for columns in (True, False):
        outer, inner = (w, h) if columns else (h, w)
        project = [
            [max(m[j][i] if columns else m[i][j] for j in range(inner)) for i in range(outer)] for m in (mask, box)
        ]
        total += dice(*project)
    return total


@pytest.mark.parametrize(("h", "w"), [(7, 9), (1, 5), (5, 1), (1, 1)])
def test_equals_the_loop(rng, device, h, w):
    masks = torch.rand(4, h, w, generator=rng)
    boxes = torch.rand(4, h, w, generator=rng) > 0.6
    expected = [slow_projection(m.double().tolist(), b.double().tolist()) for m, b in zip(masks, boxes, strict=True)]
    assert_close(projection_loss(masks.to(device), boxes.to(device)).cpu(), torch.tensor(expected))


def test_the_box_itself_costs_nothing_and_an_empty_mask_two():
    box = torch.zeros(1, 6, 6)
    box[:, 1:4, 2:5] = 1
    assert_close(projection_loss(box, box), torch.zeros(1), atol=1e-5, rtol=0)
    assert_close(projection_loss(torch.zeros_like(box), box), torch.full((1,), 2.0))


def test_a_mask_that_touches_all_four_sides_costs_nothing():
    box = torch.ones(1, 5, 5)
    assert_close(projection_loss(torch.eye(5)[None], box), torch.zeros(1), atol=1e-5, rtol=0)


def test_gradcheck(rng):
    masks = torch.rand(2, 5, 4, generator=rng, dtype=torch.float64).requires_grad_()
    boxes = torch.zeros(2, 5, 4, dtype=torch.bool)
    boxes[:, 1:4, 1:3] = True
    assert torch.autograd.gradcheck(lambda m: projection_loss(m, boxes), (masks,))


def test_half_precision_is_promoted():
    masks = torch.rand(1, 300, 300).half()
    assert projection_loss(masks, masks > 0.5).dtype == torch.float32


def test_no_instances_cost_nothing():
    assert projection_loss(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4)).shape == (0,)


@pytest.mark.parametrize(("bad", "says"), [(float("nan"), "NaN or Inf"), (-5.0, "Logits"), (1.5, "Logits")])
def test_what_is_no_probability_is_refused(bad, says):
    masks = torch.rand(2, 4, 4)
    masks[1, 2, 3] = bad
    with pytest.raises(ValueError, match=says):
        projection_loss(masks, torch.ones(2, 4, 4))


def test_equal_maxima_share_the_gradient():
    masks = torch.full((1, 3, 3), 0.5, requires_grad=True)
    projection_loss(masks, torch.ones(1, 3, 3)).sum().backward()
    assert_close(masks.grad, masks.grad[:, :1, :1].expand(1, 3, 3))
    assert masks.grad.max() < 0


def test_different_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(1, 4, 4\) and \(1, 4, 5\)"):
        projection_loss(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5))


def test_discobox_has_its_own_eps():
    """A perfect mask of 4 x 3: 1 − 2·4/(2·4 + 2e-3) plus the same with 3."""
    box = torch.zeros(1, 6, 6, dtype=torch.float64)
    box[:, 1:5, 2:5] = 1
    expected = sum(1 - 2 * side / (2 * side + 2e-3) for side in (4, 3))
    assert_close(projection_loss(box, box, eps=2e-3).item(), expected)
