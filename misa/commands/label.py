"""Masks for every box of a data set, as COCO json, with a quality each and the doubtful ones in a page to look at.

By a run, or by a student that is trained from these boxes first. The data is only read. The same command again goes
on; with --shards N --shard K a process takes every Nth image, and the last one to finish writes the result.

example: misa label mydata --out masks.json --run runs/photos-box-seed0
example: sbatch --array=0-7 --wrap 'misa label DATA --out m.json --run RUN --shards 8 --shard $SLURM_ARRAY_TASK_ID'
"""

from typing import Literal

from misa.commands import _shared as shared
from misa.parameters import Parameters, argument, option


class Label(Parameters):
    """What `misa label` takes."""

    data: str = argument("data set with boxes, in any format that misa train reads")
    out: str = option(..., "COCO json to write (of several splits one each); <out>.html shows the doubtful masks")
    run: str = option("", "run folder or exported file of a student (default: train one from these boxes)")
    row: str = option("photos:box", "row to train where no run is given, as table:name or path/to/file.py:name")
    split: Literal["all", "train", "val"] = option("all", "the part of the data to label")
    tolerance: float = option(1.0, "how far, in pixels, a polygon may leave its mask's border", low=0)
    rle: bool = option(False, "run lengths in place of polygons")
    sheet: int = option(200, "number of masks in the page, 0 for no page", low=0)
    score: bool = option(False, "compare quality and masks with the true masks, where the data has them")
    shards: int = shared.shards()
    shard: int | None = shared.shard()
    device: str = option("auto", "cpu, cuda or cuda:1; auto is a GPU if there is one")
    threads: int = shared.threads()
    seed: int = shared.seed()
    smoke: bool = shared.smoke()


def run(options: Label) -> int:
    """UserError for images that cannot be read, when all others are done."""
    import torch

    from misa.engine.labelling.label import Form, Job, label
    from misa.engine.prediction.shares import Share

    torch.set_num_threads(options.threads)
    names = ("data", "out", "run", "row", "seed", "smoke", "split")
    done = label(
        Job(**{name: getattr(options, name) for name in names}),
        Form(options.tolerance, options.rle, options.sheet),
        share=Share(options.shards, options.shard),
        device=options.device,
        threads=options.threads,
        score=options.score,
    )
    print(done)
    return 0
