"""An objective is one file and one row: a toy that uses every part of the interface trains, resumes and is exported."""

import importlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch

import misa.objectives
from misa.engine.prediction.export import export_student
from misa.engine.prediction.student import find, load_student
from misa.engine.reports.evaluate import evaluate
from misa.engine.runs.checkpoints import newest
from misa.engine.training.train import train
from misa.errors import Stopped
from misa.experiment import Experiment
from misa.machine import Machine

TOY = '''
"""A toy: the projection, and masks pulled to those of the shadow with a weight that the memory holds."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from misa.experiment import Needs
from misa.objectives.base import BoxObjective, Prepared, Ramp, Term


@dataclass(frozen=True)
class Toy(BoxObjective):
    pull: float = 1.0
    noise: float = 0.1
    ramp: Ramp = Ramp(0.0, 0.5, of="run")
    momentum: float = 0.9

    @property
    def needs(self):
        return Needs(colors=True, shadow=True, structure=2)

    def memory(self, classes, channels):
        import torch

        memory = torch.nn.Module()
        memory.register_buffer("area", torch.full((classes,), 0.5))
        return memory

    def shadow_momentum(self, iteration, total):
        return self.momentum

    def prepare(self, images, instances, memory, generators):
        import torch

        noise = torch.stack([torch.randn(images.shape[1:], generator=g) for g in generators])
        return Prepared(images + self.noise * noise, instances, images)

    def losses(self, step, memory):
        from misa.losses.projection import projection_loss

        masks = step.positives.mask_logits.sigmoid()
        count = max(len(masks), 1)
        assert step.shadow.mask_logits.shape == masks.shape and not step.shadow.mask_logits.requires_grad
        assert 0 <= step.colors.min() and step.colors.max() <= 256
        assert step.features.shape[-2:] == step.colors.shape[-2:] == step.structure.shape[-2:]
        assert (step.truth.labels[step.positives.instance] == step.positives.labels).all()
        assert (step.truth.image[step.positives.instance] == step.positives.image).all()
        weight = memory.area[step.positives.labels][:, None, None]
        pull = (weight * (masks - step.shadow.mask_logits.sigmoid()).abs()).mean(dim=(1, 2)).sum() / count
        return {
            "loss_projection": Term(projection_loss(masks, step.positives.box_masks).sum() / count),
            "loss_pull": Term(self.pull * step.ramp(self.ramp) * pull),
            "loss_structure": Term(step.structure.square().mean(), per="batch"),
        }

    def update(self, step, memory):
        masks = step.positives.mask_logits.sigmoid()
        for label, mask in zip(step.positives.labels.tolist(), masks):
            memory.area[label].lerp_(mask.mean(), 0.1)
        if os.environ.get("TOY_STOPS_AT") == str(step.iteration):
            os.kill(os.getpid(), signal.SIGTERM)
'''


@pytest.fixture
def row(tmp_path, monkeypatch, small_row):
    """The row, whose objective is a file in misa/objectives."""
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "toy.py").write_text(TOY)
    monkeypatch.setattr(misa.objectives, "__path__", [*misa.objectives.__path__, str(tmp_path / "room")])
    importlib.invalidate_caches()
    yield small_row.but(
        affinity=None, objective=importlib.import_module("misa.objectives.toy").Toy(), schedule={"epochs": 3}
    )
    del sys.modules["misa.objectives.toy"]
    monkeypatch.delattr(misa.objectives, "toy")


def weights(folder):
    return torch.load(newest(folder), weights_only=True)["state_dict"]


def test_a_toy_objective_trains_resumes_predicts_and_is_exported(row, tmp_path, monkeypatch):
    assert Experiment.from_values(json.loads(json.dumps(row.values()))) == row
    common = {"data_root": tmp_path / "data", "machine": Machine(gpus=0)}
    run = train(row, work_dir=tmp_path / "whole", **common)
    whole = weights(run.folder)
    own = {name: value for name, value in whole.items() if name.startswith("memory.")}
    assert {name.split(".")[1] for name in own} == {"own", "shadow", "structure"}
    assert not torch.equal(own["memory.own.area"], torch.full_like(own["memory.own.area"], 0.5))
    layer = "mask_head.conv_cls.weight"
    assert not torch.equal(whole[f"memory.shadow.copy.{layer}"], whole[layer])
    assert not torch.equal(own["memory.structure.bias"], torch.zeros(2))  # it learns

    # Stopped within the third epoch and resumed, everything is equal bit for bit.
    monkeypatch.setenv("TOY_STOPS_AT", "7")
    with pytest.raises(Stopped, match="after step 8 of 9"):
        train(row, work_dir=tmp_path / "stopped", **common)
    assert newest(tmp_path / "stopped").name == "epoch_2_step_8.pth"
    monkeypatch.delenv("TOY_STOPS_AT")
    again = train(row, work_dir=tmp_path / "stopped", **common)
    resumed = weights(again.folder)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert run.metrics["segm"] == again.metrics["segm"]

    # State used only in training is not exported, and the rest predicts the same.
    export_student(run.folder, tmp_path / "student.pth")
    exported = torch.load(tmp_path / "student.pth", weights_only=True)
    assert not [name for name in exported["state_dict"] if name.startswith("memory.")]
    assert exported["state_dict"].keys() == {name for name in whole if not name.startswith("memory.")}
    image = np.random.default_rng(0).integers(0, 256, (52, 70, 3), dtype=np.uint8)
    mine, theirs = (load_student(path) for path in (run.folder, tmp_path / "student.pth"))
    assert mine.digest == theirs.digest
    for one, other in zip(find(mine, [image], score=0.0), find(theirs, [image], score=0.0), strict=True):
        assert one.runs == other.runs

    # Scores come from the saved predictions of a run that is reopened from its params.json.
    (run.folder / "metrics.json").unlink()
    assert evaluate(run.folder).metrics["segm"] == run.metrics["segm"]
    shutil.rmtree(tmp_path / "data")


def test_the_draws_of_a_step_do_not_depend_on_the_batch(row):
    from mmdet.structures import DetDataSample

    from misa.models.students.base import Clock, generator_of

    def draw(clock, image):
        return torch.rand(3, generator=generator_of(clock, DetDataSample(metainfo={"img_id": image})))

    assert torch.equal(draw(Clock(3, 9, 1), 5), draw(Clock(3, 9, 1), 5))
    others = [draw(Clock(3, 9, 1), 6), draw(Clock(4, 9, 1), 5), draw(Clock(3, 9, 2), 5)]
    assert not any(torch.equal(draw(Clock(3, 9, 1), 5), other) for other in others)


def test_what_the_student_starts_from_is_the_same_with_and_without_a_memory(row):
    from mmengine.registry import MODELS

    from misa.models.students.table import model_config

    started = []
    for one in (row, row.but(objective=None)):
        torch.manual_seed(0)
        model = MODELS.build(model_config(one, ("a", "b")))
        model.init_weights()
        started.append(model.state_dict())
    with_memory, without = started
    assert all(torch.equal(value, with_memory[name]) for name, value in without.items())
