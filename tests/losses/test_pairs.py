"""The edge loss against probabilities in loops and against mmdet's BoxInst."""

import math

import pytest
import torch
from torch.testing import assert_close

from misa.losses.pairs import edge_error, pair_loss
from misa.ops.neighbors import window_offsets


def slow_error(logits, offsets):
    h, w = logits.shape
    p = logits.sigmoid()
    out = torch.zeros(len(offsets), h, w, dtype=logits.dtype)
    for k, (dy, dx) in enumerate(offsets):
        for y in range(h):
            for x in range(w):
                if 0 <= y + dy < h and 0 <= x + dx < w:
                    one, two = p[y, x].item(), p[y + dy, x + dx].item()
                    out[k, y, x] = -math.log(one * two + (1 - one) * (1 - two))
    return out


@pytest.mark.parametrize(("h", "w"), [(6, 7), (1, 4), (1, 1)])
def test_error_equals_the_loop(rng, device, h, w):
    logits = 3 * torch.randn(2, h, w, generator=rng, dtype=torch.float64)
    expected = torch.stack([slow_error(z, window_offsets(3, 2)) for z in logits])
    assert_close(edge_error(logits.to(device)).cpu(), expected)


def test_error_equals_mmdets(rng):
    from mmdet.models.dense_heads.boxinst_head import BoxInstMaskHead

    logits = 4 * torch.randn(3, 9, 8, generator=rng)
    head = BoxInstMaskHead.__new__(BoxInstMaskHead)
    torch.nn.Module.__init__(head)
    head.pairwise_size, head.pairwise_dilation = 3, 2
    theirs = head.get_pairwise_affinity(logits)
    assert_close(edge_error(logits), theirs.view(3, 8, 9, 8))


def test_sure_masks_stay_finite_with_a_gradient():
    logits = torch.tensor([[[100.0, 0.0, -100.0]]], requires_grad=True)
    error = edge_error(logits)
    assert_close(error.max(), torch.tensor(100 - math.log(2)))
    error.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0, 0] > 0 > logits.grad[0, 0, 2]


def test_gradcheck(rng):
    logits = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64).requires_grad_()
    keep = torch.rand(2, 8, 4, 5, generator=rng) > 0.5
    assert torch.autograd.gradcheck(lambda z: pair_loss(edge_error(z), keep), (logits,))
    assert torch.autograd.gradcheck(lambda z: pair_loss(edge_error(z), keep, reduction="positive"), (logits,))


def test_the_two_normalisers():
    """100 pairs with error 1 and 900 with error 0: 0.1 over all pairs, 1 and 0 per instance."""
    error, keep = torch.zeros(2, 1, 30, 30), torch.zeros(2, 1, 30, 30, dtype=torch.bool)
    error[0] = 1
    keep[0, :, :10, :10] = True
    keep[1] = True
    assert_close(pair_loss(error, keep), torch.tensor(0.1))
    assert_close(pair_loss(error, keep, reduction="positive"), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("n", [0, 2])
def test_nothing_kept_is_a_zero_with_a_gradient(n):
    logits = torch.zeros(n, 4, 4, requires_grad=True)
    keep = torch.zeros(n, 8, 4, 4, dtype=torch.bool)
    value = pair_loss(edge_error(logits), keep)
    value.backward()
    assert value == 0
    assert logits.grad.shape == logits.shape
    assert pair_loss(edge_error(logits), keep, reduction="positive").tolist() == [0.0] * n


def test_says_what_it_needs():
    with pytest.raises(ValueError, match="edge_error needs"):
        edge_error(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="pair_loss needs error"):
        pair_loss(torch.zeros(1, 8, 4, 4), torch.zeros(1, 4, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="reductions"):
        pair_loss(torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 4, dtype=torch.bool), reduction="mean")
