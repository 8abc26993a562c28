"""Training end to end on a few embedded scenes: deterministic, resumable, with clear errors."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

import misa
from misa.cli import main
from misa.engine.reports.evaluate import evaluate
from misa.engine.runs.record import commits
from misa.engine.training.preemption import begin_worker
from misa.engine.training.runner import quiet_runner
from misa.engine.training.train import require_buildable, require_shadow, train
from misa.engine.training.watch import LossRecord
from misa.errors import Stopped, UserError
from misa.evaluation.metric import Detections
from misa.experiment import TINY_MASK2FORMER, Semantic
from misa.files import locked
from misa.machine import Machine
from misa.models.teacher.semask import SeMask, semask_config
from misa.models.teacher.table import TEACHERS, build_teacher
from misa.objectives.base import Ramp
from misa.objectives.discobox import DiscoBox
from misa.ops.affinity import KERNELS, Compared
from misa.rows import find_row
from tests.helpers import CPU, tiny_experiment

TOY = tiny_experiment(
    schedule={"epochs": 3},
    augmentation={"short_sides": (64, 80), "long_side": 96},
    scenes=(("size", 64), ("train", 7), ("val", 3), ("objects", (1, 2))),
)

ROWS = f"""
from misa.experiment import *
import sys
ROWS = {{"toy": Experiment.from_values({json.loads(json.dumps(TOY.values()))!r})}}
"""


@pytest.fixture(scope="module")
def place(module_path):
    """A folder with the toy's data and its row in a user's file."""
    (module_path / "rows.py").write_text(ROWS)
    return module_path


def run_toy(place, name, machine=CPU, **options):
    return train(TOY, data_root=place / "data", work_dir=place / name, machine=machine, **options)


@pytest.fixture(scope="module")
def run(place):
    return run_toy(place, "first")


def final_weights(folder):
    return torch.load(folder / "checkpoints" / "epoch_3.pth", weights_only=True)["state_dict"]


def require_same_weights(one, other):
    expected, found = final_weights(one), final_weights(other)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_a_row_trains_with_an_affinity_of_one_function_and_one_row(place, run, monkeypatch):
    """The row names it and nothing else changes; its own losses differ from those of color alone, the others do not."""

    def brightness(inputs):
        return Compared(inputs.colors.mean(dim=0, keepdim=True), torch.ones(1, 1), 0.2)

    monkeypatch.setitem(KERNELS, "brightness", brightness)
    row = TOY.but(affinity={"kernels": ("color", "brightness")}, schedule={"epochs": 1})
    assert type(TOY).from_values(json.loads(json.dumps(row.values()))) == row
    its = train(row, data_root=place / "data", work_dir=place / "brightness", machine=CPU)
    weights = torch.load(its.folder / "checkpoints" / "epoch_1.pth", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())
    first, plain = (json.loads((each.folder / "losses.jsonl").read_text().splitlines()[0]) for each in (its, run))
    for name in ("loss_global", "loss_local"):
        assert first[name] != plain[name]
    for name in ("loss_cls", "loss_projection"):
        assert first[name] == plain[name]
    wrong = row.but(affinity={"kernels": ("color", "brigthness")})
    with pytest.raises(UserError, match="no affinity 'brigthness'"):
        train(wrong, data_root=place / "data", work_dir=place / "wrong", machine=CPU)


def test_the_run_folder_is_complete(run):
    for name in ("config.py", "params.json", "env.json", "metrics.json", "log.txt", "losses.jsonl"):
        assert (run.folder / name).exists(), name
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert set(metrics["segm"]) == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    assert (metrics["row"], metrics["seed"], metrics["data"]) == ("custom", 0, "demo")
    assert len((run.folder / "losses.jsonl").read_text().splitlines()) == 9  # 7 images in batches of 2, 3 epochs
    cost = json.loads((run.folder / "cost.json").read_text())
    assert (cost["device"], cost["steps"]) == ("cpu", 9)
    assert 0 < cost["seconds_per_step"] < 60
    assert cost["cpu_seconds_per_step"] > 0
    assert 0.2 < cost["memory_gib"] < 24  # a process that has imported torch


def test_scores_are_named_by_what_was_compared(run):
    metrics = {"segm": {"AP": 1.0}, "segm_as_rectangles": {"AP": 2.0}, "segm_any_class": {"AP": 3.0}}
    named = {"masks": {"AP": 1.0}, "as rectangles": {"AP": 2.0}, "any class": {"AP": 3.0}}
    assert replace(run, metrics=metrics).scores() == named
    before = {name: value for name, value in metrics.items() if name != "segm_any_class"}  # runs of older versions
    del named["any class"]
    assert replace(run, metrics=before).scores() == named
    assert set(run.scores()) == {"masks", "as rectangles", "any class"}


def test_the_written_config_builds_the_same_model(run):
    from mmdet.registry import MODELS
    from mmengine.config import Config

    model = MODELS.build(Config.fromfile(run.folder / "config.py").model)
    assert model.state_dict().keys() == final_weights(run.folder).keys()


def test_the_same_seed_gives_the_same_result_whatever_the_workers(run, place):
    again = run_toy(place, "again", Machine(gpus=0, workers=2))
    assert (again.folder / "metrics.json").read_bytes() == (run.folder / "metrics.json").read_bytes()
    require_same_weights(run.folder, again.folder)


def test_another_seed_gives_another_result(run, place):
    other = run_toy(place, "other", seed=1)
    its = final_weights(other.folder)
    assert any(not torch.equal(value, its[name]) for name, value in final_weights(run.folder).items())


def test_a_killed_run_ends_as_if_it_had_not_been_killed(run, place):
    folder = place / "killed"
    command = [sys.executable, "-m", "misa", "train", f"{place / 'rows.py'}:toy", "--gpus", "0"]
    command += ["--data-root", str(place / "data"), "--work-dir", str(folder)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "last_checkpoint").exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "metrics.json").exists()
    assert main(command[3:]) == 0
    assert "resuming at epoch" in (folder / "log.txt").read_text()
    expected = json.loads((run.folder / "metrics.json").read_text())
    resumed = json.loads((folder / "metrics.json").read_text())
    np.testing.assert_equal({**resumed, "row": "custom"}, expected)
    require_same_weights(run.folder, folder)
    kept = [json.loads(line)["iter"] for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert kept == list(range(9))


@pytest.fixture
def heard():
    """Enable SIGINT as in a terminal; a shell ignores it for background processes, such as these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(monkeypatch, step, times=1, number=signal.SIGINT):
    """Send SIGINT during a step, as a terminal or a notebook does, or another signal."""
    record = LossRecord.after_train_iter

    def after_train_iter(self, runner, *args, **kwargs):
        record(self, runner, *args, **kwargs)
        if runner.iter == step:
            for _ in range(times):
                signal.raise_signal(number)

    monkeypatch.setattr(LossRecord, "after_train_iter", after_train_iter)


