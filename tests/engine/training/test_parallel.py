"""Several processes: equivalent to one, also when stopped or killed, and started by one command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from misa.commands.train import Train, experiment_of, train_with
from misa.engine.training.parallel import launch, leave
from misa.engine.training.preemption import restored_signal
from misa.engine.training.resume import ResumableState, WholeBatches
from misa.errors import DIVERGED, Diverged, Stopped, UserError
from misa.machine import split_batch
from tests.helpers import tiny_experiment

# BatchNorm statistics are frozen: otherwise they would differ between the processes.
BOX = tiny_experiment(
    network={"norm_eval": True},
    schedule={"epochs": 3, "batch": 4, "lr": 1e-4},
    scenes=(("size", 64), ("train", 16), ("val", 3), ("objects", (1, 3))),
)
ROWS = """
from misa.experiment import *
from misa.objectives.base import Ramp
from misa.objectives.boxteacher import BoxTeacher
from misa.objectives.discobox import Bank, DiscoBox
from misa.objectives.sim import SIM
BOX = Experiment.from_values({box!r})
BANKED = DiscoBox(
    gate=10.0, shadow_start=Ramp(4, 4), momentum=0.9,
    bank=Bank(slots=3, least=2, grid=3, side=8, keys=1, gate=10.0, gradient=1.0, form="intended"),
)
# With prototypes that stay: those of several processes are the mean of theirs, as published, so not those of one.
STILL_SIM = SIM(ramp=Ramp(0, 8), bottom_rows=0, pseudo_start=Ramp(4, 4), pseudo_ramp=Ramp(0, 8), momentum=0.7,
                sure=0.4, share=0.0)
