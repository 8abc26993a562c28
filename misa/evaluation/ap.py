"""COCO mask AP (Tables 1-5) with pycocotools."""

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
TOUCH = 0.1
"""The least IoU that counts as overlap, as in TIDE (Bolya et al. 2020): below it a detection lies on the background."""


class _Evaluation(COCOeval):
    """COCOeval that ignores the ground truth for which `counts` is False, as COCO ignores objects of other sizes.

    So are unmatched detections of these objects: those that overlap one of them more than any other, by `TOUCH` at
    least. Class-agnostic it decodes the masks of the wanted categories only: those of others may have none.
    """

    counts: Callable[[dict[str, Any]], bool] | None = None

    def _prepare(self) -> None:
        by_class, self.params.useCats = self.params.useCats, 1
        super()._prepare()
        self.params.useCats = by_class
        if self.counts is not None:
            for objects in self._gts.values():
                for annotation in objects:
                    annotation["ignore"] = bool(annotation["ignore"]) or not self.counts(annotation)

    def evaluateImg(self, imgId: int, catId: int, aRng: Sequence[float], maxDet: int) -> dict[str, Any] | None:
        found: dict[str, Any] | None = super().evaluateImg(imgId, catId, aRng, maxDet)
        overlap = np.asarray(self.ious[imgId, catId])[:maxDet]  # IoU of detections, best score first, and objects
        if self.counts is None or found is None or overlap.size == 0:
            return found
        names = [catId] if self.params.useCats else self.params.catIds
        objects = [annotation for name in names for annotation in self._gts[imgId, name]]
        crowd = np.array([bool(annotation["iscrowd"]) for annotation in objects])
        counted = np.array([self.counts(annotation) for annotation in objects])
        own, other = (overlap.max(axis=1, where=w & ~crowd, initial=0) for w in (counted, ~counted))
        theirs = (other >= TOUCH) & (other > own)
        found["dtIgnore"] = found["dtIgnore"] | ((found["dtMatches"] == 0) & theirs)
        return found


def read_truth(annotation_file: str | Path, *, masks: bool = True) -> COCO:
    """Load the ground truth of a COCO annotation file without pycocotools' output, annotation ids starting at 1.

    masks: False if the file has boxes only. They are clipped to the image, as predicted ones are, and left out if that
    makes them thinner than a pixel, as in training; areas are those of the boxes.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file))
        if not masks:
            rows = (_clipped(row, truth.imgs[row["image_id"]]) for row in truth.dataset["annotations"])
            truth.dataset["annotations"] = [row for row in rows if min(row["bbox"][2:]) >= 1]
        number_objects(truth)
    return truth


def _clipped(row: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    """Returns an annotation whose box is the part within its image, and its area that of the box."""
    x, y, w, h = row["bbox"]
    left, top = max(x, 0), max(y, 0)
    w, h = min(x + w, image["width"]) - left, min(y + h, image["height"]) - top
    return {"iscrowd": 0, **row, "bbox": [left, top, w, h], "area": w * h}


def number_objects(truth: Any) -> None:
    """Renumber annotation ids from 1: the matching of pycocotools and its variants treats an object of id 0 as none."""
    for number, annotation in enumerate(truth.dataset.get("annotations", ()), 1):
        annotation["id"] = number
    truth.createIndex()


def mask_ap(
    truth: COCO,
    detections: Sequence[dict[str, Any]],
    *,
    images: Iterable[int] | None = None,
    categories: Iterable[str | int] | None = None,
    counts: Callable[[dict[str, Any]], bool] | None = None,
    compare: Literal["segm", "bbox"] = "segm",
    any_class: bool = False,
) -> dict[str, float | None]:
    """Return AP, AP50, AP75, APs, APm, APl in percent; None if the ground truth has no object of that size.

    `detections` are COCO results: image_id, category_id, score, segmentation (RLE at the original size).
    `images` restricts the evaluation to some image ids, `categories` to some names or ids: pass the trained classes,
    or others count as missed. `counts` returns whether an annotation is evaluated: detections of other objects (those
    that overlap one of them more than any other of their class, by `TOUCH` at least) are ignored, those of no object of
    their class remain false positives. `compare="bbox"` scores the boxes around the masks, for ground truth without
    masks. `any_class` computes class-agnostic AP, which measures outlines and ranking without classification; an object
    detected as two classes gives one true and one false positive.
    """
    evaluation = compared(
        truth, detections, images=images, categories=categories, counts=counts, compare=compare, any_class=any_class
    )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    return named(evaluation.stats)


def named(stats: Sequence[float]) -> dict[str, float | None]:
    """Return the first six figures of a COCO evaluation by name, in percent; its -1 (no ground truth) becomes None."""
    return {name: None if value < 0 else 100 * float(value) for name, value in zip(NAMES, stats[:6], strict=True)}


def compared(truth: COCO, detections: Sequence[dict[str, Any]], **options: Any) -> COCOeval:
    """Run `matched`, then accumulate: precision by threshold, recall, category, size and number of detections."""
    evaluation = matched(truth, detections, **options)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    return evaluation


def matched(
    truth: COCO,
    detections: Sequence[dict[str, Any]],
    *,
    images: Iterable[int] | None = None,
    categories: Iterable[str | int] | None = None,
    counts: Callable[[dict[str, Any]], bool] | None = None,
    compare: Literal["segm", "bbox"] = "segm",
    any_class: bool = False,
) -> COCOeval:
    """Return pycocotools' evaluation after matching, before accumulation; the arguments are those of `mask_ap`."""
    with contextlib.redirect_stdout(io.StringIO()):
        results = _results(truth, detections)
        if compare == "bbox":  # else pycocotools takes detections' sizes from masks, ground truth's from boxes
            for found in results.dataset["annotations"]:
                found["area"] = found["bbox"][2] * found["bbox"][3]
        evaluation = _Evaluation(truth, results, iouType=compare)
        evaluation.counts = counts
        evaluation.params.useCats = int(not any_class)
        if images is not None:
            evaluation.params.imgIds = sorted(images)
        if categories is not None:
            evaluation.params.catIds = category_ids(truth, categories)
        evaluation.evaluate()
    return evaluation


