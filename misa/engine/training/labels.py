"""Label maps for training a semantic teacher, written to the run folder before training.

Only boxes and classes of the annotations are read, except with supervision="mask".
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS

from misa.data.dataset import CocoImages
from misa.data.digest import digest_of
from misa.data.label_maps import LabelMap, fill_boxes, grabcut_boxes, merge_probabilities, write_label_map
from misa.data.pipeline import train_pipeline
from misa.data.semantic import BoxedImage, boxed_images, true_maps
from misa.data.source import Source
from misa.engine.runs.checkpoints import last_checkpoint, load_weights
from misa.engine.runs.folder import opened
from misa.errors import UserError, option_name
from misa.experiment import Experiment
from misa.files import read_json, write_json
from misa.losses.semantic import VOID
from misa.models.students.base import BoxSupervised
from misa.models.students.table import model_config
from misa.models.teacher.config import label_folder

Job = tuple[int, Callable[[], LabelMap]]


def prepare_labels(
    experiment: Experiment,
    source: Source,
    folder: Path,
    *,
    student: Path | None = None,
    workers: int = 0,
    only: Collection[int] | None = None,
) -> None:
    """Write the label maps that a teacher's row needs into its run folder; existing files are kept.

    student: the run whose masks they are, if the row says so. only: ids of the images, by default all.
    Raises UserError: the folder has labels of another kind or of other annotations, or the student is missing or does
    not fit.
    """
    target = label_folder(experiment, folder)
    if target is None or experiment.semantic is None:
        return
    kind = "masks" if experiment.supervision == "mask" else experiment.semantic.labels
    card: dict[str, Any] = {"labels": kind, "student": _identity(student) if kind == "student" and student else None}
    card["data"] = digest_of(source.train.annotations)  # older cards lack it
    found = read_json(target / "labels.json")
    if found is not None and {**card, **found} != card:
        how = f"made otherwise ({found})" if found | {"data": ""} != card | {"data": ""} else "of other annotations"
        raise UserError(f"{target} holds labels {how}; choose another {option_name('work_dir')} or delete that one.")
    if kind == "masks":
        jobs: Iterator[Job] = (
            (m.image_id, m.make) for m in true_maps(source.train, source.classes, limit=experiment.limit)
        )
    else:
        jobs = _from_boxes(kind, source, experiment.limit, student)
    # A list: a student that does not fit raises before anything is written.
    jobs = iter([job for job in jobs if only is None or job[0] in only])
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "labels.json", card)

    def write(job: Job) -> None:
        path = target / f"{job[0]}.png"
        if not path.exists():
            write_label_map(path, job[1]())

    print(f"label maps: {kind}", flush=True)
    # OpenCV releases the GIL; the other kinds are fast or already use torch's threads.
    with ThreadPoolExecutor(max(1, workers) if kind == "grabcut" else 1) as pool:
        list(pool.map(write, jobs))


def _from_boxes(kind: str, source: Source, limit: int | None, student: Path | None) -> Iterator[Job]:
    background = len(source.classes)
    images = boxed_images(source.train, source.classes, limit=limit)
    makers: Iterable[Callable[[], LabelMap]]
    if kind == "student":
        if student is None:
            raise UserError("a teacher of a student's labels needs Semantic.student: a row such as demo:box.")
        makers = student_maps(student, source, limit=limit)
    elif kind == "grabcut":
        makers = (partial(_grabcut, source.train.images / image.name, image, background) for image in images)
    else:
        makers = (partial(fill_boxes, one.boxes, one.labels, one.size, background=background) for one in images)
    for image, make in zip(images, makers, strict=True):
        yield image.image_id, partial(_crowds_void, make, image, background)


def _grabcut(path: Path, image: BoxedImage, background: int) -> LabelMap:
    pixels = mmcv.imread(path, channel_order="rgb")  # as in training: rotated by EXIF, 16 bit reduced to 8
    return grabcut_boxes(pixels, image.boxes, image.labels, background=background)


def _crowds_void(make: Callable[[], LabelMap], image: BoxedImage, background: int) -> LabelMap:
    labels = make()
    crowds = fill_boxes(image.crowds, [VOID] * len(image.crowds), image.size, background=background)
    return np.where((crowds == VOID) & (labels == background), VOID, labels).astype(np.uint8)


def _identity(run: Path) -> dict[str, Any]:
    """The recorded values that identify a student's run."""
    params = read_json(run / "params.json")
    if params is None:
        raise UserError(
            f"there is no trained student in {run}; train it first, for example misa train demo:box, "
            "or name its run folder in the row."
        )
    return {"digest": params["digest"], "seed": params["seed"]}


