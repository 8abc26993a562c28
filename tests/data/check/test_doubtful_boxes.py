"""Boxes that are not in COCO's form are detected by contradictions; correct ones pass."""

import numpy as np
import pytest

from misa.data.check.doubtful_boxes import Doubts
from misa.data.check.image_files import Listed

IMAGE = Listed(1, "a.jpg", 640, 480)


def drawn(count=40, seed=0):
    """Returns random objects as (x1, y1, x2, y2) in the image."""
    rng = np.random.default_rng(seed)
    first = rng.uniform((0, 0), (500, 360), (count, 2))
    return np.hstack([first, first + rng.uniform(20, 120, (count, 2))]).tolist()


def right(x1, y1, x2, y2):
    return [x1, y1, x2 - x1, y2 - y1]


def verdict(rows):
    doubts = Doubts()
    for row in rows:
        doubts.add(row, IMAGE)
    found = doubts.verdict()
    return None if found is None else found[0]


def polygon(x1, y1, x2, y2):
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def test_nothing_is_said_of_no_boxes():
    assert verdict([]) is None


@pytest.mark.parametrize("seed", range(20))
def test_right_boxes_are_left_alone(seed):
    boxes = drawn(seed=seed)
    assert verdict([{"bbox": right(*box)} for box in boxes]) is None
    whole = [
        {"bbox": right(*box), "segmentation": polygon(*box), "area": (box[2] - box[0]) * (box[3] - box[1])}
        for box in boxes
    ]
    assert verdict(whole) is None


def test_an_object_that_fills_its_image_is_right():
    assert verdict([{"bbox": [0, 0, 640, 480]}] * 5) is None


@pytest.mark.parametrize("seed", range(5))
def test_shares_of_the_image_are_recognised(seed):
    rows = [{"bbox": (np.array(right(*box)) / [640, 480, 640, 480]).tolist()} for box in drawn(seed=seed)]
    assert verdict(rows) == "box-shares"
    assert verdict([*rows[:30], *[{"bbox": [10, 10, 50, 50]}] * 10]) is None


def test_the_images_own_sides_are_recognised():
    assert verdict([{"bbox": [x1, y1, 640, 480]} for x1, y1, *_ in drawn()]) == "box-image-sides"


@pytest.mark.parametrize("known", ["masks", "areas", "borders"])
def test_corners_are_recognised_by_what_they_contradict(known):
    def row(box):
        extra = {"segmentation": polygon(*box)} if known == "masks" else {}
        extra |= {"area": (box[2] - box[0]) * (box[3] - box[1])} if known == "areas" else {}
        return {"bbox": box, **extra}

    boxes = drawn()
    if known != "borders":  # all well inside the image, so that no box exceeds it in either form
        boxes = [(np.array(box) / 4 + 1).tolist() for box in boxes]
    assert verdict(map(row, boxes)) == "box-corners"


def test_a_single_box_beyond_its_image_is_not_taken_as_corners():
    assert verdict([{"bbox": [500.0, 300.0, 620.0, 470.0]}]) is None
