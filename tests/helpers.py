"""Shared helpers: a tiny experiment, code blocks of the documentation, and a guard against host-device waits."""

import multiprocessing
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from misa.experiment import TINY, Augmentation, Experiment, Inference, Schedule
from misa.machine import Machine

CPU = Machine(gpus=0)

_TINY = Experiment(
    data="demo",
    network=TINY,
    schedule=Schedule(epochs=2, batch=2, lr=1e-3, decay="cosine", warmup=2, clip=10.0),
    augmentation=Augmentation(short_sides=(64,), long_side=64, test_short_side=64),
    # Low thresholds: after so little training scores are small.
    inference=Inference(score=0.001, keep=0.0, mask=0.3, candidates=30, per_image=10),
    scenes=(("size", 64), ("train", 4), ("val", 3), ("objects", (1, 2))),
)


def tiny_experiment(**changes: Any) -> Experiment:
    """Returns box-supervised SOLOv2 on a few embedded scenes, trained within seconds; `changes` as in `but`."""
    return _TINY.but(**changes)


def page_code(page: str, title: str | None = None) -> str:
    """Returns the code block with this title from a page of docs/extending/, by default the first titled one."""
    text = (Path(__file__).parents[1] / "docs" / "extending" / page).read_text(encoding="utf-8")
    blocks = dict(re.findall(r'```python title="(.*?)"\n(.*?)```', text, re.DOTALL))
    return blocks[title] if title else next(iter(blocks.values()))


def killed(work: Callable[..., object], *arguments: Any, when: Callable[[], bool]) -> None:
    """Run `work` in a forked process, which need not import anything, and kill it with SIGKILL `when` it has begun.

    Not for a training: torch refuses gradients in a process forked from one that has computed any.
    """
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        process.start()
    end = time.monotonic() + 120
    while not when():
        assert process.is_alive() or when(), "it ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.join()


@contextmanager
def nothing_may_wait() -> Iterator[None]:
    """Within the block, any operation that synchronises the host with a CUDA device is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # torch warns that the mode is a prototype
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
