"""Run folders of the first published commit can still be opened, evaluated, predicted with and drawn.

Stored for each distinct network of its rows, in smoke size: the record, and the names and shapes of the checkpoint's
tensors (for the contract its bytes), which get random values here.
"""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from misa.cli import main
from misa.data.source import open_source
from misa.engine.prediction.student import find, load_student
from misa.engine.reports.evaluate import load_run, predict_split
from misa.engine.runs.folder import opened
from misa.engine.runs.scores import DETECTIONS, write_scores
from misa.files import write_json
from tests.helpers import CPU, tiny_experiment

STORED = Path(__file__).with_name("old_runs.json.gz")  # of commit 531f548
RUNS = json.loads(gzip.decompress(STORED.read_bytes()))
TEACHERS = {run["params"]["row"]: run["state"] for run in RUNS if run["params"]["experiment"]["semantic"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two validation images of the embedded scenes."""
    row = tiny_experiment(scenes=(("size", 64), ("train", 2), ("val", 2), ("objects", (1, 2))))
    return open_source(row, tmp_path_factory.mktemp("data")).root


def tensor(name, kind, shape, generator):
    if kind == "uint8":
        return torch.tensor(shape, dtype=torch.uint8)
    if kind != "float32":
        return torch.zeros(shape, dtype=getattr(torch, kind))
    if name.endswith("running_var"):
        return torch.ones(shape)
    return 0.05 * torch.randn(shape, generator=generator)


def write_run(folder, params, state, data):
    generator = torch.Generator().manual_seed(0)
    weights = {name: tensor(name, *about, generator) for name, about in state.items()}
    write_json(folder / "params.json", params | {"data_root": str(data)})
    card = {"experiment": json.dumps(params["experiment"])} if params["experiment"]["semantic"] else {}
    (folder / "checkpoints").mkdir()
    torch.save({"meta": {"epoch": 1}, "state_dict": weights} | card, folder / "checkpoints" / "epoch_1.pth")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stored", RUNS, ids=lambda run: run["params"]["row"])
def test_an_old_run_folder_serves(stored, data, tmp_path, capsys):
    params, teacher = stored["params"], stored["teacher"]
    run = write_run(tmp_path / "run", params, stored["state"], data)
    if teacher is not None:
        like = (
            "teacher:demo"
            if teacher["params"]["experiment"]["network"]["backbone"] == "resnet18"
            else "teacher:coco_swin_b"
        )
        write_run(tmp_path / teacher["folder"], teacher["params"], TEACHERS[like], data)
    out = tmp_path / DETECTIONS
    out.parent.mkdir()
    kept = [] if params["experiment"]["semantic"] else ["--predictions", str(out)]
    assert main(["evaluate", str(run), "--gpus", "0", *kept]) == 0
    assert capsys.readouterr().out
    experiment, source, folder, _ = opened(run)
    if experiment.semantic is None:
        (found,) = find(load_student(run, device="cpu"), [np.zeros((50, 70, 3), np.uint8)], score=0.0)
        assert found.size == (50, 70)
        shutil.copytree(tmp_path / "predictions", folder / "predictions")
    else:
        predict_split(load_run(run, machine=CPU), source, folder, CPU)
    write_scores(experiment, source, folder, params | {"data_root": str(data)})
    if experiment.supervision == "box":
        assert main(["figures", str(run), "--out", str(tmp_path / "figures"), "--random", "1", "--worst", "1"]) == 0
        assert list((tmp_path / "figures").glob("*.png"))
    elif experiment.semantic is None:  # no figure of the paper needs only one of these
        assert main(["inspect", str(run), "--resamples", "5"]) == 0
        assert (run / "inspection.html").is_file()
