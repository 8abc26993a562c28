"""Measure the time of a training step, part by part.

Plain SOLOv2, the box baseline, + FSD, + SEPA and MISA run in turn in one process. Times are medians of whole steps
(forward, backward, update) on one real batch. The cost of a term is the difference between two of these steps; the
teacher's forward pass is timed separately, because two terms share it. A final profiled step gives each part's share
of the forward pass.

Other rows, several with commas between, or the rows of a table of the paper run as whole steps in turn, those of the
middle of a training. The network is untrained: terms that wait for good masks or stored objects, as DiscoBox's do, do
not run (`misa tables comparators --details` has the times of whole trainings). Nor is included what belongs to a
training but not to its step: label maps, loading of images, checkpoints, evaluation.

example: misa profile table3_components:voc_misa --data-root path/to/voc --device cuda
"""

from typing import Literal

from misa.commands import _shared as shared
from misa.parameters import Parameters, argument, option


class Profile(Parameters):
    """Options of `misa profile`."""

    rows: int | str = argument(
        "a row with FSD and SEPA, by parts; or other rows, as demo:box,demo:mask, or a table: 3, 4, 5, comparators",
        default="demo:misa",
        optional=True,
    )
    data: str = option("demo", "of a table: demo, the embedded scenes; voc, photos and others: give data_root")
    data_root: str = shared.data_root()
    device: Literal["cpu", "cuda"] = option("cpu", "where the step runs")
    steps: int = option(10, "number of steps that are timed", low=1)
    batch: int | None = option(None, "batch size (default: the row's)", low=1)
    threads: int = shared.threads()
    smoke: bool = shared.smoke()


def run(options: Profile) -> int:
    """Measure and print."""
    from misa.engine.reports.tables import table_rows

    rows = list(table_rows(options.rows, options.data)[1].values())  # errors before torch is imported, which is slow
    import torch

    from misa.engine.reports.profile import Setup, profile

    torch.set_num_threads(options.threads)
    setup = Setup(options.data_root, options.device, options.steps)
    profile(rows, setup, batch=options.batch, smoke=options.smoke)
    return 0
