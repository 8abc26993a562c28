"""Processes killed at any moment, or with a full disk: all files are complete, and the command resumes."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from misa.engine.runs.checkpoints import newest

ROWS = """
from misa.experiment import Experiment
import json
ROWS = {"small": Experiment.from_values(json.loads('''%s'''))}
"""
# Starts many processes that each import torch.
pytestmark = pytest.mark.slow
LIMIT = 2_000_000  # maximum file size in bytes: less than a checkpoint, more than any other file


@pytest.fixture
def row(small_row, tmp_path):
    """The small row, for two epochs, in a user's file."""
    values = small_row.but(schedule={"epochs": 2}).values()
    (tmp_path / "rows.py").write_text(ROWS % json.dumps(values))
    return f"{tmp_path / 'rows.py'}:small"


def start(arguments, *, limit=None):
    """Start the command as a process; `limit`: maximum size of a file in bytes, to simulate a full disk."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)) if limit else None
    command = [sys.executable, "-m", "misa", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=full
    )


def finish(process):
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def kill(process, seconds):
    """Kill the process after some seconds, unless it has ended."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.communicate()


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def message(error):
    assert "Traceback" not in error, error
    return [line for line in error.strip().splitlines() if line.startswith("misa ")][-1]


def test_a_full_disk_in_training(row, tmp_path):
    command = ["train", row, "--data-root", tmp_path / "data", "--work-dir", tmp_path / "run", "--gpus", "0"]
    status, _, error = finish(start(command, limit=LIMIT))
    assert status == 1
    assert "File too large" in message(error)
    assert newest(tmp_path / "run") is None, "half a checkpoint is not taken for one"
    status, out, error = finish(start(command))
    assert status == 0, error
    assert "damaged" in out
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_a_full_disk_in_export_and_prediction(small_run, tmp_path):
    before = snapshot(small_run.folder)
    status, _, error = finish(start(["export", small_run.folder, tmp_path / "x.pth"], limit=LIMIT))
    assert status == 2
    assert "cannot be written" in message(error)
    assert not list(tmp_path.glob("x.pth*"))
    photos = small_run.source.val.images
    command = ["predict", small_run.folder, photos, "--out", tmp_path / "out", "--score", "0"]
    for limit in (3000, 6000):  # fails at mmengine's copies of mmdet's files; at the record of the images
        status, _, error = finish(start(command, limit=limit))
        assert status == 1, error
        assert "File too large" in message(error)
        assert (tmp_path / "out" / "done.jsonl").exists() is (limit == 6000)
    status, out, error = finish(start(command))
    assert status == 0, error
    assert "in 4 images" in out
    assert len(list((tmp_path / "out" / "masks").glob("*.png"))) == 4
    assert not list((tmp_path / "out").rglob("*.part"))
    assert snapshot(small_run.folder) == before


def test_training_killed_at_any_moment_ends_the_same(row, tmp_path):
    common = ["--data-root", tmp_path / "data", "--gpus", "0", "--work-dir"]
    began = time.monotonic()
    status, _, error = finish(start(["train", row, *common, tmp_path / "whole"]))
    assert status == 0, error
    length = time.monotonic() - began
    rng = random.Random(7)
    for _ in range(4):
        kill(start(["train", row, *common, tmp_path / "killed"]), rng.uniform(0.3, 1.0) * length)
        found = newest(tmp_path / "killed") if (tmp_path / "killed").exists() else None
        assert found is None or "state_dict" in torch.load(found, weights_only=True)
    status, _, error = finish(start(["train", row, *common, tmp_path / "killed"]))
    assert status == 0, error
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed")]
    np.testing.assert_equal(*metrics)
    weights = [torch.load(newest(tmp_path / name), weights_only=True)["state_dict"] for name in ("whole", "killed")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_evaluation_and_export_killed_at_any_moment_change_nothing(small_run, tmp_path):
    folder = shutil.copytree(small_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    before, rng = snapshot(folder), random.Random(7)
    for _ in range(3):
        kill(start(["evaluate", folder, "--gpus", "0"]), rng.uniform(2, 9))
        kill(start(["export", folder, tmp_path / "x.pth"]), rng.uniform(2, 7))
        assert snapshot(folder) == before
        if (tmp_path / "x.pth").exists():
            assert set(torch.load(tmp_path / "x.pth", weights_only=True)) == {"student", "state_dict"}
            (tmp_path / "x.pth").unlink()
    status, _, error = finish(start(["export", folder, tmp_path / "x.pth"]))
    assert status == 0, error
    status, out, error = finish(start(["evaluate", folder, "--gpus", "0"]))
    assert status == 0, error
    assert "masks" in out


def test_sigterm_to_the_whole_group_saves_the_step(row, tmp_path):
    """With workers that load the data, which get the signal, too."""
    command = ["train", row, "--data-root", tmp_path / "data", "--work-dir", tmp_path / "run", "--gpus", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    child = subprocess.Popen(
        [sys.executable, "-m", "misa", *map(str, command), "--workers", "2"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    losses, until = tmp_path / "run" / "losses.jsonl", time.monotonic() + 200
    while not (losses.exists() and losses.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGTERM)
    status, out, error = finish(child)
    assert status == 128 + signal.SIGTERM, error
    assert "Traceback" not in out + error
    assert "stopped by SIGTERM after" in out + error
    status, _, error = finish(start(command))
    assert status == 0, error
