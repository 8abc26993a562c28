"""Measure the time of a training step, part by part.

Plain SOLOv2, the box baseline, + FSD, + SEPA and MISA run in turn in one process. Times are medians of whole steps
(forward, backward, update) on one real batch. The cost of a term is the difference between two of these steps; the
teacher's forward pass is timed separately, because two terms share it. A final profiled step gives each part's share
of the forward pass.

example: misa profile table3_components:voc_misa --data-root path/to/voc --device cuda
"""

from typing import Literal

from misa.commands import _shared as shared
from misa.parameters import Parameters, argument, option


class Profile(Parameters):
    """Options of `misa profile`."""

    row: str = argument("a row with FSD and SEPA", default="demo:misa", optional=True)
    data_root: str = shared.data_root()
    device: Literal["cpu", "cuda"] = option("cpu", "where the step runs")
    steps: int = option(10, "number of steps that are timed", low=1)
    batch: int | None = option(None, "batch size (default: the row's)", low=1)
    threads: int = shared.threads()
    smoke: bool = shared.smoke()


def run(options: Profile) -> int:
    """Measure and print."""
    shared.require_row(options.row)
    import torch

    from misa.engine.reports.profile import Setup, profile

    torch.set_num_threads(options.threads)
    setup = Setup(options.data_root, options.device, options.steps)
    profile(options.row, setup, batch=options.batch, smoke=options.smoke)
    return 0
