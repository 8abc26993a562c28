import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from PIL import Image

from misa.data.pipeline import Resize, at_test_size, network_input, train_pipeline
from misa.data.pipeline import test_pipeline as file_pipeline
from misa.errors import UserError
from misa.experiment import Augmentation, Experiment
from misa.models.students.common import preprocessor


@pytest.mark.parametrize("size", [(60, 100), (64, 96), (31, 240), (200, 3), (1, 4000), (4000, 1)])
@pytest.mark.parametrize("sizes", [(64, 96), (128, 192)])
def test_an_image_in_memory_is_what_the_test_gives_the_network(tmp_path, size, sizes):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    augmentation = Augmentation(test_short_side=sizes[0], long_side=sizes[1])
    loaded = Compose(file_pipeline(augmentation))({"img_path": str(tmp_path / "image.png"), "img_id": 0})
    preprocess = MODELS.build(preprocessor(Experiment(augmentation=augmentation)))
    expected = preprocess(pseudo_collate([loaded]), False)["inputs"]
    padded = network_input(image, augmentation, divisor=32)
    torch.testing.assert_close(padded, expected, rtol=0, atol=1e-6)
    h, w = loaded["inputs"].shape[-2:]
    assert torch.equal(network_input(image, augmentation), padded[..., :h, :w])


def test_an_image_is_never_thinner_than_a_pixel():
    assert at_test_size(np.zeros((4000, 1, 3), np.uint8), Augmentation(test_short_side=64, long_side=96)).shape[1] == 1


@pytest.mark.parametrize("jitter", [None, (0.1, 2.0)])
def test_an_image_of_one_row_is_trained_with(tmp_path, jitter):
    """With boxes and masks of its size, and images after it are resized as before."""
    pipeline = Compose(train_pipeline(Augmentation((64,), 96, jitter=jitter, crop=96), masks=True))
    for height, width in ((1, 4000), (48, 96)):
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / "image.png")
        box = [0.0, 0.0, width, height]
        polygon = [[0, 0, width, 0, width, height, 0, height]]
        given = {"bbox": box, "mask": polygon, "bbox_label": 0, "ignore_flag": 0}
        about = {"img_path": str(tmp_path / "image.png"), "img_id": 0, "height": height, "width": width}
        found = pipeline({**about, "instances": [given]})
        size = tuple(found["inputs"].shape[-2:])
        truth = found["data_samples"].gt_instances
        if jitter is None:
            assert size == ((1, 96) if height == 1 else (48, 96))
            assert truth.bboxes.tensor.tolist() == [[0, 0, size[1], size[0]]]
        assert min(size) >= 1
        assert tuple(truth.masks.masks.shape[1:]) == size


@pytest.mark.parametrize("crop", [96, 102, 126])
def test_a_jittered_batch_is_padded_to_strides_of_32(crop):
    """Otherwise maps at stride 4 would not have a quarter of the input's size, by which boxes are scaled."""
    row = Experiment(augmentation=Augmentation(jitter=(0.1, 2.0), crop=crop))
    data = pseudo_collate([{"inputs": torch.zeros(3, crop - 6, crop, dtype=torch.uint8), "data_samples": sample(crop)}])
    assert MODELS.build(preprocessor(row))(data, True)["inputs"].shape == (
        1,
        3,
        -(-crop // 32) * 32,
        -(-crop // 32) * 32,
    )


def sample(crop):
    size = (crop - 6, crop)
    found = DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "batch_input_shape": size})
    found.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return found


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)]
)
def test_what_is_no_image_is_one_sentence(image):
    with pytest.raises(UserError, match=r"RGB \(h w 3\) of 8 bits"):
        network_input(image, Augmentation())


