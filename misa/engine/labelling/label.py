"""Predict masks for every box of a dataset: `misa label`.

    from misa.engine.labelling.label import Job, label
    label(Job("photos", "masks.json", run="runs/photos-box-seed0"))

`masks.label/` beside `masks.json` has the record of finished images (run-length encodings, so that another output form
needs no prediction) and, if no run was given, the run of the student trained from these boxes.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from scipy.stats import spearmanr
from tqdm.auto import tqdm

import misa
from misa.data.digest import data_digests
from misa.data.formats.coco import DataError
from misa.data.formats.convert import open_layout
from misa.data.formats.plain import is_empty
from misa.data.images import read_image
from misa.data.rle import encode_part
from misa.data.source import open_source
from misa.engine.labelling.annotations import (
    Labels,
    Mask,
    SplitName,
    Target,
    digest,
    labelled,
    open_labels,
    true_runs,
    write,
)
from misa.engine.labelling.masks import answers, require_knows
from misa.engine.labelling.sheet import write_sheet
from misa.engine.prediction.files import appended, next_call, records
from misa.engine.prediction.predict import require_own
from misa.engine.prediction.shares import DONE, Share
from misa.engine.prediction.student import Student, choose_device, load_student
from misa.engine.runs.folder import recorded
from misa.engine.runs.record import changed_splits, teacher_digest
from misa.engine.runs.state import smoke_mark
from misa.engine.training.estimate import input_pixels, measure
from misa.engine.training.train import train
from misa.errors import UserError, counted, option_name
from misa.experiment import Experiment
from misa.files import locked, read_json, write_json
from misa.machine import Machine
from misa.rows import find_row

_CARD, _WRITTEN, _MADE = "label.json", "written.json", "made"  # in made/, files that are called like the others
_EDITION = 3  # version of masks and qualities: records of other versions are not resumed


@dataclass(frozen=True)
class Job:
    """Data, student and output of a labeling.

    data: in any format that `misa train` reads. out: the json to write. run: a student's run folder or exported file;
    if empty, `row` is trained from these boxes first, with `seed`. split: "train", "val" or "all".
    """

    data: str | Path
    out: str | Path
    run: str | Path = ""
    row: str = "photos:box"
    seed: int = 0
    smoke: bool = False
    split: SplitName = "all"

    @property
    def target(self) -> Path:
        """The json to write; UserError if its name does not end in .json."""
        path = Path(self.out).expanduser().resolve()
        if path.suffix.lower() != ".json":
            raise UserError(f"out {self.out} should end in .json: it becomes a COCO annotation file.")
        return path

    @property
    def folder(self) -> Path:
        """The folder of the record."""
        return self.target.with_suffix(".label")

    @property
    def experiment(self) -> Experiment:
        """The row to train on this data; UserError if it is not a box-supervised student."""
        row = find_row(self.row).smoke() if self.smoke else find_row(self.row)
        if row.supervision != "box" or row.semantic is not None:
            raise UserError(f"row {self.row} does not learn from boxes; choose one such as photos:box or own:medium.")
        return replace(row, data="coco", scenes=()) if row.data == "demo" else row

    def settings(self) -> dict[str, Any]:
        """The values that decide the masks; a call with equal values resumes."""
        run = str(Path(self.run).expanduser().resolve())
        by = run if self.run else f"{self.row} with seed {self.seed}{' (smoke)' if self.smoke else ''}"
        return {"data": str(Path(self.data).expanduser().resolve()), "split": self.split, "student": by}


@dataclass(frozen=True)
class Form:
    """Output form: polygons within `tolerance` pixels or run-length encoding, and the number of masks on the sheet."""

    tolerance: float = 1.0
    rle: bool = False
    sheet: int = 200


@dataclass(frozen=True)
class Labelled:
    """Result of `label`: files, the quality of every mask, the number of boxes used as masks, and of omitted boxes.

    For a share that is not the last one, `files` is empty and `left` is the number of unfinished images.
    """

    files: tuple[Path, ...]
    quality: NDArray[np.float64]
    fallback: int
    omitted: int
    left: int = 0
    truth: NDArray[np.float64] | None = None  # IoU with the ground-truth masks, NaN without one
    smoke: str = ""  # warning about masks of a smoke run

    def __str__(self) -> str:
        if not self.files:
            left = f"{counted(self.left, 'image is', 'images are')} left to other shards"
            return f"{left if self.left else 'another shard is just ending'}; the last of them writes the result"
        low, middle, high = np.quantile(self.quality, [0.05, 0.5, 0.95])
        lines = [
            f"{counted(len(self.quality), 'mask')}, median quality {middle:.2f} (nine in ten from {low:.2f} to "
            f"{high:.2f}); for {counted(self.fallback, 'box', 'boxes')} with next to no mask, the box itself"
        ]
        if self.fallback > len(self.quality) / 4:
            lines.append(
                "so many boxes without a mask mean a weak student: train one for longer, or another row (misa train "
                f"ROW --data-root DATA --epochs N), and give its folder with {option_name('run')} and another "
                f"{option_name('out')}"
            )
        if self.omitted:
            lines.append(f"left out: {counted(self.omitted, 'box', 'boxes')} without a pixel of the image")
        if self.truth is not None:
            known = np.isfinite(self.truth)
            lines.append(
                f"against {counted(int(known.sum()), 'true mask')}: mean IoU {self.truth[known].mean():.3f}, mean "
                f"quality {self.quality[known].mean():.3f}, rank correlation (Spearman) "
                f"{_rank_correlation(self.quality[known], self.truth[known])}"
            )
        return "\n".join([*filter(None, [self.smoke]), *lines, *map(str, self.files)])


def label(
    job: Job,
    form: Form | None = None,
    *,
    share: Share | None = None,
    device: str = "auto",
    threads: int = 1,
    score: bool = False,
) -> Labelled:
    """Write masks of all boxes of a dataset as COCO json, and an HTML sheet in increasing order of quality.

    The same call again resumes, and predicts only new or changed images. The data is not changed.

    job: data, student and output. form: output form, which can be changed without predicting again. share: the part of
    the images to predict; the last share to finish writes the result. device: "cpu", "cuda", "cuda:1", or "auto".
    threads: of torch on the CPU, for a training. score: compare with the data's ground-truth masks.
    Raises UserError: invalid input, or foreign files in the place of the result; unreadable images, after all others
    are finished.
    """
    form, share, base = form or Form(), share or Share(), job.folder
    if not form.tolerance >= 0 or form.sheet < 0:
        raise UserError(f"tolerance and sheet must be at least 0, not {form.tolerance} and {form.sheet}.")
    sets = _opened(job)
    if score and not any(
        not is_empty(row.get("segmentation")) for one in sets for target in one.targets for row in target.rows
    ):
        raise UserError(f"score compares with true masks, and {job.data} has none; leave it out.")
    with _student(job, sets, share, device, threads) as student:
        left = _work(student, sets, _record(student, base), share)
        with contextlib.ExitStack() as stack:
            if left == 0 and _writes(base, share, stack):
                return _finish(student, sets, base, form, score=score)
        return Labelled((), np.zeros(0), 0, 0, left)


def prepare(job: Job, *, device: str = "auto", threads: int = 1) -> None:
    """Check the data, and load or train the student. UserError as in `label`."""
    with _student(job, _opened(job), Share(), device, threads):
        pass


def _opened(job: Job) -> list[Labels]:
    """Open the annotations; UserError if they are invalid, or if the result would overwrite foreign files."""
    data = Path(job.data).expanduser().resolve()
    if job.target == data or (data.is_dir() and job.target.is_relative_to(data)):
        raise UserError(f"out {job.target} lies in the data, which is only read; choose a place outside {data}.")
    sets = open_labels(job.data, job.target, job.split)
    if not any(one.targets for one in sets):
        raise UserError(f"{job.data} has no box with a pixel of its image, so there is nothing to label.")
    for one in sets:
        for path in (one.out, one.out.with_suffix(".html")):
            _require_ours(path, job.folder)
    return sets


@contextlib.contextmanager
def _student(job: Job, sets: Sequence[Labels], share: Share, device: str, threads: int) -> Iterator[Student]:
    """Context with the given student, or one trained from these boxes, in which the record is locked."""
    names = sorted({one.names[row["category_id"]] for one in sets for target in one.targets for row in target.rows})
    base, student = job.folder, None
    if job.run:  # before anything is written
        student = load_student(Path(job.run).expanduser(), device=device)
        require_knows(student, names, advice="leave the run out, and a student is trained from these boxes")
    elif job.experiment and not (base / "run" / "metrics.json").is_file():
        if not share.whole:
            raise UserError("shards share a student that is trained already; give run, or label without shard first.")
        if (number := device.removeprefix("cuda:")) not in (device, "0"):
            raise UserError(
                f"a student is to be trained from these boxes first, on the first GPU that torch sees; set "
                f"CUDA_VISIBLE_DEVICES={number}, and device to cuda."
            )
    with share.locked(base, "the record"):
        _require_same(job)
        if student is None:
            _train(job, device, threads)
            student = load_student(base / "run", device=device)
            require_knows(student, names, advice=f"delete {base / 'run'}, and one is trained from all of these boxes")
        yield student


def _record(student: Student, base: Path) -> Path:
    """The folder of this student's record."""
    return base / f"{student.digest}-{_EDITION}"


