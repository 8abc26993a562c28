"""Mask AP on hand-made masks with known AP."""

import json

import numpy as np
import pytest
from pycocotools import mask as rle

from misa.evaluation.ap import as_rectangles, mask_ap, read_truth, score
from misa.evaluation.details import detailed, fast_ap


def encoded(mask):
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def square(top, left, size, canvas=100):
    mask = np.zeros((canvas, canvas))
    mask[top : top + size, left : left + size] = 1
    return mask


@pytest.fixture
def truth_file(tmp_path):
    masks = [square(10, 10, 40), square(60, 60, 20)]
    annotations = [
        {
            "id": i + 1,
            "image_id": 1,
            "category_id": 7,
            "bbox": [float(v) for v in rle.toBbox(rle.encode(np.asfortranarray(m.astype(np.uint8))))],
            "area": float(m.sum()),
            "iscrowd": 0,
            "segmentation": encoded(m),
        }
        for i, m in enumerate(masks)
    ]
    path = tmp_path / "truth.json"
    path.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.png", "height": 100, "width": 100}],
                "annotations": annotations,
                "categories": [{"id": 7, "name": "square"}],
            }
        )
    )
    return path


def detection(mask, score=0.9):
    return {"image_id": 1, "category_id": 7, "score": score, "segmentation": encoded(mask)}


def test_the_truth_itself_scores_a_hundred(truth_file):
    found = [detection(square(10, 10, 40)), detection(square(60, 60, 20))]
    ap = mask_ap(read_truth(truth_file), found)
    assert ap["AP"] == pytest.approx(100)
    assert ap["APs"] == pytest.approx(100)  # 20 x 20 is small, 40 x 40 medium
    assert ap["APm"] == pytest.approx(100)
    assert ap["APl"] is None


def test_an_overlap_of_five_eighths_counts_up_to_that_threshold(truth_file):
    """One object right, the other found with IoU 0.625: it counts at 0.50, 0.55 and 0.60."""
    half = np.zeros((100, 100))
    half[10:50, 10:35] = 1  # 25 of 40 columns
    ap = mask_ap(read_truth(truth_file), [detection(half, 0.8), detection(square(60, 60, 20), 0.9)])
    # One of two objects: precision 1 up to recall 0.5, that is at 51 of COCO's 101 recall points.
    alone = 100 * 51 / 101
    assert ap["AP50"] == pytest.approx(100)
    assert ap["AP75"] == pytest.approx(alone)
    assert ap["AP"] == pytest.approx((3 * 100 + 7 * alone) / 10)


def test_nothing_found_scores_zero(truth_file):
    ap = mask_ap(read_truth(truth_file), [])
    assert ap["AP"] == ap["APs"] == ap["APm"] == 0
    assert ap["APl"] is None


def test_rectangles_fill_the_masks_extent(truth_file):
    ring = square(10, 10, 40) - square(20, 20, 20)
    (rectangle,) = as_rectangles([detection(ring)])
    assert np.array_equal(rle.decode(rectangle["segmentation"]), square(10, 10, 40))


