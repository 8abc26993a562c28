"""mmcv's MultiScaleDeformableAttnFunction on our ops, called as Mask2Former's pixel decoder calls it on CUDA."""

import math

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch
from torch import Tensor
from torch.testing import assert_close

SHAPES = [(4, 5), (2, 3), (1, 1)]


def scene(rng: torch.Generator, dtype: torch.dtype, device: torch.device, b: int = 2, q: int = 3) -> list[Tensor]:
    """value (b k m d), shapes (l 2), starts (l,), locations (b q m l p 2) partly outside, attention (b q m l p)."""
    m, d, p = 2, 3, 4
    shapes = torch.tensor(SHAPES)
    sizes = shapes.prod(1)
    value = torch.randn(b, int(sizes.sum()), m, d, generator=rng, dtype=torch.double)
    locations = 1.5 * torch.rand(b, q, m, len(SHAPES), p, 2, generator=rng, dtype=torch.double) - 0.25
    attention = torch.rand(b, q, m, len(SHAPES), p, generator=rng, dtype=torch.double)
    floats = [x.to(device, dtype).requires_grad_() for x in (value, locations, attention)]
    return [floats[0], shapes.to(device), (sizes.cumsum(0) - sizes).to(device), *floats[1:]]


def slow_attention(value: Tensor, locations: Tensor, attention: Tensor) -> Tensor:
    """Sample by sample, pixel by pixel, with weight (1 - |dx|)(1 - |dy|) by the distance from the pixel's centre."""
    b, _, m, d = value.shape
    out = torch.zeros(b, locations.shape[1], m, d, dtype=torch.double)
    for i, q, head, level, p in torch.cartesian_prod(*map(torch.arange, attention.shape)).tolist():
        h, w = SHAPES[level]
        start = sum(rows * columns for rows, columns in SHAPES[:level])
        x, y = (locations[i, q, head, level, p].double() * torch.tensor([w, h]) - 0.5).tolist()
        for row, column in ((r, c) for r in range(h) for c in range(w)):
            near = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
            pixel = value[i, start + row * w + column, head].double()
            out[i, q, head] += near * attention[i, q, head, level, p].double() * pixel
    return out.flatten(2)


def test_equals_slow_loops(rng, device):
    value, shapes, starts, locations, attention = scene(rng, torch.double, device)
    out = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, attention, 64)
    with torch.no_grad():
        assert_close(out.cpu(), slow_attention(value.cpu(), locations.cpu(), attention.cpu()))


def test_value_and_gradients_equal_the_pytorch_version_of_mmcv(rng, device):
    value, shapes, starts, locations, attention = scene(rng, torch.float, device, b=3, q=7)
    twins = [x.detach().clone().requires_grad_() for x in (value, locations, attention)]
    out = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, attention, 64)
    expected = multi_scale_deformable_attn_pytorch(twins[0], shapes, twins[1], twins[2])
    assert_close(out, expected)
    direction = torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
    out.backward(direction)
    expected.backward(direction)
    for ours, theirs in zip((value, locations, attention), twins, strict=True):
        assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_gradcheck(rng, device):
    value, shapes, starts, locations, attention = scene(rng, torch.double, device, b=1, q=2)
    assert torch.autograd.gradcheck(
        lambda v, s, a: MultiScaleDeformableAttnFunction.apply(v, shapes, starts, s, a, 64),
        (value, locations, attention),
    )


def test_half_precision_is_computed_in_float_and_rounded_once(rng, device):
    value, shapes, starts, locations, attention = scene(rng, torch.half, device)
    twins = [x.detach().float().requires_grad_() for x in (value, locations, attention)]
    out = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, attention, 64)
    expected = multi_scale_deformable_attn_pytorch(twins[0], shapes, twins[1], twins[2])
    assert out.dtype == torch.half
    assert_close(out, expected.half(), atol=1e-3, rtol=1e-3)
    out.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip((value, locations, attention), twins, strict=True):
        assert_close(ours.grad, theirs.grad.half(), atol=2e-3, rtol=2e-3)


def test_constant_map_inside_gives_the_sum_of_the_attention(rng, device):
    """Theory: far enough from the border, samples of a constant map equal the constant."""
    value = torch.full((1, 64, 1, 2), math.pi, device=device)
    shapes, starts = torch.tensor([[8, 8]], device=device), torch.zeros(1, dtype=torch.long, device=device)
    locations = (0.1 + 0.8 * torch.rand(1, 5, 1, 1, 4, 2, generator=rng)).to(device)
    attention = torch.rand(1, 5, 1, 1, 4, generator=rng).to(device)
    out = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, attention, 64)
    assert_close(out, math.pi * attention.sum(-1).flatten(2).expand(1, 5, 2))


@pytest.mark.parametrize("step", [1, 64])
def test_any_number_of_images_fits_any_step(rng, device, step):
    value, shapes, starts, locations, attention = scene(rng, torch.float, device, b=3)
    together = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, attention, step)
    alone = MultiScaleDeformableAttnFunction.apply(value[2:], shapes, starts, locations[2:], attention[2:], step)
    assert_close(together[2:], alone)