@pytest.mark.parametrize("step", [5, 6], ids=["within an epoch", "at the last step of an epoch"])
def test_ctrl_c_saves_the_step_and_the_same_call_goes_on(heard, run, place, monkeypatch, capfd, step):
    before = signal.getsignal(signal.SIGINT)
    options = {"data_root": place / "data", "work_dir": place / f"interrupted {step}", "machine": CPU}
    with monkeypatch.context() as patch:
        interrupting(patch, step - 1)
        with pytest.raises(Stopped, match=f"stopped by Ctrl-C after step {step} of 9") as stopped:
            train(TOY, **options)
    assert stopped.value.status == 130
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    resumed = train(TOY, **options)
    assert f"resuming at epoch 2/3, step {step}/9" in (resumed.folder / "log.txt").read_text()
    assert "Loads checkpoint" not in "".join(capfd.readouterr())
    assert (resumed.folder / "losses.jsonl").read_bytes() == (run.folder / "losses.jsonl").read_bytes()
    require_same_weights(run.folder, resumed.folder)


@pytest.mark.parametrize("kind", ["teacher", "masks"])
def test_draws_from_torchs_generator_are_those_of_an_uninterrupted_run(heard, tmp_path, monkeypatch, kind):
    """SeMask's dropout, and the points at which Mask2Former compares true masks."""
    masks = {"student": "mask2former", "network": TINY_MASK2FORMER, "supervision": "mask"}
    row = TOY.but(**{"teacher": {"semantic": Semantic()}, "masks": masks}[kind])
    options = {"data_root": tmp_path / "data", "machine": CPU}
    whole = train(row, work_dir=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        interrupting(patch, 3)
        with pytest.raises(Stopped, match="after step 4 of 9"):
            train(row, work_dir=tmp_path / "stopped", **options)
    resumed = train(row, work_dir=tmp_path / "stopped", **options)
    assert (resumed.folder / "losses.jsonl").read_bytes() == (whole.folder / "losses.jsonl").read_bytes()
    require_same_weights(whole.folder, resumed.folder)


def test_the_config_in_a_strangers_checkpoint_is_not_executed(run, place, tmp_path):
    """As mmengine does when it resumes, which makes the folder named control here."""
    folder, sprung = tmp_path / "run", tmp_path / "sprung"
    shutil.copytree(run.folder, folder)
    (folder / "metrics.json").unlink()
    path = folder / "checkpoints" / "epoch_3.pth"
    content = torch.load(path, weights_only=True)
    content["meta"]["config"] = f"import os\nos.makedirs({str(sprung)!r})\n"
    Config.fromstring(content["meta"]["config"].replace("sprung", "control"), ".py")
    assert (tmp_path / "control").is_dir()
    torch.save(content, path)
    assert train(TOY, data_root=place / "data", work_dir=folder, machine=CPU).metrics == run.metrics
    assert not sprung.exists()


def test_a_resume_under_another_commit_is_recorded(run, place, tmp_path):
    """And one under the same leaves no line; figures name all commits."""
    folder = shutil.copytree(run.folder, tmp_path / "run")
    before = json.loads((folder / "env.json").read_text())
    for commit in (before["commit"], "another"):
        (folder / "metrics.json").unlink()
        (folder / "env.json").write_text(json.dumps(before | {"commit": commit}))
        train(TOY, data_root=place / "data", work_dir=folder, machine=CPU)
        assert (folder / "env_resumed.jsonl").exists() is (commit == "another")
    assert json.loads((folder / "env.json").read_text())["commit"] == "another"
    (line,) = (folder / "env_resumed.jsonl").read_text().splitlines()
    assert json.loads(line) == {"commit": before["commit"]}
    assert commits(folder) == ["another", before["commit"]]
    assert commits(run.folder) == [before["commit"]]


def test_a_stop_with_another_micro_batch_is_the_newest(heard, place, tmp_path, monkeypatch):
    """Stopped in the second of four steps with micro-batches of one image, then in the third with whole batches."""
    row = TOY.but(schedule={"epochs": 1}, scenes=(("size", 64), ("train", 8), ("val", 3), ("objects", (1, 2))))
    for step, per_gpu, name in ((4, 1, "epoch_0_step_2.pth"), (3, None, "epoch_0_step_3.pth")):
        options = {"data_root": tmp_path / "data", "machine": Machine(gpus=0, per_gpu=per_gpu)}
        with monkeypatch.context() as patch:
            interrupting(patch, step - 1)
            with pytest.raises(Stopped, match=f"saved as {name}"):
                train(row, work_dir=tmp_path / "run", **options)
        assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("epoch_*")] == [name]
    run = train(row, work_dir=tmp_path / "run", **options)
    assert "resuming at epoch 1/1, step 3/4" in (run.folder / "log.txt").read_text()
    assert [json.loads(line)["iter"] for line in (run.folder / "losses.jsonl").read_text().splitlines()] == [
        0,
        0,
        1,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize(("before", "batches"), [(16, 4), (4, 16)])
def test_losses_are_renumbered_once(tmp_path, before, batches):
    """Also where the run is killed before its next checkpoint, and in lines of older versions."""
    path = tmp_path / "losses.jsonl"
    rows = [{"iter": i, "of": before, "loss": float(i)} for i in range(2 * before)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iter": 3')
    runner = SimpleNamespace(_resume=True, train_dataloader=range(batches))
    checkpoint = {"meta": {"iter": before * 3 // 2}, "batches_per_epoch": before}
    record = LossRecord(str(path))
    record.after_load_checkpoint(runner, checkpoint)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["loss"] for row in found] == [float(i) for i in range(before * 3 // 2)]
    assert [row["iter"] for row in found] == [i * batches // before for i in range(before * 3 // 2)]
    once = path.read_text()
    record.after_load_checkpoint(runner, checkpoint)
    assert path.read_text() == once
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "of"}) + "\n" for row in rows))
    record.after_load_checkpoint(runner, checkpoint)
    assert [json.loads(line) for line in path.read_text().splitlines()] == found


@pytest.mark.parametrize(("step", "times"), [(4, 2), (8, 1)], ids=["twice", "at the last step"])
def test_ctrl_c_stops_at_once(heard, place, tmp_path, monkeypatch, step, times):
    before = signal.getsignal(signal.SIGINT)
    interrupting(monkeypatch, step, times)
    with pytest.raises(KeyboardInterrupt):
        train(TOY, data_root=place / "data", work_dir=tmp_path / "run", machine=CPU)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert not list((tmp_path / "run").glob("**/epoch_*_step_*.pth"))


def test_sigterm_in_the_last_step_stops_before_the_evaluation(run, place, tmp_path, monkeypatch):
    options = {"data_root": place / "data", "work_dir": tmp_path / "run", "machine": CPU}
    with monkeypatch.context() as patch:
        interrupting(patch, 8, number=signal.SIGTERM)
        with pytest.raises(Stopped, match="stopped by SIGTERM after the last step of 9") as stopped:
            train(TOY, **options)
    assert stopped.value.status == 143
    assert not (tmp_path / "run" / "metrics.json").exists()
    seen, process = [], Detections.process
    before = signal.getsignal(signal.SIGTERM)

    def processed(self, *args, **kwargs):
        seen.append(signal.getsignal(signal.SIGTERM))
        return process(self, *args, **kwargs)

    monkeypatch.setattr(Detections, "process", processed)
    resumed = train(TOY, **options)
    assert resumed.metrics["segm"] == run.metrics["segm"]
    assert seen
    assert set(seen) == {before}, "in an evaluation SIGTERM takes effect at once"


def working(connection):
    begin_worker(0)
    connection.send("ready")
    while True:
        connection.send(connection.recv())


def test_a_worker_is_ended_by_its_parent_alone():
    """timeout, SLURM and systemd send SIGTERM to all processes; the parent needs its workers to finish the step."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=working, args=(theirs,), daemon=True)
    worker.start()
    assert ours.recv() == "ready"
    for name in ("-TERM", "-INT"):
        subprocess.run(["kill", name, str(worker.pid)], check=True)
    time.sleep(0.2)
    ours.send("alive")
    assert ours.poll(20)
    assert ours.recv() == "alive"
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_a_worker_does_not_hold_the_run_folder_of_a_parent_that_is_gone(tmp_path):
    """It lives on for seconds after its parent is killed, and the same command is to go on at once."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with locked(tmp_path):
        worker = context.Process(target=working, args=(theirs,), daemon=True)
        worker.start()
        assert ours.recv() == "ready"
        with pytest.raises(UserError, match="is in use"), locked(tmp_path):
            pass
    with locked(tmp_path):
        assert worker.is_alive()
    worker.terminate()
    worker.join(20)


def test_what_ignores_ctrl_c_goes_on_ignoring_it(place, tmp_path, monkeypatch):
    """As for a training that a shell script runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupting(monkeypatch, 1)
        done = train(TOY, data_root=place / "data", work_dir=tmp_path / "run", machine=CPU)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.folder / "metrics.json").exists()


def strip(annotation):
    return {key: value for key, value in annotation.items() if key not in ("segmentation", "area")}


def spoil(annotation):
    return {**annotation, "segmentation": [[1, 2, "x"]], "area": -1}


@pytest.mark.parametrize("change", [strip, spoil])
def test_losses_are_the_same_to_the_bit_without_masks(run, tmp_path, change):
    """With every training mask deleted or replaced by garbage, all losses of all steps are equal."""
    root = shutil.copytree(run.source.root, tmp_path / "data")
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [change(a) for a in content["annotations"]]
    path.write_text(json.dumps(content))
    other = train(replace(TOY, data="coco"), data_root=root, work_dir=tmp_path / "run", machine=CPU)
    assert (other.folder / "losses.jsonl").read_bytes() == (run.folder / "losses.jsonl").read_bytes()


def test_a_finished_run_is_shown_not_repeated(run, place, capsys):
    before = (run.folder / "metrics.json").stat().st_mtime_ns
    again = run_toy(place, "first")
    assert "is finished" in capsys.readouterr().out
    np.testing.assert_equal(again.metrics, run.metrics)
    assert (run.folder / "metrics.json").stat().st_mtime_ns == before


def test_checkpoints_hold_nothing_that_needs_unpickling(run):
    checkpoint = torch.load(run.folder / "checkpoints" / "epoch_3.pth", weights_only=True)
    assert checkpoint["meta"]["epoch"] == 3


def test_evaluate_repeats_the_runs_own_predictions(run, tmp_path):
    again = evaluate(run.folder, predictions=tmp_path / "again.json").metrics
    np.testing.assert_equal(again["segm"], run.metrics["segm"])
    own = (run.folder / "predictions" / "val.json").read_bytes()
    assert (tmp_path / "again.json").read_bytes() == own
    evaluate(run.folder, checkpoint="none", predictions=tmp_path / "again.json")  # such a file is replaced
    assert (tmp_path / "again.json").read_bytes() != own


@pytest.mark.parametrize("text", ['{"images": [], "annotations": [{"score": 1}]}', '[{"id": 1}]', "", "notes"])
def test_evaluate_replaces_no_other_file(run, tmp_path, text):
    """Not even the annotations that are evaluated on."""
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match=r"mine\.json exists already and holds no detections; choose another file"):
        evaluate(run.folder, predictions=tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == text


def test_evaluate_refuses_another_models_checkpoint(run, place, tmp_path):
    wider = TOY.but(network={"head_channels": 96}, schedule={"epochs": 1})
    other = train(wider, data_root=place / "data", work_dir=tmp_path / "wider", machine=CPU)
    with pytest.raises(UserError, match=r"another model: .* this run's has"):
        evaluate(run.folder, checkpoint=other.folder / "checkpoints" / "epoch_1.pth")


def test_evaluate_refuses_what_is_no_checkpoint(run, tmp_path):
    (tmp_path / "cut.pth").write_bytes((run.folder / "checkpoints" / "epoch_3.pth").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut\.pth cannot be read as a checkpoint"):
        evaluate(run.folder, checkpoint=tmp_path / "cut.pth")
    with pytest.raises(UserError, match="there is no checkpoint"):
        evaluate(run.folder, checkpoint=tmp_path / "absent.pth")
    with pytest.raises(UserError, match="is not a run folder"):
        evaluate(tmp_path)


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_from_a_stranger_runs_no_code(run, tmp_path):
    torch.save({"state_dict": {}, "extra": Trap(tmp_path / "sprung")}, tmp_path / "stranger.pth")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        evaluate(run.folder, checkpoint=tmp_path / "stranger.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", ["photo", "text", "word", "pickle", "new pickle", "archive"])
def test_what_is_no_checkpoint_is_refused_without_advice_to_execute_it(kind, tmp_path):
    path = tmp_path / "photo.jpg"
    if kind == "photo":
        Image.new("RGB", (8, 8)).save(path)
    elif kind == "archive":
        torch.save({"state_dict": {}, "extra": Trap(tmp_path / "sprung")}, path)
    else:
        protocol = 4 if kind == "new pickle" else 2
        content = {"text": b"not a checkpoint", "word": b"hello"}
        path.write_bytes(content.get(kind) or pickle.dumps(Trap(tmp_path / "sprung"), protocol=protocol))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as caught:
            misa.load(path)
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    assert str(caught.value) == f"{path} cannot be read as a checkpoint; give one made by misa train."
    assert not (tmp_path / "sprung").exists()


def test_runs_of_one_second_share_nothing(place, tmp_path, monkeypatch):
    runners = []

    def kept(config):
        runners.append(quiet_runner(config))
        return runners[-1]

    monkeypatch.setattr("misa.engine.training.train.quiet_runner", kept)
    monkeypatch.setattr(time, "strftime", lambda *_: "20260102_030405")
    short = TOY.but(schedule={"epochs": 1})
    for name in ("one", "other"):
        train(short, data_root=place / "data", work_dir=tmp_path / name, machine=CPU)
        assert len((tmp_path / name / "losses.jsonl").read_text().splitlines()) == 3
        assert list((tmp_path / name / "tensorboard").iterdir())
    one, other = runners
    assert one.message_hub is not other.message_hub
    assert one.visualizer is not other.visualizer
    assert one.logger is not other.logger


def test_a_folder_with_another_run_is_left_alone(run, place):
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.name != ".lock"}
    with pytest.raises(UserError, match=r"schedule\.epochs is 3 there and 4 here"):
        train(TOY.but(schedule={"epochs": 4}), data_root=place / "data", work_dir=run.folder, machine=CPU)
    with pytest.raises(UserError, match="seed is 0 there and 5 here"):
        run_toy(place, "first", seed=5)
    after = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.name != ".lock"}
    assert after == before


def test_work_dir_that_cannot_be_made(place):
    blocked = place / "blocked"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"work_dir .*blocked.* cannot be written"):
        run_toy(place, "blocked/run")


def test_a_moved_run_goes_on_from_its_own_checkpoints(run, place):
    """mmengine's pointer file names the old path; a truncated newest checkpoint falls back to the previous one."""
    moved = shutil.copytree(run.folder, place / "moved")
    (moved / "metrics.json").unlink()
    (moved / "checkpoints" / "last_checkpoint").write_text("")
    newest = moved / "checkpoints" / "epoch_3.pth"
    newest.write_bytes(newest.read_bytes()[:-5000])
    again = run_toy(place, "moved")
    assert "resuming at epoch 3/3" in (moved / "log.txt").read_text()
    np.testing.assert_equal(again.metrics, run.metrics)
    require_same_weights(run.folder, moved)
    # Still only the two newest, as in an uninterrupted run.
    assert {p.name for p in (moved / "checkpoints").glob("*.pth")} == {"epoch_2.pth", "epoch_3.pth"}


def test_a_damaged_record_is_named_and_left_alone(run, place):
    for name, content in (("params.json", "[]"), ("metrics.json", '{"segm": '), ("metrics.json", "{}")):
        copy = shutil.copytree(run.folder, place / f"damaged-{name}-{len(content)}")
        (copy / name).write_text(content)
        with pytest.raises(UserError, match=f"{name} (cannot be read|holds no values)"):
            run_toy(place, copy.name)
        assert (copy / name).read_text() == content


def test_two_runs_cannot_share_a_folder(place):
    with locked(place / "shared"), pytest.raises(UserError, match="in use by another run"):
        run_toy(place, "shared")


def test_a_loss_that_is_no_number_ends_the_run(place, capsys):
    rows = place / "wild.py"
    rows.write_text(ROWS + "ROWS['wild'] = ROWS['toy'].but(schedule={'lr': 1e30, 'clip': 1e30})\n")
    folder = place / "wild"
    common = ["--data-root", str(place / "data"), "--work-dir", str(folder), "--gpus", "0"]
    assert main(["train", f"{rows}:wild", *common]) == 1
    assert "became" in capsys.readouterr().err
    assert not (folder / "metrics.json").exists()
    assert not list((folder / "checkpoints").glob("*.pth"))


def test_a_row_file_that_fails_is_named_with_its_line(place, capsys):
    broken = place / "broken.py"
    broken.write_text("from misa.experiment import Experiment\n\nROWS = {'a': Experiment(projection=1)}\n")
    assert main(["train", f"{broken}:a"]) == 2
    assert "broken.py, line 3: TypeError" in capsys.readouterr().err


@pytest.mark.parametrize("smoke", [[], ["--smoke"]])
def test_a_network_that_cannot_be_built_is_refused_before_any_work(place, capsys, smoke):
    """Also by a smoke run, which trains a small network in the place of the row's."""
    (place / "wrong.py").write_text(
        "from misa.rows import find_row\nROWS = {'wide': find_row('demo:box').but(network={'head_channels': 250})}\n"
    )
    out = place / "never"
    assert main(["train", f"{place / 'wrong.py'}:wide", "--work-dir", str(out), "--gpus", "0", *smoke]) == 2
    error = capsys.readouterr().err
    assert "the row's network cannot be built (num_channels (250) must be divisible by num_groups (32)); ch" in error
    assert "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"backbone": "resnet1"}, "there is no backbone 'resnet1'; did you mean 'resnet18'?"),
        ({"base_channels": 10**9}, "wrong.py:teacher's network cannot be built (Storage size calculation overflowed"),
    ],
)
@pytest.mark.parametrize("row", ["misa", "teacher", "relabeled", "again"])
def test_a_network_that_is_learned_from_is_checked_first(tmp_path, monkeypatch, capsys, row, change, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.py").write_text(
        f"from misa.rows import find_row\nROWS = {{'teacher': find_row('teacher:demo').but(network={change})}}\n"
        "ROWS['misa'] = find_row('demo:misa').but(teacher='wrong.py:teacher')\n"
        "ROWS['relabeled'] = find_row('teacher:demo').but(semantic={'labels': 'student', 'student': 'wrong.py:misa'})\n"
        "ROWS['again'] = find_row('demo:misa').but(teacher='wrong.py:relabeled')\n"
    )
    assert main(["train", f"wrong.py:{row}", "--work-dir", "never", "--gpus", "0"]) == 2
    error = capsys.readouterr().err
    assert (sentence.replace("wrong.py:teacher", "the row") if row == "teacher" else sentence) in error
    assert "Traceback" not in error
    assert not any(path.suffix != ".py" and path.name != "__pycache__" for path in tmp_path.iterdir())


