"""Predict masks of images, folders and videos; no annotation file is needed.

The same command resumes, and processes only new or changed images. --shards N starts N processes, here or with
--cluster as jobs, and merges their results. With --shard K it processes only every Nth image; when all are done, the
same command without both options writes the tables of all images.

example: misa predict runs/demo-long-seed0 photos/ --out results
example: misa predict RUN photos --out results --shards 8 --cluster slurm --cluster-options timeout_min=60
example: sbatch --array=0-7 --wrap 'misa predict RUN photos --out results --shards 8 --shard $SLURM_ARRAY_TASK_ID'
"""

import mimetypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from misa.commands import _shared as shared
from misa.errors import UserError, counted
from misa.files import shorter
from misa.parameters import Parameters, argument, option

if TYPE_CHECKING:
    from misa.engine.prediction.predict import Predictions


_LISTED = 20  # files that could not be read


class Predict(Parameters):
    """Options of `misa predict`."""

    checkpoint: str = argument("run folder, checkpoint in it, or file made by misa export")
    inputs: tuple[str, ...] = argument("images, folders of images, videos")
    out: str = option(..., "folder of the results")
    boxes: str = option("", "known boxes in any format of docs/data.md: at most one mask for each")
    score: float = option(0.3, "score threshold", low=0, high=1)
    mask: float | None = option(None, "mask binarization threshold (default: the row's)", low=0, high=1)
    batch: int = option(1, "images per forward pass", low=1)
    device: str = option("auto", "cpu, cuda or cuda:1; auto is a GPU if there is one")
    threads: int = shared.threads()
    tile: int | None = option(None, "split very large images into tiles of this side, in pixels", low=32)
    overlap: int = option(128, "overlap of neighboring tiles, in pixels", low=0)
    every: int = option(1, "process every Nth frame of a video", low=1)
    masks: Literal["map", "each", "none"] = option("map", "one PNG per image, one per instance, or none")
    overlay: bool = option(True, "draw the masks over the images")
    shards: int = shared.shards()
    shard: int | None = shared.shard()
    cluster: str = shared.cluster()
    cluster_options: str = shared.cluster_options()


def run(options: Predict) -> int:
    """Predict all readable images, then raise UserError if some could not be read, in a shard only warn."""
    shared.require_student(options.checkpoint)
    if (mimetypes.guess_type(options.checkpoint)[0] or "").startswith("image/"):
        raise UserError(f"{options.checkpoint} is an image; the run comes first: misa predict RUN IMAGE --out FOLDER.")
    shared.require_shares(options)
    if options.boxes:
        shared.require_unused(options, ("score",), "with --boxes, each of which has a mask")
    if options.tile is None:
        shared.require_unused(options, ("overlap",), "without --tile")
    shared.require_given(options.out, "out")
    for path in options.inputs:
        shared.require_given(path, "the path of an image")
        if "://" not in path:  # an address gets its own message later
            shared.require_file(path, "image, folder or video", "correct the path")
    import numpy as np
    import torch

    from misa.data.formats.convert import read_boxes
    from misa.engine.prediction.predict import Boxes, predict
    from misa.engine.prediction.shares import Share

    torch.set_num_threads(options.threads)
    if options.shards > 1 and options.shard is None:
        shared.start_shards("predict", options, Path(options.out).expanduser())
    boxes = None
    if options.boxes:
        boxes = {name: Boxes(np.array(box), label) for name, (box, label) in read_boxes(options.boxes).items()}
    names = ("out", "batch", "device", "score", "mask", "tile", "overlap", "every", "masks", "overlay")
    how: dict[str, Any] = {name: getattr(options, name) for name in names}
    share = Share(options.shards, options.shard)
    done = predict(options.checkpoint, options.inputs, boxes=boxes, share=share, **how)
    print(_summary(done, so_far=options.shard is not None))
    if done.skipped:
        more = f"{counted(len(done.skipped), 'file that is', 'files that are')} no image skipped"
        print(f"{more}{':' if len(done.skipped) == 1 else ', such as'} {shorter(done.skipped[0])}")
    for sentence in _left_out(done):
        print(f"warning: {sentence}", file=sys.stderr)
    if done.failed:
        first, *rest = done.failed.values()
        for sentence in rest[:_LISTED]:
            print(f"warning: {sentence}", file=sys.stderr)
        place = "above" if len(rest) <= _LISTED else f"of which {_LISTED} above"
        more = f" ({counted(len(rest), 'other')} {place})" if rest else ""
        if options.shard is not None:  # the call for all shards tries again and fails
            print(f"warning: {first}{more}", file=sys.stderr)
            return 0
        others = "the other images are done, but " if done.images else ""
        raise UserError(f"{others}{first}{more}")
    return 0


def _summary(done: "Predictions", *, so_far: bool) -> str:
    """Say what the call did and, where that is more, what the folder now holds."""
    whole = f"{counted(done.instances, 'instance')} in {counted(done.images, 'image')}"
    if so_far:
        return f"{done.folder}: {whole} so far; the same without --shards and --shard writes the tables of all"
    images, instances = done.given
    text = f"{done.folder}: {counted(instances, 'instance')} in {counted(images, 'image')}"
    if done.predicted != images:
        text += f", of which {done.predicted} {'was' if done.predicted == 1 else 'were'} new or changed"
    return text if done.images == images else f"{text}; with those of earlier calls, instances.json holds {whole}"


def _left_out(done: "Predictions") -> Iterator[str]:
    """Yield the messages on given boxes that were clipped, have no mask, no area in the image or no image."""
    if done.clipped:
        name, count = next(iter(done.clipped.items()))
        total = counted(sum(done.clipped.values()), "box reaches", "boxes reach")
        first = counted(count, "box", "boxes")
        yield (
            f"{total} more than a pixel beyond the image, and only the part inside was used; check that boxes and "
            f"images have the same size (first: {first} of {name})."
        )
    if done.outside:
        name, count = next(iter(done.outside.items()))
        total = counted(sum(done.outside.values()), "box has", "boxes have")
        yield (
            f"{total} no area in the image and got no mask; check that boxes and images have the same size "
            f"(first: {counted(count, 'box', 'boxes')} of {name})."
        )
    if done.unanswered:
        name, count = next(iter(done.unanswered.items()))
        total = counted(sum(done.unanswered.values()), "box has", "boxes have")
        yield f"{total} no mask, the student found nothing there (first: {counted(count, 'box', 'boxes')} of {name})."
    if done.unused:
        more = f", like those of {counted(len(done.unused) - 1, 'other image')}" if len(done.unused) > 1 else ""
        yield f"the boxes of {done.unused[0]} are of no image that was given{more}."
