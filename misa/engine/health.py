"""Watching a training: how the masks look, which loss moves the student, and a step whose losses are no numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from misa.errors import Diverged

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
