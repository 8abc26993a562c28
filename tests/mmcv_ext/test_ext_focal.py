"""mmcv's sigmoid focal loss on our ops, called as mmdet's FocalLoss calls it on CUDA."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from mmcv.ops import sigmoid_focal_loss
from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss
from torch.testing import assert_close

from misa.mmcv_ext.ops import common_dtype

CLASSES = 4


@pytest.fixture
def logits(rng: torch.Generator) -> torch.Tensor:
    return 3 * torch.randn(9, CLASSES, generator=rng)


@pytest.fixture
def target(rng: torch.Generator) -> torch.Tensor:
    return torch.cat([torch.arange(CLASSES + 1), torch.randint(CLASSES + 1, (4,), generator=rng)])


def one_hot(target: torch.Tensor) -> torch.Tensor:
    return F.one_hot(target, CLASSES + 1)[:, :CLASSES]


@pytest.mark.parametrize("gamma", [2.0, 0.5])
@pytest.mark.parametrize("alpha", [0.25, 0.9])
def test_value_and_gradient_equal_torchvision_and_mmdet(logits, target, device, gamma, alpha):
    ours, theirs, mmdets = (logits.to(device).requires_grad_() for _ in range(3))
    target = target.to(device)
    kwargs = {"gamma": gamma, "alpha": alpha, "reduction": "none"}
    loss = sigmoid_focal_loss(ours, target, gamma, alpha, None, "none")
    expected = torchvision.ops.sigmoid_focal_loss(theirs, one_hot(target).float(), **kwargs)
    assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    assert_close(loss, py_sigmoid_focal_loss(mmdets, one_hot(target), **kwargs), atol=1e-6, rtol=1e-5)
    direction = torch.linspace(-1, 1, loss.numel(), device=device).view_as(loss)
    loss.backward(direction)
    expected.backward(direction)
    assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck(logits, target, device, rng, reduction):
    weight = torch.rand(CLASSES, generator=rng, dtype=torch.double).to(device)
    logits = logits.double().to(device).requires_grad_()
    target = target.to(device)
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, target, 1.5, 0.3, weight, reduction), logits)


def test_weight_is_that_of_the_label_and_the_background_weighs_one(logits, target, device):
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    logits, target = logits.to(device), target.to(device)
    plain = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    weighted = sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "none")
    assert_close(weighted, plain * torch.cat([weight, weight.new_ones(1)])[target][:, None])


def test_large_logits_stay_finite_and_keep_their_slope(device):
    """exp overflows at 88 and 1 - p rounds to 0 at 17; the loss of a very wrong logit is still linear in it."""
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0], [17.5, -17.5]], device=device, requires_grad=True)
    target = torch.tensor([0, 0, 1], device=device)
    loss = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    assert_close(loss[1], torch.tensor([0.25 * 200, 0.75 * 200], device=device))
    loss.sum().backward()
    assert logits.grad.isfinite().all()
    assert_close(logits.grad[1], torch.tensor([-0.25, 0.75], device=device))


def test_gradient_of_a_sure_answer_keeps_its_digits(device):
    """At logit 10, 1 - p is 4.5e-5; a subtraction in float32 would keep only three digits of it."""
    target = torch.tensor([0], device=device)
    gradients = []
    for dtype in (torch.float, torch.double):
        logits = torch.tensor([[10.0, -10.0]], device=device, dtype=dtype, requires_grad=True)
        sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "sum").backward()
        gradients.append(logits.grad.double())
    assert_close(*gradients, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ([torch.half], torch.float),
        ([torch.bfloat16, torch.half], torch.float),
        ([torch.half, torch.float], torch.float),
        ([torch.float, torch.double], torch.double),
    ],
)
def test_ops_compute_in_float32_unless_given_better(given, used):
    assert {x.dtype for x in common_dtype(*(torch.ones(1, dtype=dtype) for dtype in given))} == {used}


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_half_precision_is_computed_in_float_and_rounded_once(logits, target, device, dtype):
    half = logits.to(device, dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    target = target.to(device)
    loss, expected = (sigmoid_focal_loss(x, target, 2.0, 0.25, None, "none") for x in (half, full))
    assert loss.dtype == dtype
    assert_close(loss, expected.to(dtype), atol=0, rtol=0)
    loss.backward(torch.ones_like(loss))
    expected.backward(torch.ones_like(expected))
    assert_close(half.grad, full.grad.to(dtype), atol=0, rtol=0)


def test_no_anchor_no_loss(device):
    logits = torch.zeros(0, CLASSES, device=device, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.zeros(0, dtype=torch.long, device=device), 2.0, 0.25, None, "sum")
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == (0, CLASSES)
