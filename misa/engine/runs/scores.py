"""The scores of the predictions in a run folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from misa.data.label_maps import LabelMap, merge_by_score, read_label_map
from misa.data.semantic import true_maps
from misa.data.source import Source
from misa.evaluation.ap import score
from misa.evaluation.miou import background_name, miou
from misa.experiment import Experiment
from misa.files import write_json

LABEL_MAPS = "predictions/val"


MERGE_SCORE = 0.3
"""Score threshold of instances that are merged into a label map (Figure 1)."""


def score_label_maps(source: Source, folder: Path, *, limit: int | None = None) -> dict[str, Any]:
    """mIoU of the predicted label maps in `folder` on the validation data (see `true_maps` for the ground truth)."""
    pairs = (
        (m.make(), read_label_map(folder / f"{m.image_id}.png"))
        for m in true_maps(source.val, source.classes, limit=limit)
    )
    return miou(pairs, source.classes)


def merged_map(
    found: Sequence[dict[str, Any]],
    names: Mapping[int, str],
    classes: Sequence[str],
    size: tuple[int, int],
    *,
    threshold: float = MERGE_SCORE,
) -> LabelMap:
    """Merge the detections of an image of `size` (h, w) into a label map; `names` of the categories by id."""
    return merge_by_score(
        [rle.decode(d["segmentation"]).astype(bool) for d in found],
        [classes.index(names[d["category_id"]]) for d in found],
        [d["score"] for d in found],
        size,
        background=len(classes),
        threshold=threshold,
    )


def score_merged(
    source: Source, detections: Path, *, limit: int | None = None, threshold: float = MERGE_SCORE
) -> dict[str, Any]:
    """mIoU of instances merged into label maps, which ignores instance discrimination (Figure 1).

    Detections with a score of at least `threshold` are painted in increasing order of score; uncovered pixels are
    background.
    """
    categories = {c["id"]: c["name"] for c in json.loads(source.val.annotations.read_text())["categories"]}
    found: dict[int, list[dict[str, Any]]] = {}
    for detection in json.loads(detections.read_text()):
        found.setdefault(detection["image_id"], []).append(detection)

    def pairs() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        for true in true_maps(source.val, source.classes, limit=limit):
            truth = true.make()
            mine = [d for d in found.get(true.image_id, []) if d["score"] >= threshold]
            size = (truth.shape[0], truth.shape[1])
            yield truth, merged_map(mine, categories, source.classes, size, threshold=threshold)

    return {**miou(pairs(), source.classes), "merged_from_score": threshold}


DETECTIONS = "predictions/val.json"


def write_scores(experiment: Experiment, source: Source, folder: Path, params: dict[str, Any]) -> dict[str, Any]:
    """Score the predictions in a run folder and write metrics.json, which marks the run as finished."""
    metrics = scored(experiment, source, folder)
    metrics |= {name: params[name] for name in ("row", "digest", "seed")} | {"data": experiment.data}
    write_json(folder / "metrics.json", metrics)
    return metrics


def measured(metrics: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield the scores that could be measured: kind, name and value in percent."""
    for name in ("segm", "segm_as_rectangles", "segm_any_class", "bbox", "iou"):
        for key, value in metrics.get(name, {}).items():
            if value is not None:
                yield name, key, value


def scored(experiment: Experiment, source: Source, folder: Path) -> dict[str, Any]:
    """The scores of the predictions in a run folder."""
    if experiment.semantic is not None and not source.masks:
        # There is no ground truth for its label maps; a student can still learn from it.
        return {
            "miou": None,
            "miou_foreground": None,
            "iou": dict.fromkeys((*source.classes, background_name(source.classes))),
        }
    if experiment.semantic is not None:
        return score_label_maps(source, folder / LABEL_MAPS, limit=experiment.limit)
    return score(
        source.val.annotations, folder / DETECTIONS, limit=experiment.limit, classes=source.classes, masks=source.masks
    )
