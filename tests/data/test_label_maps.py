"""Label maps computed by hand, GrabCut on images with a known result, VOC's own files."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from misa.data.label_maps import (
    VOC_CLASSES,
    fill_boxes,
    grabcut_boxes,
    merge_by_score,
    merge_probabilities,
    rasterise,
    read_label_map,
    read_voc_label_map,
    write_label_map,
)
from misa.errors import UserError
from misa.ops.boxes import box_masks


def square(top, left, side, size=(8, 8)):
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_the_smaller_box_is_on_top():
    boxes = np.array([[0, 0, 2, 2], [0, 0, 4, 3]], float)
    made = fill_boxes(boxes, [0, 1], (4, 5), background=2)
    assert made.tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [1, 1, 1, 1, 2], [2, 2, 2, 2, 2]]


def test_a_box_below_a_pixel_or_over_the_border_still_shows():
    made = fill_boxes(np.array([[1.6, 1.6, 1.9, 1.9], [3, -2, 9, 1]]), [0, 1], (4, 4), background=2)
    assert (made == 0).sum() == 1
    assert np.argwhere(made == 1).tolist() == [[0, 3]]


def test_a_filled_box_is_the_losses_box_mask(rng):
    """The same pixels as `misa.ops.boxes.box_masks`, which the box objectives use."""
    low = 20 * torch.rand(200, 2, generator=rng)
    boxes = torch.cat([low, low + 12 * torch.rand(200, 2, generator=rng)], dim=1).clamp(max=24)
    for box, mask in zip(boxes, box_masks(boxes, 24, 26), strict=True):
        made = fill_boxes(box.double().numpy()[None], [0], (24, 26), background=1)
        # Below one pixel the two choose a pixel differently.
        if (box[2:] - box[:2]).min() >= 1:
            assert np.array_equal(made == 0, mask.numpy())


def test_rasterise_puts_the_smaller_mask_on_top_and_void_below():
    large, small, crowd = square(0, 0, 4), square(1, 1, 2), square(3, 3, 3)
    made = rasterise([small, large], [0, 1], (8, 8), background=2, void=[crowd])
    assert (made[small] == 0).all()
    assert (made[large & ~small] == 1).all()
    assert (made[crowd & ~large] == 255).all()
    assert (made == 2).sum() == 64 - (large | crowd).sum()


def test_merging_puts_the_better_instance_on_top_and_drops_the_unsure():
    masks = [square(0, 0, 4), square(2, 2, 4), square(5, 5, 3)]
    made = merge_by_score(masks, [0, 1, 1], [0.9, 0.4, 0.2], (8, 8), background=2, threshold=0.3)
    assert (made[masks[0]] == 0).all()
    assert (made[masks[1] & ~masks[0]] == 1).all()
    assert made[7, 7] == 2
    tie = merge_by_score(masks[:2], [0, 1], [0.5, 0.5], (8, 8), background=2, threshold=0.5)
    assert tie[3, 3] == 0


def test_probabilities_are_void_in_between_and_nothing_outside_their_box():
    masks = np.array([[[0.9, 0.6, 0.1, 0.9]], [[0.0, 0.45, 0.7, 0.8]]], np.float32)
    boxes = np.array([[0, 0, 3, 1], [1, 0, 3, 1]], float)
    made = merge_probabilities(masks, boxes, [0, 1], background=2, low=0.35, high=0.65)
    assert made.tolist() == [[0, 255, 1, 2]]


def scene():
    """A red disc on green with its mask; a little noise gives the colour models some variance."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :40]
    disc = (y - 20) ** 2 + (x - 18) ** 2 < 100
    image = np.where(disc[..., None], [200, 40, 40], [40, 160, 40]) + rng.integers(-9, 10, (40, 40, 3))
    return image.astype(np.uint8), disc, np.array([[8, 10, 28, 31]], float)


def test_grabcut_finds_a_disc_in_its_box():
    image, disc, boxes = scene()
    made = grabcut_boxes(image, boxes, [3], background=4)
    sure = made != 255
    assert sure.mean() > 0.98
    assert ((made == 3) == disc)[sure].mean() > 0.995
    assert (made[:10] == 4).all()


