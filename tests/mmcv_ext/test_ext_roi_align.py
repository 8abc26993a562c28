"""mmcv's roi_align on our ops, and mmdet's crop_and_resize of masks, which uses it."""

import math

import numpy as np
import pytest
import torch
import torchvision
from mmcv.ops import RoIAlign, roi_align
from mmdet.structures.mask import BitmapMasks
from torch import Tensor
from torch.testing import assert_close


def slow_roi_align(
    maps: Tensor, rois: Tensor, size: tuple[int, int], scale: float, ratio: int, aligned: bool
) -> Tensor:
    """Sample by sample, in double precision."""
    _, c, h, w = maps.shape
    out = torch.zeros(len(rois), c, *size, dtype=torch.double)

    def sample(image: Tensor, y: float, x: float) -> Tensor:
        if not (-1 <= y <= h and -1 <= x <= w):
            return torch.zeros(c, dtype=torch.double)
        y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
        top, left = min(int(y), max(h - 2, 0)), min(int(x), max(w - 2, 0))
        down, right = min(top + 1, h - 1), min(left + 1, w - 1)
        upper = image[:, top, left] * (left + 1 - x) + image[:, top, right] * (x - left)
        lower = image[:, down, left] * (left + 1 - x) + image[:, down, right] * (x - left)
        return upper * (top + 1 - y) + lower * (y - top)

    for n, (index, *box) in enumerate(rois.double().tolist()):
        x1, y1, x2, y2 = (scale * edge - (0.5 if aligned else 0) for edge in box)
        least = 0 if aligned else 1
        extent = (max(y2 - y1, least), max(x2 - x1, least))
        steps = [ratio if ratio > 0 else math.ceil(e / s) for e, s in zip(extent, size, strict=True)]
        for i, j in ((i, j) for i in range(size[0]) for j in range(size[1])):
            for a, b in ((a, b) for a in range(steps[0]) for b in range(steps[1])):
                y = y1 + extent[0] / size[0] * (i + (a + 0.5) / steps[0])
                x = x1 + extent[1] / size[1] * (j + (b + 0.5) / steps[1])
                out[n, :, i, j] += sample(maps[int(index)].double(), y, x) / (steps[0] * steps[1])
    return out


@pytest.fixture
def maps(rng: torch.Generator) -> Tensor:
    return torch.randn(2, 3, 7, 9, generator=rng, dtype=torch.double)


# Image index and box at twice the size of the maps: inside, large, over the border, outside, thin.
ROIS = [[0, 2, 3, 9, 11], [1, 0, 0, 18, 14], [0, -4, -3, 5, 6], [1, 30, 30, 40, 40], [0, 6.2, 3, 6.4, 12]]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2])
def test_equals_slow_loops_and_torchvision(maps, device, aligned, ratio):
    rois = torch.tensor(ROIS, dtype=torch.double)
    out = roi_align(maps.to(device), rois.to(device), (2, 3), 0.5, ratio, "avg", aligned)
    assert_close(out.cpu(), slow_roi_align(maps, rois, (2, 3), 0.5, ratio, aligned))
    assert_close(out.cpu(), torchvision.ops.roi_align(maps, rois, (2, 3), 0.5, ratio, aligned))


@pytest.mark.parametrize("aligned", [True, False])
def test_gradcheck(maps, device, aligned):
    rois = torch.tensor(ROIS, dtype=torch.double, device=device)
    maps = maps.to(device).requires_grad_()
    # The order of atomic additions on CUDA is not fixed, so two runs may differ in the last bit.
    assert torch.autograd.gradcheck(
        lambda x: roi_align(x, rois, (2, 3), 0.5, 0, "avg", aligned), maps, nondet_tol=1e-12
    )


def test_module_with_half_precision_maps_and_float_boxes(maps, device):
    """Under automatic mixed precision the maps are half and the boxes are not."""
    half = maps.to(device, torch.half).requires_grad_()
    full = half.detach().float().requires_grad_()
    rois = torch.tensor(ROIS, device=device)
    pool = RoIAlign((2, 2), 0.5, sampling_ratio=2)
    out, expected = pool(half, rois), pool(full, rois)
    assert out.dtype == torch.half
    assert_close(out, expected.half(), atol=0, rtol=0)
    out.sum().backward()
    expected.sum().backward()
    assert_close(half.grad, full.grad.half(), atol=1e-3, rtol=1e-3)


def test_no_boxes(maps, device):
    maps = maps.to(device).requires_grad_()
    out = roi_align(maps, maps.new_zeros(0, 5), (2, 2), 1.0, 0, "avg", True)
    assert out.shape == (0, 3, 2, 2)
    out.sum().backward()
    assert_close(maps.grad, torch.zeros_like(maps))


def test_maximum_pooling_is_refused_by_name(maps):
    with pytest.raises(NotImplementedError, match=r"roi_align with pool_mode='max'.*pool_mode='avg'"):
        roi_align(maps, maps.new_zeros(1, 5), (2, 2), 1.0, 0, "max", True)


def test_crop_and_resize_of_a_box_on_the_grid_is_a_slice(device):
    masks = np.zeros((2, 16, 20), dtype=np.uint8)
    masks[0, 4:9, 3:12] = 1
    masks[1, 6:, 10:] = 1
    boxes = torch.tensor([[2.0, 3, 10, 9], [8, 4, 16, 10], [2, 3, 10, 9]], device=device)
    chosen = torch.tensor([0, 1, 1], device=device)
    cropped = BitmapMasks(masks, 16, 20).crop_and_resize(boxes, (6, 8), chosen, device=device)
    expected = np.stack([masks[0, 3:9, 2:10], masks[1, 4:10, 8:16], masks[1, 3:9, 2:10]])
    np.testing.assert_array_equal(cropped.masks, expected)
