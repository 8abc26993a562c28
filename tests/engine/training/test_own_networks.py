"""A student framework and a semantic teacher are one file and one row each: toy ones train, predict, are exported."""

import importlib
import sys

import numpy as np
import pytest
import torch

import misa.models.students
from misa.engine.prediction.export import export_student, export_torchscript
from misa.engine.prediction.known_boxes import find_boxes
from misa.engine.prediction.student import find, load_student
from misa.engine.reports.evaluate import evaluate
from misa.engine.reports.explore import open_networks
from misa.engine.runs.teacher import load_teacher
from misa.engine.training.labels import student_maps
from misa.engine.training.train import train
from misa.errors import UserError
from misa.experiment import FRAMEWORKS, TINY, Affinity, Distillation, Experiment, Framework, Semantic
from misa.machine import Machine
from misa.models.teacher import table as teachers

STUDENT = '''
"""A toy: what is at the middle of a box multiplies the dense feature; every pixel may be the middle of something."""

import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.detectors.base import BaseDetector
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import nn

from misa.losses.inputs import Positives
from misa.models.students.base import BoxMasks, BoxSupervised, Handover
from misa.models.students.common import objectives, preprocessor
from misa.models.students.table import Implementation
from misa.ops.boxes import box_masks


class Plain(BaseDetector):
    def __init__(self, classes_of_data, width, data_preprocessor):
        super().__init__(data_preprocessor=data_preprocessor)
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=4), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU()
        )
        self.scores = nn.Conv2d(width, classes_of_data, 1)

    def extract_feat(self, images):
        return (self.body(images),)

    def predict(self, images, samples, rescale=True):
        (features,) = self.extract_feat(images)
        for feature, scores, sample in zip(features, self.scores(features).sigmoid(), samples):
            best, where = scores.flatten(1).max(dim=1)
            masks = torch.einsum("dk,dhw->khw", feature.flatten(1)[:, where], feature).sigmoid()
            whole = nn.functional.interpolate(masks[None], sample.ori_shape[:2])[0] > 0.5
            boxes = torch.zeros(len(best), 4)
            sample.pred_instances = InstanceData(
                scores=best, labels=torch.arange(len(best)), masks=whole, bboxes=boxes
            )
        return samples

    def loss(self, images, samples): ...

    def _forward(self, images, samples=None): ...


class Toy(BoxSupervised, Plain):
    def feature_channels(self):
        return self.scores.in_channels

    def dense_feature(self, maps):
        return maps[0]

    def handover(self, images, instances):
        (features,) = self.extract_feat(images)
        h, w = features.shape[-2:]
        image = torch.cat([torch.full_like(own.labels, b) for b, own in enumerate(instances)])
        boxes, labels = torch.cat([own.bboxes for own in instances]), torch.cat([own.labels for own in instances])
        x, y = ((boxes[:, k] + boxes[:, k + 2]) / 8 for k in (0, 1))
        x, y = x.long().clamp(max=w - 1), y.long().clamp(max=h - 1)
        masks = torch.einsum("nd,ndhw->nhw", features[image, :, y, x], features[image])
        loss = nn.functional.cross_entropy(self.scores(features)[image, :, y, x], labels)
        positives = Positives(masks, box_masks(boxes, h, w, stride=4), labels, image, torch.arange(len(labels)))
        return Handover(positives, features, {"loss_cls": loss})

    def masks_of_boxes(self, images, instances):
        masks = self.handover(images, instances).positives.mask_logits.sigmoid()
        parts = masks.split([len(own.labels) for own in instances])
        return [BoxMasks(part, torch.ones(len(part), dtype=torch.bool)) for part in parts]


def config(experiment, classes):
    common = {
        "classes_of_data": len(classes),
        "width": experiment.network.feature_channels,
        "data_preprocessor": preprocessor(experiment),
    }
    return ConfigDict(type=Toy, **common, **objectives(experiment, len(classes)))


toy = Implementation(
    config,
    parameter_groups=lambda experiment: {"scores": {"decay_mult": 0.0}},
    dense_feature=lambda model, maps: model.dense_feature(maps),
)
'''

TEACHER = '''
"""A toy: one convolution a class."""

import torch
from torch import nn

from misa.data.pipeline import MEAN, STD
from misa.losses.inputs import SemanticPrior
from misa.models.teacher.contract import SemanticMaps, TeacherContract, TeacherNetwork
from misa.ops.readings import Classifier


class Toy(TeacherNetwork):
    def __init__(self, classes, width):
        super().__init__()
        self.contract = TeacherContract(tuple(classes), len(classes), MEAN, STD)
        self.body = nn.Conv2d(3, width, 4, stride=4)
        self.head = nn.Conv2d(width, len(classes) + 1, 1)

    def forward(self, images):
        features = self.body(images).relu()
        return SemanticMaps(features, self.head(features), self.head(features))

    @torch.no_grad()
    def prior(self, images):
        return SemanticPrior(self(images).features, self.head.weight.flatten(1)[:-1])

    def last_layer(self):
        weight, bias = self.head.weight.detach().flatten(1), self.head.bias.detach()
        return Classifier(weight[:-1], weight[-1], bias[:-1], bias[-1])


def config(experiment, classes):
    return {"type": Toy, "classes": list(classes), "width": experiment.network.feature_channels}
'''


@pytest.fixture
def room(tmp_path, monkeypatch):
    """The two files, as if they were in the package, and their rows."""
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


def test_an_unknown_teacher_is_named(small_row):
    row = small_row.but(semantic=Semantic(network="semasc"))
    assert Experiment.from_values(row.values()) == row
    with pytest.raises(UserError, match="no semantic teacher 'semasc'; did you mean 'semask'"):
        teachers.network_config(row, ("a",))
