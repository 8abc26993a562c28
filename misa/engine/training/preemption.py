"""Handling of SIGTERM and Ctrl-C: finish the step, save a checkpoint and end; the same command resumes."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.runner import Runner

from misa.engine.training.resume import ResumableState
from misa.engine.training.watch import LossRecord, NaNGuard
from misa.errors import Stopped
from misa.files import close_locks
from misa.machine import expected_processes

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


@contextlib.contextmanager
def restored_signal() -> Iterator[None]:
    """Context that restores the handlers of SIGTERM and SIGINT on exit.

    Exception: SIGTERM's in one of several processes whose training failed, since torchrun sends SIGTERM before the
    process has printed its error.
    """
    main = threading.current_thread() is threading.main_thread()
    before, interrupt = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    failed = True
    try:
        yield
        failed = False
    finally:
        if main:
            signal.signal(signal.SIGINT, interrupt)
        if main and not (failed and expected_processes() > 1):
            signal.signal(signal.SIGTERM, before)


def begin_worker(worker_id: int) -> None:
    """Let a data loader's worker outlive a signal that the whole process group gets, as from timeout, SLURM, systemd.

    Its parent still needs it to finish the step. SIGTERM ends it only if the parent sent it, as torch does at the end.
    """
    close_locks()  # this process may outlive one that is killed, and nobody could resume the run until then
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # also for the threads that it will start
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker only"

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Preemption(Hook):
    """Handles SIGTERM while training. All processes stop at the same step, even if only one received it.

    A single process handles Ctrl-C in the same way, in a terminal and in a notebook; a second Ctrl-C ends it at once.
    Several processes get SIGTERM from their launcher when that receives Ctrl-C.

    accumulate: micro-batches per optimizer step; partly accumulated gradients cannot be saved.
    """

    priority = "LOWEST"

    def __init__(self, accumulate: int = 1) -> None:
        self.accumulate = accumulate
        self.received = 0
        self.group: Any = None
        self.interrupt: Any = None
        self.terminate: Any = None

    def before_train(self, runner: Runner) -> None:
        """Install the handler, only in the main thread; `restored_signal` removes it."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo")  # on the hosts: a collective on the GPU would synchronize
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, self._receive)
            self.terminate = before if self.group is None else None
            # A background process of a shell script ignores Ctrl-C, and must continue to do so.
            if self.group is None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                self.interrupt = signal.signal(signal.SIGINT, self._receive)

    def after_train(self, runner: Runner) -> None:
        """Restore the immediate effect of Ctrl-C and SIGTERM: no step follows that would check for them.

        Several processes keep SIGTERM's handler (see `restored_signal`); their launcher kills them if they do not end.
        """
        for number, handler in ((signal.SIGINT, self.interrupt), (signal.SIGTERM, self.terminate)):
            if handler is not None:
                signal.signal(number, handler)
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received and self.group is None:
            raise Stopped(
                f"stopped by SIGTERM after the last step of {runner.max_iters}; the same command goes on with the "
                "evaluation.",
                status=128 + self.received,
            )

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Save a checkpoint and stop if any process has received a signal."""
        done = runner.iter + 1
        if done % self.accumulate or done == runner.max_iters:
            return
        received = torch.tensor(self.received)
        if self.group is not None:
            dist.all_reduce(received, dist.ReduceOp.MAX, group=self.group)
        if not received:
            return
        for hook in runner.hooks:
            if isinstance(hook, NaNGuard):
                hook.check_weights(runner)
            if isinstance(hook, LossRecord):
                hook.flush(runner)
            if isinstance(hook, ResumableState):
                hook.collect(runner)
        # Numbered by optimizer steps, which stay the same with another micro-batch or number of GPUs.
        name = f"epoch_{runner.epoch}_step_{done // self.accumulate}.pth"
        runner.save_checkpoint(runner.work_dir, name, by_epoch=False)
        _forget_stops(runner, but=name)
        reason = signal.Signals(int(received))
        what = "step" if self.accumulate == 1 else "micro-batch"
        sentence = f"stopped by {NAMES[reason]} after {what} {done} of {runner.max_iters}, saved as {name}"
        first = self.group is None or dist.get_rank() == 0  # one message for all processes
        raise Stopped(f"{sentence}; the same command goes on from there." if first else "", status=128 + reason)

    def after_train_epoch(self, runner: Runner) -> None:
        """Delete mid-epoch checkpoints, which the epoch's own replaces."""
        _forget_stops(runner)

    def _receive(self, number: int, *_: Any) -> None:
        if number == signal.SIGINT:
            if self.received:
                raise KeyboardInterrupt
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
        self.received = number


def _forget_stops(runner: Runner, but: str = "") -> None:
    """Delete the checkpoints within epochs, except one."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        for path in Path(runner.work_dir).glob("epoch_*_step_*.pth"):
            if path.name != but:
                path.unlink()