UNSURE = (0.35, 0.65)
"""Pixels with a foreground probability in this range are void."""


def student_maps(run: Path, source: Source, *, limit: int | None = None) -> Iterator[Callable[[], LabelMap]]:
    """Yield a function that makes the label map, for each training image in the order of the annotation file.

    Masks are predicted for the annotated boxes (`BoxSupervised.masks_of_boxes`), so classes and instances are known.
    Raises UserError: `run` is not a trained box-supervised student of these classes.
    """
    student, data, run, _ = opened(run)
    if student.supervision != "box" or student.semantic is not None:
        raise UserError(f"{run} is not a box-supervised student; give the run of a row such as demo:box.")
    if data.classes != source.classes:
        raise UserError(f"the student {run} knows {', '.join(data.classes)}, the data has {', '.join(source.classes)}.")
    warnings.filterwarnings("ignore", message=".*torch.meshgrid.*")  # from mmdet's heads at their first call
    model = MODELS.build(model_config(student.but(network={"pretrained": False}), source.classes))
    if not isinstance(model, BoxSupervised):
        raise UserError(
            f"{run} is a {student.student}, whose masks are not matched to boxes; give the run of a box-supervised "
            "solov2, mask2former or condinst."
        )
    load_weights(model, last_checkpoint(run))
    model = model.eval().predicting
    # Resized as at test time: large-scale jittering would crop at random.
    sizes = {"short_sides": (student.augmentation.test_short_side,), "flip": 0.0, "jitter": None}
    images = CocoImages(
        ann_file=str(source.train.annotations),
        data_prefix={"img": str(source.train.images)},
        filter_cfg={"filter_empty_gt": False, "min_size": 0},
        pipeline=train_pipeline(student.but(augmentation=sizes).augmentation, masks=False),
        metainfo={"classes": source.classes},
        indices=limit,
        masks=False,
    )
    for i in range(len(images)):
        yield partial(_label_map, model, images, i, len(source.classes))


@torch.no_grad()
def _label_map(model: Any, images: CocoImages, index: int, background: int) -> LabelMap:
    data = model.data_preprocessor(pseudo_collate([images[index]]), False)
    inputs, (sample,) = data["inputs"], data["data_samples"]
    original, truth = tuple(sample.ori_shape[:2]), sample.gt_instances
    if len(truth.labels) == 0:
        return np.full(original, background, np.uint8)
    size = (inputs.shape[-2], inputs.shape[-1])
    ((masks, answered),) = model.masks_of_boxes(inputs, [truth])
    masks[~answered] = sum(UNSURE) / 2  # void: the pixels of a box without a mask are unknown
    rows, columns = sample.img_shape[:2]
    fine = F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[:, :, :rows, :columns]
    whole = F.interpolate(fine, size=original, mode="bilinear", align_corners=False)[0]
    boxes = truth.bboxes.double().cpu().numpy() / np.tile(np.asarray(sample.scale_factor), 2)
    return merge_probabilities(
        whole.cpu().numpy(), boxes, truth.labels.tolist(), background=background, low=UNSURE[0], high=UNSURE[1]
    )
