"""The log: lines that fit a terminal, explained losses, and a live curve in a notebook."""

import base64
import json
import types

import cv2
import numpy as np
import pytest
import torch

from misa.engine.training import cost, watch
from misa.engine.training.cost import measured_step
from misa.engine.training.train import train
from misa.engine.training.watch import MEANING, WIDTH, FollowingRun, Progress, explained
from misa.files import write_json
from misa.machine import Machine
from misa.rows import find_row

TEACHER = ("outside", "class", "sure", "projection", "global", "local", "stages")
STUDENT = ("cls", "projection", "global", "local", "distillation")


def run(progress, terms, steps=40):
    runner = types.SimpleNamespace(iter=0, max_iters=steps, epoch=0, max_epochs=12)
    progress.before_train(runner)
    for step in range(steps):
        runner.iter, runner.epoch = step, step // 4
        losses = {"loss": torch.tensor(46.42), **{f"loss_{name}": torch.tensor(39.41) for name in terms}}
        health = {"mask_fill": 0.87, "mask_is_box": 0.0, **{f"gradient_{name}": 0.2 for name in terms}}
        watched = {name: torch.tensor(value) for name, value in health.items()} if step % 20 == 0 else {}
        progress.after_train_iter(runner, step, outputs=losses | watched)


@pytest.mark.parametrize("terms", [TEACHER, STUDENT], ids=["teacher", "student"])
def test_lines_fit_a_terminal_and_columns_stand_below_their_names(tmp_path, capsys, terms):
    run(Progress(str(tmp_path / "log.txt"), about="batch 8"), terms)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "batch 8"
    assert max(map(len, lines)) <= WIDTH
    (head,) = [line for line in lines if line.endswith("s/step   left")]
    steps = [line for line in lines if line.startswith("epoch ")]
    assert len(steps) == 21
    assert "epoch 1/12 step 1/40" in steps[0]
    for name in ("loss", *terms):
        end = head.index(f" {name}") + len(name) + 1
        assert all(line[end - 5 : end] in ("46.42", "39.41") for line in steps), name
    explanation = " ".join(lines[1 : lines.index(head)])
    assert all(f"{name}: {MEANING[name]}" in explanation for name in terms)
    assert all(line.endswith("20%") for line in lines if "share of the gradient" in line)
    assert sum("masks fill 87% of their boxes" in line for line in lines) == 2  # when measured, never repeated
    assert len((tmp_path / "log.txt").read_text().splitlines()) == len(lines)


def test_names_without_an_explanation_stand_for_themselves():
    assert explained({"loss": 1.0, "own": 2.0}) == []


@pytest.mark.parametrize(
    ("later", "after_10", "at_the_end"),
    [
        ((), "1:00", "0:00"),  # 30 steps of 2 s
        ((FollowingRun(60),), "~4:00", "~3:00"),  # and 60 steps, each a guess of 1.5 of these
        ((FollowingRun(60, 0.5),), "~1:30", "~0:30"),  # and 60 steps of 0.5 s, as measured
        ((FollowingRun(60, 0.5), FollowingRun(60)), "~4:30", "~3:30"),
        ((FollowingRun(1, 0.001),), "~1:01", "~0:01"),  # rounded up
    ],
)
def test_the_time_left_is_that_of_all_parts(tmp_path, capsys, monkeypatch, later, after_10, at_the_end):
    """A step of this stage takes 2 s, the first one 100 s, which is not used to predict the others."""
    clock = iter([0.0, *(100.0 + 2 * step for step in range(40)), *[0.0] * 99])
    moments = {}

    def now():
        return moments["now"]

    monkeypatch.setattr(watch.time, "monotonic", now)
    moments["now"] = next(clock)
    progress = Progress(str(tmp_path / "log.txt"), lines=4)
    runner = types.SimpleNamespace(iter=0, max_iters=40, epoch=0, max_epochs=1)
    progress.later = later
    progress.before_train(runner)
    for step in range(40):
        runner.iter, moments["now"] = step, next(clock)
        progress.after_train_iter(runner, step, outputs={"loss": torch.tensor(1.0)})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert lines[0].split()[-2:] == ["100.00", "?"]
    assert lines[1].split()[-2:] == ["2.00", after_10]
    assert lines[-1].split()[-2:] == ["2.00", at_the_end]
    assert max(map(len, lines)) <= WIDTH


