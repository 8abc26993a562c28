"""Data of a run as arrays, for figures: images with boxes, predictions, losses."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from pycocotools.coco import COCO

from misa.data.formats.coco import Split
from misa.data.label_maps import read_label_map
from misa.data.source import Source
from misa.engine.runs.folder import Run
from misa.engine.runs.scores import DETECTIONS, LABEL_MAPS
from misa.errors import UserError
from misa.evaluation.ap import read_truth


def training_samples(source: Source, *, count: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Sample training images: `image` (h w 3), `boxes` (n 4, xyxy), `labels` (n names).

    `colors`: the numbers of the classes, so that each has one color, as in the live picture of a training.
    """
    truth = read_truth(source.train.annotations)
    shown = [boxed(truth, source.train, source.classes, image_id) for image_id in _some(truth.getImgIds(), count, seed)]
    return [{**one, "colors": [source.classes.index(name) for name in one["labels"]]} for one in shown]


def results(run: Run, *, count: int = 4, seed: int = 0, threshold: float = 0.3) -> list[dict[str, Any]]:
    """Sample validation images with predictions above a score and the ground truth, for `figures.box_to_mask`.

    An object detected as several classes is shown once, see `surest`. `truth` is None if the data has no masks.
    """
    truth = read_truth(run.source.val.annotations)
    images = truth.getImgIds()[: run.experiment.limit]
    semantic = run.experiment.semantic is not None
    sure: dict[int, list[dict[str, Any]]] = {}
    if not semantic:
        for detection in json.loads((run.folder / DETECTIONS).read_text()):
            if detection["score"] >= threshold:
                sure.setdefault(detection["image_id"], []).append(detection)
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    rows = []
    for image_id in _some(images, count, seed):
        sample = boxed(truth, run.source.val, run.source.classes, image_id)
        size = sample["image"].shape[:2]
        shown = surest(sure.get(image_id, []))
        if semantic:
            predicted, labels = _classes(run, image_id)
        else:
            predicted = _stack([rle.decode(d["segmentation"]) for d in shown], size)
            labels = [f"{names[d['category_id']]} {d['score']:.2f}" for d in shown]
        rows.append(
            {
                "image": sample["image"],
                "boxes": sample["boxes"],
                "predicted": predicted,
                "predicted_labels": labels,
                "truth": stacked_objects(truth, run.source.classes, image_id) if run.source.masks else None,
            }
        )
    return rows


def surest(detections: Sequence[dict[str, Any]], *, same: float = 0.5) -> list[dict[str, Any]]:
    """Class-agnostic NMS of an image's detections by mask IoU; the result is ordered by decreasing score.

    A student may detect an object as several classes. AP counts all of them; drawn on top of each other they would hide
    the best one. `same`: minimum IoU (0..1) of two masks of the same object.
    """
    kept: list[dict[str, Any]] = []
    for detection in sorted(detections, key=lambda d: -float(d["score"])):
        before = [other["segmentation"] for other in kept]
        if not before or rle.iou([detection["segmentation"]], before, [0] * len(before)).max() < same:
            kept.append(detection)
    return kept


def _classes(run: Run, image_id: int) -> tuple[NDArray[np.bool_], list[str]]:
    """A teacher's predicted classes in an image, as one mask each."""
    labels = read_label_map(run.folder / LABEL_MAPS / f"{image_id}.png")
    present = [i for i in range(len(run.source.classes)) if (labels == i).any()]
    return _stack([labels == i for i in present], labels.shape), [run.source.classes[i] for i in present]


def losses(folder: str | Path) -> dict[str, NDArray[np.float64]]:
    """Read every loss of a run by name, one value per step, without a half-written last line.

    Raises UserError: the run has not written a loss yet.
    """
    path = Path(folder) / "losses.jsonl"
    lines = list(_whole_lines(path.read_text())) if path.is_file() else []
    if not lines:
        raise UserError(f"there are no losses in {path}; a run writes them at the end of each epoch.")
    names = [name for name in lines[0] if name.startswith("loss")]
    return {name.removeprefix("loss_"): np.array([line[name] for line in lines]) for name in names}


def health(folder: str | Path) -> dict[str, NDArray[np.float64]]:
    """Read the diagnostics logged every N steps: `step`, `mask_fill`, `mask_is_box`, `gradient_<term>`.

    Shares in 0..1, see `misa.models.students.step_health`; empty for teachers and mask-supervised students.
    """
    path = Path(folder) / "losses.jsonl"
    lines = [line for line in _whole_lines(path.read_text()) if "mask_fill" in line] if path.is_file() else []
    if not lines:
        return {}
    names = [name for name in lines[0] if name.startswith(("mask_", "gradient_"))]
    return {"step": np.array([line["iter"] + 1 for line in lines])} | {
        name: np.array([line[name] for line in lines]) for name in names
    }


def _whole_lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # it is being written, or was truncated by a kill
            return


def _some(ids: list[int], count: int, seed: int) -> list[int]:
    chosen = np.random.default_rng(seed).permutation(len(ids))[:count]
    return [ids[i] for i in sorted(chosen)]


def _objects(truth: COCO, classes: Sequence[str], image_id: int) -> list[dict[str, Any]]:
    """The annotations of an image's objects of the given classes, without crowds."""
    wanted = [category["id"] for category in truth.dataset["categories"] if category["name"] in classes]
    objects: list[dict[str, Any]] = truth.loadAnns(truth.getAnnIds(imgIds=[image_id], catIds=wanted, iscrowd=False))
    return objects


def stacked_objects(truth: COCO, classes: Sequence[str], image_id: int) -> NDArray[np.bool_]:
    """The ground-truth masks (n h w) of an image's objects, in the order of `boxed`."""
    record = truth.loadImgs([image_id])[0]
    objects = _objects(truth, classes, image_id)
    return _stack([truth.annToMask(a) for a in objects], (record["height"], record["width"]))


def boxed(truth: COCO, split: Split, classes: Sequence[str], image_id: int) -> dict[str, Any]:
    """An image with its annotations as in training: `image` (h w 3), `boxes` (n 4, xyxy), `labels` (n names)."""
    path = split.images / truth.loadImgs([image_id])[0]["file_name"]
    image = mmcv.imread(path, channel_order="rgb")  # as in training: rotated by EXIF, 8 bits
    objects = _objects(truth, classes, image_id)
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    boxes = np.array([o["bbox"] for o in objects], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return {"image": image, "boxes": boxes, "labels": [names[o["category_id"]] for o in objects]}


def _stack(masks: list[NDArray[Any]], size: tuple[int, ...]) -> NDArray[np.bool_]:
    return np.stack(masks).astype(bool) if masks else np.zeros((0, *size), dtype=bool)


def held_out(run: Run) -> list[Path]:
    """Paths of a run's validation images, from its annotations: training images may be in the same folder."""
    truth = read_truth(run.source.val.annotations)
    return [run.source.val.images / image["file_name"] for image in truth.loadImgs(truth.getImgIds())]