@pytest.mark.parametrize("read", [float, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy])
def test_a_network_of_ones_own_may_read_its_weights(monkeypatch, read):
    """The check allocates none, and does not judge such a network."""

    class Reading(SeMask):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.largest = read(self.classifier.weight.detach().max())

    monkeypatch.setitem(TEACHERS, "reading", lambda *args: {**semask_config(*args), "type": Reading})
    row = find_row("teacher:demo").but(semantic={"network": "reading"}, network={"pretrained": False})
    require_buildable(row)
    build_teacher(row, ("one", "two"))


@pytest.mark.parametrize(
    ("row", "network", "words"),
    [
        ("demo:box", {"frozen_stages": 5}, "frozen_stages is 5; a backbone has 4 stages"),
        ("demo:box", {"backbone": "swin_t", "frozen_stages": 5}, "frozen_stages is 5; a backbone has 4 stages"),
        ("demo:box", {"grids": (20, 10)}, "network has 4 strides, 2 grids, 4 scale_ranges; give as many of each"),
        ("demo:box", {"grids": (20, 10, 8, 6, 4)}, "network has 4 strides, 5 grids, 4 scale_ranges"),
        (
            "demo:box",
            {"strides": (8, 16, 32), "grids": (20, 10, 5), "scale_ranges": ((1, 8), (4, 16), (8, 99))},
            "network has 3 strides, 3 grids, 3 scale_ranges; give .* at least four levels",
        ),
        ("demo:box", {"frozen_stages": -2}, "frozen_stages is -2; a backbone has 4 stages"),
        ("demo:mask2former_box", {"feature_channels": 30}, r"the row's network cannot be built \(num_channels \(30\)"),
    ],
)
def test_a_network_out_of_range_is_refused(row, network, words):
    with pytest.raises(UserError, match=words):
        require_buildable(find_row(row).but(network=network))


