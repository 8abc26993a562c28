"""AP of single images: against the evaluation of each image by itself."""

import json

import numpy as np
import pytest
from pycocotools import mask as rle

from misa.data.synthetic import Scenes, write_scenes
from misa.evaluation.ap import mask_ap, read_truth
from misa.evaluation.per_image import image_ap, worst


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = write_scenes(
        tmp_path_factory.mktemp("data") / "toy", Scenes(size=48, train=1, val=10, objects=(0, 3), seed=3)
    )
    path = root / "annotations" / "instances_val2017.json"
    rng = np.random.default_rng(0)
    found = []
    for annotation in json.loads(path.read_text())["annotations"]:
        mask = rle.decode(annotation["segmentation"])
        for _ in range(2):
            moved = np.roll(mask, rng.integers(-2, 3, 2), axis=(0, 1))
            encoded = rle.encode(np.asfortranarray(moved))
            segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": int(rng.choice([annotation["category_id"], 1])),
                    "score": float(rng.random()),
                    "segmentation": segmentation,
                }
            )
    return read_truth(path), found


@pytest.mark.parametrize("categories", [None, ["striped star", "checked ring"]])
def test_as_if_each_image_were_evaluated_alone(case, categories):
    truth, found = case
    ids = truth.getImgIds()
    scores = image_ap(truth, found, images=ids, categories=categories)
    assert list(scores) == sorted(ids)
    for image_id in ids:
        alone = mask_ap(truth, found, images=[image_id], categories=categories)["AP"]
        assert scores[image_id] == (None if alone is None else pytest.approx(alone))
    assert len({value for value in scores.values() if value is not None}) > 2


def test_without_detections_everything_is_missed(case):
    truth, _ = case
    scores = image_ap(truth, [], images=truth.getImgIds())
    assert set(scores.values()) <= {0.0, None}


def test_the_worst_come_first_and_unscored_ones_never():
    assert worst({1: 30.0, 2: None, 3: 0.0, 4: 0.0, 5: 90.0}, 3) == [3, 4, 1]
    assert worst({2: None}, 3) == []