ROWS = {{
    "box": BOX,
    "short": BOX.but(limit=4, schedule={{"epochs": 1}}),
    "long": BOX.but(schedule={{"epochs": 10}}),
    "teacher": BOX.but(semantic=Semantic(), schedule={{"epochs": 1}}),
    "misa": BOX.but(teacher="{file}:teacher", distillation=Distillation(),
                    affinity={{"saliency": True}}, schedule={{"lr": 2e-5}}),
    "mask2former": BOX.but(
        student="mask2former", network=TINY_MASK2FORMER,
        affinity={{"reduction": "box_ratio"}}, schedule={{"lr": 1e-5}},
    ).but(network={{"norm_eval": True}}),
    "mask2former_discobox": BOX.but(
        student="mask2former", network=TINY_MASK2FORMER, affinity=None, schedule={{"lr": 1e-5}}, objective=BANKED,
    ).but(network={{"norm_eval": True}}),
    "mask2former_sim": BOX.but(
        student="mask2former", network=TINY_MASK2FORMER, affinity=None, schedule={{"lr": 1e-5}}, objective=STILL_SIM,
    ).but(network={{"norm_eval": True}}),
    "sim": BOX.but(affinity=None, objective=STILL_SIM),
    "baseline": BOX.but(student="boxinst", affinity=None),
    "discobox": BOX.but(affinity=None, objective=DiscoBox(gate=10.0, shadow_start=Ramp(4, 4), momentum=0.9)),
    "discobox_bank": BOX.but(affinity=None, objective=BANKED),
    # On SOLOv2: CondInst's mask branch normalises by the images of its own process.
    "boxteacher": BOX.but(
        affinity=None, schedule={{"lr": 2e-5}},
        objective=BoxTeacher(ramp=Ramp(0, 8), pseudo_ramp=Ramp(0, 4), bottom_rows=0, momentum=0.7, overlap=0.05),
    ),
    "polarmask": BOX.but(student="polarmask", supervision="mask", affinity=None, schedule={{"lr": 2e-5}}),
}}
"""


@pytest.fixture(scope="module")
def place(module_path):
    rows = module_path / "rows.py"
    rows.write_text(ROWS.format(box=json.loads(json.dumps(BOX.values())), file=rows))
    return module_path


def options(place, row, name, **more):
    return {
        "row": f"{place / 'rows.py'}:{row}",
        "data_root": str(place / "data"),
        "work_dir": str(place / name),
        "gpus": 0,
    } | more


def torchrun(place, row, name, *more):
    return started("-m", "misa", "train", *Train(**options(place, row, name)).command_line(), *more)


def started(*program):
    """Start a program in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def losses(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


ALIKE = (
    *("box", "misa", "mask2former", "discobox", "discobox_bank", "mask2former_discobox", "boxteacher", "polarmask"),
    *("sim", "mask2former_sim"),
)
TRAIN_EACH = """
import json, sys
from misa.commands.train import Train, experiment_of
from misa.engine.training.parallel import leave
from misa.engine.training.train import train
for options in map(lambda each: Train(**each), json.loads(sys.argv[1])):
    train(experiment_of(options), data_root=options.data_root, work_dir=options.work_dir, row=options.row,
          machine=options.machine)
leave()
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(place):
    """The same images, each process with half of every batch: the loss to 1e-4 over all 12 steps, its terms to 5e-4.

    Rounding errors grow over the steps: the projection depends on the largest pixel only, which may change. All rows
    in the same processes, whose start takes longer than a row.
    """
    (place / "each.py").write_text(TRAIN_EACH)
    child = started(str(place / "each.py"), json.dumps([options(place, row, f"{row}-two") for row in ALIKE]))
    text, _ = child.communicate(timeout=500)
    assert child.returncode == 0, text
    assert "batch 4 = 2 processes x 2 images" in text
    assert text.count(", seed 0, on cpu, in ") == len(ALIKE) + 1  # with the teacher; only one of them prints
    for row in ALIKE:
        one = train_with(Train(**options(place, row, f"{row}-one")))
        ours, theirs = losses(one.folder), losses(place / f"{row}-two")
        assert len(ours) == len(theirs) == 12
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys(), row
            for name, value in a.items():
                if name.startswith(("mask_", "gradient_")):
                    continue  # diagnostics of a monitored step use the images of the main process only
                close = 1e-4 if name == "loss" else 5e-4
                absolute = close if name != "loss" else 0
                assert b[name] == pytest.approx(value, rel=close, abs=absolute), (row, a["iter"], name)
        if row.endswith("sim"):
            assert ours[3]["loss_pseudo"] == 0 < min(a["loss_pseudo"] for a in ours[6:])
        there = json.loads((place / f"{row}-two" / "metrics.json").read_text())
        assert there["images"] == one.metrics["images"]
        assert there["detections"] == pytest.approx(one.metrics["detections"], abs=2), row


def gloo_threads():
    return [path for path in Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()]


def test_no_thread_of_the_group_is_left_when_the_training_is(tmp_path):
    """Such a thread may need the interpreter during its shutdown, which aborts the process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model.itself = [model]  # a reference cycle, as between runners and their hooks
    assert gloo_threads()
    del model
    leave()
    assert not dist.is_initialized()
    assert gloo_threads() == []


@pytest.mark.parametrize(("processes", "restored"), [("1", True), ("2", False)])
def test_one_of_several_processes_that_fails_is_not_ended_before_it_has_said_why(monkeypatch, processes, restored):
    def fail():
        with restored_signal():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise Stopped("lost the others")

    monkeypatch.setenv("WORLD_SIZE", processes)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Stopped):
            fail()
        assert (signal.getsignal(signal.SIGTERM) == before) is restored
        with restored_signal():
            signal.signal(signal.SIGTERM, lambda *_: None)
        assert (signal.getsignal(signal.SIGTERM) == before) is restored  # as it was before this time
    finally:
        signal.signal(signal.SIGTERM, before)


def process_of(launcher, rank):
    """Returns the id of the process to which torchrun gave this rank."""
    for _ in range(600):
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == launcher and f"RANK={rank}\0".encode() in b"\0" + (path / "environ").read_bytes():
                    return int(path.name)
            except (OSError, ValueError):
                continue
        time.sleep(0.1)
    raise AssertionError(f"no process of rank {rank}")


