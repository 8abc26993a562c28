"""The objectives of other papers train, and an interrupted run resumes bit for bit, including their memory."""

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from misa.engine.prediction.export import export_student
from misa.engine.prediction.student import find, load_student
from misa.engine.runs.checkpoints import newest
from misa.engine.training.train import train
from misa.errors import Stopped
from misa.experiment import TINY_MASK2FORMER
from misa.objectives.base import Ramp
from misa.objectives.box2mask import Box2Mask
from misa.objectives.boxinst import BoxInst
from misa.objectives.boxteacher import BoxTeacher
from misa.objectives.discobox import Bank, DiscoBox
from misa.objectives.sim import SIM

BANK = Bank(slots=3, least=2, grid=3, side=8, keys=1, gate=10.0, form="intended")
LATE_SIM = SIM(ramp=Ramp(0, 8), bottom_rows=0, pseudo_start=Ramp(2, 2), pseudo_ramp=Ramp(0, 2), momentum=0.7, sure=0.4)
ROWS = {
    "box2mask": {"objective": Box2Mask()},
    "boxinst": {"student": "condinst", "objective": BoxInst(ramp=Ramp(0, 8), bottom_rows=0)},
    "discobox": {"objective": DiscoBox(gate=10.0, shadow_start=Ramp(4, 4), momentum=0.9)},
    "discobox_bank": {"objective": DiscoBox(gate=10.0, shadow_start=Ramp(4, 4), momentum=0.9, bank=BANK)},
    "boxteacher": {
        "student": "condinst",
        "objective": BoxTeacher(ramp=Ramp(0, 8), pseudo_ramp=Ramp(0, 4), bottom_rows=0, momentum=0.7, overlap=0.05),
        "inference": {"from_shadow": True, "rescore": True},
    },
    "sim": {
        "student": "condinst",
        "objective": LATE_SIM,
    },
    "sim_paste": {"student": "condinst", "objective": dataclasses.replace(LATE_SIM, paste=5, sure=0.3)},
}
QUERIES = {"student": "mask2former", "network": TINY_MASK2FORMER}
ROWS |= {f"mask2former_{name}": ROWS[name] | QUERIES for name in ("discobox_bank", "sim_paste")}


def check_that_the_copy_predicts(run, exported, stored):
    """Check that a run and its exported student use the EMA weights as the student's and predict the same."""
    export_student(run, exported)
    written = torch.load(exported, weights_only=True)["state_dict"]
    assert written.keys() == {name for name in stored if not name.startswith("memory.")}
    assert all(torch.equal(value, stored[f"memory.shadow.copy.{name}"]) for name, value in written.items())
    assert not all(torch.equal(value, stored[name]) for name, value in written.items())
    image = np.random.default_rng(0).integers(0, 256, (52, 70, 3), dtype=np.uint8)
    mine, theirs = load_student(run), load_student(exported)
    assert mine.digest == theirs.digest
    for one, other in zip(find(mine, [image], score=0.0), find(theirs, [image], score=0.0), strict=True):
        assert len(one)
        assert one.runs == other.runs
        assert (one.scores == other.scores).all()


def weights(folder):
    return torch.load(newest(folder), weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_resumes_to_the_bit(name, tmp_path, monkeypatch, small_row):
    row = small_row.but(affinity=None, schedule={"epochs": 3}, **ROWS[name])
    whole = train(row, work_dir=tmp_path / "whole", data_root=tmp_path / "data")
    expected = weights(whole.folder)

    kind = type(row.objective)
    update = kind.update

    def stops(self, step, memory):
        update(self, step, memory)
        if step.iteration == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "update", stops)
        with pytest.raises(Stopped, match="after step 8 of 9"):
            train(row, work_dir=tmp_path / "stopped", data_root=tmp_path / "data")
    again = train(row, work_dir=tmp_path / "stopped", data_root=tmp_path / "data")
    resumed = weights(again.folder)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in expected.items())
    assert whole.metrics["segm"] == again.metrics["segm"]
    if name.endswith("sim_paste"):
        logs = [(whole.folder / "losses.jsonl"), (again.folder / "losses.jsonl")]
        pasted = [[json.loads(line)["loss_paste"] for line in log.read_text().splitlines()] for log in logs]
        assert pasted[0][8] > 0  # after the resume
        assert pasted[0][8] == pasted[1][-1]
    if name.endswith("discobox_bank"):
        assert expected["memory.own.filled"].sum() > 0
        assert expected["memory.own.features"].any()
    if name == "discobox":
        layer = "mask_head.conv_cls.weight"
        assert not torch.equal(expected[f"memory.shadow.copy.{layer}"], expected[layer])
        assert expected["memory.own.running"] < 2
    if name == "boxteacher":
        check_that_the_copy_predicts(whole.folder, tmp_path / "exported.pth", expected)
    shutil.rmtree(tmp_path / "whole")
    shutil.rmtree(tmp_path / "stopped")
