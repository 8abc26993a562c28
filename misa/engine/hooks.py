"""What happens around the training steps: seeds, exact resume, the loss record and progress."""

import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, is_main_process, master_only
from mmengine.hooks import Hook, ParamSchedulerHook, RuntimeInfoHook
from mmengine.runner import Runner
from tqdm.auto import tqdm

from misa.engine.health import blamed
from misa.errors import Diverged


class EpochSeed(Hook):
    """Tells the data set which epoch it is, before its workers start."""

    def before_train_epoch(self, runner: Runner) -> None:
        """Called by mmengine."""
        runner.train_dataloader.dataset.epoch = runner.epoch


class ResumableState(Hook):
    """Makes a resumed run equal to an uninterrupted one, and its checkpoints loadable with weights_only=True.

    mmengine saves neither the random generators nor anything but pickled objects for its logs.
    """

    priority = "VERY_LOW"

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the generators' states; leave the log buffers out (`losses.jsonl` has them)."""
        kept = runner.message_hub.runtime_info.get("keep_ckpt_ids", [])  # which checkpoints may be deleted next
        checkpoint["message_hub"] = {
            "log_scalars": {},
            "runtime_info": {"keep_ckpt_ids": kept},
            "resumed_keys": {"keep_ckpt_ids": True},
        }
        numpy_state: Any = np.random.get_state()  # noqa: NPY002
        name, keys, position, has_gauss, gauss = numpy_state
        version, numbers, following = random.getstate()
        checkpoint["batches_per_epoch"] = len(runner.train_dataloader)
        checkpoint["random_states"] = {
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "python": [version, list(numbers), following],
        }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Set the generators as they were; only a resumed run carries their states.

        Another per_gpu or number of GPUs makes another number of batches an epoch: where the run is, is counted anew.
        """
        states = checkpoint.get("random_states")
        if states is None or not runner._resume:
            return
        batches = len(runner.train_dataloader)  # whole steps of the optimiser, and saved after whole ones: it divides
        meta, before = checkpoint["meta"], checkpoint.get("batches_per_epoch", batches)
        meta["iter"] = meta["iter"] * batches // before
        # The checkpoint is loaded onto the training's device, the generators want their states on the CPU.
        torch.set_rng_state(states["torch"].cpu())
        if states["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"][0].cpu())
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
        version, numbers, following = states["python"]
        random.setstate((version, tuple(numbers), following))


class RuntimeInfo(RuntimeInfoHook):
    """mmengine's, without reading every loss back from the device at every step."""

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `LossRecord` keeps the losses."""


class StepSchedulers(ParamSchedulerHook):
    """mmengine's, but once a step of the optimiser: accumulation leaves the learning rates as they would be.

    Args:
        accumulate: batches that make a step.
    """

    def __init__(self, accumulate: int = 1) -> None:
        self.accumulate = accumulate

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Called by mmengine."""
        if (runner.iter + 1) % self.accumulate == 0:
            super().after_train_iter(runner, batch_idx, data_batch, outputs)


class LossRecord(Hook):
    """Writes every step's losses to a jsonl file and to the loggers, many steps in one go, so that little waits.

    With several processes these are the means over them: the losses of the whole batch. A resumed run first drops the
    lines of steps that it will repeat.
    """

    def __init__(self, path: str, every: int = 50) -> None:
        self.path = Path(path)
        self.every = every
        self.pending: list[dict[str, Any]] = []

    @master_only
    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Count the lines of a run that goes on with another number of batches an epoch in those batches.

        Before `ResumableState`, whose priority is lower, counts the checkpoint's own place anew.
        """
        if not runner._resume or not self.path.exists():
            return
        batches = len(runner.train_dataloader)
        before = checkpoint.get("batches_per_epoch", batches)
        if batches == before:
            return
        kept = [line for line in self.path.read_text().splitlines() if _step(line) < checkpoint["meta"]["iter"]]
        rows = [row | {"iter": row["iter"] * batches // before} for row in map(json.loads, kept)]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Keep the lines before the step at which training starts."""
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) < runner.iter]
            self.path.write_text("".join(line + "\n" for line in kept))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Remember the losses as tensors; reading them here would stall a GPU, keeping their graph would fill it."""
        losses = {name: value.detach() for name, value in (outputs or {}).items() if torch.is_tensor(value)}
        self.pending.append({"iter": runner.iter, "lr": runner.optim_wrapper.param_groups[0]["lr"], **losses})
        if len(self.pending) >= self.every:
            self.flush(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Write what was remembered."""
        self.flush(runner)

    def flush(self, runner: Runner) -> None:
        """Write what was remembered; a loss that is no number ends the training here. All processes together."""
        rows = read_losses(self.pending)
        self.pending.clear()
        whole = [row for row in rows if all(map(math.isfinite, row.values()))]
        if is_main_process():
            with self.path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in whole)
        for row in whole:
            scalars = {name: value for name, value in row.items() if name != "iter"}
            runner.visualizer.add_scalars(scalars, step=row["iter"] + 1)
        for row in rows:
            if broken := [name for name, value in row.items() if not math.isfinite(value)]:
                name = blamed(broken)
                raise Diverged(
                    f"{name} became {row[name]} at step {row['iter'] + 1}; the checkpoints before it are whole: "
                    "lower the learning rate or the weight of that loss, in another work_dir."
                )