def read_until(child, words):
    for line in child.stdout:
        if words in line:
            return
    raise AssertionError(f"never said {words!r}")


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_a_sentence_and_the_run_resumes(place):
    child = torchrun(place, "long", "killed")
    read_until(child, "epoch 4/10")
    os.kill(process_of(child.pid, 1), signal.SIGKILL)
    text, _ = child.communicate(timeout=120)
    assert child.returncode != 0
    assert "process 0 of 2 lost the others" in text
    assert "the same command goes on from the last checkpoint" in text
    assert not (place / "killed" / "metrics.json").exists()
    child = torchrun(place, "long", "killed")
    text, _ = child.communicate(timeout=400)
    assert child.returncode == 0, text
    assert "resuming at epoch" in text
    assert len(losses(place / "killed")) == 40


@pytest.mark.slow
def test_sigterm_to_one_of_two_stops_both_at_one_step(place):
    child = torchrun(place, "long", "preempted")
    read_until(child, "epoch 4/10")
    os.kill(process_of(child.pid, 1), signal.SIGTERM)
    text, _ = child.communicate(timeout=120)
    assert text.count("stopped by SIGTERM after step") == 1
    child = torchrun(place, "long", "preempted")
    text, _ = child.communicate(timeout=400)
    assert child.returncode == 0, text
    assert [row["iter"] for row in losses(place / "preempted")] == list(range(40))


def single(place, name, row="long"):
    parameters = Train(**options(place, row, name))
    command = [sys.executable, "-m", "misa", "train", *parameters.command_line()]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.slow
def test_sigterm_within_an_epoch_loses_nothing(place):
    """Stopped anywhere and restarted, the weights equal those of an uninterrupted run bit for bit."""
    child = single(place, "term")
    read_until(child, "epoch 4/10")
    child.send_signal(signal.SIGTERM)
    text, _ = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM, text
    assert "goes on from there" in text
    (saved,) = (place / "term" / "checkpoints").glob("epoch_*_step_*.pth")
    assert saved.name in text
    child = single(place, "term")
    text, _ = child.communicate(timeout=300)
    assert child.returncode == 0, text
    whole = train_with(Train(**options(place, "long", "whole")))
    assert losses(whole.folder) == losses(place / "term")
    a, b = (
        torch.load(f / "checkpoints" / "epoch_10.pth", weights_only=True)["state_dict"]
        for f in (whole.folder, place / "term")
    )
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert not list((place / "term" / "checkpoints").glob("*_step_*"))


@pytest.mark.slow
def test_one_command_starts_them_and_passes_on_what_they_say(place, capsys):
    launch(Train(**options(place, "box", "launched")).command_line(), 2, threads=1)
    text = capsys.readouterr().out
    assert "batch 4 = 2 processes x 2 images" in text
    assert "step 12/12" in text
    with pytest.raises(UserError, match="cannot be shared evenly by 3"):
        launch(Train(**options(place, "box", "three")).command_line(), 3, threads=1)
    assert not (place / "three").exists()


@pytest.mark.slow
def test_a_student_that_leaves_a_branch_out_trains_too(place):
    child = torchrun(place, "baseline", "baseline", "--epochs", "1")
    text, _ = child.communicate(timeout=200)
    assert child.returncode == 0, text


def test_a_batch_is_shared_evenly_or_not_at_all():
    assert str(split_batch(8, 1)) == "batches of 8 images"
    assert str(split_batch(16, 8)) == "batch 16 = 8 processes x 2 images"
    assert str(split_batch(16, 1, 2)) == "batch 16 = 2 images x 8 accumulated"
    assert str(split_batch(16, 2, 4)) == "batch 16 = 2 processes x 4 images x 2 accumulated"
    with pytest.raises(UserError, match="by 3 processes; take 1, 2, 4, 8 or 16"):
        split_batch(16, 3)
    with pytest.raises(UserError, match="per_gpu is 3"):
        split_batch(16, 2, 3)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_batch_has_the_same_images_in_any_number_of_processes(world):
    whole = list(WholeBatches(range(23), batch=8, seed=3))
    assert len(whole) == 16
    samplers = []
    for rank in range(world):
        sampler = WholeBatches(range(23), batch=8, seed=3)
        sampler.rank, sampler.world_size, sampler.num_samples = rank, world, 16 // world
        samplers.append(list(sampler))
    part = 8 // world
    for step in range(2):
        together = sorted(i for own in samplers for i in own[step * part : (step + 1) * part])
        assert together == sorted(whole[step * 8 : step * 8 + 8])


