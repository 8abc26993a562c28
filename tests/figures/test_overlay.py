"""The overlay: tints, outlines and boxes are drawn at the objects, and only there."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from skimage.color import deltaE_ciede2000, rgb2lab

from misa.figures.overlay import PALETTE, overlay, whole
from misa.figures.style import CLASS_COLORS, COLORS, ink


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


def test_labels_show_other_scripts_than_ascii(image):
    patches = {text: overlay(image, whole([square(20, 5, 30)]), [text]) for text in ("кот", "кит", "???")}
    assert (patches["кот"] != patches["кит"]).any()  # letters, not one replacement for all of them
    assert (patches["кот"] != patches["???"]).any()


@pytest.mark.parametrize(("left", "top"), [(0, 0), (60, 0), (79, 59), (0, 59)])
def test_a_label_is_kept_within_the_image(left, top):
    mask = np.zeros((60, 80), bool)
    mask[top, left] = True
    plain = overlay(np.full((60, 80, 3), 120, np.uint8), whole([mask]))
    changed = (overlay(np.full((60, 80, 3), 120, np.uint8), whole([mask]), ["cat"]) != plain).any(axis=-1)
    rows, columns = np.nonzero(changed)
    assert 100 < changed.sum() < 0.2 * changed.size
    assert rows.max() - rows.min() < 30
    assert columns.max() - columns.min() < 80


def test_classes_have_colors_that_can_be_told_apart():
    assert len(set(CLASS_COLORS)) == 24
    assert CLASS_COLORS[:8] == COLORS  # the ones that are safe for any kind of color vision come first
    lab = rgb2lab(np.array([[to_rgb(color) for color in CLASS_COLORS]]))[0]
    apart = deltaE_ciede2000(lab[:, None], lab[None]) + 100 * np.eye(24)
    assert apart.min() > 8  # 2.3 is just noticeable


def test_text_has_contrast_on_every_color():
    def luminance(color):
        parts = np.array(to_rgb(color))  # WCAG 2.1
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722) + 0.05

    for color in CLASS_COLORS:
        light, dark = sorted((luminance(color), luminance(ink(color))), reverse=True)
        assert light / dark > 3  # of large text
