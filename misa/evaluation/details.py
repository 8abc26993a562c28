"""Details of mask AP: per class, precision-recall curves, and boundary AP."""

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from misa.evaluation.ap import (
    category_ids,
    compared,
    mask_ap,
    named,
    number_objects,
    present,
    read_truth,
)

_ALL_SIZES, _MOST = 0, -1  # pycocotools' indices of area range and maxDets


def detailed(
    annotation_file: str | Path,
    detections: str | Path,
    *,
    limit: int | None = None,
    classes: Iterable[str] | None = None,
    masks: bool = True,
    boundary: bool = False,
) -> dict[str, Any]:
    """Return `per_class` and `curves` of a results file, and on request `boundary` AP; arguments as in `score`.

    Without `masks` both are of boxes.
    """
    truth = read_truth(annotation_file, masks=masks)
    images = truth.getImgIds()[:limit]
    names = None if classes is None else present(truth, classes)
    found = json.loads(Path(detections).read_text())
    evaluation = compared(truth, found, images=images, categories=names, compare="segm" if masks else "bbox")
    parts: dict[str, Any] = {"per_class": per_class(evaluation), "curves": curves(evaluation)}
    if boundary:
        wanted = None if names is None else category_ids(truth, names)
        parts["boundary"] = fast_ap(annotation_file, found, images=images, categories=wanted, compare="boundary")
    return parts


def per_class(evaluation: COCOeval) -> dict[str, dict[str, float | None]]:
    """Return AP, AP50, AP75 of every class in percent and its number of objects; None for a class without objects."""
    precision = _precision(evaluation)
    thresholds = evaluation.params.iouThrs
    truth = evaluation.cocoGt
    table: dict[str, dict[str, float | None]] = {}
    for place, category in enumerate(truth.loadCats(evaluation.params.catIds)):
        own = precision[:, :, place]
        rows = {"AP": own, "AP50": own[np.isclose(thresholds, 0.5)], "AP75": own[np.isclose(thresholds, 0.75)]}
        number = sum(
            not annotation.get("iscrowd", 0)
            for annotation in truth.loadAnns(truth.getAnnIds(evaluation.params.imgIds, category["id"]))
        )
        table[category["name"]] = {name: _mean(values) for name, values in rows.items()} | {"objects": float(number)}
    return table


def curves(evaluation: COCOeval) -> dict[str, list[float]]:
    """Return precision-recall curves, both in [0, 1]: means over classes at IoU 0.50, 0.75 and over 0.50 to 0.95.

    Empty if the ground truth has no object.
    """
    precision = _precision(evaluation)
    thresholds = evaluation.params.iouThrs
    there = precision[0, 0] > -1
    if not there.any():
        return {}
    kept = precision[:, :, there].mean(axis=2)
    chosen = {"IoU 0.50": np.isclose(thresholds, 0.5), "IoU 0.75": np.isclose(thresholds, 0.75)}
    chosen["IoU 0.50:0.95"] = np.ones(len(thresholds), bool)
    lines = {name: kept[rows].mean(axis=0).tolist() for name, rows in chosen.items()}
    return {"recall": evaluation.params.recThrs.tolist(), **lines}


def fast_ap(
    annotation_file: str | Path,
    detections: Sequence[dict[str, Any]],
    *,
    images: Iterable[int] | None = None,
    categories: Iterable[int] | None = None,
    compare: str = "boundary",
) -> dict[str, float | None]:
    """Return AP by faster-coco-eval: boundary AP (Cheng et al. 2021, a band of 2 % of the diagonal), or "segm".

    Raises ImportError without that optional package.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(Path(annotation_file).read_text())
        number_objects(truth)
        if not detections:
            return mask_ap(read_truth(annotation_file), [], images=images, categories=categories)
        found = truth.loadRes([{k: v for k, v in d.items() if k != "bbox"} for d in detections])
        evaluation = COCOeval_faster(truth, found, iouType=compare)
        if images is not None:
            evaluation.params.imgIds = sorted(images)
        if categories is not None:
            evaluation.params.catIds = sorted(categories)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return named(evaluation.stats)


def _precision(evaluation: COCOeval) -> NDArray[np.float64]:
    """Return precision (IoU, recall, category) for all sizes and the largest maxDets; -1 without objects."""
    precision: NDArray[np.float64] = evaluation.eval["precision"][:, :, :, _ALL_SIZES, _MOST]
    return precision


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[values > -1]
    return 100 * float(known.mean()) if known.size else None
