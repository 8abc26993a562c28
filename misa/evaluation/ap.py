"""Mask average precision as COCO defines it (Tables 1-5), by pycocotools."""

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class _Evaluation(COCOeval):
    """COCOeval in which some objects are neither found nor missed, as COCO has it for objects of other sizes."""

    counts: Callable[[dict[str, Any]], bool] | None = None

    def _prepare(self) -> None:
        super()._prepare()
        if self.counts is not None:
            for objects in self._gts.values():
                for annotation in objects:
                    annotation["ignore"] = bool(annotation["ignore"]) or not self.counts(annotation)


def read_truth(annotation_file: str | Path) -> COCO:
    """The ground truth of a COCO annotation file, read without pycocotools' chatter, objects numbered from 1."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file))
        number_objects(truth)
    return truth


def number_objects(truth: Any) -> None:
    """Ids of the annotations from 1 on: to the matching of pycocotools and its kin, an object with id 0 is none."""
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
    """AP, AP50, AP75, APs, APm, APl in percent; None where the truth has no object of that size.

    `detections` are COCO results: image_id, category_id, score, segmentation (RLE at the original size).
    `images` restricts the evaluation to some image ids, `categories` to some names or ids: those that were trained on,
    or classes that the network cannot know count as missed. `counts` says of an annotation whether its object is
    asked for: a detection of any other is dropped, one of no object stays wrong. `compare="bbox"` scores the boxes
    around the masks, for a truth without masks. `any_class` takes all categories for one: how well objects are outlined
    and ranked, whatever they are called; an object found as two things is then found once and once in vain.
    """
    evaluation = compared(
        truth,
        detections,
        images=images,
        categories=categories,
        counts=counts,
        compare=compare,
        any_class=any_class,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    return named(evaluation.stats)


def named(stats: Sequence[float]) -> dict[str, float | None]:
    """The first six figures of a COCO evaluation by name, in percent; it writes -1 where it could not measure."""
    return {name: None if value < 0 else 100 * float(value) for name, value in zip(NAMES, stats[:6], strict=True)}


def compared(truth: COCO, detections: Sequence[dict[str, Any]], **options: Any) -> COCOeval:
    """`matched` and accumulated: precision by threshold, recall, category, size and number of detections."""
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
    """pycocotools' evaluation after the matching and before any score; the arguments are those of `mask_ap`."""
    with contextlib.redirect_stdout(io.StringIO()):
        results = _results(truth, detections)
        if compare == "bbox":  # pycocotools would sort what is found by its mask's area, and what is there by its box's
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
    """The ids of categories given by name or id, in ascending order; ValueError for one that is not there."""
    ids = {category["name"]: int(category["id"]) for category in truth.dataset["categories"]}
    found = [ids.get(c, c) if isinstance(c, str) else c for c in categories]
    if unknown := [c for c in found if c not in ids.values()]:
        raise ValueError(f"the truth has no category {unknown[0]!r}; it has {', '.join(ids)}.")
    return sorted({int(c) for c in found})


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
    """Mask AP of a results file, of the same detections as full rectangles, and class-agnostic.

    Also by failure mode, where the annotations note one.

    limit: the first images only; classes: the names that were trained on, None for all in the file. masks: whether the
    truth has any; without, box AP of the boxes around the predicted masks is all there is to say.
    """
    truth = read_truth(annotation_file)
    images = truth.getImgIds()[:limit]
    names = None if classes is None else list(classes)
    found = json.loads(Path(detections).read_text())
    if not masks:
        for annotation in truth.dataset["annotations"]:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
            annotation.setdefault("iscrowd", 0)
        boxes = mask_ap(truth, found, images=images, categories=names, compare="bbox")
        return {"bbox": boxes, "detections": len(found), "images": len(images)}
    modes = sorted({a["mode"] for a in truth.dataset["annotations"] if "mode" in a})
    by_mode = {
        mode: mask_ap(truth, found, images=images, categories=names, counts=lambda a, m=mode: a.get("mode") == m)  # type: ignore[misc]
        for mode in modes
    }
    return {
        "segm": mask_ap(truth, found, images=images, categories=names),
        "segm_as_rectangles": mask_ap(truth, as_rectangles(found), images=images, categories=names),
        "segm_any_class": mask_ap(truth, found, images=images, categories=names, any_class=True),
        **({"segm_by_mode": by_mode} if modes else {}),
        "detections": len(found),
        "images": len(images),
    }
