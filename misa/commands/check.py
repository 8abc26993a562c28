"""Check a data set: read its annotations and images, and list every problem.

example: misa check path/to/data --picture check.png
"""

import shlex
from pathlib import Path

from misa.commands import _shared as shared
from misa.parameters import Parameters, argument, option
from misa.rows import find_row


class Check(Parameters):
    """Options of `misa check`."""

    data_root: str = argument("data set in any format of docs/data.md: a folder, a csv, or one COCO json")
    images: str = option(
        "", "with one COCO json, the folder of its images (default: beside it, or in images/ or data/ there)"
    )
    picture: str = option("", "draw 16 images with their boxes here (default: runs/check-<path>.png)")
    no_picture: bool = option(False, "draw nothing")


def run(options: Check) -> int:
    """Print the report; returns 2 if the data is not usable for training."""
    shared.require_given(options.data_root, "the path of the data")
    shared.require_data(options.data_root)
    from misa.engine.reports.checkup import check_data

    place, here = Path(options.data_root).expanduser().resolve(), Path.cwd()
    parts = place.relative_to(here if here in place.parents else place.anchor).parts
    name = "-".join(parts)[-200:]  # the whole path, as many data sets are in a folder called data
    picture = None if options.no_picture else options.picture or f"runs/check-{name}.png"
    found = check_data(options.data_root, images=options.images or None, picture=picture)
    print(found)
    if found.usable and len(found.reports) > 1:
        clean = "" if any(report.warnings for report in found.reports) else "no problems; "
        images, batch = found.reports[0].images, find_row("photos:box").schedule.batch
        less = f" --batch {images}" if images < batch else ""
        print(f"{clean}now: misa train photos:box --data-root {shlex.quote(options.data_root)}{less}")
    return 0 if found.usable else 2