def test_an_epoch_can_be_entered_anywhere_once():
    sampler = WholeBatches(range(10), batch=2, seed=0)
    whole = list(sampler)
    sampler.skip = 4
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole
    assert len(sampler) == 10


def test_accumulation_is_said_and_steps_once_for_all(place):
    """Four batches of one image make one step: the weights change only at the fourth."""
    run = train_with(Train(**options(place, "box", "accumulated", per_gpu=1, epochs=1)))
    assert "batch 4 = 1 image x 4 accumulated, learning rate 0.0001" in (run.folder / "log.txt").read_text()
    assert len(losses(run.folder)) == 16
    saved = torch.load(run.folder / "checkpoints" / "epoch_1.pth", weights_only=True)
    steps = {int(state["step"]) for state in saved["optimizer"]["state"].values()}
    assert steps == {4}
    # The learning rate decays as without accumulation.
    whole = train_with(Train(**options(place, "box", "at-once", epochs=1)))
    assert [row["lr"] for row in losses(run.folder)][::4] == [row["lr"] for row in losses(whole.folder)]


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 1)])
def test_a_run_goes_on_with_another_accumulation(place, before, after):
    """After running out of memory, or with more GPUs: no image is skipped, no step is repeated."""
    name = f"from-{before}-to-{after}"
    run = train_with(Train(**options(place, "box", name, per_gpu=before)))
    (run.folder / "metrics.json").unlink()
    (run.folder / "checkpoints" / "epoch_3.pth").unlink()
    train_with(Train(**options(place, "box", name, per_gpu=after)))
    saved = torch.load(run.folder / "checkpoints" / "epoch_3.pth", weights_only=True)
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {12}
    each = 4 // after  # batches per step
    assert saved["meta"]["iter"] == 12 * each
    rows = losses(run.folder)
    assert [row["iter"] for row in rows[-4 * each :]] == list(range(8 * each, 12 * each))
    assert [row["iter"] for row in rows[: -4 * each]] == [i * before * each // 4 for i in range(32 // before)]
    whole = train_with(Train(**options(place, "box", "at-once-whole")))
    assert [row["lr"] for row in rows[-4 * each :]][::each] == [row["lr"] for row in losses(whole.folder)][8:]


def test_a_checkpoint_that_counts_otherwise_is_refused(place):
    """An old one that does not record the number of batches per epoch."""
    run = train_with(Train(**options(place, "box", "silent", per_gpu=1, epochs=2)))
    (run.folder / "metrics.json").unlink()
    (run.folder / "checkpoints" / "epoch_2.pth").unlink()
    path = run.folder / "checkpoints" / "epoch_1.pth"
    saved = torch.load(path, weights_only=True)
    del saved["batches_per_epoch"]
    torch.save(saved, path)
    with pytest.raises(UserError, match="written with another per_gpu or number of GPUs"):
        train_with(Train(**options(place, "box", "silent", epochs=2)))


COLLECT = """
import random, sys
from types import SimpleNamespace
import numpy as np
import torch
from mmengine.dist import get_rank
from misa.engine.training.parallel import join, leave
from misa.engine.training.resume import ResumableState
from misa.models.students.memory import Shadow

join(cuda=False)
rank = get_rank()
model = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.BatchNorm2d(1).eval(), torch.nn.Linear(1, 1))
for seed in (torch.manual_seed, np.random.seed, random.seed):
    seed(rank)
for layer in (model[0], model[1]):
    layer.running_mean += 1 + 2 * rank  # 1 and 3
shadow = Shadow(model)
object.__setattr__(model, "memory", SimpleNamespace(shadow=shadow, own=None))
runner = SimpleNamespace(model=model, train_dataloader=[0], _resume=True)
runner.message_hub = SimpleNamespace(runtime_info={})
state = ResumableState()
state.after_train_epoch(runner)
checkpoint = {"meta": {"iter": 1}}
state.before_save_checkpoint(runner, checkpoint)
draws = [float(torch.rand(())), np.random.rand(), random.random()]
if rank == 0:
    torch.save(checkpoint, sys.argv[1])
torch.distributed.barrier()
saved = torch.load(sys.argv[1], weights_only=True)
ResumableState().after_load_checkpoint(runner, saved)
again = [float(torch.rand(())), np.random.rand(), random.random()]
assert again == draws, (rank, draws, again)
means = [float(own[layer].running_mean) for own in (model, shadow.copy) for layer in (0, 1)]
print(f"RANK {rank} draws {draws[0]:.6f}, statistics {means}")
leave()
"""


@pytest.mark.slow
def test_a_checkpoint_has_the_generators_and_the_mean_statistics_of_all_processes(tmp_path):
    (tmp_path / "collect.py").write_text(COLLECT)
    child = started(str(tmp_path / "collect.py"), str(tmp_path / "saved.pth"))
    text, _ = child.communicate(timeout=200)
    assert child.returncode == 0, text
    drawn = [float(torch.rand((), generator=torch.Generator().manual_seed(rank))) for rank in (0, 1)]
    assert drawn[0] != drawn[1]
    for rank, own in enumerate((1.0, 3.0)):  # the second layer's statistics are fixed
        assert f"RANK {rank} draws {drawn[rank]:.6f}, statistics {[2.0, own, 2.0, own]}" in text


def test_generators_of_more_gpus_than_there_are_here(monkeypatch):
    """A checkpoint of a machine with several visible GPUs resumes with one: only the used generators matter."""
    applied = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_rng_state", applied.append)
    checkpoint = {"meta": {"iter": 3}}
    runner = SimpleNamespace(_resume=True, train_dataloader=[1, 2], model=torch.nn.Identity())
    runner.message_hub = SimpleNamespace(runtime_info={})
    ResumableState().before_save_checkpoint(runner, checkpoint)
    states = [torch.full((4,), i, dtype=torch.uint8) for i in range(8)]
    checkpoint["random_states"]["cuda"] = states
    ResumableState().after_load_checkpoint(runner, checkpoint)
    assert torch.equal(applied[0], states[0])
    assert checkpoint["meta"]["iter"] == 3


def test_what_diverged_elsewhere_is_no_wrong_input(place, monkeypatch):
    said = f"misa train: {DIVERGED}loss_cls became NaN or infinite at step 3. The checkpoints before it are whole."
    child = [sys.executable, "-c", f"import sys; print({said!r}); sys.exit(1)"]
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: real(child, **more))
    with pytest.raises(Diverged, match=r"^loss_cls became NaN or infinite"):
        launch(Train(**options(place, "box", "diverged")).command_line(), 2, threads=1)


