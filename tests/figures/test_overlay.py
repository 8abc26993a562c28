"""The overlay: tints, outlines and boxes are drawn at the objects, and only there."""

import numpy as np
import pytest

from misa.figures.overlay import PALETTE, overlay, whole


@pytest.fixture
def image():
    return np.full((60, 80, 3), 120, np.uint8)


def square(top, left, side, size=(60, 80)):
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_a_mask_is_tinted_within_its_outline_and_nothing_else_is_touched(image):
    painted = overlay(image, whole([square(10, 20, 30)]), opacity=0.5, readable=1)
    expected = (0.5 * 120 + 0.5 * PALETTE[0].astype(float)).round()
    assert (painted[14:36, 24:46] == expected).all()
    assert (painted[10, 20:50] == PALETTE[0]).all()  # the outline is the mask's own border
    outside = np.ones((60, 80), bool)
    outside[8:42, 18:52] = False
    assert (painted[outside] == 120).all()
    assert (image == 120).all()


def test_the_first_lies_on_top_and_keeps_the_color_it_is_given(image):
    parts = whole([square(10, 10, 20), square(10, 10, 30)])
    painted = overlay(image, parts, colors=["#ffffff", 1], opacity=[1.0, 1.0], readable=1)
    assert (painted[15:25, 15:25] == 255).all()
    assert (painted[32:36, 32:36] == PALETTE[1]).all()


def test_no_tint_leaves_the_outline_alone(image):
    painted = overlay(image, whole([square(10, 20, 30)]), opacity=0, readable=1)
    assert (painted[14:36, 24:46] == 120).all()
    assert (painted[10, 20:50] == PALETTE[0]).all()


def test_frames_stand_around_their_boxes(image):
    painted = overlay(image, boxes=[[20, 10, 50, 40]], colors=["#ffffff"], readable=1)
    for line in (painted[10, 20:50], painted[39, 20:50], painted[10:40, 20], painted[10:40, 49]):
        assert (line == 255).all()
    assert (painted[14:36, 24:46] == 120).all()


def test_a_small_image_is_enlarged_by_a_whole_factor_and_an_empty_mask_is_nothing(image):
    painted = overlay(image, whole([np.zeros((60, 80), bool)]), ["nothing"])
    assert painted.shape == (360, 480, 3)
    assert whole([np.zeros((60, 80), bool)])[0][2].size == 0


def test_parts_are_the_masks_again():
    rng = np.random.default_rng(0)
    masks = rng.random((5, 12, 17)) > 0.97
    for (top, left, pixels), mask in zip(whole(masks), masks, strict=True):
        again = np.zeros_like(mask)
        again[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        assert (again == mask).all()
