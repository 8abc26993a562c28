import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS

from misa.data.rle import encode
from misa.engine.labelling.masks import answers
from misa.engine.prediction.known_boxes import find_boxes
from misa.engine.prediction.student import Instances, Student, build_student, find, for_inference
from misa.errors import UserError
from misa.experiment import FRAMEWORKS
from misa.models.students.table import model_config
from tests.helpers import tiny_experiment


@pytest.mark.parametrize("backbone", ["resnet18", "swin_t", "efficientnet_lite0", "timm:convnext_atto"])
def test_a_student_of_every_kind_of_backbone_is_opened(tmp_path, backbone):
    """It is built on the meta device first, but mmdet's Swin reads values during construction."""
    row = tiny_experiment(network={"backbone": backbone})
    torch.manual_seed(0)
    weights = MODELS.build(model_config(for_inference(row), ("a", "b"))).state_dict()
    opened = build_student(row, ("a", "b"), path=tmp_path, weights=weights)
    assert not opened.training
    assert all(torch.equal(value, weights[name]) for name, value in opened.state_dict().items())


LIMITS = {"score": 0.5, "keep": 0.5, "per_image": 3}
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def untrained(student, supervision="box", **inference):
    """A student with random weights, whose row has these thresholds."""
    row = tiny_experiment(student=student, supervision=supervision, network=FRAMEWORKS[student].smoke)
    row = for_inference(row.but(inference=inference))
    torch.manual_seed(0)
    model = MODELS.build(model_config(row, ("a", "b")))
    for name, values in model.named_parameters():
        if name.endswith(("solo_cls.bias", "conv_cls.bias", "fc_cls.bias")):
            torch.nn.init.zeros_(values)  # no detection would have any score yet
    return Student(model.eval(), row, ("a", "b"), Path("run"), "0")


@pytest.mark.parametrize(
    ("student", "supervision"),
    [("solov2", "box"), ("condinst", "box"), ("mask2former", "box"), ("solo", "mask"), ("mask_rcnn", "mask")],
)
def test_thresholds_of_a_call_may_be_below_those_of_the_row(student, supervision):
    """mmdet's heads apply the row's first: the result is that of a row with the thresholds of the call."""
    strict = untrained(student, supervision, **LIMITS)
    before = copy.deepcopy([getattr(module, "test_cfg", None) for module in strict.model.modules()])
    (found,) = find(strict, [IMAGE], score=0.0, per_image=30)
    (expected,) = find(untrained(student, supervision, score=0.0, keep=0.0, per_image=30), [IMAGE], score=0.0)
    assert len(found) > 3
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.runs == expected.runs
    assert [getattr(module, "test_cfg", None) for module in strict.model.modules()] == before
    assert len(find(strict, [IMAGE], score=0.0)[0]) <= 3


def test_all_answers_of_mask2former_may_be_asked_for():
    """There are as many as queries times classes, and no more."""
    (found,) = find(untrained("mask2former", per_image=3), [IMAGE], score=0.0, per_image=1000)
    assert 3 < len(found) <= 20 * 2


def test_thresholds_are_restored_after_an_error():
    student = untrained("condinst", **LIMITS)
    with pytest.raises(UserError):
        find(student, [IMAGE, IMAGE[..., 0]], score=0.0, per_image=30)
    assert student.model.test_cfg.score_thr == 0.5
    assert student.model.test_cfg.max_per_img == 3


def test_known_boxes_take_sure_detections_first(monkeypatch):
    """As before, whatever else is detected; others only where a box is left."""
    runs = [encode(mask) for mask in boxed_masks()]
    found = Instances((64, 96), np.array([0.9, 0.2, 0.1]), ("a", "b", "b"), CORNERS[[0, 0, 1]], tuple(runs))
    monkeypatch.setattr("misa.engine.prediction.known_boxes.find", lambda *_, **__: [found])
    student = untrained("condinst", score=0.5)
    answers = find_boxes(student, IMAGE, CORNERS + 1)
    assert answers.prompts == (0, 1)
    assert answers.labels == ("a", "b")
    # A sure detection that only touches the box is a neighbor's.
    one = Instances((64, 96), np.array([0.9, 0.2]), ("a", "b"), CORNERS[[1, 0]], (runs[2], runs[0]))
    monkeypatch.setattr("misa.engine.prediction.known_boxes.find", lambda *_, **__: [one])
    alone = find_boxes(student, IMAGE, CORNERS[:1] + np.array([0, 0, 14, 5]))
    assert alone.labels == ("b",)
    # And no detection is the answer to two boxes.
    single = Instances((64, 96), np.array([0.9]), ("a",), CORNERS[:1], (runs[0],))
    monkeypatch.setattr("misa.engine.prediction.known_boxes.find", lambda *_, **__: [single])
    assert find_boxes(student, IMAGE, CORNERS[[0, 0]] + np.array([[0, 0, 0, 0], [0, 0, 9, 9]])).prompts == (0,)


CORNERS = np.array([[3.0, 4, 40, 50], [50, 10, 90, 60]])


def boxed_masks():
    for x1, y1, x2, y2 in CORNERS[[0, 0, 1]].astype(int):
        mask = np.zeros((64, 96), bool)
        mask[y1:y2, x1:x2] = True
        yield mask


def test_only_a_student_with_such_a_threshold_takes_one():
    for student in ("condinst", "mask2former"):
        with pytest.raises(UserError, match="mask is a threshold of solov2 students"):
            find(untrained(student), [IMAGE], mask=0.4)


@pytest.mark.parametrize("box", [[95.9999999, 3, 96, 30], [3, 63.9999999, 40, 64]])
def test_a_box_without_a_pixel_at_the_border_has_no_mask(box):
    """In float32 its center is the image's own border, where no cell is."""
    found = find_boxes(untrained("solov2", score=0.0, keep=0.0, mask=0.01), IMAGE, [box, [3, 4, 60, 50]])
    assert 0 not in found.prompts


def test_masks_of_labels_are_cut_where_predictions_are():
    """Mask2Former's are cut at 0.5, whatever its row says; SOLOv2's by the row."""

    def pixels(student, threshold):
        made = untrained(student, mask=threshold)
        if student == "mask2former":
            made.model.panoptic_head.mask_embed[-1].weight.data *= 50  # beyond the 0.4 to 0.6 of random weights
        (found,) = answers(made, IMAGE, np.array([[3.0, 4, 60, 50]]), ["a"])
        assert not found.fallback
        return int(found.part.pixels.sum())

    assert 0 < pixels("mask2former", 0.5) < 57 * 46
    assert pixels("mask2former", 0.1) == pixels("mask2former", 0.5) == pixels("mask2former", 0.9)
    assert 57 * 46 > pixels("solov2", 0.7) > pixels("solov2", 0.9)


def test_an_exported_row_names_no_start_of_the_training():
    """It is a path of another machine, and the weights are in the file."""
    row = tiny_experiment()
    assert for_inference(row.but(start="runs/other")).values() == for_inference(row).values()
