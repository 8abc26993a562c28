"""What happens around the training steps: seeds, exact resume, the loss record and progress."""

import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, get_rank, is_main_process, master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from tqdm.auto import tqdm

from misa.errors import Diverged
from misa.files import atomic_write


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
        self._rewrite(map(json.dumps, rows))

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Keep the lines before the step at which training starts."""
        if self.path.exists():
            self._rewrite([line for line in self.path.read_text().splitlines() if _step(line) < runner.iter])

    def _rewrite(self, lines: Iterable[str]) -> None:
        with atomic_write(self.path) as partial:
            partial.write_text("".join(line + "\n" for line in lines))

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


BATCH = "diverged.pth"


class Health(Hook):
    """Asks the student for its health at every so manyth step; `LossRecord` writes the answer among the losses.

    Looking costs a backward pass a loss as far as the neck; steps in between cost nothing.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Called by mmengine."""
        student = runner.model.module if is_model_wrapper(runner.model) else runner.model
        student.watched = runner.iter % self.every == 0


class NaNGuard(Hook):
    """Ends the training at a step whose losses are no numbers: names the loss, and keeps the batch for a second look.

    Of several processes each keeps its own batch: `diverged.pth` is the first one's, `diverged-1.pth` the next one's.

    On a GPU the answer is fetched behind the training's back, `behind` steps late at most, so that nothing waits.
    """

    priority = "VERY_HIGH"

    def __init__(self, folder: str, behind: int = 8) -> None:
        rank = get_rank()
        self.path = Path(folder) / (BATCH if rank == 0 else f"{Path(BATCH).stem}-{rank}.pth")
        self.behind = behind
        self.current: tuple[int, Any] | None = None
        self.open: list[tuple[int, Any, list[str], torch.Tensor, Any]] = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Remember the batch, in case the model itself refuses to go on."""
        self.current = (runner.iter, data_batch)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Look at this step's losses, or at those of earlier steps that have arrived."""
        losses = {name: value for name, value in (outputs or {}).items() if torch.is_tensor(value)}
        if not losses:
            return
        values = torch.stack([value.detach().float().mean() for value in losses.values()])
        event = None
        if values.is_cuda:
            values, event = values.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.open.append((runner.iter, data_batch, list(losses), values, event))
        self._look(all_of_them=False)

    def after_train(self, runner: Runner) -> None:
        """Look at what is still open."""
        self._look(all_of_them=True)

    def _look(self, *, all_of_them: bool) -> None:
        while self.open:
            step, batch, names, values, event = self.open[0]
            if event is not None and not event.query():
                if not all_of_them and len(self.open) <= self.behind:
                    return
                event.synchronize()
            self.open.pop(0)
            broken = [name for name, value in zip(names, values.tolist(), strict=True) if not _finite(value)]
            if broken:
                raise Diverged(f"{blamed(broken)} became no number at step {step + 1}. {self.save(step, batch)}")

    def explain(self, error: Diverged) -> Diverged:
        """The model's own refusal, with the step and the batch that it happened on."""
        if self.current is None or self.path.name in str(error):
            return error
        step, batch = self.current
        return Diverged(f"step {step + 1}: {error} {self.save(step, batch)}")

    def save(self, step: int, batch: Any) -> str:
        """Write the batch as plain tensors, loadable with weights_only=True; a sentence that says so."""
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
            "learning rate or the weight of that loss, in another work_dir."
        )


def blamed(broken: Sequence[str]) -> str:
    """The first that is not "loss": that is the sum, and no number as soon as one of its parts is none."""
    return next((name for name in broken if name != "loss"), broken[0])


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _plain(values: Any) -> torch.Tensor:
    tensor: torch.Tensor = getattr(values, "tensor", values)
    return tensor.cpu()
