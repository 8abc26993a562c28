"""Resized maps: torch's bilinear interpolation, means that exclude padding, masks on cells."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from torch.testing import assert_close

from misa.ops.resize import coarse_masks, resized, resized_within


def test_any_leading_axes(rng):
    maps = torch.rand(2, 3, 8, 6, generator=rng)
    expected = interpolate(maps, size=(5, 9), mode="bilinear", align_corners=False)
    assert_close(resized(maps, (5, 9)), expected)
    assert_close(resized(maps[0], (5, 9)), expected[0])
    assert_close(resized(maps[0, 0], (5, 9)), expected[0, 0])
    assert resized(maps, (8, 6)) is maps
    nothing = resized(maps[:0].requires_grad_(), (5, 9))
    assert nothing.shape == (0, 3, 5, 9)
    assert nothing.requires_grad


def test_a_map_is_the_same_to_the_bit_whatever_stands_beside_it(rng):
    maps = torch.rand(2, 3, 8, 6, generator=rng)
    for alone, beside in zip(maps.flatten(0, 1), resized(maps, (5, 9)).flatten(0, 1), strict=True):
        assert torch.equal(resized(alone, (5, 9)), beside)


def test_gradcheck(rng):
    maps = torch.rand(1, 2, 4, 4, generator=rng, dtype=torch.float64).requires_grad_()
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[..., 2:] = False
    assert torch.autograd.gradcheck(lambda x: resized_within(x, valid, (3, 5))[0], (maps,))


def test_a_constant_within_stays_whatever_is_in_the_padding():
    maps, valid = torch.full((1, 2, 8, 8), 0.7), torch.ones(1, 8, 8, dtype=torch.bool)
    valid[..., 5:] = False
    maps[..., 5:] = 100
    small, inner = resized_within(maps, valid, (4, 4))
    assert inner[0, 0].tolist() == [True, True, True, False]
    assert_close(small[:, :, inner[0]], torch.full((1, 2, 12), 0.7))
    large, inner = resized_within(maps, valid, (16, 16))
    assert inner[0].sum(dim=1).unique().tolist() == [10]
    assert_close(large[:, :, inner[0]], torch.full((1, 2, 160), 0.7))


@pytest.mark.parametrize(("size", "cells"), [((16, 24), (4, 6)), ((13, 18), (3, 5)), ((15, 21), (8, 8))])
def test_a_coarse_mask_is_the_cells_that_it_covers_half(size, cells):
    """Of masks at the resized size already: counted pixel by pixel of the image; cells beyond it are outside."""
    masks = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) < 0.5
    found = coarse_masks(masks, size, cells, stride=4)
    assert found.shape == (3, *cells)
    for n, row, column in np.ndindex(*found.shape):
        own = masks[n, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert bool(found[n, row, column]) == (own.numel() > 0 and int(own.sum()) >= own.numel() / 2)
    assert coarse_masks(masks[:0], size, cells, stride=4).shape == (0, *cells)


@pytest.mark.parametrize(
    ("image", "size"), [((375, 500), (262, 349)), ((375, 500), (158, 211)), ((1, 4000), (1, 1333))]
)
def test_the_whole_image_covers_all_of_its_cells(image, size):
    """Whatever rounding its resizing has, and if the image ends within its last cells."""
    cells = (max(round(size[0] / 4), 1), max(round(size[1] / 4), 1))
    assert coarse_masks(torch.ones(1, *image, dtype=torch.bool), size, cells, stride=4).all()


def test_coarse_masks_of_a_larger_image_are_where_it_is_resized_to():
    """A half plane of 101 rows, seen at 50 rows and cells of 4: its edge at row 61 of 101 is at cell 7.55."""
    mask = torch.zeros(1, 101, 101, dtype=torch.bool)
    mask[:, :61] = True
    assert coarse_masks(mask, (50, 50), (12, 12), stride=4)[0, :, 5].tolist() == [True] * 8 + [False] * 4
    mask[:, 59:] = False  # 7.30
    assert coarse_masks(mask, (50, 50), (12, 12), stride=4)[0, :, 5].tolist() == [True] * 7 + [False] * 5
