"""Estimate step time, memory and days of a row on other GPUs, from two small steps measured here.

The formula and its limits are in misa/engine/training/estimate.py.

example: misa estimate table1_coco:misa_r50 --gpus 8 --gpu H100
"""

from dataclasses import replace

from misa.commands import _shared as shared
from misa.commands.train import Train, experiment_of
from misa.errors import UserError
from misa.parameters import Parameters, argument, option


class Estimate(Parameters):
    """Options of `misa estimate`."""

    row: str = argument("row, as table:name or path/to/file.py:name")
    gpus: int = option(1, "number of GPUs", low=1)
    gpu: str = option("H100", "their model")
    per_gpu: int | None = shared.per_gpu()
    precision: shared.Precision = shared.precision()
    images: int | None = option(None, "number of training images (default: COCO's or VOC's, as the row says)", low=1)
    utilization: float | None = option(
        None, "fraction of the GPU's peak that is reached (default: measured, or 0.3)", low=1e-3, high=1
    )
    report: str | None = option(None, "gpu.json of `make gpu` on such a GPU, to use its utilization")


def run(options: Estimate) -> int:
    """Measure and print."""
    experiment = experiment_of(Train(row=options.row, precision=options.precision))
    import torch

    from misa.engine.training.estimate import estimate, measure, reported, require_estimable, require_known

    require_known(options.gpu)
    calibrated = None
    if options.report is not None:
        if options.utilization is not None:
            raise UserError("both --report and --utilization say how much of the peak is reached; give one of them.")
        calibrated = reported(options.report, options.gpu, experiment.schedule.precision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, _ = require_estimable(experiment, gpus=options.gpus, per_gpu=options.per_gpu, images=options.images)
    if options.images is None:
        print(f"for the {images} training images of {experiment.data.upper()}; of other data give --images", flush=True)
    print(f"measuring steps of {options.row} on this machine's {device}; minutes on a CPU", flush=True)
    work = measure(experiment, device=device)
    values = {name: getattr(options, name) for name in ("gpus", "gpu", "per_gpu", "images")}
    found = estimate(experiment, work, utilization=options.utilization or calibrated, **values)
    print(replace(found, measured=True, source=f"from {options.report}") if calibrated else found)
    print("the formula and what it leaves out: misa/engine/training/estimate.py")
    return 0