def _writes(base: Path, share: Share, stack: contextlib.ExitStack) -> bool:
    """Lock the result, and return whether this process writes it: one of several shares that end at the same time."""
    try:
        stack.enter_context(locked(base / "write", "the result"))
    except UserError:
        if share.whole:
            raise
        return False
    return True


def _require_ours(path: Path, base: Path) -> None:
    """Raise UserError if an output file exists and was not written by `label`."""
    written = read_json(base / _WRITTEN) or {}
    if path.exists() and digest(path) not in written.get(path.name, []):
        changed = "has been changed since misa label wrote it" if path.name in written else "is there already"
        raise UserError(f"{path} {changed}; move it away, or choose another out.")


def _require_same(job: Job) -> None:
    """Raise UserError if the record beside the result is of other data or another student."""
    written = [name for name in read_json(job.folder / _WRITTEN) or {} if job.target.with_name(name).exists()]
    advice = f"choose another out, or delete {', '.join([job.folder.name, *written])} beside it to label anew"
    what = "record of misa label"
    require_own(job.folder, job.settings(), card=_CARD, what=what, out=job.target, advice=advice)


def _train(job: Job, device: str, threads: int) -> None:
    """Train the student from these boxes, unless it is trained already (`_require_own_student`)."""
    folder, experiment = job.folder / "run", job.experiment
    if (folder / "metrics.json").is_file():
        _require_own_student(job, folder)
        return
    print(f"no run is given; {_planned(experiment, job, device)}", flush=True)
    machine = Machine(gpus=0 if device == "cpu" else None, threads=threads)
    train(experiment, data_root=job.data, work_dir=folder, row=job.row, seed=job.seed, machine=machine)


