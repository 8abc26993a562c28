"""The label maps that a semantic teacher learns from, made before training and kept in the run folder.

Boxes and classes are all that is read of the annotations, except for supervision="mask".
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mmcv
import numpy as np

from misa.data.labels import LabelMap, fill_boxes, grabcut_boxes, write_label_map
from misa.data.semantic import BoxedImage, boxed_images, true_maps
from misa.data.source import Source
from misa.engine.record import read_json, write_json
from misa.engine.teacher_config import label_folder
from misa.errors import UserError
from misa.experiment import Experiment
from misa.losses.semantic import VOID

Job = tuple[int, Callable[[], LabelMap]]


def prepare_labels(
    experiment: Experiment, source: Source, folder: Path, *, student: Path | None = None, workers: int = 0
) -> None:
    """Write the label maps that a teacher's row needs into its run folder; those that are there already stay.

    Raises:
        UserError: the folder holds labels made otherwise, or the student is missing or does not fit.
    """
    target = label_folder(experiment, folder)
    if target is None or experiment.semantic is None:
        return
    kind = "masks" if experiment.supervision == "mask" else experiment.semantic.labels
    card = {"labels": kind, "student": _identity(student) if kind == "student" and student else None}
    found = read_json(target / "labels.json")
    if found is not None and found != card:
        raise UserError(f"{target} holds labels made otherwise ({found}); choose another work_dir or delete that one.")
    if kind == "masks":
        jobs: Iterator[Job] = (
            (m.image_id, m.make) for m in true_maps(source.train, source.classes, limit=experiment.limit)
        )
    else:
        jobs = _from_boxes(kind, source, experiment.limit, student)
    jobs = iter(list(jobs))  # a student that does not fit is told before anything is written
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "labels.json", card)

    def write(job: Job) -> None:
        path = target / f"{job[0]}.png"
        if not path.exists():
            write_label_map(path, job[1]())

    print(f"label maps: {kind}", flush=True)
    # OpenCV lets other threads run; the others are quick or keep torch busy by themselves.
    with ThreadPoolExecutor(max(1, workers) if kind == "grabcut" else 1) as pool:
        list(pool.map(write, jobs))


def _from_boxes(kind: str, source: Source, limit: int | None, student: Path | None) -> Iterator[Job]:
    background = len(source.classes)
    images = boxed_images(source.train, source.classes, limit=limit)
    makers: Iterable[Callable[[], LabelMap]]
    if kind == "student":
        from misa.engine.student_labels import student_maps  # not above: it needs the engine that needs this

        if student is None:
            raise UserError("a teacher of a student's labels needs Semantic.student: a row such as demo:box.")
        makers = student_maps(student, source, limit=limit)
    elif kind == "grabcut":
        makers = (partial(_grabcut, source.train.images / image.name, image, background) for image in images)
    else:
        makers = (partial(_filled, image, background) for image in images)
    for image, make in zip(images, makers, strict=True):
        yield image.image_id, partial(_crowds_void, make, image, background)


def _filled(image: BoxedImage, background: int) -> LabelMap:
    return fill_boxes(image.boxes, image.labels, image.size, background=background)


def _grabcut(path: Path, image: BoxedImage, background: int) -> LabelMap:
    pixels = mmcv.imread(path, channel_order="rgb")  # as the training reads it: turned by EXIF, 16 bit made 8
    return grabcut_boxes(pixels, image.boxes, image.labels, background=background)


def _crowds_void(make: Callable[[], LabelMap], image: BoxedImage, background: int) -> LabelMap:
    labels = make()
    crowds = fill_boxes(image.crowds, [VOID] * len(image.crowds), image.size, background=background)
    return np.where((crowds == VOID) & (labels == background), VOID, labels).astype(np.uint8)


def _identity(run: Path) -> dict[str, Any]:
    """What tells one student from another."""
    params = read_json(run / "params.json")
    if params is None:
        raise UserError(
            f"there is no trained student in {run}; train it first, for example misa train demo:box, "
            "or name its run folder in the row."
        )
    return {"digest": params["digest"], "seed": params["seed"]}