def test_another_batch_takes_the_learning_rate_along(place, capsys):
    row = f"{place / 'rows.py'}:box"
    assert experiment_of(Train(row=row, batch=2)).schedule.lr == pytest.approx(5e-5)
    assert experiment_of(Train(row=row, batch=2, scale_lr=False)).schedule.lr == 1e-4
    with pytest.raises(UserError, match="precision must be one of float32, bfloat16, float16, not 'half'"):
        experiment_of(Train(row=row, precision="half"))


def test_more_gpus_than_there_are_is_told_before_anything_starts(place):
    with pytest.raises(UserError, match="a batch of 4 cannot be shared evenly by 64 processes"):
        train_with(Train(**options(place, "box", "many", gpus=64)))
    with pytest.raises(UserError, match="float16 needs a GPU"):
        train_with(Train(**options(place, "box", "half", precision="float16")))


def test_bfloat16_networks_have_float32_losses(place):
    """The first loss equals that of float32 up to the precision of the networks; weights stay in float32."""
    half = train_with(Train(**options(place, "short", "bfloat16", precision="bfloat16")))
    full = train_with(Train(**options(place, "short", "float32")))
    a, b = losses(half.folder)[0], losses(full.folder)[0]
    assert a["loss"] != b["loss"]
    assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    saved = torch.load(half.folder / "checkpoints" / "epoch_1.pth", weights_only=True)["state_dict"]
    assert all(v.dtype != torch.bfloat16 for v in saved.values() if torch.is_tensor(v))
    assert "networks in bfloat16" in (half.folder / "log.txt").read_text()


def test_stopped_has_a_status_of_its_own():
    assert Stopped("x").status == 1
    assert isinstance(Stopped("x", status=143), RuntimeError)
