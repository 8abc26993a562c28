"""Hooks that monitor a training: loss record, progress lines, diagnostics and the guard against NaN."""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.dist import all_reduce, get_rank, is_main_process, master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from misa.engine.runs.live import Live, in_notebook
from misa.errors import Diverged, counted, option_name
from misa.files import atomic_write


class LossRecord(Hook):
    """Writes the losses of every step to a jsonl file and to the loggers, buffered to rarely synchronize with a GPU.

    Losses are averaged over processes, which gives those of the whole batch. A resumed run first removes the lines of
    steps that it will repeat. "iter" counts micro-batches, of which an epoch has "of".
    """

    def __init__(self, path: str, every: int = 50) -> None:
        self.path = Path(path)
        self.every = every
        self.pending: list[dict[str, Any]] = []

    @master_only
    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Renumber the lines if a resumed run has another number of micro-batches per epoch.

        Runs before `ResumableState`, whose priority is lower, renumbers the checkpoint's step. Each line states its own
        numbering: those of a run that was killed before its next checkpoint are renumbered already.
        """
        if not runner._resume or not self.path.exists():
            return
        batches = len(runner.train_dataloader)
        before = checkpoint.get("batches_per_epoch", batches)
        rows = [json.loads(line) for line in self.path.read_text().splitlines() if math.isfinite(_step(line))]
        if all(row.get("of", before) == batches for row in rows):
            return
        done = checkpoint["meta"]["iter"]
        kept = [row for row in rows if row["iter"] * before < done * row.get("of", before)]
        self._rewrite(
            json.dumps(row | {"iter": row["iter"] * batches // row.get("of", before), "of": batches}) for row in kept
        )

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Keep the lines before the step at which training starts."""
        if self.path.exists():
            self._rewrite([line for line in self.path.read_text().splitlines() if _step(line) < runner.iter])

    def _rewrite(self, lines: Iterable[str]) -> None:
        with atomic_write(self.path) as partial:
            partial.write_text("".join(line + "\n" for line in lines))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Buffer the losses, detached to free the graph, and without reading them, which would synchronize."""
        losses = {name: value.detach() for name, value in (outputs or {}).items() if torch.is_tensor(value)}
        place = {"iter": runner.iter, "of": len(runner.train_dataloader)}
        self.pending.append({**place, "lr": runner.optim_wrapper.param_groups[0]["lr"], **losses})
        if len(self.pending) >= self.every:
            self.flush(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Write the buffered losses."""
        self.flush(runner)

    def flush(self, runner: Runner) -> None:
        """Write the buffered losses (a collective call of all processes); Diverged if one is not finite."""
        rows = read_losses(self.pending)
        self.pending.clear()
        whole = [row for row in rows if all(map(math.isfinite, row.values()))]
        if is_main_process():
            with self.path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in whole)
        for row in whole:
            scalars = {name: value for name, value in row.items() if name not in ("iter", "of")}
            runner.visualizer.add_scalars(scalars, step=row["iter"] + 1)
        for row in rows:
            if broken := [name for name, value in row.items() if not math.isfinite(value)]:
                name = culprits(broken)
                raise Diverged(
                    f"{name} became {row[name]} at step {row['iter'] + 1}; the checkpoints before it are whole: "
                    f"lower the learning rate or the weight of that loss, in another {option_name('work_dir')}."
                )


