"""Label maps from a student's masks of given boxes: SOLOv2 and Mask2Former, with known probabilities."""

import numpy as np
import pytest
import torch

from misa.data.label_maps import VOID, read_label_map
from misa.data.semantic import boxed_images
from misa.engine.reports.explore import open_networks
from misa.engine.training.labels import UNSURE, student_maps
from misa.engine.training.train import train
from misa.errors import UserError
from misa.experiment import TINY_MASK2FORMER, Semantic
from misa.models.students.base import BoxMasks
from misa.models.students.mask2former import MISAMask2Former
from misa.models.students.solov2 import MISA
from misa.models.teacher.config import label_folder
from tests.helpers import CPU

SHORT_RUN = {"epochs": 1}


@pytest.fixture(scope="module")
def mask2former(small_row, module_path):
    """Trained with large-scale jittering, like the rows of the tables."""
    row = small_row.but(student="mask2former", network=TINY_MASK2FORMER, schedule=SHORT_RUN)
    row = row.but(augmentation={"jitter": (0.5, 1.5), "crop": 64})
    return train(row, data_root=module_path / "data", work_dir=module_path / "mask2former", machine=CPU)


def test_a_teacher_learns_from_a_mask2formers_masks(mask2former, small_row, module_path):
    assert open_networks(mask2former.folder).example(1).student is not None
    semantic = Semantic(labels="student", student=str(mask2former.folder))
    row = small_row.but(semantic=semantic, schedule=SHORT_RUN)
    run = train(row, data_root=module_path / "data", work_dir=module_path / "teacher", machine=CPU)
    assert 0 <= run.metrics["miou"] <= 100
    background = len(run.source.classes)
    for image in boxed_images(run.source.train, run.source.classes):
        made = read_label_map(label_folder(row, run.folder) / f"{image.image_id}.png")
        assert made.shape == image.size == (52, 70)
        outside = np.ones(made.shape, bool)
        for x1, y1, x2, y2 in image.boxes.round().astype(int):
            outside[y1:y2, x1:x2] = False
        assert (made[outside] == background).all()
        assert set(np.unique(made)) <= {*image.labels, background, VOID}


@pytest.mark.parametrize("student", ["solov2", "mask2former"])
def test_sure_pixels_have_a_class_and_the_others_are_void(student, small_run, mask2former, monkeypatch):
    """Probabilities grow from left to right; the first box of an image with several has no mask."""

    def ramp(self, images, instances):
        assert images.shape == (1, 3, 64, 96)  # 52 x 70 enlarged to 64 x 86, and padded
        (boxes,) = (truth.bboxes for truth in instances)
        answered = torch.arange(len(boxes)) > (0 if len(boxes) > 1 else -1)
        slope = (torch.arange(24) + 0.5) / 24
        return [BoxMasks(slope.expand(len(boxes), 16, 24) * answered[:, None, None], answered)]

    run = small_run if student == "solov2" else mask2former
    monkeypatch.setattr(MISA if student == "solov2" else MISAMask2Former, "masks_of_boxes", ramp)
    several = 0
    images = boxed_images(run.source.train, run.source.classes)
    for image, make in zip(images, student_maps(run.folder, run.source), strict=True):
        slope = np.tile((np.arange(70) + 0.5) / 70 * 86 / 96, (52, 1))
        best, label = np.zeros((52, 70)), np.full((52, 70), len(run.source.classes))
        several += len(image.boxes) > 1
        for n, (x1, y1, x2, y2) in enumerate(image.boxes.round().astype(int)):
            mask = np.zeros((52, 70))
            mask[y1:y2, x1:x2] = 0.5 if len(image.boxes) > 1 and n == 0 else slope[y1:y2, x1:x2]
            label = np.where(mask > best, image.labels[n], label)
            best = np.maximum(mask, best)
        low, high = UNSURE
        expected = np.where(best >= high, label, np.where(best < low, len(run.source.classes), VOID))
        close = np.minimum(abs(best - low), abs(best - high)) < 1e-3
        assert np.array_equal(make()[~close], expected[~close])
        assert close.mean() < 0.1
    assert several


def test_a_student_that_matches_no_boxes_is_a_sentence(small_row, small_run, module_path):
    row = small_row.but(student="boxinst", affinity=None, schedule=SHORT_RUN)
    run = train(row, data_root=module_path / "data", work_dir=module_path / "boxinst", machine=CPU)
    with pytest.raises(UserError, match="is a boxinst, whose masks are not matched to boxes; give the run of"):
        next(student_maps(run.folder, run.source))
