"""The log: lines that fit a terminal, losses that are explained, and a curve that replaces itself in a notebook."""

import types

import pytest
import torch

from misa.engine.training.watch import MEANING, WIDTH, Progress, explained

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


def test_a_notebook_sees_one_curve_that_is_replaced(tmp_path, capsys, monkeypatch):
    shown, updated = [], []
    handle = types.SimpleNamespace(update=updated.append)

    def display(what, *, display_id):
        assert display_id
        shown.append(what)
        return handle

    monkeypatch.setattr("IPython.display.display", display)
    run(Progress(str(tmp_path / "log.txt"), interactive=True), STUDENT)
    assert len(shown) == 1
    assert len(updated) == 20
    assert "data:image/png;base64," in updated[-1].data
    assert "step 40/40" in updated[-1].data
    assert "epoch" not in capsys.readouterr().out
    assert "step 40/40" in (tmp_path / "log.txt").read_text()
