"""Polygons of masks, decoded by pycocotools as an independent reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as rle
from scipy import ndimage

from misa.data.polygons import loops, polygons

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=st.booleans())


def decoded(found, h, w):
    return rle.decode(rle.merge(rle.frPyObjects(found, h, w))).astype(bool)


@given(MASKS)
def test_a_polygon_without_simplification_is_the_mask(mask):
    found = polygons(mask)
    assert bool(found) == bool(mask.any())
    if found:
        np.testing.assert_array_equal(decoded(found, *mask.shape), mask)
        assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in found)


@given(MASKS)
def test_there_is_a_loop_for_each_piece_and_each_hole(mask):
    """Components are 4-connected, so the background is 8-connected."""
    pieces = ndimage.label(mask)[1]
    background = ndimage.label(np.pad(~mask, 1, constant_values=True), structure=np.ones((3, 3)))[1]
    assert len(loops(mask)) == pieces + background - 1


def test_an_offset_moves_it():
    mask = np.zeros((9, 8), bool)
    mask[3:6, 2:7] = True
    mask[4, 4] = False
    np.testing.assert_array_equal(decoded(polygons(mask[3:6, 2:7], top=3, left=2), 9, 8), mask)


@pytest.mark.parametrize("tolerance", [1.0, 3.0])
def test_simplified_ones_stay_within_the_tolerance(tolerance):
    """Pixels farther from the border than the tolerance plus half a pixel diagonal stay on the same side."""
    y, x = np.mgrid[:120, :160]
    mask = (np.hypot(x - 70, y - 60) < 50) & (np.hypot(x - 60, y - 55) > 17)
    found = polygons(mask, tolerance=tolerance)
    exact = polygons(mask)
    assert len(found) == 1
    assert len(found[0]) < len(exact[0]) / 2
    wrong = decoded(found, *mask.shape) != mask
    depth = np.maximum(ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask))
    assert wrong.any()
    assert depth[wrong].max() <= tolerance + 1.5


def test_small_pieces_go_but_never_all():
    mask = np.zeros((20, 20), bool)
    mask[2:9, 3:9] = True
    mask[15, 15] = True
    assert len(polygons(mask, tolerance=1.0)) == 1
    assert len(polygons(mask, tolerance=0.9)) == 2
    (only,) = polygons(mask[10:], tolerance=5.0)
    assert only == [15.0, 5.0, 16.0, 5.0, 16.0, 6.0, 15.0, 6.0]


def test_an_island_in_a_hole():
    mask = np.ones((15, 15), bool)
    mask[3:12, 3:12] = False
    mask[5:10, 5:10] = True
    mask[7, 7] = False
    found = polygons(mask)
    assert len(found) == 2
    np.testing.assert_array_equal(decoded(found, 15, 15), mask)


def test_a_negative_tolerance_is_an_error():
    with pytest.raises(ValueError, match="tolerance of 0 or more"):
        polygons(np.ones((2, 2), bool), tolerance=float("nan"))
