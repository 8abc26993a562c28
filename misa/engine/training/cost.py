"""Cost of a training: seconds per step and memory, written to `cost.json`."""

import contextlib
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from misa.engine.runs.record import COST
from misa.errors import UserError
from misa.experiment import Experiment
from misa.files import read_json, write_json

GIB = 2**30


class Cost(Hook):
    """Writes `cost.json` into the run folder at the end of a training, measured since its last start or resume.

    seconds_per_step: median wall-clock time, data loading included, without the first step, which compiles.
    cpu_seconds_per_step: mean over steps of the main process's CPU time, all threads. memory_gib: peak memory allocated
    on the GPU; on a CPU the main process's peak, including earlier work such as training a teacher. All figures are the
    main process's. Measuring does not synchronize with the GPU.

    accumulate: micro-batches per optimizer step; a step is all of them.
    """

    def __init__(self, folder: str, accumulate: int = 1) -> None:
        self.path = Path(folder) / COST
        self.accumulate = accumulate
        self.times: list[float] = []

    def before_train(self, runner: Runner) -> None:
        """Start the timers."""
        self.times = [time.perf_counter()]
        self.cpu = time.process_time()
        if get_device() == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Record the end of a step. On a GPU the step may still run, but later ones queue: the median is right."""
        if (runner.iter + 1) % self.accumulate == 0:
            self.times.append(time.perf_counter())

    def after_train(self, runner: Runner) -> None:
        """Write the file, unless there were fewer than two steps."""
        steps = [end - start for start, end in zip(self.times, self.times[1:], strict=False)]
        if len(steps) < 2 or not is_main_process():
            return
        on_gpu = get_device() == "cuda"
        memory = torch.cuda.max_memory_allocated() if on_gpu else _peak_of_process()
        write_json(
            self.path,
            {
                "device": _device(),
                "steps": len(steps),
                "seconds_per_step": round(statistics.median(steps[1:]), 4),
                "cpu_seconds_per_step": round((time.process_time() - self.cpu) / len(steps), 4),
                "memory_gib": round(memory / GIB, 3),
            },
        )


def measured_step(experiment: Experiment, beside: Path) -> float | None:
    """The seconds that a step of this row took on such a device in a run in the folder `beside`; None without one."""
    for path in sorted(beside.glob(f"*/{COST}")):
        with contextlib.suppress(UserError, KeyError):  # a file of another run that is broken, or of before
            params, cost = read_json(path.parent / "params.json"), read_json(path)
            if params and cost and (params["digest"], cost["device"]) == (experiment.digest(), _device()):
                return float(cost["seconds_per_step"])
    return None


def _device() -> str:
    return torch.cuda.get_device_name() if get_device() == "cuda" else "cpu"


def _peak_of_process() -> int:
    """Peak memory in bytes; Linux reports KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
