"""Write masks for every box of a data set as COCO json, each with an estimate of its quality.

Uses a run, or a student that is first trained from these boxes; an HTML page shows the doubtful masks first. The data
is never changed. The same command resumes. --shards N starts N processes, here or with --cluster as jobs. With --shard
K it processes only every Nth image, and the last one to finish writes the result.

example: misa label mydata --out masks.json --run runs/photos-box-seed0
example: misa label mydata --out masks.json --shards 8 --cluster slurm --cluster-options timeout_min=60
example: sbatch --array=0-7 --wrap 'misa label DATA --out m.json --run RUN --shards 8 --shard $SLURM_ARRAY_TASK_ID'
"""

from typing import Literal

from misa.commands import _shared as shared
from misa.parameters import Parameters, argument, option


class Label(Parameters):
    """Options of `misa label`."""

    data: str = argument("data set with boxes, in any format that misa train reads")
    out: str = option(..., "COCO json to write (one per split); <out>.html shows the doubtful masks")
    run: str = option("", "run folder or exported file of a student (default: train one from these boxes)")
    row: str = option("photos:box", "row to train if no run is given, as table:name or path/to/file.py:name")
    split: Literal["all", "train", "val"] = option("all", "the part of the data to label")
    tolerance: float = option(
        1.0, "distance in pixels that a polygon may have from its mask's border, approximately", low=0
    )
    rle: bool = option(False, "run-length encoding instead of polygons")
    sheet: int = option(200, "number of masks in the page, 0 for no page", low=0)
    score: bool = option(False, "compare masks and quality with the ground-truth masks, if the data has them")
    shards: int = shared.shards()
    shard: int | None = shared.shard()
    cluster: str = shared.cluster()
    cluster_options: str = shared.cluster_options()
    device: str = option("auto", "cpu, cuda or cuda:1; auto is a GPU if there is one")
    threads: int = shared.threads()
    seed: int = shared.seed()
    smoke: bool = shared.smoke()


def run(options: Label) -> int:
    """Label all readable images, then raise UserError if some could not be read."""
    shared.require_shares(options)
    if options.run:
        shared.require_student(options.run)
        shared.require_unused(options, ("row", "seed", "smoke"), "with --run, a student that is trained already")
    else:
        shared.require_row(options.row)
    if options.rle:
        shared.require_unused(options, ("tolerance",), "with --rle, which keeps every pixel")
    shared.require_given(options.data, "the path of the data")
    shared.require_given(options.out, "out")
    shared.require_data(options.data)
    import torch

    from misa.engine.labelling.label import Form, Job, label, prepare
    from misa.engine.prediction.shares import Share

    torch.set_num_threads(options.threads)
    names = ("data", "out", "run", "row", "seed", "smoke", "split")
    job = Job(**{name: getattr(options, name) for name in names})
    if options.shards > 1 and options.shard is None:
        prepare(job, device=options.device, threads=options.threads)
        shared.start_shards("label", options, job.folder)
    done = label(
        job,
        Form(options.tolerance, options.rle, options.sheet),
        share=Share(options.shards, options.shard),
        device=options.device,
        threads=options.threads,
        score=options.score,
    )
    print(done)
    return 0
