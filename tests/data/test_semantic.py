"""Reading boxes without masks, and ground-truth label maps from instances or VOC's PNGs."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from misa.data.formats.coco import Split
from misa.data.label_maps import VOC_CLASSES
from misa.data.semantic import boxed_images, true_maps

CLASSES = ("cat", "dog")


def encoded(mask):
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def mask(top, left, bottom, right):
    canvas = np.zeros((8, 10), bool)
    canvas[top:bottom, left:right] = True
    return canvas


@pytest.fixture
def split(tmp_path):
    """A dog within a cat, a crowd of cats, an ignored dog and a bird, which is not a requested class."""
    objects = [
        (2, mask(0, 0, 4, 6), {}),
        (1, mask(1, 1, 3, 3), {}),
        (2, mask(3, 5, 8, 10), {"iscrowd": 1}),
        (1, mask(7, 0, 8, 2), {"ignore": 1}),
        (3, mask(6, 0, 7, 2), {}),
    ]
    annotations = []
    for i, (category, m, more) in enumerate(objects):
        box = [float(v) for v in rle.toBbox(rle.encode(np.asfortranarray(m.astype(np.uint8))))]
        annotations.append(
            {"id": i + 1, "image_id": 5, "category_id": category, "bbox": box, "area": float(m.sum()), "iscrowd": 0}
            | {"segmentation": encoded(m)}
            | more
        )
    content = {
        "images": [{"id": 5, "file_name": "sub/a.jpg", "height": 8, "width": 10}],
        "annotations": annotations,
        # The file lists dogs first; labels follow the requested classes.
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "bird"}],
    }
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    return Split(path, tmp_path / "train2017")


def test_boxes_are_read_without_masks(split):
    (image,) = boxed_images(split, CLASSES)
    assert (image.name, image.labels, image.size) == ("sub/a.jpg", [0, 1], (8, 10))
    assert image.boxes.tolist() == [[0, 0, 6, 4], [1, 1, 3, 3]]
    assert image.crowds.tolist() == [[5, 3, 10, 8], [0, 7, 2, 8]], "what is to be ignored is a crowd"
    content = json.loads(split.annotations.read_text())
    for a in content["annotations"]:
        del a["segmentation"], a["area"]
    split.annotations.write_text(json.dumps(content))
    (again,) = boxed_images(split, CLASSES)
    assert str(again) == str(image)


def test_instances_become_a_label_map(split):
    (true,) = true_maps(split, CLASSES)
    made = true.make()
    dog, cat, crowd = mask(1, 1, 3, 3), mask(0, 0, 4, 6), mask(3, 5, 8, 10) | mask(7, 0, 8, 2)
    assert (true.name, true.image_id) == ("sub/a.jpg", 5)
    assert (made[dog] == 1).all()
    assert (made[cat & ~dog] == 0).all()
    assert (made[crowd & ~cat] == 255).all()
    assert (made[~(cat | crowd)] == 2).all()


def test_vocs_own_map_goes_before_the_masks(split):
    folder = split.annotations.parent.parent / "SegmentationClass"
    folder.mkdir()
    index = np.zeros((8, 10), np.uint8)
    index[0, :3] = VOC_CLASSES.index("cat") + 1, VOC_CLASSES.index("dog") + 1, 255
    Image.fromarray(index).save(folder / "a.png")
    (true,) = true_maps(split, CLASSES)
    assert true.make()[0, :4].tolist() == [0, 1, 255, 2]


@pytest.mark.parametrize("other", ["classes", "numbering"])
def test_label_maps_of_another_numbering_are_not_read(split, other):
    """Tools write SegmentationClass for classes of their own, in the order of a labelmap.txt."""
    folder = split.annotations.parent.parent / "SegmentationClass"
    folder.mkdir()
    Image.fromarray(np.full((8, 10), 255, np.uint8)).save(folder / "a.png")
    classes = ("cat", "dog")
    if other == "classes":
        content = json.loads(split.annotations.read_text())
        for category in content["categories"]:
            category["name"] = category["name"].replace("dog", "widget")
        split.annotations.write_text(json.dumps(content))
        classes = ("cat", "widget")
    else:
        (folder.parent / "labelmap.txt").write_text("background:0,0,0::\ndog:128,0,0::\n")
    (true,) = true_maps(split, classes)
    assert (true.make()[1:3, 1:3] == 1).all()
    assert (true.make()[4:7, :2] == 2).all()
