"""Mask AP image by image, to find the worst ones."""

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

from pycocotools.coco import COCO

from misa.evaluation.ap import _category_ids, _Evaluation, _results


def image_ap(
    truth: COCO,
    detections: Sequence[dict[str, Any]],
    *,
    images: Iterable[int],
    categories: Iterable[str | int] | None = None,
) -> dict[int, float | None]:
    """AP in percent of each image alone, as `mask_ap` gives it for that one image; None without an object to find.

    Masks are matched once for all images; what follows is the cheap part.
    """
    ids = sorted(images)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _Evaluation(truth, _results(truth, detections), iouType="segm")
        evaluation.params.imgIds = ids
        if categories is not None:
            evaluation.params.catIds = _category_ids(truth, categories)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.params.maxDets = evaluation.params.maxDets[-1:]
        evaluation.evaluate()
        matches = evaluation.evalImgs  # category by category, the images of each in turn
        found: dict[int, float | None] = {}
        for place, image_id in enumerate(ids):
            evaluation.evalImgs = matches[place :: len(ids)]
            evaluation.params.imgIds = evaluation._paramsEval.imgIds = [image_id]
            evaluation.accumulate()
            precision = evaluation.eval["precision"]
            known = precision[precision > -1]
            found[image_id] = 100 * float(known.mean()) if known.size else None
    return found


def worst(scores: dict[int, float | None], count: int) -> list[int]:
    """The images of the lowest scores, the worst first; equal ones by their id."""
    known = [(value, image_id) for image_id, value in scores.items() if value is not None]
    return [image_id for _, image_id in sorted(known)[:count]]