def read_losses(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace tensors in the rows by numbers, averaged over the processes, with one transfer for all."""
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
    except (ValueError, KeyError):  # a truncated line of a killed process
        return float("inf")


WIDTH = 100  # maximum characters per line
# Description of the package's losses for the head of the log; others are printed by name only.
MEANING = {
    "cls": "classification",
    "class": "classes inside the boxes",
    "mask": "masks against true ones",
    "dice": "overlap with true masks",
    "projection": "masks touch all sides of their boxes",
    "global": "masks follow the affinity along the tree",
    "local": "masks follow the affinity in windows",
    "distillation": "features follow the teacher's (FSD)",
    "outside": "nothing outside the boxes",
    "sure": "self-training on confident pixels",
    "stages": "the same for the stages' summed maps",
    "labels": "label maps against true ones",
}
_HEALTH = ("mask_", "gradient_")
# Assumed duration of a step of the next training relative to this one's, where none was measured: a student also runs
# its teacher.
NEXT_STEP = 1.5


class FollowingRun(NamedTuple):
    """A training that follows: its steps, and the seconds per step that an earlier run measured, if any."""

    steps: int
    seconds: float | None = None


class Progress(Hook):
    """Prints a head and about `lines` progress lines per run to standard output and `log.txt`, on the main process.

    With `interactive`, a notebook shows one display instead, updated in place (`misa.engine.runs.live`).

    path: the log. interactive: use the display if a Jupyter kernel runs this. lines: number of progress lines of the
    whole run. about: text printed before the first step. accumulate: micro-batches per optimizer step; the log counts
    the former.

    `later` is set to the trainings that follow, to include them in the remaining time, which is then marked with ~;
    `said` to the lines that were printed before the log was open, and are only written to it.
    """

    priority = "LOWEST"

    def __init__(
        self, path: str, interactive: bool = False, lines: int = 20, about: str = "", accumulate: int = 1
    ) -> None:
        self.path = Path(path)
        self.interactive = interactive and is_main_process() and in_notebook()
        self.lines = lines
        self.about = about
        self.accumulate = accumulate
        self.columns: list[str] | None = None
        self.later: Sequence[FollowingRun] = ()
        self.said: Sequence[str] = ()
        self.live: Live | None = None
        self.health: dict[str, torch.Tensor] = {}

    def before_train(self, runner: Runner) -> None:
        """Start the timer at the first step of this call."""
        self.started, self.first = time.monotonic(), runner.iter
        self.every = max(1, runner.max_iters // self.lines)
        self.live = Live(runner) if self.interactive else None
        for line in self.said:
            self._write(line)
        for line in self.about.splitlines():
            self._say(line)
        if 0 < runner.iter < runner.max_iters:
            self._say(
                f"resuming at epoch {runner.epoch + 1}/{runner.max_epochs}, step {runner.iter}/{runner.max_iters}"
            )

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Report."""
        done = runner.iter + 1
        watched = {name: value.detach() for name, value in (outputs or {}).items() if name.startswith(_HEALTH)}
        self.health = watched or self.health
        if done % self.every and done != runner.max_iters and done != self.first + 1:
            return
        shown = {k: v.detach() for k, v in (outputs or {}).items() if "loss" in k}
        losses, health = read_losses([shown, self.health])
        values = {key.removeprefix("loss_"): value for key, value in losses.items()}
        if self.columns is None:
            self._name_columns(values)
        if done == self.first + 1:
            # The first step compiles and fills caches; the remaining time is extrapolated from the others.
            seconds, self.started = time.monotonic() - self.started, time.monotonic()
        else:
            seconds = (time.monotonic() - self.started) / (done - self.first - 1)
        step = f"epoch {runner.epoch + 1}/{runner.max_epochs} step {done}/{runner.max_iters}"
        line = f"{step:<26}" + "".join(f"{values[name]:>{_wide(name)}.2f}" for name in self.columns or ())
        clock = "?" if done == self.first + 1 < runner.max_iters else self._left(seconds, runner.max_iters - done)
        line += f"{seconds:>8.2f} {clock:>6}"
        lines = [line, *(_in_words(health) if health else ())]
        for text in lines:
            self._say(text, quiet=self.interactive)
        if self.live is not None:
            self.live.show(runner, values, "\n".join([self.heads, *lines]), done)
        self.health = {}

    def _left(self, seconds: float, steps: int) -> str:
        """Returns the remaining time as minutes:seconds from the seconds per step; with ~ if a training follows."""
        following = sum(part.steps * (part.seconds or NEXT_STEP * seconds * self.accumulate) for part in self.later)
        left = math.ceil(seconds * steps + following)
        return f"{'~' if self.later else ''}{left // 60}:{left % 60:02d}"

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Report the evaluation's progress four times."""
        total = len(runner.test_dataloader)
        if (batch_idx + 1) % max(1, total // 4) == 0:
            self._say(f"evaluated {batch_idx + 1} of {counted(total, 'image')}")

    def _name_columns(self, values: Mapping[str, float]) -> None:
        """Print the losses' descriptions and the header of as many columns as fit."""
        for line in explained(values):
            self._say(line)
        self.columns, used = [], 26 + 8 + 7
        for name in values:
            if used + _wide(name) <= WIDTH:
                self.columns.append(name)
                used += _wide(name)
        heads = "".join(f"{name:>{_wide(name)}}" for name in self.columns)
        self.heads = f"{'':<26}{heads}{'s/step':>8}{'left':>7}"
        self._say(self.heads, quiet=self.interactive)

    @master_only
    def _say(self, text: str, *, quiet: bool = False) -> None:
        if not quiet:
            print(text, flush=True)
        self._write(text)

    @master_only
    def _write(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def explained(values: Mapping[str, float]) -> list[str]:
    """Describe the losses, in lines of at most `WIDTH` characters.

    >>> explained({"loss": 2.0, "cls": 1.0, "projection": 1.0})
    ['losses: cls: classification; projection: masks touch all sides of their boxes']
    """
    return _wrapped("losses: ", [f"{name}: {MEANING[name]}" for name in values if name in MEANING], "; ")


def _wrapped(head: str, parts: Sequence[str], between: str) -> list[str]:
    """Join parts after a head, wrapped to `WIDTH` characters; continuation lines are indented."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(between) + len(part) <= WIDTH:
            lines[-1] += between + part
        else:
            lines.append((" " * len(head) if lines else head) + part)
    return lines


def _wide(name: str) -> int:
    return max(len(name) + 1, 6)


def _in_words(values: Mapping[str, float]) -> list[str]:
    """Format the diagnostics of a step as lines of the log."""
    shares = [f"{n.removeprefix('gradient_')} {v:.0%}" for n, v in values.items() if n.startswith("gradient_")]
    return [
        f"  masks fill {values['mask_fill']:.0%} of their boxes, {values['mask_is_box']:.0%} are the box",
        *_wrapped("  share of the gradient: ", shares, ", "),
    ]


BATCH = "diverged.pth"


class Health(Hook):
    """Requests diagnostics from the student every N steps; `LossRecord` writes them with the losses.

    Such a step costs one additional backward pass per loss, up to the neck; others cost nothing.

    every: N.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Set the student's `watched`."""
        student = runner.model.module if is_model_wrapper(runner.model) else runner.model
        student.watched = runner.iter % self.every == 0


class NaNGuard(Hook):
    """Ends the training at a step with a non-finite loss, names the loss and saves the batch.

    A gradient that is not finite shows in the loss of the next step only, so that the weights are checked before every
    checkpoint and thereby after the last step.

    Every process saves its own batch: `diverged.pth` is the main process's, `diverged-1.pth` that of rank 1.

    folder: where to save the batch. behind: on a GPU losses are read asynchronously, at most this many steps late.
    """

    priority = "VERY_HIGH"

    def __init__(self, folder: str, behind: int = 8) -> None:
        rank = get_rank()
        self.path = Path(folder) / (BATCH if rank == 0 else f"{Path(BATCH).stem}-{rank}.pth")
        self.behind = behind
        self.current: tuple[int, Any] | None = None
        self.open: list[tuple[int, Any, list[str], torch.Tensor, Any]] = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Keep the batch, in case the model itself raises."""
        self.current = (runner.iter, data_batch)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Check this step's losses, on a GPU those of earlier steps whose transfer is complete."""
        losses = {name: value for name, value in (outputs or {}).items() if torch.is_tensor(value)}
        if not losses:
            return
        values = torch.stack([value.detach().float().mean() for value in losses.values()])
        event = None
        if values.is_cuda:
            values, event = values.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.open.append((runner.iter, data_batch, list(losses), values, event))
        self.check(wait=False)

    def after_train_epoch(self, runner: Runner) -> None:
        """Check the remaining steps and the weights, before mmengine saves them."""
        self.check_weights(runner)

    def check_weights(self, runner: Runner) -> None:
        """Raise Diverged if a loss so far or a weight is not finite."""
        self.check(wait=True)
        weights = [p.detach() for p in runner.model.parameters()]
        if weights and not torch.stack([w.isfinite().all() for w in weights]).all():
            names = [name for name, p in runner.model.named_parameters() if not p.detach().isfinite().all()]
            many = counted(len(names), "parameter")
            raise Diverged(f"{many} of the network became NaN or infinite, such as {names[0]}.")

    def check(self, *, wait: bool) -> None:
        """Raise Diverged for the first step with non-finite losses among those transferred; `wait`: among all."""
        while self.open:
            step, batch, names, values, event = self.open[0]
            if event is not None and not event.query():
                if not wait and len(self.open) <= self.behind:
                    return
                event.synchronize()
            self.open.pop(0)
            broken = [name for name, value in zip(names, values.tolist(), strict=True) if not math.isfinite(value)]
            if broken:
                raise Diverged(
                    f"{culprits(broken)} became NaN or infinite at step {step + 1}. {self.save(step, batch)}"
                )

    def explain(self, error: Diverged) -> Diverged:
        """Add step and batch to an error raised by the model."""
        if self.current is None or self.path.name in str(error):
            return error
        step, batch = self.current
        return Diverged(f"step {step + 1}: {error} {self.save(step, batch)}")

    def save(self, step: int, batch: Any) -> str:
        """Save the batch as plain tensors, loadable with weights_only=True; return a sentence for the error message."""
        samples = batch["data_samples"]
        torch.save(
            {
                "step": step,
                "inputs": [image.cpu() for image in batch["inputs"]],
                "boxes": [_plain(sample.gt_instances.bboxes) for sample in samples if "gt_instances" in sample],
                "labels": [_plain(sample.gt_instances.labels) for sample in samples if "gt_instances" in sample],
                "img_ids": [int(sample.img_id) for sample in samples],
                "img_paths": [str(sample.img_path) for sample in samples],
            },
            self.path,
        )
        return (
            f"The batch is in {self.path}, and the checkpoints before it are whole: look at its images, or lower the "
            f"learning rate or the weight of a loss, in another {option_name('work_dir')}."
        )


def culprits(broken: Sequence[str]) -> str:
    """Name of the first non-finite loss term; the total, "loss", is named last."""
    return next((name for name in broken if name != "loss"), broken[0])


def _plain(values: Any) -> torch.Tensor:
    tensor: torch.Tensor = getattr(values, "tensor", values)
    return tensor.cpu()
