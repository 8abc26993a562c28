"""What a figure of a run shows, as arrays: the images with their boxes, the predictions, the losses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from misa.data.labels import read_label_map
from misa.data.layout import Split
from misa.data.source import Source
from misa.engine.config import DETECTIONS
from misa.engine.teacher import LABEL_MAPS
from misa.engine.train import Run
from misa.evaluation.ap import read_truth


def training_samples(source: Source, *, count: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Some training images as the student sees them: `image` (h w 3), `boxes` (n 4, xyxy), `labels` (n names)."""
    truth = read_truth(source.train.annotations)
    return [_boxed(truth, source.train, image_id) for image_id in _some(truth.getImgIds(), count, seed)]


def results(run: Run, *, count: int = 6, seed: int = 0, threshold: float = 0.3) -> list[dict[str, Any]]:
    """Some validation images with what was predicted above a score and the truth, for `figures.box_to_mask`."""
    truth = read_truth(run.source.val.annotations)
    images = truth.getImgIds()[: run.experiment.limit]
    semantic = run.experiment.semantic is not None
    found = [] if semantic else json.loads((run.folder / DETECTIONS).read_text())
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    rows = []
    for image_id in _some(images, count, seed):
        sample = _boxed(truth, run.source.val, image_id)
        size = sample["image"].shape[:2]
        sure = [d for d in found if d["image_id"] == image_id and d["score"] >= threshold]
        sure.sort(key=lambda detection: -detection["score"])
        objects = truth.loadAnns(truth.getAnnIds(imgIds=[image_id], iscrowd=False))
        if semantic:
            predicted, labels = _classes(run, image_id)
        else:
            predicted = _stack([rle.decode(d["segmentation"]) for d in sure], size)
            labels = [f"{names[d['category_id']]} {d['score']:.2f}" for d in sure]
        rows.append(
            {
                "image": sample["image"],
                "boxes": sample["boxes"],
                "predicted": predicted,
                "predicted_labels": labels,
                "truth": _stack([truth.annToMask(a) for a in objects], size),
            }
        )
    return rows


def _classes(run: Run, image_id: int) -> tuple[NDArray[np.bool_], list[str]]:
    """A teacher's predicted classes in an image, a mask each."""
    labels = read_label_map(run.folder / LABEL_MAPS / f"{image_id}.png")
    present = [i for i in range(len(run.source.classes)) if (labels == i).any()]
    return _stack([labels == i for i in present], labels.shape), [run.source.classes[i] for i in present]


def losses(folder: str | Path) -> dict[str, NDArray[np.float64]]:
    """Every loss of a run by name, one value a step."""
    lines = [json.loads(line) for line in (Path(folder) / "losses.jsonl").read_text().splitlines()]
    names = [name for name in (lines[0] if lines else ()) if name.startswith("loss")]
    return {name.removeprefix("loss_"): np.array([line[name] for line in lines]) for name in names}


def _some(ids: list[int], count: int, seed: int) -> list[int]:
    chosen = np.random.default_rng(seed).permutation(len(ids))[:count]
    return [ids[i] for i in sorted(chosen)]


def _boxed(truth: COCO, split: Split, image_id: int) -> dict[str, Any]:
    path = split.images / truth.loadImgs([image_id])[0]["file_name"]
    image = np.array(Image.open(path).convert("RGB"))
    objects = truth.loadAnns(truth.getAnnIds(imgIds=[image_id], iscrowd=False))
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    boxes = np.array([o["bbox"] for o in objects], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return {"image": image, "boxes": boxes, "labels": [names[o["category_id"]] for o in objects]}


def _stack(masks: list[NDArray[Any]], size: tuple[int, ...]) -> NDArray[np.bool_]:
    return np.stack(masks).astype(bool) if masks else np.zeros((0, *size), dtype=bool)
