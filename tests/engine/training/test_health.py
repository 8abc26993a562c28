"""Monitoring of a training: what is recorded, and how a training with non-finite losses ends."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.model import BaseModel
from mmengine.structures import InstanceData

from misa.engine.runs.samples import health
from misa.engine.training.train import train
from misa.engine.training.watch import NaNGuard
from misa.errors import Diverged, NotFinite
from misa.figures.plots import health_curves
from misa.rows import find_row
from tests.helpers import CPU, tiny_experiment


@pytest.fixture(scope="module")
def place(module_path):
    return module_path


def test_a_run_says_how_its_masks_look_and_which_loss_moves_it(place):
    run = train(find_row("demo:box").smoke(), data_root=place / "data", work_dir=place / "run", machine=CPU)
    found = health(run.folder)
    assert found["step"].tolist() == [1]  # step 1 of 2; recorded every 50 steps
    assert 0 <= found["mask_fill"][0] <= 1
    shares = {name: value[0] for name, value in found.items() if name.startswith("gradient_")}
    assert set(shares) == {"gradient_cls", "gradient_projection", "gradient_global", "gradient_local"}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert "masks fill" in (run.folder / "log.txt").read_text()
    assert len(health_curves(found).axes) == 2
    assert health_curves({}).texts[0].get_text() == "this run was not watched"
    lines = [json.loads(line) for line in (run.folder / "losses.jsonl").read_text().splitlines()]
    losses = [value for name, value in lines[0].items() if name.startswith("loss_")]
    assert lines[0]["loss"] == pytest.approx(sum(losses), rel=1e-5)  # diagnostics are not part of the loss


def test_watching_changes_no_weight(place, monkeypatch):
    row = find_row("demo:box").smoke()
    for name, every in (("watched", 1), ("alone", 10**9)):
        monkeypatch.setattr("misa.engine.training.config.HEALTH_EVERY", every)
        train(row, data_root=place / "data", work_dir=place / name, machine=CPU)
    one, other = (
        torch.load(place / name / "checkpoints" / "epoch_1.pth", weights_only=True)["state_dict"]
        for name in ("watched", "alone")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(health(place / "watched")["step"]) == 2


@pytest.mark.parametrize("step", [3, 6], ids=["last step of an epoch", "last step"])
def test_a_gradient_that_is_not_finite_is_told_before_a_checkpoint_has_it(tmp_path, monkeypatch, step):
    """The loss of that step is finite, and no step follows in the epoch that would show it."""
    row = tiny_experiment(schedule={"epochs": 2}, scenes=(("size", 64), ("train", 6), ("val", 3), ("objects", (1, 2))))
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clipped(parameters, **options):
        calls.append(None)
        if len(calls) == step:
            parameters[0].grad.view(-1)[0] = float("nan")
        return clip(parameters, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    with pytest.raises(
        Diverged, match=rf"^step {step}: .* parameters? of the network became NaN .* such as \S+\. The batch is in"
    ):
        train(row, data_root=tmp_path / "data", work_dir=tmp_path / "run", machine=CPU)
    kept = sorted((tmp_path / "run" / "checkpoints").glob("epoch_*.pth"))
    assert [path.name for path in kept] == ["epoch_1.pth"] * (step > 3)
    for path in kept:
        values = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(value.isfinite().all() for value in values if value.is_floating_point())
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_training_that_explodes_names_its_step_and_keeps_the_batch(place):
    row = find_row("demo:box").smoke().but(schedule={"lr": 1e30, "clip": 1e30, "epochs": 3})
    with pytest.raises(Diverged, match=r"step \d+.*The batch is in .*diverged\.pth"):
        train(row, data_root=place / "data", work_dir=place / "exploded", machine=CPU)
    kept = torch.load(place / "exploded" / "diverged.pth", weights_only=True)
    assert len(kept["inputs"]) == len(kept["boxes"]) == len(kept["img_ids"]) == 2
    assert kept["inputs"][0].dtype == torch.uint8
    assert kept["boxes"][0].shape == (len(kept["labels"][0]), 4)
    assert not (place / "exploded" / "metrics.json").exists()


def test_a_loss_that_refuses_keeps_the_batch_too(place, monkeypatch):
    def overflows(*_, **__):
        raise NotFinite("distillation_loss is not finite: the squared difference overflows.")

    monkeypatch.setattr("misa.objectives.misa.MISA.losses", overflows)
    row = find_row("demo:box").smoke()
    with pytest.raises(Diverged, match=r"^step 1: distillation_loss is not finite.*The batch is in .*diverged\.pth"):
        train(row, data_root=place / "data", work_dir=place / "refused", machine=CPU)
    assert (place / "refused" / "diverged.pth").exists()


def batch():
    sample = DetDataSample(metainfo={"img_id": 7, "img_path": "a.png"})
    sample.gt_instances = InstanceData(bboxes=torch.ones(1, 4), labels=torch.tensor([2]))
    return {"inputs": [torch.zeros(3, 4, 4, dtype=torch.uint8)], "data_samples": [sample]}


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_the_guard_names_the_loss(tmp_path, wrong):
    guard, runner = NaNGuard(str(tmp_path)), SimpleNamespace(iter=4)

    def losses_of(local):
        """As mmengine passes it on: the sum comes first, and is not finite if one of its terms is not."""
        parts = {"loss_cls": torch.tensor(1.0), "loss_local": torch.tensor(local)}
        return BaseModel.parse_losses(None, parts)[1]

    guard.after_train_iter(runner, 0, batch(), losses_of(0.5))
    assert not (tmp_path / "diverged.pth").exists()
    runner.iter = 5
    with pytest.raises(Diverged, match="loss_local became NaN or infinite at step 6"):
        guard.after_train_iter(runner, 1, batch(), losses_of(wrong))
    kept = torch.load(tmp_path / "diverged.pth", weights_only=True)
    assert (kept["step"], kept["img_ids"], kept["labels"][0].tolist()) == (5, [7], [2])


def test_each_process_keeps_its_own_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("misa.engine.training.watch.get_rank", lambda: 2)
    guard, runner = NaNGuard(str(tmp_path)), SimpleNamespace(iter=4)
    with pytest.raises(
        Diverged, match=r"loss_local became NaN or infinite at step 5. The batch is in .*diverged-2.pth"
    ):
        guard.after_train_iter(runner, 0, batch(), {"loss_local": torch.tensor(np.nan)})
    assert torch.load(tmp_path / "diverged-2.pth", weights_only=True)["img_ids"] == [7]


def test_a_late_answer_still_names_its_own_step(tmp_path):
    """As on a GPU: the losses of a step arrive later, and the saved batch is that of their step."""
    guard = NaNGuard(str(tmp_path), behind=2)
    ready = SimpleNamespace(query=lambda: False, synchronize=lambda: None)
    for step in range(2):
        guard.open.append((step, batch(), ["loss"], torch.tensor([1.0 if step else np.nan]), ready))
    guard.check(wait=False)  # two may be pending
    guard.open.append((2, batch(), ["loss"], torch.tensor([1.0]), ready))
    with pytest.raises(Diverged, match="loss became NaN or infinite at step 1"):
        guard.check(wait=False)
