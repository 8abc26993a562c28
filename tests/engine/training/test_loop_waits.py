"""Host-device waits in the training loop: a loss is read only where it is printed or written."""

import pytest

from misa.data.source import open_source
from misa.engine.training import watch
from misa.engine.training.config import run_config
from misa.engine.training.runner import quiet_runner
from misa.machine import Machine
from misa.models.teacher.table import build_teacher
from misa.ops.backends import choice
from misa.rows import find_row, teacher_row
from tests.pretend_cuda import pretended

PRINTED, WRITTEN, STEPS = (0, 3, 7), (3, 7), 8


def looped(row, folder):
    """Run a row's training loop on a fake device; returns the waits of each step."""
    source = open_source(row, folder / "data")
    runner = quiet_runner(run_config(row, source, folder=folder, seed=0, machine=Machine(gpus=0), log=True))
    if row.teacher:
        teacher = build_teacher(teacher_row(row), source.classes)
    found = []
    with pretended() as waits, choice.use("torch"):
        runner.model.to("cuda")
        if row.teacher:
            runner.model.attach(teacher)
        runner._train_loop = runner.build_train_loop(runner._train_loop)
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
        runner.optim_wrapper.initialize_count_status(runner.model, 0, STEPS)
        for name in ("before_run", "before_train", "before_train_epoch"):
            runner.call_hook(name)
        record, progress = (
            next(hook for hook in runner.hooks if isinstance(hook, kind)) for kind in (watch.LossRecord, watch.Progress)
        )
        record.every, progress.every = len(WRITTEN) * 2, 4
        for index, data in enumerate(runner.train_loop.dataloader):
            waits.clear()
            runner.train_loop.run_iter(index, data)
            found.append(list(waits))
    runner.visualizer.close()  # or TensorBoard's thread writes after the folder is deleted
    return found


@pytest.mark.parametrize("name", ["demo:misa", "demo:discobox", "teacher:demo"])
def test_a_loss_is_read_where_it_is_printed_or_written(name, tmp_path):
    """In the first step, which fills caches, only the reading of losses is checked."""
    row = find_row(name).smoke().but(limit=STEPS, schedule={"batch": 1})
    if row.affinity is not None:
        row = row.but(affinity={"local_steps": 2})  # further steps are the same operations
    found = looped(row, tmp_path)
    assert len(found) == STEPS
    for step, waits in enumerate(found):
        reads = [line for line in waits if "training/watch.py" in line]
        expected = (step in PRINTED) + (step in WRITTEN)
        assert reads == ["_to_copy at training/watch.py read_losses"] * expected, step
        assert step == 0 or waits == reads, step
    assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == STEPS
