"""Readers for the semantic teacher: boxes for training, ground-truth label maps for evaluation.

Axes: h row · w column.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from misa.data.dataset import OrderedCOCO
from misa.data.formats.coco import Split
from misa.data.formats.plain import is_ignored
from misa.data.label_maps import VOC_CLASSES, LabelMap, rasterise, read_voc_label_map


class BoxedImage(NamedTuple):
    """An image and its boxes (x1, y1, x2, y2) in pixels; boxes of crowds separately."""

    name: str
    image_id: int
    boxes: NDArray[np.float64]
    labels: list[int]
    crowds: NDArray[np.float64]
    size: tuple[int, int]


def boxed_images(split: Split, classes: tuple[str, ...], *, limit: int | None = None) -> list[BoxedImage]:
    """Returns the images of an annotation file with their boxes; `segmentation` is never read."""
    content = json.loads(split.annotations.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    label = {i: classes.index(name) for i, name in names.items() if name in classes}
    objects: dict[int, list[tuple[list[float], int, bool]]] = {}
    for a in content["annotations"]:
        if a["category_id"] in label:
            crowd = bool(a.get("iscrowd")) or is_ignored(a)
            objects.setdefault(a["image_id"], []).append((a["bbox"], label[a["category_id"]], crowd))
    images = []
    for image in content["images"][:limit]:
        mine = objects.get(image["id"], [])
        images.append(
            BoxedImage(
                image["file_name"],
                image["id"],
                _corners([box for box, _, crowd in mine if not crowd]),
                [c for _, c, crowd in mine if not crowd],
                _corners([box for box, _, crowd in mine if crowd]),
                (image["height"], image["width"]),
            )
        )
    return images


class TrueMap(NamedTuple):
    """An image's name and id, and a function that reads its ground-truth label map."""

    name: str
    image_id: int
    make: Callable[[], LabelMap]


def true_maps(split: Split, classes: tuple[str, ...], *, limit: int | None = None) -> Iterator[TrueMap]:
    """Yield the ground-truth label map of every image: VOC's PNG if there is one, else the instance masks combined.

    A PNG in SegmentationClass beside the folder `annotations` has the void border that instance masks lack. It numbers
    VOC's classes: with other classes, or a labelmap.txt, as other tools write for a numbering of their own, it is not
    read. Where instances overlap the smaller is on top; a crowd is void except where an instance lies.
    """
    truth = OrderedCOCO(str(split.annotations))
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    of_voc = set(classes) <= set(VOC_CLASSES)
    for image in truth.loadImgs(truth.getImgIds()[:limit]):

        def make(image: dict[str, Any] = image) -> LabelMap:
            png = split.label_map(image["file_name"])
            if of_voc and png.is_file() and not (png.parent.parent / "labelmap.txt").exists():
                return read_voc_label_map(png, classes)
            return _from_instances(truth, image, names, classes)

        yield TrueMap(image["file_name"], image["id"], make)


def _from_instances(truth: Any, image: dict[str, Any], names: dict[int, str], classes: tuple[str, ...]) -> LabelMap:
    rows = truth.loadAnns(truth.getAnnIds(imgIds=[image["id"]]))
    objects = [a for a in rows if names[a["category_id"]] in classes]
    masks = [truth.annToMask(a).astype(bool) for a in objects]
    crowd = [bool(a.get("iscrowd")) or is_ignored(a) for a in objects]
    return rasterise(
        [mask for mask, several in zip(masks, crowd, strict=True) if not several],
        [classes.index(names[a["category_id"]]) for a, several in zip(objects, crowd, strict=True) if not several],
        (image["height"], image["width"]),
        background=len(classes),
        void=[mask for mask, several in zip(masks, crowd, strict=True) if several],
    )


def _corners(boxes: list[list[float]]) -> NDArray[np.float64]:
    corners = np.array(boxes, dtype=float).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    return corners