def _require_own_student(job: Job, folder: Path) -> None:
    """Raise UserError if the trained student is of another definition of the row; warn if the boxes have changed."""
    trained, _, params = recorded(folder)
    teacher = teacher_digest(job.experiment).get("teacher_digest")
    if trained.digest() != job.experiment.digest() or params.get("teacher_digest", teacher) != teacher:
        raise UserError(
            f"the student in {folder} was trained when {job.row} or its teacher had other values; delete that folder, "
            "and it is trained again, or choose another out."
        )
    layout = open_layout(Path(job.data).expanduser().resolve())
    if changed := changed_splits(params, data_digests(layout.train, layout.val)):
        print(
            f"warning: the annotations of {' and '.join(changed)} in {job.data} have changed since the student in "
            f"{folder} was trained from them; delete that folder, and it is trained again.",
            file=sys.stderr,
            flush=True,
        )


def _planned(experiment: Experiment, job: Job, device: str) -> str:
    """Describe the training and its duration, estimated from measured steps."""
    images, schedule = open_source(experiment, job.data).images, experiment.schedule
    place = "cuda" if choose_device(device).type == "cuda" else "cpu"
    seconds = measure(experiment, sides=(96, 160), device=place).seconds(input_pixels(experiment))
    minutes = schedule.epochs * (images // schedule.batch) * schedule.batch * seconds / 60
    about = counted(max(round(minutes), 1), "minute") if minutes < 90 else f"{minutes / 60:.1f} hours"
    teacher = f", after its teacher {experiment.teacher}" if experiment.trains_teacher else ""
    return (
        f"{job.row} is trained from these boxes{teacher}: {counted(images, 'image')}, "
        f"{counted(schedule.epochs, 'epoch')}, about {about} on this machine's {place}, in {job.folder / 'run'}; "
        "the same command goes on if it is stopped"
    )


def _work(student: Student, sets: Sequence[Labels], place: Path, share: Share) -> int:
    """Label unfinished images, recorded one per line; return the number of images left to other shares."""
    targets = [(one, target) for one in sets for target in one.targets]
    done = {name: row["stamp"] for name, row in records(place)}
    mine = [pair for i, pair in enumerate(targets) if share.takes(i)]
    failed: list[str] = []
    call = next_call(place)
    with appended(share.place(place) / DONE) as record:
        for one, target in tqdm(mine, desc="label", unit="image", disable=None):
            try:
                if done.get(target.name) != target.stamp:
                    record.write(json.dumps(_labelled(student, one, target) | {"call": call}).encode() + b"\n")
                    record.flush()
            except (DataError, OSError) as error:
                failed.append(str(error))
    if failed:
        more = f" ({len(failed) - 1} more like it)" if len(failed) > 1 else ""
        raise UserError(f"the other images are done, but {failed[0]}{more}")
    done = {name: row["stamp"] for name, row in records(place)}
    return sum(done.get(target.name) != target.stamp for _, target in targets)


def _labelled(student: Student, labels: Labels, target: Target) -> dict[str, Any]:
    """Label an image and return its record."""
    image = read_image(target.path)
    size = (target.image["height"], target.image["width"])
    if image.shape[:2] != size:
        raise DataError(
            f"{target.path} is {image.shape[1]} x {image.shape[0]} pixels and listed as {size[1]} x {size[0]}; "
            "correct one of the two."
        )
    names = [labels.names[row["category_id"]] for row in target.rows]
    found = answers(student, image, target.boxes, names)
    instances = [
        [row["id"], encode_part(one.part.pixels, one.part.top, one.part.left, size), one.quality, one.fallback]
        for row, one in zip(target.rows, found, strict=True)
    ]
    return {"name": target.name, "file": target.path.name, "stamp": target.stamp, "size": size, "instances": instances}


def _finish(student: Student, sets: Sequence[Labels], base: Path, form: Form, *, score: bool) -> Labelled:
    """Write the result from the record."""
    found = {name: row["instances"] for name, row in records(_record(student, base))}
    about = {"version": misa.__version__, "student": student.digest, "tolerance": None if form.rle else form.tolerance}
    smoke = smoke_mark(student.experiment)
    quality: list[float] = []
    truth: list[float] = []
    paths: list[Path] = []
    fallback = omitted = 0
    for one in sets:
        targets = one.targets
        masks = {i: Mask(*rest) for target in targets for i, *rest in found[target.name]}
        omitted += sum(not row["iscrowd"] for row in one.content["annotations"]) - len(masks)
        made = base / _MADE / one.out.name
        made.parent.mkdir(exist_ok=True)
        write(made, one, masks, tolerance=None if form.rle else form.tolerance, about=about)
        paths.append(_put(made, one.out, base))
        if form.sheet:
            page = one.out.with_suffix(".html")
            text = write_sheet(one.out.name, targets, masks, one.names, most=form.sheet, warning=smoke)
            (base / _MADE / page.name).write_bytes(text.encode(errors="replace"))
            paths.append(_put(base / _MADE / page.name, page, base))
        for target in targets:
            quality += [masks[row["id"]].quality for row in target.rows]
            fallback += sum(masks[row["id"]].fallback for row in target.rows)
            truth += [_iou(row, masks[row["id"]], form) for row in target.rows] if score else []
    known = np.array(truth) if score else None
    return Labelled(tuple(paths), np.array(quality), fallback, omitted, truth=known, smoke=smoke)


def _put(made: Path, path: Path, base: Path) -> Path:
    """Move a file to its place, after its digest is recorded, so that after a kill it is still known as ours.

    UserError if the file there has been changed, or a foreign one put there, while the masks were made.
    """
    _require_ours(path, base)
    written = read_json(base / _WRITTEN) or {}
    written[path.name] = [*written.get(path.name, [])[-1:], digest(made)]
    write_json(base / _WRITTEN, written)
    os.replace(made, path)
    return path


def _rank_correlation(quality: NDArray[np.float64], truth: NDArray[np.float64]) -> str:
    """Spearman's coefficient as text; it is not defined where all values are equal, as of boxes in place of masks."""
    if min(len(set(quality)), len(set(truth))) < 2:
        return "not defined, since all are equal"
    return f"{spearmanr(quality, truth).statistic:.3f}"


def _iou(row: dict[str, Any], mask: Mask, form: Form) -> float:
    """IoU of a mask in its written form with the ground truth; NaN if there is none."""
    true = true_runs(row, mask.runs["size"])
    if true is None:
        return float("nan")
    ours = true_runs(labelled(row, mask, None if form.rle else form.tolerance), mask.runs["size"])
    return float(rle.iou([ours], [true], [0])[0, 0])