def test_an_ema_model_that_never_begins_predicts_nothing(place):
    row = TOY.but(affinity=None, objective=DiscoBox(), inference={"from_shadow": True})
    words = "EMA model of DiscoBox does not begin in the [0-9]+ steps of this training"
    with pytest.raises(UserError, match=words):
        train(row, data_root=place / "data", work_dir=place / "ema", machine=CPU)
    assert not (place / "ema").exists()
    late = row.but(objective=DiscoBox(shadow_start=Ramp(8, 8)))  # begins in the ninth step
    require_shadow(late, 9)
    require_shadow(row.smoke(), 2)
    with pytest.raises(UserError, match="in the 8 steps"):
        require_shadow(late, 8)


def test_a_batch_larger_than_the_data_is_refused(place, capsys):
    common = ["--data-root", str(place / "data"), "--work-dir", str(place / "large"), "--gpus", "0"]
    assert main(["train", f"{place / 'rows.py'}:toy", "--batch", "8", *common]) == 2
    assert "set --batch to 7 or less" in capsys.readouterr().err
    assert not (place / "large").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo:bxo"], "did you mean 'demo:box'"),
        (["dmeo:box"], "did you mean 'demo'"),
        (["demo"], "demo is a table; name one of its rows"),
        (["demo:box", "--seed", "-1"], "seed must be from 0"),
        (["demo:box", "--epochs", "0"], "epochs must be at least 1"),
        (["coco_mini:box", "--data-root", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_wrong_input_is_one_sentence_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    sentence, *rows = error.splitlines()
    assert message in sentence
    assert all(line.startswith("  demo:") for line in rows)
    assert bool(rows) == sentence.endswith("Its rows are:")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "demo:box", "--epoch-count", "3"])
    assert stop.value.code == 2