def test_a_step_is_all_micro_batches_of_it(tmp_path, capsys, monkeypatch):
    """Four micro-batches of 2 s: a step of 8 s, 1.5 times as long in the training that follows.

    By the other clock the k-th step takes 4 (k + 1) s, from 0, so that a wrong boundary shows.
    """
    clock = {"now": 0.0, "cost": 0.0}
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock["cost"])
    progress, measured = Progress(str(tmp_path / "log.txt"), lines=4, accumulate=4), cost.Cost(str(tmp_path), 4)
    progress.later = [FollowingRun(10)]
    runner = types.SimpleNamespace(iter=0, max_iters=40, epoch=0, max_epochs=1)
    for hook in (progress, measured):
        hook.before_train(runner)
    for step in range(40):
        runner.iter = step
        clock["now"] += 2
        clock["cost"] += 1 + step // 4
        for hook in (progress, measured):
            hook.after_train_iter(runner, step, outputs={"loss": torch.tensor(1.0)})
    measured.after_train(runner)
    found = json.loads((tmp_path / "cost.json").read_text())
    assert (found["steps"], found["seconds_per_step"]) == (10, 24.0)
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")][-1]
    assert last.split()[-2:] == ["2.00", "~2:00"]


def test_a_step_is_measured_by_a_run_of_the_same_row_on_the_same_device(tmp_path):
    row = find_row("demo:box")
    assert measured_step(row, tmp_path / "nowhere") is None
    broken, other, gpu, own = (tmp_path / name for name in "abcd")
    for folder, experiment, device, seconds in [
        (other, find_row("demo:misa"), "cpu", 1.0),
        (gpu, row, "another device", 2.0),
        (own, row, "cpu", 3.0),
    ]:
        folder.mkdir()
        write_json(folder / "params.json", {"digest": experiment.digest()})
        assert measured_step(row, tmp_path) is None
        write_json(folder / "cost.json", {"device": device, "seconds_per_step": seconds})
    broken.mkdir()
    (broken / "cost.json").write_text("{")
    assert measured_step(row, tmp_path) == 3.0


def test_a_notebook_sees_one_display_in_place_of_the_lines(tmp_path, capsys, monkeypatch):
    shown = []

    class Display:
        def __init__(self, runner):
            pass

        def show(self, runner, values, words, step):
            shown.append((values, words, step))

    monkeypatch.setattr(watch, "in_notebook", lambda: True)
    monkeypatch.setattr(watch, "Live", Display)
    run(Progress(str(tmp_path / "log.txt"), interactive=True), STUDENT)
    assert [step for *_, step in shown] == [1, *range(2, 41, 2)]
    values, words, _ = shown[-1]
    assert set(values) == {"loss", *STUDENT}
    assert "distillation  s/step   left\nepoch 10/12 step 40/40" in words
    assert "epoch" not in capsys.readouterr().out
    assert "step 40/40" in (tmp_path / "log.txt").read_text()


def test_lines_are_printed_where_no_kernel_runs(tmp_path, capsys):
    run(Progress(str(tmp_path / "log.txt"), interactive=True), STUDENT)
    assert "step 40/40" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("row", ["demo:box", "teacher:demo"])
def test_looking_at_a_training_changes_nothing(tmp_path, monkeypatch, row):
    """The losses are equal bit for bit, and there is one display, updated in place."""
    shown, updated = [], []

    def display(what, *, display_id):
        assert display_id
        shown.append(what)
        return types.SimpleNamespace(update=updated.append)

    monkeypatch.setattr(watch, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    losses = []
    for interactive in (True, False):
        folder = tmp_path / f"run-{interactive}"
        machine = Machine(gpus=0, interactive=interactive)
        experiment = find_row(row).smoke().but(schedule={"epochs": 2})
        train(experiment, data_root=tmp_path / "data", work_dir=folder, row=row, machine=machine)
        losses.append((folder / "losses.jsonl").read_text())
    assert losses[0] == losses[1]
    assert len(losses[0].splitlines()) == 4
    assert len(shown) == 1
    assert len(updated) == 3
    assert "step 4/4" in updated[-1].data
    png = base64.b64decode(updated[-1].data.split("base64,")[1].split("'")[0])
    picture = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape[:2] == (400, 900)
    assert picture[280:].std() > 10  # the strip of images