@pytest.mark.parametrize("damage", ["inside", "gone"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, damage):
    """Only decoding shows it: the start and the end of the file are right."""
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.unlink()
    if damage == "inside":
        path.write_bytes(content)
    for pipeline in (train_pipeline(Augmentation((64,), 96), masks=False), file_pipeline(Augmentation())):
        sample = {"img_path": str(path), "img_id": 0, "instances": []}
        with pytest.raises(UserError, match=rf"^the image {path} cannot be read, or not to its end; replace it"):
            Compose(pipeline)(sample)


def _resized(size, *, masks=None, labels=None, to=(64, 96)):
    """What `Resize` makes of masks (n h w) or a label map (h w) beside an image of that size."""
    results = {"img": np.zeros((*size, 3), np.uint8)}
    if masks is not None:
        results["gt_masks"] = BitmapMasks(masks, *size)
    if labels is not None:
        results["gt_seg_map"] = labels
    return Resize(scale=to[::-1], keep_ratio=False).transform(results)


def _disc(size, center, radius, *, image):
    """The pixels of a map whose centers lie in a disc of the image, by the definition."""
    rows, columns = ((np.arange(n) + 0.5) * whole / n for n, whole in zip(size, image, strict=True))
    return (rows[:, None] - center[0]) ** 2 + (columns[None] - center[1]) ** 2 <= radius**2


@pytest.mark.parametrize(
    ("image", "to"), [((375, 500), (800, 1067)), ((375, 500), (192, 256)), ((480, 640), (240, 320))]
)
def test_masks_and_label_maps_lie_where_the_resized_object_lies(image, to):
    """Compared with the disc drawn at the resized size; mmdet's own lie up to half a pixel to the lower right."""
    rng, overlaps, areas, shifts = np.random.default_rng(0), [], [], {"mask": [], "labels": []}
    for _ in range(20):
        radius = rng.uniform(10, 50)
        center = rng.uniform(radius, np.array(image) - radius)
        drawn = _disc(image, center, radius, image=image).astype(np.uint8)
        expected = _disc(to, center, radius, image=image)
        found = _resized(image, masks=drawn[None], labels=drawn * 7, to=to)
        mask, labels = found["gt_masks"].masks[0].astype(bool), found["gt_seg_map"]
        assert mask.shape == labels.shape == to
        assert set(np.unique(labels)) == {0, 7}
        overlaps.append((mask & expected).sum() / (mask | expected).sum())
        areas.append(mask.sum() / (drawn.sum() * to[0] * to[1] / image[0] / image[1]))
        middle = np.argwhere(expected).mean(0)
        shifts["mask"].append(np.argwhere(mask).mean(0) - middle)
        shifts["labels"].append(np.argwhere(labels).mean(0) - middle)
    assert np.mean(overlaps) > 0.975
    # A threshold of 0.4 or 0.6 is 0.015 or more off; at half the size a quarter of the border's pixels are ties.
    assert np.mean(areas) == pytest.approx(1, abs=0.03 if to == (240, 320) else 0.008)
    assert np.abs(np.mean(shifts["mask"], 0)).max() < 0.05
    # At exactly half the size each center lies between four pixels, of which one is taken.
    assert np.abs(np.mean(shifts["labels"], 0)).max() < (0.3 if to == (240, 320) else 0.05)


@pytest.mark.parametrize(("width", "scale"), [(1, 0.4), (2, 0.2), (3, 0.4)])
def test_a_thin_bar_keeps_its_box_and_its_area(width, scale):
    """Also a tilted one, of which few pixels are covered by half."""
    rng, image, to = np.random.default_rng(0), (480, 640), (round(480 * scale), round(640 * scale))
    overlaps, areas = [], []
    for _ in range(30):
        angle, length = rng.uniform(0, np.pi), rng.uniform(60, 200)
        center, half = rng.uniform((120, 120), (360, 520)), np.array([np.sin(angle), np.cos(angle)]) * length / 2
        bar = np.zeros(image, np.uint8)
        cv2.line(bar, *(tuple(int(v) for v in end[::-1]) for end in (center - half, center + half)), 1, width)
        found = _resized(image, masks=bar[None], to=to)["gt_masks"].masks[0]
        boxes = [np.argwhere(mask) for mask in (bar, found)]
        (top, bottom), (y1, y2) = [(p.min(0) * s, (p.max(0) + 1) * s) for p, s in zip(boxes, (scale, 1), strict=True)]
        inside = np.clip(np.minimum(bottom, y2) - np.maximum(top, y1), 0, None).prod()
        overlaps.append(inside / ((bottom - top).prod() + (y2 - y1).prod() - inside))
        areas.append(found.sum() / (bar.sum() * scale**2))
    assert np.mean(overlaps) > 0.8
    assert 0.9 < np.median(areas) < 1.6


def test_a_label_map_of_one_row_keeps_its_columns(tmp_path):
    labels = np.repeat(np.array([[0, 1]], np.uint8), 100, axis=1)
    Image.fromarray(np.zeros((1, 200, 3), np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(labels).save(tmp_path / "labels.png")
    for jitter in (None, (1.0, 1.0)):
        sizes = Augmentation((64,), 100, jitter=jitter, crop=100, flip=0.0)
        pipeline = Compose(train_pipeline(sizes, masks=False, label_maps=True))
        given = {"bbox": [0.0, 0, 200, 1], "bbox_label": 0, "ignore_flag": 0}
        about = {"img_path": str(tmp_path / "image.png"), "img_id": 0, "height": 1, "width": 200}
        found = pipeline({**about, "seg_map_path": str(tmp_path / "labels.png"), "instances": [given]})
        assert found["data_samples"].gt_sem_seg.sem_seg.squeeze().tolist() == [0] * 50 + [1] * 50


def test_a_mask_thinner_than_half_a_pixel_is_kept_and_an_empty_one_stays_empty():
    masks = np.zeros((3, 64, 96), np.uint8)
    masks[0, :, 10] = 1  # a quarter of a pixel wide at a quarter of the size
    masks[1, 20, 30] = 1
    found = _resized((64, 96), masks=masks, to=(16, 24))["gt_masks"].masks
    assert np.array_equal(np.unique(np.argwhere(found[0])[:, 1]), [2])
    assert found[0].sum() == 16
    assert np.argwhere(found[1]).tolist() == [[5, 7]]
    assert found[2].sum() == 0
    assert _resized((64, 96), masks=masks[:0], to=(16, 24))["gt_masks"].masks.shape == (0, 16, 24)
