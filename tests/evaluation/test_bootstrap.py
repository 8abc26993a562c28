"""Scores computed from matches equal pycocotools'; intervals are correct."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from misa.evaluation.ap import mask_ap, matched
from misa.evaluation.bootstrap import average_precision, estimates, image_scores, matches_of, scores, worst_images


def runs(box, size=(160, 160)):
    mask = np.zeros(size, np.uint8, order="F")
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    found = rle.encode(mask)
    return {"size": list(size), "counts": found["counts"].decode()}


@pytest.fixture(scope="module")
def example():
    """Objects of three sizes and classes in 18 images; shifted, missed, duplicate and false detections; crowds."""
    rng = np.random.default_rng(3)
    images, objects, detections = [], [], []
    for i in range(1, 19):
        images.append({"id": i, "width": 160, "height": 160, "file_name": f"{i}.png"})
        for _ in range(int(rng.integers(0, 5))):
            w, h = (int(v) for v in rng.integers(8, 120, 2))
            x, y = int(rng.integers(0, 160 - w)), int(rng.integers(0, 160 - h))
            category, crowd = int(rng.integers(1, 4)), int(rng.random() < 0.1)
            objects.append(
                {"id": len(objects) + 1, "image_id": i, "category_id": category, "bbox": [x, y, w, h], "area": w * h}
                | {"iscrowd": crowd, "segmentation": runs((x, y, w, h))}
            )
            for _ in range(int(rng.integers(0, 3))):
                shift = rng.integers(-6, 7, 2)
                box = (max(x + shift[0], 0), max(y + shift[1], 0), w, h)
                label = category if rng.random() < 0.8 else 1 + category % 3
                score = round(float(rng.random()), 1)  # with ties
                detections.append({"image_id": i, "category_id": label, "score": score, "segmentation": runs(box)})
    categories = [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "bird", "none of these"), 1)]
    truth = COCO()
    truth.dataset = {"images": images, "annotations": objects, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth, detections


@pytest.mark.parametrize(("count", "given"), [(2, False), (9, False), (10, True)])
def test_a_few_images_have_no_interval(example, count, given):
    """As `misa guidance` has none: over few images a bootstrap is far too narrow."""
    truth, detections = example
    images = sorted({a["image_id"] for a in truth.dataset["annotations"] if not a["iscrowd"]})[:count]
    images += sorted(truth.imgs.keys() - {a["image_id"] for a in truth.dataset["annotations"]})  # without objects
    found = estimates(matches_of(matched(truth, detections, images=images)), resamples=50)
    assert (found["AP"].low is not None, found["AP"].high is not None) == (given, given)


def test_a_size_or_class_in_a_few_of_many_images_has_no_interval(example):
    truth, detections = example
    matches = matches_of(matched(truth, detections))
    found = estimates(matches, resamples=20)
    images = {
        name: len({a["image_id"] for a in truth.dataset["annotations"] if a["category_id"] == i and not a["iscrowd"]})
        for i, name in enumerate(matches.classes, 1)
    }
    known = {name: found[f"class {name}"].low is not None for name in images}
    assert known == {name: count >= 10 for name, count in images.items()}
    assert found["AP"].low is not None
    assert not all(known.values())


def test_the_whole_is_what_pycocotools_says(example):
    truth, detections = example
    expected = mask_ap(truth, detections)
    found = estimates(matches_of(matched(truth, detections)), resamples=0)
    for name, value in expected.items():
        assert found[name].value == (None if value is None else pytest.approx(value, abs=1e-9)), name
        assert found[name].low is None
    for name in ("cat", "dog", "bird"):
        alone = mask_ap(truth, detections, categories=[name])["AP"]
        assert found[f"class {name}"].value == pytest.approx(alone, abs=1e-9)
    assert found["class none of these"].value is None
    assert found["AP"].objects == sum(not a["iscrowd"] for a in truth.dataset["annotations"])


@pytest.mark.parametrize("chosen", [[1, 2, 3], [4], list(range(2, 13, 2))])
def test_a_part_of_the_images_is_what_pycocotools_says(example, chosen):
    truth, detections = example
    matches = matches_of(matched(truth, detections))
    weights = np.array([int(image in chosen) for image in matches.images])
    found = scores(matches, weights)
    for value, expected in zip(found, mask_ap(truth, detections, images=chosen).values(), strict=False):
        assert (np.isnan(value) and expected is None) or value == pytest.approx(expected, abs=1e-9)


def test_a_doubled_image_is_two_of_them(example):
    """Compared with pycocotools on data that really contains the images twice, with distinct scores."""
    truth, detections = example
    detections = [{**d, "score": d["score"] + i * 1e-5} for i, d in enumerate(detections)]
    weights = np.array([2, 0, 1] * 6)
    images, objects, results = [], [], []
    for copy in range(2):
        for image, weight in zip(truth.dataset["images"], weights, strict=True):
            if copy < weight:
                number = image["id"] + 100 * copy
                images.append({**image, "id": number})
                own = [a for a in truth.dataset["annotations"] if a["image_id"] == image["id"]]
                objects += [{**a, "id": a["id"] + 1000 * copy, "image_id": number} for a in own]
                results += [{**d, "image_id": number} for d in detections if d["image_id"] == image["id"]]
    twice = COCO()
    twice.dataset = {"images": images, "annotations": objects, "categories": truth.dataset["categories"]}
    with contextlib.redirect_stdout(io.StringIO()):
        twice.createIndex()
    expected = [np.nan if value is None else value for value in mask_ap(twice, results).values()]
    found = scores(matches_of(matched(truth, detections)), weights)[:6]
    np.testing.assert_allclose(found, expected, atol=1.5)  # a tie of copies is one step instead of two
    assert abs(found[0] - expected[0]) < 0.5


def test_each_image_alone(example):
    truth, detections = example
    found = image_scores(matches_of(matched(truth, detections)))
    for image, value in found.items():
        expected = mask_ap(truth, detections, images=[image])["AP"]
        assert value == (None if expected is None else pytest.approx(expected, abs=1e-9))


def test_the_worst_images_are_of_lowest_ap_then_of_most_objects(example):
    truth, detections = example
    matches = matches_of(matched(truth, detections))
    counts = {i: sum(not a["iscrowd"] for a in truth.imgToAnns[i]) for i in truth.imgs}
    assert matches.objects() == counts
    found = image_scores(matches)
    by_ap = worst_images(found, counts, 99)
    assert set(by_ap) == {i for i, count in counts.items() if count}
    assert [found[i] for i in by_ap] == sorted(value for value in found.values() if value is not None)
    ties = worst_images({i: None if value is None else 0.0 for i, value in found.items()}, counts, 9)
    assert [counts[i] for i in ties] == sorted(counts.values(), reverse=True)[:9]
    assert ties != sorted(ties)


def test_intervals_hold_the_value_and_narrow_with_the_images(example):
    truth, detections = example
    matches = matches_of(matched(truth, detections))
    found = estimates(matches, resamples=200, seed=1)
    assert sum(estimate.low is not None for estimate in found.values()) > 3
    for estimate in found.values():
        if estimate.value is not None and estimate.low is not None:
            assert estimate.low < estimate.value < estimate.high
    assert estimates(matches, resamples=200, seed=1) == found, "the seed decides"
    many = np.tile(np.arange(18), 9)
    copies = type(matches)(
        tuple(range(162)),
        matches.classes,
        {
            key: cell._replace(
                right=np.repeat(cell.right, 9, axis=1),
                wrong=np.repeat(cell.wrong, 9, axis=1),
                image=(cell.image[:, None] + 18 * np.arange(9)).reshape(-1),
                objects=cell.objects[many],
            )
            for key, cell in matches.cells.items()
        },
    )
    narrow = estimates(copies, resamples=200, seed=1)["AP"]
    width = found["AP"].high - found["AP"].low
    assert (narrow.high - narrow.low) / width == pytest.approx(1 / 3, abs=0.15), "by the root of nine times as many"


def test_nothing_detected_is_zero_and_no_objects_are_nothing(example):
    truth, _ = example
    matches = matches_of(matched(truth, []))
    found = estimates(matches, resamples=20)
    assert (found["AP"].value, found["AP"].low, found["AP"].high) == (0.0, 0.0, 0.0)
    assert np.isnan(average_precision(matches.cells["none of these", "all"], np.ones(18, int))).all()


def test_the_thresholds_are_pycocotools(example):
    evaluation = matched(*example)
    assert isinstance(evaluation, COCOeval)
    assert (evaluation.params.iouThrs[0], evaluation.params.iouThrs[5]) == (0.5, 0.75)
    assert evaluation.params.areaRngLbl == ["all", "small", "medium", "large"]
