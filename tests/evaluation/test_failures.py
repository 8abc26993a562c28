"""Planted errors are classified as their type."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle

from misa.evaluation.failures import BACKGROUND, KINDS, MEANING, TIDE, error_types

SIZE = (60, 80)


def runs(*windows):
    mask = np.zeros(SIZE, np.uint8, order="F")
    for y1, y2, x1, x2 in windows:
        mask[y1:y2, x1:x2] = 1
    return rle.encode(mask)


OBJECTS = {"left": (10, 30, 10, 30), "right": (10, 30, 32, 52)}
ANNOTATIONS = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 1}]
MASKS = [runs(window) for window in OBJECTS.values()]


def detection(*windows, label=1, score=0.9):
    return {"category_id": label, "score": score, "segmentation": runs(*windows)}


CASES = {
    "found": detection((10, 30, 11, 31)),
    "wrong class": detection((10, 30, 11, 31), label=2),
    "missed": detection((50, 58, 60, 70)),
    "merged": detection((10, 30, 10, 52)),
    "leaked": detection((2, 42, 2, 31)),
    "incomplete": detection((10, 16, 10, 30)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_failure_gets_its_name(kind):
    errors = error_types(ANNOTATIONS, MASKS, [CASES[kind]])
    assert errors.outcomes[0].kind == kind
    assert (errors.outcomes[0].detection is None) == (kind == "missed")
    assert errors.outcomes[1].kind == ("merged" if kind == "merged" else "missed")
    assert len(errors.background) == (kind == "missed")


def test_a_merge_over_the_border_of_classes_is_one_too():
    errors = error_types([ANNOTATIONS[0], {"id": 2, "category_id": 2}], MASKS, [CASES["merged"]])
    assert [outcome.kind for outcome in errors.outcomes] == ["merged", "missed"]


def test_the_best_of_several_detections_counts():
    errors = error_types(ANNOTATIONS, MASKS, [CASES["leaked"], CASES["found"], CASES["incomplete"]])
    assert errors.outcomes[0].kind == "found"
    assert errors.outcomes[0].iou == pytest.approx(19 / 21)


def test_good_is_a_threshold():
    assert error_types(ANNOTATIONS, MASKS, [CASES["found"]], good=0.95).outcomes[0].kind in ("leaked", "incomplete")


def test_a_detection_in_a_crowd_is_no_false_positive():
    lonely = CASES["missed"]
    assert error_types([], [], [lonely]).background == [lonely]
    assert error_types([], [], [lonely], crowds=[runs((40, 60, 50, 80))]).background == []


def test_nothing_detected_is_all_missed():
    errors = error_types(ANNOTATIONS, MASKS, [])
    assert [outcome.kind for outcome in errors.outcomes] == ["missed", "missed"]
    assert error_types([], [], []) == ([], [])


def test_every_kind_is_explained():
    assert set(MEANING) == {*KINDS, BACKGROUND}
    assert set(TIDE) == set(MEANING) - {"found"}


WINDOW = st.tuples(st.integers(0, 50), st.integers(1, 59), st.integers(0, 70), st.integers(1, 79)).map(
    lambda w: (w[0], max(w[1], w[0] + 1), w[2], max(w[3], w[2] + 1))
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(WINDOW, st.integers(1, 3)), max_size=4),
    st.lists(st.tuples(WINDOW, st.integers(1, 3)), max_size=5),
)
def test_every_object_has_one_outcome(objects, found):
    annotations = [{"id": i, "category_id": label} for i, (_, label) in enumerate(objects)]
    detections = [detection(window, label=label) for window, label in found]
    errors = error_types(annotations, [runs(window) for window, _ in objects], detections)
    assert [outcome.annotation["id"] for outcome in errors.outcomes] == list(range(len(objects)))
    for outcome in errors.outcomes:
        assert outcome.kind in KINDS
        assert (outcome.kind in ("found", "wrong class")) == (outcome.iou >= 0.5)
    assert len(errors.background) <= len(detections)
