"""Mean IoU against a case by hand and a loop over pixels."""

import numpy as np
import pytest

from misa.evaluation.miou import confusion, iou, miou


def test_a_case_by_hand():
    truth = np.array([[0, 0, 1, 1], [2, 2, 2, 255]], np.uint8)
    predicted = np.array([[0, 1, 1, 1], [2, 2, 0, 0]], np.uint8)
    scores = miou([(truth, predicted)], ("a", "b"))
    # a: 1 hit of 2 true + 1 false (the void pixel does not count); b: 2 of 3; background: 2 of 3
    assert scores["iou"] == {
        "a": pytest.approx(100 / 3),
        "b": pytest.approx(200 / 3),
        "background": pytest.approx(200 / 3),
    }
    assert scores["miou"] == pytest.approx(500 / 9)
    assert scores["miou_foreground"] == pytest.approx(50)
    assert scores["pixel_accuracy"] == pytest.approx(500 / 7)


def test_against_a_loop_over_pixels():
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(3):
        truth = rng.integers(0, 4, (9, 7)).astype(np.uint8)
        truth[rng.random(truth.shape) < 0.1] = 255
        pairs.append((truth, rng.integers(0, 4, (9, 7)).astype(np.uint8)))
    expected = []
    for c in range(4):
        hit = union = 0
        for truth, predicted in pairs:
            for t, p in zip(truth.flat, predicted.flat, strict=True):
                if t != 255:
                    hit += t == c and p == c
                    union += t == c or p == c
        expected.append(100 * hit / union)
    scores = miou(pairs, ("a", "b", "c"))
    assert list(scores["iou"].values()) == pytest.approx(expected)
    assert scores["miou"] == pytest.approx(np.mean(expected))


def test_an_absent_class_is_left_out_and_a_wrongly_predicted_one_is_not():
    truth = np.zeros((2, 2), np.uint8)
    scores = miou([(truth, np.array([[0, 0], [0, 2]], np.uint8))], ("a", "b"))
    assert scores["iou"] == {"a": 75.0, "b": None, "background": 0.0}
    assert scores["miou"] == pytest.approx(37.5)


def test_the_truth_itself_scores_a_hundred():
    truth = np.array([[0, 1, 255]], np.uint8)
    assert miou([(truth, np.array([[0, 1, 0]], np.uint8))], ("a",))["miou"] == 100


def test_nothing_at_all_stays_unmeasured():
    assert miou([], ("a",))["miou"] is None
    assert np.isnan(iou(np.zeros((2, 2), np.int64))).all()


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="one size"):
        confusion(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), 2)
    with pytest.raises(ValueError, match="classes 0 to 1"):
        confusion(np.zeros((1, 1), np.uint8), np.full((1, 1), 2, np.uint8), 2)
