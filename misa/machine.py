"""The machine that a training runs on: its devices and processes, and how they split a batch. Standard library only."""

import importlib.util
import os
from dataclasses import dataclass, fields

from misa.errors import UserError, counted, did_you_mean

LOGGERS = {"wandb": "wandb", "mlflow": "mlflow"}
"""A logger and the package that it needs."""


@dataclass(frozen=True)
class Machine:
    """Where a network runs, and what it shows meanwhile; none of it changes a result on one kind of device.

    gpus: 0 for the CPU, more for GPUs, one a process; None: a GPU if there is one.
    per_gpu: micro-batch of a process; gradients are accumulated to its part of the batch. None: no accumulation.
    workers: processes that load images.
    threads: of torch on the CPU. Two busy threads on two busy cores are many times slower than one.
    interactive: in a notebook, one live display in place of log lines.
    loggers: "wandb", "mlflow", beside TensorBoard.
    """

    gpus: int | None = None
    per_gpu: int | None = None
    workers: int = 0
    threads: int = 1
    interactive: bool = False
    loggers: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """As options of `misa train`; what is at its default is left out, and `interactive`, which a log file is not.

        >>> Machine(gpus=1, per_gpu=2, loggers=("wandb", "mlflow")).options()
        ['--gpus=1', '--per-gpu=2', '--loggers=wandb,mlflow']
        """
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "interactive"}
        given["loggers"] = ",".join(self.loggers)
        standard = vars(Machine()) | {"loggers": ""}
        return [f"--{name.replace('_', '-')}={v}" for name, v in given.items() if v != standard[name]]


@dataclass(frozen=True)
class BatchSplit:
    """How a batch is split: over processes, each of which accumulates the gradients of several micro-batches."""

    processes: int
    images: int  # of a micro-batch
    accumulate: int

    def __str__(self) -> str:
        parts = [counted(self.images, "image")]
        if self.processes > 1:
            parts.insert(0, f"{self.processes} processes")
        if self.accumulate > 1:
            parts.append(f"{self.accumulate} accumulated")
        return f"batch {self.processes * self.images * self.accumulate} = {' x '.join(parts)}"


def split_batch(batch: int, processes: int, per_gpu: int | None = None) -> BatchSplit:
    """Split a batch evenly over processes and into micro-batches of `per_gpu` images (None: one for each process).

    UserError where it cannot be split evenly: another batch would be trained silently.
    """
    if batch % processes:
        raise UserError(
            f"a batch of {batch} cannot be shared evenly by {processes} processes; take {_divisors(batch)} of them, or "
            "another batch."
        )
    part = batch // processes
    images = part if per_gpu is None else per_gpu
    if part % images:
        raise UserError(
            f"per_gpu is {images}, and the {part} images of each process cannot be accumulated from it; take "
            f"{_divisors(part)}."
        )
    return BatchSplit(processes, images, part // images)


def _divisors(number: int) -> str:
    *most, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(most)} or {last}" if most else last


def expected_processes() -> int:
    """How many processes torchrun or srun has started for this training; 1 for a process on its own."""
    # Not SLURM_NTASKS: a batch script has it as well, and is one process.
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def is_main_process() -> bool:
    """Whether this process is the one that writes files and prints, also before the processes have joined."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0 or expected_processes() == 1


def logger_names(text: str) -> tuple[str, ...]:
    """The loggers in a list such as "wandb,mlflow"; UserError for one that is unknown or not installed."""
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
