"""What a training took: seconds a step and memory, kept beside the scores in `cost.json`."""

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
from misa.files import write_json

GIB = 2**30


class Cost(Hook):
    """Writes `cost.json` into the run folder when a training ends, from the steps since it was last started.

    seconds_per_step: the median of the wall clock, data loading included, without the first step, which compiles.
    cpu_seconds_per_step: the mean of the main process over all its threads. memory_gib: the peak of what is allocated
    on the GPU, or of the main process on a CPU, whatever it did before included (a teacher trained in it, say).
    Several processes: those of the main one. Nothing is read from a GPU, so no step waits.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / COST
        self.times: list[float] = []

    def before_train(self, runner: Runner) -> None:
        """Start the clocks."""
        self.times = [time.perf_counter()]
        self.cpu = time.process_time()
        if get_device() == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """A step has ended. On a GPU it may not have, but the next ones queue up behind it: the median is right."""
        self.times.append(time.perf_counter())

    def after_train(self, runner: Runner) -> None:
        """Write the file; a run without a second step has no median."""
        steps = [end - start for start, end in zip(self.times, self.times[1:], strict=False)]
        if len(steps) < 2 or not is_main_process():
            return
        on_gpu = get_device() == "cuda"
        memory = torch.cuda.max_memory_allocated() if on_gpu else _peak_of_process()
        write_json(
            self.path,
            {
                "device": torch.cuda.get_device_name() if on_gpu else "cpu",
                "steps": len(steps),
                "seconds_per_step": round(statistics.median(steps[1:]), 4),
                "cpu_seconds_per_step": round((time.process_time() - self.cpu) / len(steps), 4),
                "memory_gib": round(memory / GIB, 3),
            },
        )


def _peak_of_process() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
