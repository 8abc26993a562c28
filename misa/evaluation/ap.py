"""Mask average precision as COCO defines it (Tables 1-5), by pycocotools."""

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def read_truth(annotation_file: str | Path) -> COCO:
    """The ground truth of a COCO annotation file, read without pycocotools' chatter."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(annotation_file))


def mask_ap(
    truth: COCO, detections: Sequence[dict[str, Any]], *, images: Iterable[int] | None = None
) -> dict[str, float | None]:
    """AP, AP50, AP75, APs, APm, APl in percent; None where the truth has no object of that size.

    `detections` are COCO results: image_id, category_id, score, segmentation (RLE at the original size).
    `images` restricts the evaluation to some image ids.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        results = _results(truth, detections)
        evaluation = COCOeval(truth, results, iouType="segm")
        if images is not None:
            evaluation.params.imgIds = sorted(images)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # pycocotools writes -1 where nothing could be measured.
    return {
        name: None if value < 0 else 100 * float(value)
        for name, value in zip(NAMES, evaluation.stats[:6], strict=True)
    }


def _results(truth: COCO, detections: Sequence[dict[str, Any]]) -> COCO:
    """Detections as pycocotools wants them; its own loadRes cannot read an empty list."""
    if detections:
        # A result's box would take the place of the mask's own extent.
        return truth.loadRes([{k: v for k, v in d.items() if k != "bbox"} for d in detections])
    empty = COCO()
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def as_rectangles(detections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same detections with each mask replaced by its full bounding rectangle: what a box alone would score."""
    rectangles = []
    for detection in detections:
        x, y, w, h = (int(v) for v in rle.toBbox(detection["segmentation"]))
        canvas = np.zeros(detection["segmentation"]["size"], dtype=np.uint8, order="F")
        canvas[y : y + h, x : x + w] = 1
        encoded = rle.encode(canvas)
        encoded["counts"] = encoded["counts"].decode()
        rectangles.append({**detection, "segmentation": encoded})
    return rectangles


def score(annotation_file: str | Path, detections: str | Path, *, limit: int | None = None) -> dict[str, Any]:
    """Mask AP of a results file, and of the same detections as full rectangles; the first `limit` images only."""
    truth = read_truth(annotation_file)
    images = truth.getImgIds()[:limit]
    found = json.loads(Path(detections).read_text())
    return {
        "segm": mask_ap(truth, found, images=images),
        "segm_as_rectangles": mask_ap(truth, as_rectangles(found), images=images),
        "detections": len(found),
        "images": len(images),
    }