def test_rectangles_are_those_painted_pixel_by_pixel():
    rng = np.random.default_rng(0)
    masks = [rng.random((13, 17)) < share for share in (0.005, 0.02, 0.05, 0.5) for _ in range(10)]
    for mask, rectangle in zip(masks, as_rectangles([detection(m) for m in masks]), strict=True):
        canvas = np.zeros(mask.shape)
        rows, columns = np.nonzero(mask)
        if len(rows):
            canvas[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = 1
        assert np.array_equal(rle.decode(rectangle["segmentation"]), canvas)
        assert rectangle["score"] == 0.9
    assert as_rectangles([]) == []


def test_classes_that_were_not_trained_on_do_not_count(truth_file, tmp_path):
    """An object of another class would be missed by any network, and halve the mean over classes."""
    content = json.loads(truth_file.read_text())
    content["categories"].append({"id": 9, "name": "extra"})
    content["annotations"][1]["category_id"] = 9
    truth_file.write_text(json.dumps(content))
    found = [detection(square(10, 10, 40))]
    assert mask_ap(read_truth(truth_file), found)["AP"] == pytest.approx(50)
    for categories in (["square"], [7]):
        assert mask_ap(read_truth(truth_file), found, categories=categories)["AP"] == pytest.approx(100)
    results = tmp_path / "found.json"
    results.write_text(json.dumps(found))
    scored = score(truth_file, results, classes=("square",))
    assert scored["segm"]["AP"] == scored["segm_as_rectangles"]["AP"] == pytest.approx(100)
    with pytest.raises(ValueError, match="no category 'circle'; it has square, extra"):
        mask_ap(read_truth(truth_file), found, categories=["circle"])


def test_any_class_asks_for_the_mask_alone(truth_file, tmp_path):
    content = json.loads(truth_file.read_text())
    content["categories"].append({"id": 9, "name": "extra"})
    content["annotations"][1]["category_id"] = 9
    truth_file.write_text(json.dumps(content))
    first, second = detection(square(10, 10, 40), 0.9), detection(square(60, 60, 20), 0.8)  # both as squares
    found = [first, second]
    truth = read_truth(truth_file)
    assert mask_ap(truth, found, categories=["square", "extra"])["AP"] == pytest.approx(50)
    assert mask_ap(truth, found, categories=["square", "extra"], any_class=True)["AP"] == pytest.approx(100)
    # Classes that were not trained on do not count here either.
    assert mask_ap(truth, [first], categories=["square"], any_class=True)["AP"] == pytest.approx(100)
    # An object detected as two classes gives a false positive before the second object: precision 1 up to recall 0.5
    # (51 of 101 points), 2/3 beyond it.
    twice = [first, {**first, "category_id": 9, "score": 0.85}, {**second, "category_id": 9}]
    precision = (51 + 50 * 2 / 3) / 101
    assert mask_ap(truth, twice, any_class=True)["AP50"] == pytest.approx(100 * precision)
    results = tmp_path / "found.json"
    results.write_text(json.dumps(found))
    scored = score(truth_file, results)
    assert (scored["segm"]["AP"], scored["segm_any_class"]["AP"]) == pytest.approx((50, 100))


@pytest.mark.parametrize("segmentation", [None, []])
def test_a_class_that_was_left_out_may_have_no_masks(truth_file, tmp_path, segmentation):
    """Class-agnostic too, where pycocotools decodes the masks of every class."""
    content, found = (
        json.loads(truth_file.read_text()),
        [detection(square(10, 10, 40), 0.8), detection(square(5, 5, 9))],
    )
    expected = mask_ap(read_truth(truth_file), found, categories=["square"], any_class=True)
    other = {"id": 3, "image_id": 1, "category_id": 8, "bbox": [10.0, 10.0, 40.0, 40.0], "area": 1600.0, "iscrowd": 0}
    content["annotations"].append(other if segmentation is None else other | {"segmentation": segmentation})
    content["categories"].append({"id": 8, "name": "dog"})
    (tmp_path / "more.json").write_text(json.dumps(content))
    assert mask_ap(read_truth(tmp_path / "more.json"), found, categories=["square"], any_class=True) == expected
    assert expected["AP"] not in (0, 100, None)


def test_an_empty_mask_stays_empty():
    (rectangle,) = as_rectangles([detection(np.zeros((9, 9)))])
    assert rle.area(rectangle["segmentation"]) == 0


def test_score_counts_only_the_first_images(truth_file, tmp_path):
    results = tmp_path / "found.json"
    results.write_text(json.dumps([detection(square(10, 10, 40)), detection(square(60, 60, 20))]))
    assert score(truth_file, results)["images"] == 1
    assert score(truth_file, results, limit=0)["images"] == 0


def test_objects_that_do_not_count_are_neither_found_nor_missed(truth_file):
    content = json.loads(truth_file.read_text())
    for annotation, mode in zip(content["annotations"], ("plain", "contrast"), strict=True):
        annotation["mode"] = mode
    truth_file.write_text(json.dumps(content))
    truth = read_truth(truth_file)
    both = [detection(square(10, 10, 40), 0.9), detection(square(60, 60, 20), 0.8)]
    for found, plain in ((both, 100), (both[:1], 100), (both[1:], 0)):
        assert mask_ap(truth, found, counts=lambda a: a["mode"] == "plain")["AP"] == pytest.approx(plain)
    wrong = [detection(square(0, 60, 30), 0.95), *both]  # a false positive: half of the precision in every metric
    assert mask_ap(truth, wrong, counts=lambda a: a["mode"] == "plain")["AP"] == pytest.approx(50)


def test_scores_by_failure_mode_where_the_truth_notes_it(truth_file, tmp_path):
    results = tmp_path / "found.json"
    results.write_text(json.dumps([detection(square(60, 60, 20))]))
    assert "segm_of_mode" not in score(truth_file, results)
    content = json.loads(truth_file.read_text())
    for annotation, mode in zip(content["annotations"], ("plain", "contrast"), strict=True):
        annotation["mode"] = mode
    truth_file.write_text(json.dumps(content))
    by_mode = score(truth_file, results)["segm_of_mode"]
    assert {mode: round(values["AP"]) for mode, values in by_mode.items()} == {"contrast": 100, "plain": 0}


@pytest.mark.parametrize("any_class", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_ap_of_a_mode_is_that_without_the_objects_of_the_others(tmp_path, seed, any_class):
    """Where no object's masks reach another's, against a file without the others' objects and their detections."""
    rng = np.random.default_rng(seed)
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    images, objects, found = [], [], []
    for i in range(1, 9):
        images.append({"id": i, "width": 100, "height": 100, "file_name": f"{i}.png"})
        for x in (0, 50):
            for y in (0, 50):
                mode, category = str(rng.choice(["plain", "contrast"])), int(rng.choice([1, 2]))
                true = encoded(square(x + 5, y + 5, 40))
                where = {"image_id": i, "category_id": category}
                area = {"area": 1600, "bbox": [x + 5, y + 5, 40, 40], "iscrowd": 0}
                objects.append({"id": len(objects) + 1, "segmentation": true, "mode": mode, **where, **area})
                for _ in range(rng.integers(0, 4)):  # loose masks and duplicates
                    part = square(x + 5, y + 5, int(rng.integers(15, 41)))
                    found.append((mode, detection(part, float(rng.random())) | where))
        nothing = detection(square(46, 46, 7), float(rng.random())) | {"image_id": i, "category_id": 1}
        found += [("", nothing)] * int(rng.integers(0, 2))
    for mode in ("plain", "contrast"):
        for name, kept in (("all", objects), ("own", [a for a in objects if a["mode"] == mode])):
            content = {"images": images, "annotations": kept, "categories": categories}
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        own = mask_ap(read_truth(tmp_path / "own.json"), [d for m, d in found if m in ("", mode)], any_class=any_class)
        within = mask_ap(
            read_truth(tmp_path / "all.json"),
            [d for _, d in found],
            any_class=any_class,
            counts=lambda a, mode=mode: a["mode"] == mode,
        )
        assert within == pytest.approx(own)
        assert 5 < own["AP"] < 95


@pytest.mark.parametrize(
    ("left", "counts_in"),
    [  # IoU with the plain object (columns 0 to 40) and the camouflaged one (42 to 82)
        (24, {"plain"}),  # 0.24, 0.17
        (26, {"plain", "camouflage"}),  # 0.20, 0.20: of both alike
        (30, {"camouflage"}),  # 0.14, 0.28
        (74, {"camouflage"}),  # 0, 0.11
        (76, {"plain", "camouflage"}),  # 0, 0.08: on the background
        (90, {"plain", "camouflage"}),  # 0, 0
    ],
)
def test_a_loose_detection_counts_in_the_mode_of_the_object_that_it_overlaps_most(
    truth_file, tmp_path, left, counts_in
):
    """Above two exact detections, it halves the precision of the modes in which it is a false positive."""
    content = json.loads(truth_file.read_text())
    content["annotations"], found = [], [detection(square(35, left, 30), 0.9)]
    for number, (mode, x) in enumerate((("plain", 0), ("camouflage", 42)), 1):
        area = {"area": 1600, "bbox": [x, 30, 40, 40], "iscrowd": 0, "image_id": 1, "category_id": 7}
        true = encoded(square(30, x, 40))
        content["annotations"].append({"id": number, "segmentation": true, "mode": mode, **area})
        found.append(detection(square(30, x, 40), 0.5))
    truth_file.write_text(json.dumps(content))
    (tmp_path / "found.json").write_text(json.dumps(found))
    by_mode = score(truth_file, tmp_path / "found.json")["segm_of_mode"]
    expected = {mode: 50 if mode in counts_in else 100 for mode in ("plain", "camouflage")}
    assert {mode: values["AP"] for mode, values in by_mode.items()} == pytest.approx(expected)


def test_a_false_positive_counts_in_every_mode(truth_file, tmp_path):
    """Both objects are found after one false positive: precision 2/3 for all objects, 1/2 for those of each mode."""
    content = json.loads(truth_file.read_text())
    for annotation, mode in zip(content["annotations"], ("plain", "contrast"), strict=True):
        annotation["mode"] = mode
    truth_file.write_text(json.dumps(content))
    found = [(square(0, 80, 15), 0.9), (square(10, 10, 40), 0.8), (square(60, 60, 20), 0.7)]
    (tmp_path / "found.json").write_text(json.dumps([detection(*one) for one in found]))
    scores = score(truth_file, tmp_path / "found.json")
    assert scores["segm"]["AP"] == pytest.approx(200 / 3)
    assert {mode: values["AP"] for mode, values in scores["segm_of_mode"].items()} == pytest.approx(
        {"contrast": 50, "plain": 50}
    )


@pytest.mark.parametrize("first", [0, -1, 5])
def test_ids_of_objects_may_begin_anywhere(truth_file, first):
    """pycocotools treats an object with id 0 as unmatched."""
    content = json.loads(truth_file.read_text())
    for i, annotation in enumerate(content["annotations"]):
        annotation["id"] = first + i
    truth_file.write_text(json.dumps(content))
    found = [detection(square(10, 10, 40)), detection(square(60, 60, 20))]
    assert mask_ap(read_truth(truth_file), found)["AP"] == pytest.approx(100)
    pytest.importorskip("faster_coco_eval")
    assert fast_ap(truth_file, found, compare="segm")["AP"] == pytest.approx(100)


def test_boxes_have_the_size_of_boxes_on_both_sides(truth_file, tmp_path):
    """A thin mask in a medium box is a medium detection: the false positive with the higher score counts."""
    content = json.loads(truth_file.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
        annotation["area"] = 0
    del content["annotations"][1]
    truth_file.write_text(json.dumps(content))
    masks = np.zeros((2, 100, 100))
    masks[0, 55:95, 55:95] = masks[1, 10:50, 10:50] = np.eye(40)
    found = tmp_path / "found.json"
    found.write_text(json.dumps([detection(masks[0], 0.9), detection(masks[1], 0.5)]))
    result = score(truth_file, found, masks=False)["bbox"]
    assert result["APm"] == pytest.approx(result["AP"]) == pytest.approx(50)
    assert result["APs"] is None


def test_boxes_are_scored_as_far_as_they_are_in_the_image(truth_file, tmp_path):
    """Predicted boxes end at the image: those of the truth that reach beyond can be found exactly, too."""
    content = json.loads(truth_file.read_text())
    boxes = [[-30, 10, 70, 50.0], [60, 60, 90, 90], [5, 5, 0.4, 50], [99.5, 5, 30, 50]]  # the last two: thin inside
    content["annotations"] = [{"id": i, "image_id": 1, "category_id": 7, "bbox": box} for i, box in enumerate(boxes, 1)]
    truth_file.write_text(json.dumps(content))
    masks = np.zeros((2, 100, 100))
    masks[0, 10:60, :40] = masks[1, 60:, 60:] = 1
    found = tmp_path / "found.json"
    found.write_text(json.dumps([detection(mask) for mask in masks]))
    result = score(truth_file, found, masks=False)["bbox"]
    assert result["AP"] == pytest.approx(100)
    assert result["APm"] == pytest.approx(100)
    assert result["APl"] is None, "an area is that of the part inside"
    (row,) = detailed(truth_file, found, masks=False)["per_class"].values()
    assert row == {"AP": 100, "AP50": 100, "AP75": 100, "objects": 2}


def test_a_mode_that_is_no_text_is_none(truth_file, tmp_path):
    content = json.loads(truth_file.read_text())
    for annotation, mode in zip(content["annotations"], (None, "plain"), strict=True):
        annotation["mode"] = mode
    truth_file.write_text(json.dumps(content))
    found = tmp_path / "found.json"
    found.write_text(json.dumps([detection(square(60, 60, 20))]))
    assert {mode: values["AP"] for mode, values in score(truth_file, found)["segm_of_mode"].items()} == {
        "plain": pytest.approx(100)
    }
