"""The objectives of other papers train, and a run that was stopped in the middle of their memory resumes to the bit."""

import os
import shutil
import signal

import pytest
import torch

from misa.engine.runs.checkpoints import newest
from misa.engine.training.train import train
from misa.errors import Stopped
from misa.objectives.base import Ramp
from misa.objectives.box2mask import Box2Mask
from misa.objectives.boxinst import BoxInst
from misa.objectives.discobox import DiscoBox

ROWS = {
    "box2mask": {"objective": Box2Mask()},
    "boxinst": {"student": "condinst", "objective": BoxInst(ramp=Ramp(0, 8), bottom_rows=0)},
    "discobox": {"objective": DiscoBox(gate=10.0, shadow_start=Ramp(4, 4), momentum=0.9)},
}


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
    if name == "discobox":
        layer = "mask_head.conv_cls.weight"
        assert not torch.equal(expected[f"memory.shadow.copy.{layer}"], expected[layer])
        assert expected["memory.own.running"] < 2
    shutil.rmtree(tmp_path / "whole")
    shutil.rmtree(tmp_path / "stopped")
