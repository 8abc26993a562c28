"""Sampler and epoch loop that resume mid-epoch and give the same batches for any number of processes."""

import random
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch
from mmengine.dataset import DefaultSampler
from mmengine.dist import all_gather_object, all_reduce_params, get_rank, get_world_size
from mmengine.hooks import Hook, ParamSchedulerHook, RuntimeInfoHook
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from misa.errors import UserError, option_name
from misa.models.students.base import Clock


class WholeBatches(DefaultSampler):
    """Shuffles indices into whole batches, of which each process takes its part.

    A batch has the same images for any world size and micro-batch.

    dataset: the dataset. batch: images per optimizer step, over all processes. seed: of the order, together with the
    epoch.
    """

    def __init__(self, dataset: Sized, *, batch: int, seed: int) -> None:
        super().__init__(dataset, shuffle=True, seed=seed, round_up=False)
        self.total_size = len(dataset) // batch * batch
        self.num_samples = self.total_size // self.world_size
        self.skip = 0  # number of this process's indices to skip in the next epoch only

    def __iter__(self) -> Iterator[int]:
        mine = list(super().__iter__())[self.skip :]
        self.skip = 0
        return iter(mine)


class ResumableLoop(EpochBasedTrainLoop):
    """mmengine's epoch loop that can resume within an epoch."""

    def run_epoch(self) -> None:
        """Run an epoch from the batch at which the checkpoint was saved."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        done = self._iter - self._epoch * len(self.dataloader)
        if not 0 <= done <= len(self.dataloader):
            raise UserError(
                f"the checkpoint is at batch {self._iter} after {self._epoch} epochs of {len(self.dataloader)}: it was "
                f"written with another {option_name('per_gpu')} or number of GPUs; go on with those."
            )
        if done < len(self.dataloader):  # otherwise stopped between the last step of the epoch and its end
            batches = self.dataloader.batch_sampler
            batches.sampler.skip = done * batches.batch_size
            # A loader draws its seed from torch's generator, which a resumed run has done at the epoch's beginning.
            with torch.random.fork_rng(devices=(), enabled=done > 0):
                loaded = iter(self.dataloader)
            for index, batch in enumerate(loaded, start=done):
                self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


class EpochSeed(Hook):
    """Sets the dataset's epoch, which seeds its augmentation, before its workers start."""

    def before_train_epoch(self, runner: Runner) -> None:
        """Set the epoch."""
        runner.train_dataloader.dataset.epoch = runner.epoch


class StepClock(Hook):
    """Passes the training's progress to the student before every optimizer step, for ramps and the EMA model.

    The step is the runner's, so that it is right after a resume.

    seed: of the run. accumulate: micro-batches per optimizer step.
    """

    def __init__(self, seed: int, accumulate: int = 1) -> None:
        self.seed, self.accumulate = seed, accumulate

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Call the student's `begin_step` at the first micro-batch of a step."""
        if runner.iter % self.accumulate == 0:
            student = runner.model.module if is_model_wrapper(runner.model) else runner.model
            step, steps = runner.iter // self.accumulate, runner.max_iters // self.accumulate
            student.begin_step(Clock(step, steps, self.seed))


class ResumableState(Hook):
    """Saves and restores random generators and an objective's host state, so that a resumed run equals an uninterrupted
    one.

    The main process writes the checkpoint: of several processes it also has the others' generators, and the mean of
    their BatchNorm statistics; host state is the main process's. Checkpoints remain loadable with weights_only=True:
    mmengine would pickle its log objects into them.
    """

    priority = "LOW"  # before mmengine's hook that saves the checkpoint

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def after_train_epoch(self, runner: Runner) -> None:
        """Collect what the checkpoint of this epoch needs of all processes."""
        self.collect(runner)

    def collect(self, runner: Runner) -> None:
        """Gather the generators of all processes, and average their BatchNorm statistics (a collective call)."""
        if get_world_size() > 1:
            share_statistics(runner.model)
        self.states = all_gather_object(_random_states())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the states; remove the log buffers, whose content `losses.jsonl` has."""
        kept = runner.message_hub.runtime_info.get("keep_ckpt_ids", [])  # which checkpoints may be deleted next
        checkpoint["message_hub"] = {
            "log_scalars": {},
            "runtime_info": {"keep_ckpt_ids": kept},
            "resumed_keys": {"keep_ckpt_ids": True},
        }
        checkpoint["batches_per_epoch"] = len(runner.train_dataloader)
        if (kept := _kept_on_host(runner)) is not None:
            checkpoint["kept_on_host"] = kept.state()
        first, *others = self.states or [_random_states()]
        checkpoint |= {"random_states": first, "random_states_of_others": others}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Restore the states, if the checkpoint has them.

        With another per_gpu or number of GPUs an epoch has another number of micro-batches: the step is renumbered.
        """
        checkpoint.get("meta", {}).pop("config", None)  # mmengine would execute it
        states = checkpoint.get("random_states")
        if states is None or not runner._resume:
            return
        others = checkpoint.get("random_states_of_others", [])
        if 0 < get_rank() <= len(others):
            states = others[get_rank() - 1]
        if (kept := _kept_on_host(runner)) is not None:
            kept.restore(checkpoint["kept_on_host"])
        batches = len(runner.train_dataloader)  # saved after whole optimizer steps, so the division below is exact
        meta, before = checkpoint["meta"], checkpoint.get("batches_per_epoch", batches)
        meta["iter"] = meta["iter"] * batches // before
        # The checkpoint is loaded to the training's device, but generators require their states on the CPU.
        torch.set_rng_state(states["torch"].cpu())
        if states["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"][0].cpu())
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
        version, numbers, following = states["python"]
        random.setstate((version, tuple(numbers), following))


def _random_states() -> dict[str, Any]:
    """This process's generators as tensors, numbers and text."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    name, keys, position, has_gauss, gauss = numpy_state
    version, numbers, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(numbers), following],
    }


def share_statistics(model: nn.Module) -> None:
    """Average the running statistics of all processes that BatchNorm layers of this one are learning.

    Each process has seen its own images only, unless it is SyncBatchNorm. An EMA model has the student's.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    learned = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
    all_reduce_params([buffer for buffer in learned if buffer is not None], op="mean")
    student = model.module if is_model_wrapper(model) else model
    if (shadow := getattr(getattr(student, "memory", None), "shadow", None)) is not None:
        shadow.take_buffers(student)


def _kept_on_host(runner: Runner) -> Any:
    """The `on_host` of an objective's memory, or None."""
    student = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return getattr(getattr(getattr(student, "memory", None), "own", None), "on_host", None)


class RuntimeInfo(RuntimeInfoHook):
    """mmengine's hook without reading every loss from the device at every step."""

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        """A no-op: `LossRecord` records the losses."""


class StepSchedulers(ParamSchedulerHook):
    """mmengine's hook called once per optimizer step, so that accumulation does not change the learning rates.

    accumulate: micro-batches per optimizer step.
    """

    def __init__(self, accumulate: int = 1) -> None:
        self.accumulate = accumulate

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Update the learning rates after the last micro-batch of a step."""
        if (runner.iter + 1) % self.accumulate == 0:
            super().after_train_iter(runner, batch_idx, data_batch, outputs)
