"""AP by class, precision-recall curves and boundary AP, against pycocotools and cases by hand."""

import json

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from misa.evaluation.ap import compared, mask_ap, read_truth, score
from misa.evaluation.details import curves, detailed, fast_ap, per_class

SIZE = 120


def disc(x, y, radius):
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def encode(mask):
    code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode()}


@pytest.fixture
def scene(tmp_path):
    """Three images, two classes and one without objects, and detections of all kinds."""
    rng = np.random.default_rng(0)
    annotations, detections = [], []
    for image in range(1, 4):
        for number in range(4):
            x, y, radius = 20 + 25 * number, 30 + 20 * image, int(rng.integers(8, 14))
            mask = disc(x, y, radius)
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": 1 + number % 2, "iscrowd": 0}
            annotations.append(
                annotation | {"area": int(mask.sum()), "bbox": [0, 0, 1, 1], "segmentation": encode(mask)}
            )
            if rng.random() < 0.8:
                found = disc(x + rng.integers(0, 4), y, radius - rng.integers(0, 2))
                label = 1 + number % 2 if rng.random() < 0.9 else 1
                detections.append(
                    {"image_id": image, "category_id": label, "score": rng.random(), "segmentation": encode(found)}
                )
    truth = {
        "images": [{"id": i, "width": SIZE, "height": SIZE, "file_name": f"{i}.png"} for i in range(1, 4)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 7, "name": "never"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(detections))
    return tmp_path / "truth.json", tmp_path / "found.json", detections


def test_the_mean_over_the_classes_is_the_ap(scene):
    truth, _, detections = scene
    whole = read_truth(truth)
    table = per_class(compared(whole, detections))
    expected = mask_ap(whole, detections)
    for metric in ("AP", "AP50", "AP75"):
        assert np.mean([table[name][metric] for name in ("a", "b")]) == pytest.approx(expected[metric])
        for name in ("a", "b"):
            assert table[name][metric] == pytest.approx(mask_ap(whole, detections, categories=[name])[metric])
    assert table["never"]["AP"] is None
    assert (table["a"]["objects"], table["never"]["objects"]) == (6, 0)


def test_the_area_under_a_curve_is_the_ap(scene):
    truth, _, detections = scene
    lines = curves(compared(read_truth(truth), detections))
    expected = mask_ap(read_truth(truth), detections)
    assert 100 * np.mean(lines["IoU 0.50"]) == pytest.approx(expected["AP50"])
    assert 100 * np.mean(lines["IoU 0.75"]) == pytest.approx(expected["AP75"])
    assert 100 * np.mean(lines["IoU 0.50:0.95"]) == pytest.approx(expected["AP"])
    assert len(lines["recall"]) == 101
    assert np.all(np.diff(lines["IoU 0.50"]) <= 1e-9)
    assert curves(compared(read_truth(truth), detections, categories=["never"])) == {}


def test_both_libraries_agree(scene):
    pytest.importorskip("faster_coco_eval")
    truth, _, detections = scene
    whole = read_truth(truth)
    for options in ({}, {"images": [1, 3]}, {"categories": [2]}):
        fast = fast_ap(truth, detections, compare="segm", **options)
        slow = mask_ap(whole, detections, **options)
        assert fast.keys() == slow.keys()
        for name, value in slow.items():
            assert fast[name] == (None if value is None else pytest.approx(value, abs=1e-6)), name
    for options in ({}, {"categories": [2]}, {"images": []}):
        assert fast_ap(truth, [], **options) == mask_ap(whole, [], **options)
    assert fast_ap(truth, [])["AP"] == 0
    content = json.loads(truth.read_text())
    content["annotations"] = [row | {"area": 5000.0} for row in content["annotations"]]
    medium = truth.with_name("medium.json")
    medium.write_text(json.dumps(content))
    assert fast_ap(medium, [])["APs"] is None
    assert fast_ap(medium, [])["APm"] == 0


@pytest.mark.shared
def test_both_libraries_agree_on_real_masks(shared):
    """Crowds, small objects, polygons: every fifth object of COCO is missed, the others have scores by size."""
    pytest.importorskip("faster_coco_eval")
    path = shared / "data" / "coco_mini" / "annotations" / "instances_val2017.json"
    truth = read_truth(path)
    detections = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "score": 1 / (1 + a["area"] % 97),
            "segmentation": encode(np.roll(truth.annToMask(a), 2, 1)),
        }
        for k, a in enumerate(truth.dataset["annotations"])
        if k % 5 and not a["iscrowd"]
    ]
    slow, fast = mask_ap(truth, detections), fast_ap(path, detections, compare="segm")
    assert 10 < slow["AP"] < 90
    for name, value in slow.items():
        assert fast[name] == pytest.approx(value, abs=1e-6), name


def test_the_boundary_tells_a_ragged_edge_that_the_area_hides(tmp_path):
    """Large discs predicted without a rim of three pixels: most of the area is right, but little of the boundary."""
    pytest.importorskip("faster_coco_eval")
    truth = {
        "images": [{"id": 1, "width": 400, "height": 400, "file_name": "a"}],
        "categories": [{"id": 1, "name": "a"}],
    }
    rows, columns = np.mgrid[:400, :400]
    distance = np.hypot(rows - 200, columns - 200)
    truth["annotations"] = [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "iscrowd": 0,
            "area": 1e5,
            "bbox": [0, 0, 400, 400],
            "segmentation": encode(distance < 180),
        }
    ]
    (tmp_path / "truth.json").write_text(json.dumps(truth))

    def found(radius):
        return [{"image_id": 1, "category_id": 1, "score": 1.0, "segmentation": encode(distance < radius)}]

    exact = fast_ap(tmp_path / "truth.json", found(180))
    assert exact["AP"] == pytest.approx(100)
    masks = mask_ap(read_truth(tmp_path / "truth.json"), found(174))
    edges = fast_ap(tmp_path / "truth.json", found(174))
    assert masks["AP"] > 85
    assert edges["AP"] < 40


def test_a_file_is_taken_apart_in_one_go(scene):
    truth, found, detections = scene
    parts = detailed(truth, found, classes=["b", "a"])
    assert list(parts["per_class"]) == ["a", "b"]
    assert parts["per_class"]["b"]["AP"] == mask_ap(read_truth(truth), detections, categories=["b"])["AP"]
    assert "boundary" not in parts


def test_classes_of_data_without_masks_are_scored_by_boxes(scene):
    """As pycocotools alone scores the boxes around both."""
    truth, found, detections = scene
    content = json.loads(truth.read_text())
    for annotation in content["annotations"]:
        annotation["bbox"] = rle.toBbox(annotation.pop("segmentation")).tolist()
        del annotation["area"], annotation["iscrowd"]
    truth.write_text(json.dumps(content))
    parts = detailed(truth, found, classes=["a", "b"], masks=False)
    plain = COCO()
    plain.dataset = {**content, "annotations": [{**a, "area": 100, "iscrowd": 0} for a in content["annotations"]]}
    plain.createIndex()
    for number, name in ((1, "a"), (2, "b")):
        evaluation = COCOeval(plain, plain.loadRes([dict(one) for one in detections]), "bbox")
        evaluation.params.catIds = [number]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        expected = 100 * evaluation.stats[:3]
        assert [parts["per_class"][name][kind] for kind in ("AP", "AP50", "AP75")] == pytest.approx(expected)
        assert parts["per_class"][name]["objects"] == 6
    together = score(truth, found, classes=["a", "b"], masks=False)["bbox"]["AP50"]
    assert 100 * np.mean(parts["curves"]["IoU 0.50"]) == pytest.approx(together)