def category_ids(truth: COCO, categories: Iterable[str | int]) -> list[int]:
    """Return the ids of categories given by name or id, ascending; raise ValueError on an unknown one."""
    ids = {category["name"]: int(category["id"]) for category in truth.dataset["categories"]}
    found = [ids.get(c, c) if isinstance(c, str) else c for c in categories]
    if unknown := [c for c in found if c not in ids.values()]:
        raise ValueError(f"the truth has no category {unknown[0]!r}; it has {', '.join(ids)}.")
    return sorted({int(c) for c in found})


def present(truth: COCO, classes: Iterable[str]) -> list[str]:
    """Return those of the classes that are categories of the file, in the given order."""
    known = {category["name"] for category in truth.dataset["categories"]}
    return [name for name in classes if name in known]


def _results(truth: COCO, detections: Sequence[dict[str, Any]]) -> COCO:
    """Convert detections for pycocotools, whose loadRes cannot read an empty list."""
    if detections:
        # With a "bbox", loadRes would use it instead of the mask's extent.
        return truth.loadRes([{k: v for k, v in d.items() if k != "bbox"} for d in detections])
    empty = COCO()
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def as_rectangles(detections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace each detection's mask by its full bounding rectangle, as a baseline: the score of boxes alone."""
    if not detections:
        return []
    masks = [detection["segmentation"] for detection in detections]
    rectangles = []
    for detection, mask, box in zip(detections, masks, rle.toBbox(masks), strict=True):
        (encoded,) = rle.frPyObjects(box[None], *mask["size"])
        encoded["counts"] = encoded["counts"].decode()
        rectangles.append({**detection, "segmentation": encoded})
    return rectangles


def score(
    annotation_file: str | Path,
    detections: str | Path,
    *,
    limit: int | None = None,
    classes: Iterable[str] | None = None,
    masks: bool = True,
) -> dict[str, Any]:
    """Return the mask AP of a results file, of the same detections as full rectangles, and class-agnostic AP.

    Also by failure mode, if annotations have a "mode": objects of the other modes and their detections are ignored (see
    `mask_ap`), but a detection of another class or of the background has no mode and counts in each, so that all of
    them may lie below the AP.

    limit: use the first images only; classes: the trained names, None for all in the file; those that the file lacks
    are not scored. masks: whether the ground truth has masks; if not, only the box AP of the boxes around the
    predicted masks is returned.
    """
    truth = read_truth(annotation_file, masks=masks)
    images = truth.getImgIds()[:limit]
    names = None if classes is None else present(truth, classes)
    found = json.loads(Path(detections).read_text())
    if not masks:
        boxes = mask_ap(truth, found, images=images, categories=names, compare="bbox")
        return {"bbox": boxes, "detections": len(found), "images": len(images)}
    modes = sorted({a["mode"] for a in truth.dataset["annotations"] if isinstance(a.get("mode"), str)})
    by_mode = {
        mode: mask_ap(truth, found, images=images, categories=names, counts=lambda a, m=mode: a.get("mode") == m)  # type: ignore[misc]
        for mode in modes
    }
    return {
        "segm": mask_ap(truth, found, images=images, categories=names),
        "segm_as_rectangles": mask_ap(truth, as_rectangles(found), images=images, categories=names),
        "segm_any_class": mask_ap(truth, found, images=images, categories=names, any_class=True),
        **({"segm_of_mode": by_mode} if modes else {}),
        "detections": len(found),
        "images": len(images),
    }
