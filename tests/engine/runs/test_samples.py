"""Sources of figures: images as training reads them, and the complete lines of a record."""

import json
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from misa.data.scenes.scenes import Scenes, write_scenes
from misa.data.source import open_source
from misa.engine.runs.samples import losses, results, surest, training_samples
from misa.engine.runs.scores import DETECTIONS
from misa.errors import UserError
from misa.experiment import Experiment


@pytest.fixture
def root(tmp_path):
    return write_scenes(tmp_path / "toy", Scenes(size=48, train=2, val=3, classes=2, objects=(1, 2)))


def edit(root, split, change):
    path = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_image_turned_by_exif_is_shown_as_it_is_trained_on(root):
    path = root / "train2017" / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path, exif=exif)

    def change(content):
        content["images"] = [{"id": 1, "file_name": path.name, "width": 30, "height": 40}]
        content["annotations"] = [{**content["annotations"][0], "image_id": 1, "bbox": [2, 30, 20, 9]}]

    edit(root, "train", change)
    source = open_source(Experiment(data="coco"), root)
    (sample,) = training_samples(source)
    assert np.array_equal(sample["image"], mmcv.imread(path)[..., ::-1])
    assert sample["image"].shape == (40, 30, 3)
    assert [source.classes[number] for number in sample["colors"]] == sample["labels"]


def test_sixteen_bits_are_shown_as_they_are_trained_on(root):
    path = sorted((root / "train2017").iterdir())[0]
    Image.fromarray(np.full((48, 48), 40_000, np.uint16)).save(path)
    shown = training_samples(open_source(Experiment(data="coco"), root))[0]["image"]
    assert np.array_equal(shown, mmcv.imread(path))
    assert shown.dtype == np.uint8


def test_objects_and_detections_are_those_of_the_image_and_the_classes(root, tmp_path):
    def extra(content):
        content["categories"].append({"id": 9, "name": "extra"})
        extra = {**content["annotations"][0], "id": 99, "category_id": 9}
        extra.pop("segmentation")
        content["annotations"].append(extra)

    plain = json.loads((root / "annotations/instances_val2017.json").read_text())
    edit(root, "val", extra)
    source = open_source(Experiment(data="coco"), root)
    found = [
        {k: a[k] for k in ("image_id", "category_id", "segmentation")} | {"score": score}
        for a in plain["annotations"]
        for score in (0.2, 0.5, 0.9)
    ]
    (tmp_path / DETECTIONS).parent.mkdir()
    (tmp_path / DETECTIONS).write_text(json.dumps(found))
    run = SimpleNamespace(source=source, experiment=Experiment(data="coco"), folder=tmp_path)
    rows = results(run, threshold=0.3)
    for row, image in zip(rows, plain["images"], strict=True):
        own = [a for a in plain["annotations"] if a["image_id"] == image["id"]]
        assert len(row["truth"]) == len(row["boxes"]) == len(own)
        assert [float(label[-4:]) for label in row["predicted_labels"]] == [0.9] * len(own)
        assert np.array_equal(row["predicted"].any(axis=0), row["truth"].any(axis=0))
    assert all(len(row["predicted"]) == 0 for row in results(run, threshold=0.95))


def test_a_half_written_line_of_losses_is_left_out(tmp_path):
    (tmp_path / "losses.jsonl").write_text('{"iter": 0, "loss": 2.0, "loss_box": 1.5}\n{"iter": 1, "loss": 1.0, "lo')
    found = losses(tmp_path)
    assert {name: values.tolist() for name, values in found.items()} == {"loss": [2.0], "box": [1.5]}


@pytest.mark.parametrize("content", [None, "", '{"iter'])
def test_no_losses_are_a_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "losses.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"there are no losses in .*losses\.jsonl; a run writes them at the end"):
        losses(tmp_path)


def test_an_object_that_two_classes_claim_is_shown_once():
    def detection(score, category, rows):
        mask = np.zeros((20, 20), np.uint8, order="F")
        mask[rows] = 1
        return {"score": score, "category_id": category, "segmentation": rle.encode(mask)}

    right, wrong = detection(0.9, 1, slice(0, 10)), detection(0.4, 2, slice(0, 9))
    other, worse = detection(0.5, 2, slice(9, 15)), detection(0.3, 2, slice(10, 15))
    assert surest([wrong, worse, other, right]) == [right, other]
    assert surest([wrong, right], same=0.95) == [right, wrong]
    assert surest([]) == []