def test_grabcut_is_the_same_in_any_thread():
    image, _, boxes = scene()
    noisy = np.random.default_rng(1).integers(0, 255, image.shape).astype(np.uint8)
    for picture in (image, noisy):
        expected = grabcut_boxes(picture, boxes, [0], background=1)
        with ThreadPoolExecutor(3) as pool:
            for made in pool.map(lambda _, p=picture: grabcut_boxes(p, boxes, [0], background=1), range(6)):
                assert np.array_equal(made, expected)


@pytest.mark.parametrize("seed", range(4))
def test_grabcut_does_not_depend_on_what_opencv_drew_before(seed):
    image = np.random.default_rng(seed).integers(0, 255, (60, 60, 3)).astype(np.uint8)
    made = []
    for state in (1, 2, 3):
        cv2.setRNGSeed(state)
        made.append(grabcut_boxes(image, np.array([[5, 5, 50, 55]], float), [0], background=1, least=0, most=1))
    assert np.array_equal(made[0], made[1])
    assert np.array_equal(made[0], made[2])


def test_a_small_box_leaves_the_larger_object_around_its_own():
    """A blue spot on the red disc, each with a box: the pixels around the spot remain disc."""
    image, disc, boxes = scene()
    spot = np.zeros_like(disc)
    spot[17:23, 15:21] = True
    image[spot] = [30, 40, 220]
    made = grabcut_boxes(image, np.array([*boxes, [13, 15, 23, 25]]), [0, 1], background=2)
    assert (made[spot] == 1).mean() > 0.9
    around = disc & ~spot
    around[:15] = around[25:] = False
    assert (made[around] == 0).mean() > 0.9


def test_a_box_without_contrast_is_void():
    flat = np.full((40, 40, 3), 90, np.uint8)
    made = grabcut_boxes(flat, np.array([[10, 10, 30, 30]], float), [0], background=1)
    assert (made[10:30, 10:30] == 255).all()
    assert (made == 1).sum() == 1600 - 400


@pytest.mark.parametrize("box", [[0, 0, 40, 40], [5, 5, 6, 6], [39, 39, 40, 40]])
def test_grabcut_of_extreme_boxes(box):
    image, _, _ = scene()
    made = grabcut_boxes(image, np.array([box], float), [0], background=1)
    assert set(np.unique(made)) <= {0, 1, 255}


def test_label_maps_survive_a_file(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_label_map(tmp_path / "deep" / "a.png", labels)
    assert np.array_equal(read_label_map(tmp_path / "deep" / "a.png"), labels)


def test_voc_palettes_are_read_by_name(tmp_path):
    index = np.array([[0, 15, 255], [20, 1, 8]], np.uint8)
    picture = Image.fromarray(index)
    picture.putpalette([v for i in range(256) for v in (i, 255 - i, i // 2)])
    picture.save(tmp_path / "a.png")
    assert read_voc_label_map(tmp_path / "a.png", VOC_CLASSES).tolist() == [[20, 14, 255], [19, 0, 7]]
    # Other classes, in another order: VOC classes that are not requested are background.
    assert read_voc_label_map(tmp_path / "a.png", ("person", "cat")).tolist() == [[2, 0, 255], [2, 2, 1]]
    with pytest.raises(UserError, match="no class 'personne'"):
        read_voc_label_map(tmp_path / "a.png", ("personne",))
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(UserError, match="is a RGB image"):
        read_voc_label_map(tmp_path / "rgb.png", VOC_CLASSES)


@pytest.mark.shared
def test_a_real_voc_file(shared):
    path = next((shared / "data/voc_mini/VOC2012/SegmentationClass").glob("*.png"))
    made, raw = read_voc_label_map(path, VOC_CLASSES), np.asarray(Image.open(path))
    assert ((made == 255) == (raw == 255)).all()
    assert ((made == 20) == (raw == 0)).all()
    assert (made[(raw > 0) & (raw < 255)] == raw[(raw > 0) & (raw < 255)] - 1).all()
