"""SIGTERM: finish the step, save, and end; the same command goes on from there."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.runner import Runner

from misa.engine.training.watch import LossRecord
from misa.errors import Stopped
from misa.machine import expected_processes

SIGTERM_STATUS = 128 + signal.SIGTERM


@contextlib.contextmanager
def restored_signal() -> Iterator[None]:
    """SIGTERM means afterwards what it meant before.

    But not in one of several processes whose training failed: torchrun ends it, and it has a sentence to say first.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    failed = True
    try:
        yield
        failed = False
    finally:
        if main and not (failed and expected_processes() > 1):
            signal.signal(signal.SIGTERM, before)


class Preemption(Hook):
    """Catches SIGTERM while training. All processes stop at the same step, even if one alone was told.

    Args:
        accumulate: batches that make a step of the optimiser; what is half accumulated cannot be saved.
    """

    priority = "LOWEST"

    def __init__(self, accumulate: int = 1) -> None:
        self.accumulate = accumulate
        self.told = False
        self.group: Any = None

    def before_train(self, runner: Runner) -> None:
        """Take the signal over; only a main thread can. `restored_signal` gives it back."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo")  # between hosts: a GPU would have to be waited for
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._tell)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Save and stop where somebody was told to."""
        done = runner.iter + 1
        if done % self.accumulate or done == runner.max_iters:
            return
        told = torch.tensor(int(self.told))
        if self.group is not None:
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
        if not told:
            return
        for hook in runner.hooks:
            if isinstance(hook, LossRecord):
                hook.flush(runner)
        name = f"epoch_{runner.epoch}_step_{done}.pth"
        runner.save_checkpoint(runner.work_dir, name, by_epoch=False)
        sentence = f"stopped by SIGTERM after step {done} of {runner.max_iters}, saved as {name}"
        first = self.group is None or dist.get_rank() == 0  # one sentence for all processes
        raise Stopped(f"{sentence}; the same command goes on from there." if first else "", status=SIGTERM_STATUS)

    def after_train_epoch(self, runner: Runner) -> None:
        """What was saved within an epoch is not needed once the epoch is."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            for path in Path(runner.work_dir).glob("epoch_*_step_*.pth"):
                path.unlink()

    def _tell(self, *_: Any) -> None:
        self.told = True
