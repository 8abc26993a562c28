"""Devices, processes and loggers of a training, and how a batch is split over them. Standard library only."""

import importlib.util
import os
from dataclasses import dataclass, fields

from misa.errors import UserError, counted, did_you_mean, option_name

LOGGERS = {"wandb": "wandb", "mlflow": "mlflow"}
"""A logger and the package that it needs."""


@dataclass(frozen=True)
class Machine:
    """Hardware and display of a run; on one kind of device nothing but `per_gpu` changes a result.

    gpus: number of GPUs, one process each; 0 for the CPU; None: a GPU if there is one.
    per_gpu: micro-batch of a process; gradients are accumulated to its part of the batch. None: no accumulation. Losses
        are averaged within each micro-batch, so that an instance counts more in one with few.
    workers: processes that load images.
    threads: of torch on the CPU. Two busy threads on two busy cores are many times slower than one.
    interactive: in a notebook, a live display instead of log lines.
    loggers: "wandb", "mlflow", in addition to TensorBoard.
    """

    gpus: int | None = None
    per_gpu: int | None = None
    workers: int = 0
    threads: int = 1
    interactive: bool = False
    loggers: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """Returns the options of `misa train` other than defaults; `interactive` is left out, as output goes to a log.

        >>> Machine(gpus=1, per_gpu=2, loggers=("wandb", "mlflow")).options()
        ['--gpus=1', '--per-gpu=2', '--loggers=wandb,mlflow']
        """
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "interactive"}
        given["loggers"] = ",".join(self.loggers)
        standard = vars(Machine()) | {"loggers": ""}
        return [f"--{name.replace('_', '-')}={v}" for name, v in given.items() if v != standard[name]]


@dataclass(frozen=True)
class BatchSplit:
    """The split of a batch over processes, each of which accumulates gradients over several micro-batches."""

    processes: int
    images: int  # in a micro-batch
    accumulate: int

    def __str__(self) -> str:
        if self.processes * self.accumulate == 1:
            return f"batches of {counted(self.images, 'image')}"
        parts = [counted(self.images, "image")]
        if self.processes > 1:
            parts.insert(0, f"{self.processes} processes")
        if self.accumulate > 1:
            parts.append(f"{self.accumulate} accumulated")
        return f"batch {self.processes * self.images * self.accumulate} = {' x '.join(parts)}"


def split_batch(batch: int, processes: int, per_gpu: int | None = None) -> BatchSplit:
    """Split a batch evenly over processes and into micro-batches of `per_gpu` images (None: one for each process).

    UserError if it cannot be split evenly: training would silently use another batch size.
    """
    if batch % processes:
        raise UserError(
            f"a batch of {batch} cannot be shared evenly by {processes} processes; take {_divisors(batch)} of them, or "
            f"another {option_name('batch')}."
        )
    part = batch // processes
    images = part if per_gpu is None else per_gpu
    if part % images:
        raise UserError(
            f"{option_name('per_gpu')} is {images}, and the {part} images of each process cannot be accumulated from "
            f"it; take {_divisors(part)}."
        )
    return BatchSplit(processes, images, part // images)


def _divisors(number: int) -> str:
    *most, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(most)} or {last}" if most else last


def expected_processes() -> int:
    """Returns the world size that torchrun or srun has set for this training; 1 for a single process."""
    # Not SLURM_NTASKS: it is set in a batch script too, which is a single process.
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def is_main_process() -> bool:
    """Whether this process has rank 0, which writes files and prints; valid before the process group is set up."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0 or expected_processes() == 1


def logger_names(text: str) -> tuple[str, ...]:
    """Parse a list such as "wandb,mlflow"; UserError for a logger that is unknown or not installed."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name == "tensorboard":
            continue
        if name not in LOGGERS:
            hint = did_you_mean(name, LOGGERS) or f"; the loggers are {', '.join(LOGGERS)}."
            raise UserError(f"there is no logger {name!r}{hint} TensorBoard is always on.")
        if importlib.util.find_spec(LOGGERS[name]) is None:
            raise UserError(f"the logger {name} is not installed; pip install {LOGGERS[name]}.")
    return tuple(name for name in names if name != "tensorboard")