def read_losses(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with plain numbers in place of tensors, each the mean over the processes; one transfer for all."""
    tensors = [value for row in rows for value in row.values() if torch.is_tensor(value)]
    if not tensors:
        return [dict(row) for row in rows]
    stacked = torch.stack([value.double() for value in tensors])
    all_reduce(stacked, op="mean")
    numbers = iter(stacked.tolist())
    return [{name: next(numbers) if torch.is_tensor(value) else value for name, value in row.items()} for row in rows]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["iter"])
    except (ValueError, KeyError):  # a line cut by a kill
        return float("inf")


_HEALTH = ("mask_", "gradient_")


def _in_words(health: dict[str, torch.Tensor]) -> str:
    """The last look at the student, for a line of the log."""
    if not health:
        return ""
    values = {name: value.item() for name, value in health.items()}
    shares = [(n.removeprefix("gradient_"), v) for n, v in values.items() if n.startswith("gradient_")]
    return (
        f" | masks fill {values['mask_fill']:.0%} of their boxes, {values['mask_is_box']:.0%} are the box"
        f" | gradient {' '.join(f'{name} {share:.0%}' for name, share in shares)}"
    )


class Progress(Hook):
    """A line about every twentieth of the run to standard output and `log.txt`; a bar in an interactive notebook.

    The first of several processes speaks for all.

    Args:
        about: said before the first step.
    """

    priority = "LOWEST"

    def __init__(self, path: str, interactive: bool = False, lines: int = 20, about: str = "") -> None:
        self.path = Path(path)
        self.interactive = interactive and is_main_process()
        self.lines = lines
        self.about = about
        self.bar: Any = None
        self.health: dict[str, torch.Tensor] = {}

    def before_train(self, runner: Runner) -> None:
        """Start the clock at the step that training starts from."""
        self.started, self.first = time.monotonic(), runner.iter
        self.every = max(1, runner.max_iters // self.lines)
        if self.about:
            self._say(self.about)
        if 0 < runner.iter < runner.max_iters:
            self._say(
                f"resuming at epoch {runner.epoch + 1}/{runner.max_epochs}, step {runner.iter}/{runner.max_iters}"
            )
        if self.interactive:
            self.bar = tqdm(total=runner.max_iters, initial=runner.iter, desc="train", unit="step")

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Report."""
        done = runner.iter + 1
        watched = {name: value.detach() for name, value in (outputs or {}).items() if name.startswith(_HEALTH)}
        self.health = watched or self.health
        if self.bar is not None:
            self.bar.update()
        if done % self.every and done != runner.max_iters and done != self.first + 1:
            return
        seconds = (time.monotonic() - self.started) / (done - self.first)
        left = int(seconds * (runner.max_iters - done))
        (losses,) = read_losses([{k: v.detach() for k, v in (outputs or {}).items() if "loss" in k}])
        parts = " ".join(f"{key.removeprefix('loss_')} {value:.2f}" for key, value in losses.items())
        self._say(
            f"epoch {runner.epoch + 1}/{runner.max_epochs} step {done}/{runner.max_iters} | {parts} | "
            f"{seconds:.2f} s/step, {left // 60}:{left % 60:02d} left{_in_words(self.health)}",
            quiet=self.bar is not None,
        )

    def after_train(self, runner: Runner) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Report the evaluation four times."""
        total = len(runner.test_dataloader)
        if (batch_idx + 1) % max(1, total // 4) == 0:
            self._say(f"evaluated {batch_idx + 1}/{total} images")

    @master_only
    def _say(self, text: str, *, quiet: bool = False) -> None:
        if not quiet:
            print(text, flush=True)
        with self.path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
