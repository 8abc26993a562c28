"""Preemption by SIGTERM: finish the step, save a checkpoint, and end; the same command resumes from there."""

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
    """Restore the handler of SIGTERM afterwards.

    But not in one of several processes whose training failed: torchrun sends it SIGTERM, and it still has to print why.
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
    """Handles SIGTERM while training. All processes stop at the same step, even if only one received it.

    Args:
        accumulate: micro-batches of an optimiser step; half accumulated gradients cannot be saved.
    """

    priority = "LOWEST"

    def __init__(self, accumulate: int = 1) -> None:
        self.accumulate = accumulate
        self.received = False
        self.group: Any = None

    def before_train(self, runner: Runner) -> None:
        """Install the handler, which only a main thread can; `restored_signal` removes it."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo")  # on the hosts: a collective on the GPU would be waited for
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._receive)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Save and stop where any process has received SIGTERM."""
        done = runner.iter + 1
        if done % self.accumulate or done == runner.max_iters:
            return
        received = torch.tensor(int(self.received))
        if self.group is not None:
            dist.all_reduce(received, dist.ReduceOp.MAX, group=self.group)
        if not received:
            return
        for hook in runner.hooks:
            if isinstance(hook, LossRecord):
                hook.flush(runner)
        name = f"epoch_{runner.epoch}_step_{done}.pth"
        runner.save_checkpoint(runner.work_dir, name, by_epoch=False)
        sentence = f"stopped by SIGTERM after step {done} of {runner.max_iters}, saved as {name}"
        first = self.group is None or dist.get_rank() == 0  # one message for all processes
        raise Stopped(f"{sentence}; the same command goes on from there." if first else "", status=SIGTERM_STATUS)

    def after_train_epoch(self, runner: Runner) -> None:
        """Delete checkpoints from within the epoch, which has one of its own now."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            for path in Path(runner.work_dir).glob("epoch_*_step_*.pth"):
                path.unlink()

    def _receive(self, *_: Any) -> None:
        self.received = True
