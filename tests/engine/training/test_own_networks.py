"""A student framework and a semantic teacher are one file and one row each: those of the documentation."""

import importlib
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import misa.models.students
from misa.engine.prediction.export import export_student, export_torchscript
from misa.engine.prediction.known_boxes import find_boxes
from misa.engine.prediction.student import find, load_student
from misa.engine.reports.evaluate import evaluate
from misa.engine.reports.explore import open_networks
from misa.engine.reports.guidance import READINGS, measure_guidance
from misa.engine.runs.teacher import load_teacher
from misa.engine.training.labels import student_maps
from misa.engine.training.train import train
from misa.errors import UserError
from misa.experiment import FRAMEWORKS, TINY, Affinity, Distillation, Experiment, Framework, Semantic
from misa.machine import Machine
from misa.models.teacher import table as teachers
from misa.ops.readings import class_probabilities
from tests.helpers import page_code

STUDENT, TEACHER = page_code("student.md"), page_code("teacher.md")


@pytest.fixture
def room(tmp_path, monkeypatch):
    """The two files, importable as part of the package, and their rows."""
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "toy.py").write_text(STUDENT)
    (tmp_path / "room" / "toy_teacher.py").write_text(TEACHER)
    monkeypatch.setattr(misa.models.students, "__path__", [*misa.models.students.__path__, str(tmp_path / "room")])
    monkeypatch.setitem(FRAMEWORKS, "toy", Framework(supervision=("box",)))
    monkeypatch.syspath_prepend(tmp_path / "room")
    importlib.invalidate_caches()
    monkeypatch.setitem(teachers.TEACHERS, "toy", importlib.import_module("toy_teacher").config)
    yield tmp_path
    for name in ("toy_teacher", "misa.models.students.toy"):
        sys.modules.pop(name, None)
    monkeypatch.delattr(misa.models.students, "toy", raising=False)


def short(row, **changes):
    return row.but(**changes, schedule={"epochs": 1, "batch": 3})


def test_a_toy_student_trains_predicts_is_evaluated_and_exported(room, small_row):
    row = short(small_row, student="toy")
    assert row.smoke().network == TINY
    run = train(row, data_root=room / "data", work_dir=room / "run", machine=Machine(gpus=0))
    assert evaluate(run.folder, machine=Machine(gpus=0)).metrics["segm"] == run.metrics["segm"]

    export_student(run.folder, room / "toy.pth")
    mine, theirs = load_student(run.folder), load_student(room / "toy.pth")
    assert mine.digest == theirs.digest
    image = np.random.default_rng(0).integers(0, 256, (52, 70, 3), dtype=np.uint8)
    (found,), (again,) = find(mine, [image], score=0.0), find(theirs, [image], score=0.0)
    assert found.runs == again.runs
    answers = find_boxes(mine, image, np.array([[5.0, 5, 60, 45]]), [mine.classes[0]])
    assert set(answers.labels) <= {mine.classes[0]}
    with pytest.raises(UserError, match="TorchScript is there for solov2 students"):
        export_torchscript(run.folder, room / "toy.pt")

    assert open_networks(run.folder).example(run.source.train and 1).student is not None
    assert len(list(student_maps(run.folder, run.source))) == 6


def test_a_toy_student_is_refused_what_it_does_not_learn_from(room, small_row):
    with pytest.raises(ValueError, match="'toy' is a student: it takes supervision='box', not 'mask'"):
        small_row.but(student="toy", supervision="mask")
    with pytest.raises(ValueError, match=r"student is 'toi'; choose one of solov2, .*toy"):
        small_row.but(student="toi")


def test_a_toy_teacher_trains_and_a_student_learns_from_it(room, small_row):
    (room / "own.py").write_text(
        "from misa.experiment import Experiment\n"
        f"ROWS = {{'toy': Experiment.from_values({short(small_row, semantic=Semantic(network='toy')).values()!r})}}\n"
    )
    row = short(
        small_row,
        teacher=f"{room / 'own.py'}:toy",
        distillation=Distillation(),
        affinity=Affinity(saliency=True),
    )
    run = train(row, data_root=room / "data", work_dir=room / "run", machine=Machine(gpus=0))
    (place,) = (path.parent for path in room.glob("own-toy-*/metrics.json"))
    teacher = load_teacher(place, classes=run.source.classes)
    assert type(teacher).__module__ == "toy_teacher"
    assert "miou" in evaluate(place, machine=Machine(gpus=0)).metrics
    torch.manual_seed(0)
    assert (teacher.prior(torch.randn(1, 3, 64, 96)).features >= 0).all()
    assert "loss_distillation" in (run.folder / "losses.jsonl").read_text()
    guidance = measure_guidance(run.folder, images=2, readings={"probability": READINGS["probability"]})
    assert ("probability", "local") in guidance.pulls


def test_the_class_maps_of_a_guidance_are_those_of_the_teachers_own_output(room):
    torch.manual_seed(0)
    own = teachers.TEACHERS["toy"](Experiment(data="demo"), ("hen", "cat"))
    toy = own.pop("type")(**own)
    images = torch.randn(1, 3, 64, 96)
    expected = toy(images).logits.softmax(dim=1)[:, :2]
    assert_close(class_probabilities(toy.prior(images).features, toy.last_layer()), expected)


def test_an_unknown_teacher_is_named(small_row):
    row = small_row.but(semantic=Semantic(network="semasc"))
    assert Experiment.from_values(row.values()) == row
    with pytest.raises(UserError, match="no semantic teacher 'semasc'; did you mean 'semask'"):
        teachers.network_config(row, ("a",))
