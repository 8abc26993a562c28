"""Measure whether each affinity would pull a student's masks towards the ground truth or away from it.

example: misa guidance runs/demo-long-seed0 --images 60 --out runs/guidance
"""

from pathlib import Path
from typing import Literal

from misa.commands import _shared as shared
from misa.engine.runs.record import read_params
from misa.errors import UserError
from misa.parameters import Parameters, argument, option


class Guidance(Parameters):
    """Options of `misa guidance`."""

    run: str = argument("run folder of a student trained from boxes")
    teacher: str = option(
        "", "run folder of a teacher, or truth: the true class maps (default: the student's own, if any)"
    )
    split: Literal["val", "train"] = option("val", "split that the images are from")
    images: int = option(60, "number of images with objects", low=1)
    group: str = option("all", "print objects of this class, size or failure mode, such as small")
    only: str = option("", "readings whose name has one of these words, comma-separated")
    out: str = option("", "write the table of all groups (csv) and the figure into this folder")
    data_root: str = shared.other_data()
    seed: int = option(0, "random seed of the drawn images", low=0, high=2**32 - 1)


def run(options: Guidance) -> int:
    """Measure and print."""
    shared.require_folder(options.out, "out")
    shared.require_run(options.run)
    shared.require_data(options.data_root)
    from misa.engine.reports.guidance import READINGS, SIZES, measure_guidance, write_guidance

    words = [word.strip() for word in options.only.split(",") if word.strip()]
    readings = {name: value for name, value in READINGS.items() if not words or any(word in name for word in words)}
    if not readings:
        raise UserError(f"no reading has {options.only!r} in its name; they are {'; '.join(READINGS)}.")
    known = ["all", *SIZES, *(f"class {name}" for name in read_params(Path(options.run).expanduser())["classes"])]
    if options.group not in known and not options.group.startswith("mode "):
        raise UserError(f"there is no group {options.group!r}; choose one of {', '.join(known)}, or an annotated mode.")
    measured = measure_guidance(
        options.run,
        teacher=options.teacher or None,
        readings=readings,
        split=options.split,
        images=options.images,
        data_root=options.data_root or None,
        seed=options.seed,
    )
    written = write_guidance(measured, options.out) if options.out else []  # kept if there is no such group
    print(measured.text(options.group), *written, sep="\n")
    return 0
