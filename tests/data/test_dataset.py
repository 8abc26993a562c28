"""The training reader: boxes only, and a sample that depends on (seed, epoch, index) alone."""

import json
import shutil

import numpy as np
import pytest
import torch

import misa.models  # noqa: F401  (imports mmdet silently)
from misa.data.dataset import CocoImages
from misa.data.pipeline import train_pipeline
from misa.data.scenes.scenes import Scenes, write_scenes
from misa.experiment import Augmentation

AUGMENTATION = Augmentation(short_sides=(48, 64, 80), long_side=96, test_short_side=64, flip=0.5)


@pytest.fixture(scope="module")
def root(module_path):
    return write_scenes(module_path / "toy", Scenes(size=64, train=6, val=2, classes=3))


def dataset(root, *, classes=None, masks=False, seed=0, annotations="instances_train2017.json"):
    names = [c["name"] for c in json.loads((root / "annotations" / annotations).read_text())["categories"]]
    return CocoImages(
        ann_file=str(root / "annotations" / annotations),
        data_prefix={"img": str(root / "train2017")},
        metainfo={"classes": tuple(classes or names)},
        pipeline=train_pipeline(AUGMENTATION, masks=masks),
        masks=masks,
        seed=seed,
    )


def rewritten(root, target, change):
    """Copy the data with every training annotation changed."""
    shutil.copytree(root, target)
    path = target / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [change(dict(a)) for a in content["annotations"]]
    path.write_text(json.dumps(content))
    return target


def without_mask(annotation):
    return {key: value for key, value in annotation.items() if key not in ("segmentation", "area")}


def with_wrong_mask(annotation):
    return {**annotation, "segmentation": {"size": [1, 1], "counts": "not a mask"}, "area": -5.0}


@pytest.mark.parametrize("change", [without_mask, with_wrong_mask])
def test_masks_are_never_read(root, tmp_path, change):
    plain, changed = dataset(root), dataset(rewritten(root, tmp_path / "changed", change))
    assert len(plain) == len(changed) == 6
    for i in range(6):
        a, b = plain[i], changed[i]
        assert torch.equal(a["inputs"], b["inputs"])
        assert torch.equal(a["data_samples"].gt_instances.bboxes.tensor, b["data_samples"].gt_instances.bboxes.tensor)
        assert "masks" not in a["data_samples"].gt_instances


def test_mask_supervision_does_read_them(root):
    assert dataset(root, masks=True)[0]["data_samples"].gt_instances.masks.masks.any()


def test_a_crowd_is_ignored_and_no_object(root, tmp_path):
    """As seen by the losses: its box is given, but is neither an object nor background."""

    def crowd(annotation):
        return {**annotation, "iscrowd": int(annotation["id"] == 1)}

    plain, changed = dataset(root), dataset(rewritten(root, tmp_path / "crowd", crowd))
    before, after = plain[0]["data_samples"], changed[0]["data_samples"]
    assert len(before.ignored_instances) == 0
    assert len(after.ignored_instances) == 1
    assert torch.equal(after.ignored_instances.bboxes.tensor, before.gt_instances.bboxes.tensor[:1])
    assert torch.equal(after.gt_instances.bboxes.tensor, before.gt_instances.bboxes.tensor[1:])


def test_a_sample_depends_on_seed_epoch_and_index_alone(root):
    first, second = dataset(root), dataset(root)
    np.random.seed(3)  # noqa: NPY002  (whatever the global generators are at)
    torch.manual_seed(5)
    images = [first[i]["inputs"] for i in range(6)]
    assert all(torch.equal(images[i], second[i]["inputs"]) for i in reversed(range(6)))
    second.epoch = 1
    assert not all(torch.equal(image, second[i]["inputs"]) for i, image in enumerate(images))
    other = dataset(root, seed=1)
    assert not all(torch.equal(image, other[i]["inputs"]) for i, image in enumerate(images))


def test_reading_leaves_the_global_generators_alone(root):
    data = dataset(root)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    data[0]
    assert torch.equal(torch.rand(3), expected)


def test_labels_follow_the_classes_that_were_asked_for(root):
    names = [c["name"] for c in json.loads((root / "annotations/instances_train2017.json").read_text())["categories"]]
    forward, backward = dataset(root), dataset(root, classes=names[::-1])
    for i in range(6):
        there = forward.get_data_info(i)["instances"]
        back = backward.get_data_info(i)["instances"]
        assert [names[o["bbox_label"]] for o in there] == [names[::-1][o["bbox_label"]] for o in back]
    assert forward.metainfo["category_ids"] == backward.metainfo["category_ids"][::-1]
