"""Write scenes in every supported format, following the formats' documentation and without code of misa.

A picture is (name, split, (width, height), objects); an object is (label, box x y w h in pixels, polygons).
"""

import base64
import csv
import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("cat", "dog")


class Thing(NamedTuple):
    label: str
    box: tuple[int, int, int, int]
    polygons: list[list[float]]


class Picture(NamedTuple):
    name: str
    split: str
    size: tuple[int, int]
    things: list[Thing]


def box_of(polygons: list[list[float]]) -> tuple[int, int, int, int]:
    xs, ys = [x for p in polygons for x in p[::2]], [y for p in polygons for y in p[1::2]]
    return int(min(xs)), int(min(ys)), int(max(xs) - min(xs)), int(max(ys) - min(ys))


def draw(picture: Picture, path: Path) -> None:
    """Draw the image: its objects in one color each on noise that is seeded by its name."""
    rng = np.random.default_rng([ord(c) for c in picture.name])
    width, height = picture.size
    image = Image.fromarray(rng.integers(0, 90, (height, width, 3), dtype=np.uint8))
    for thing in picture.things:
        for polygon in thing.polygons:
            ImageDraw.Draw(image).polygon(polygon, fill=(220, 200 if thing.label == "cat" else 90, 120))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def coco(pictures: Iterable[Picture], name: Callable[[Picture], str], *, first: int = 1, masks: bool = True) -> str:
    """cocodataset.org/#format-data; first: the lowest id, which is 0 in some tools."""
    tables: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": label, "supercategory": ""} for i, label in enumerate(CLASSES, first)],
    }
    for i, picture in enumerate(pictures, first):
        width, height = picture.size
        tables["images"].append({"id": i, "file_name": name(picture), "width": width, "height": height})
        for thing in picture.things:
            row = {"id": len(tables["annotations"]) + first, "image_id": i, "bbox": list(thing.box), "iscrowd": 0}
            row |= {"category_id": CLASSES.index(thing.label) + first, "area": thing.box[2] * thing.box[3]}
            tables["annotations"].append(row | {"segmentation": thing.polygons if masks else []})
    return json.dumps({"info": {"description": "scenes"}, **tables})


def by_split(pictures: list[Picture]) -> dict[str, list[Picture]]:
    return {split: [p for p in pictures if p.split == split] for split in ("train", "val", "test")}


def published(root: Path, pictures: list[Picture]) -> None:
    (root / "annotations").mkdir(parents=True)
    for split, some in by_split(pictures).items():
        for picture in some:
            draw(picture, root / f"{split}2017" / picture.name)
        if some:
            (root / f"annotations/instances_{split}2017.json").write_text(coco(some, lambda p: p.name))


def roboflow(root: Path, pictures: list[Picture]) -> None:
    """Roboflow's "COCO": a json in each of train, valid and test; ids from 0."""
    for split, some in by_split(pictures).items():
        folder = root / {"val": "valid"}.get(split, split)
        for picture in some:
            draw(picture, folder / picture.name)
        if some:
            (folder / "_annotations.coco.json").write_text(coco(some, lambda p: p.name, first=0))


def cvat(root: Path, pictures: list[Picture]) -> None:
    """CVAT's "COCO 1.0": annotations/instances_<subset>.json, images/<subset>/."""
    (root / "annotations").mkdir(parents=True)
    for split, some in by_split(pictures).items():
        for picture in some:
            draw(picture, root / "images" / split / picture.name)
        if some:
            (root / f"annotations/instances_{split}.json").write_text(coco(some, lambda p: p.name))


def label_studio(root: Path, pictures: list[Picture]) -> None:
    """Label Studio's "COCO": result.json, names with images\\ or images/; without splits."""
    for picture in pictures:
        draw(picture, root / "images" / picture.name)
    (root / "result.json").write_text(coco(pictures, lambda p: f"images\\{p.name}", first=0))


def fiftyone(root: Path, pictures: list[Picture]) -> None:
    """FiftyOne's COCODetectionDataset, exported once for each split: data/ and labels.json."""
    for split, some in by_split(pictures).items():
        for picture in some:
            draw(picture, root / split / "data" / picture.name)
        if some:
            (root / split / "labels.json").write_text(coco(some, lambda p: p.name))


def one_json(root: Path, pictures: list[Picture]) -> None:
    """A json of any name, in UTF-16, beside a folder of images."""
    for picture in pictures:
        draw(picture, root / "photos" / picture.name)
    (root / "my labels.json").write_bytes(coco(pictures, lambda p: f"photos/{p.name}").encode("utf-16"))


def text_ids(root: Path, pictures: list[Picture]) -> None:
    """COCO with ids, sizes and references as strings."""
    for picture in pictures:
        draw(picture, root / "images" / picture.name)
    tables = json.loads(coco(pictures, lambda p: p.name))
    for row in tables["images"]:
        row |= {"id": f"image {row['id']}", "width": str(row["width"]), "height": str(row["height"])}
    for row in tables["categories"]:
        row |= {"id": f"{row['id']}"}
    for row in tables["annotations"]:
        row |= {"id": f"a{row['id']}", "image_id": f"image {row['image_id']}", "category_id": f"{row['category_id']}"}
    (root / "labels.json").write_text(json.dumps(tables))


def _sheet(root: Path, splits: dict[str, str], **more: object) -> None:
    lines = [*(f"{key}: {value}" for key, value in more.items()), *(f"{key}: {value}" for key, value in splits.items())]
    names = "\n".join(f"  {i}: {label}" for i, label in enumerate(CLASSES))
    (root / "data.yaml").write_text("\n".join([*lines, "names:", names, ""]))


def _yolo(root: Path, pictures: list[Picture], line: Callable[[Thing, Picture], list[float]]) -> None:
    for picture in pictures:
        draw(picture, root / "images" / picture.split / picture.name)
        rows = [[CLASSES.index(thing.label), *line(thing, picture)] for thing in picture.things]
        labels = (root / "labels" / picture.split / picture.name).with_suffix(".txt")
        labels.parent.mkdir(parents=True, exist_ok=True)
        if rows:  # an image without objects has no file
            labels.write_text("".join(" ".join(f"{value:.10g}" for value in row) + "\n" for row in rows))


def yolo_detect(root: Path, pictures: list[Picture]) -> None:
    """docs.ultralytics.com/datasets/detect: class, centre, sides; all from 0 to 1."""

    def line(thing: Thing, picture: Picture) -> list[float]:
        (x, y, w, h), (width, height) = thing.box, picture.size
        return [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]

    _yolo(root, pictures, line)
    _sheet(root, {split: f"images/{split}" for split in ("train", "val", "test")}, path=root)


def yolo_segment(root: Path, pictures: list[Picture]) -> None:
    """docs.ultralytics.com/datasets/segment: class and the corners of one polygon; lists of images."""

    def line(thing: Thing, picture: Picture) -> list[float]:
        (polygon,), (width, height) = thing.polygons, picture.size
        return [value / (height if i % 2 else width) for i, value in enumerate(polygon)]

    _yolo(root, pictures, line)
    for split, some in by_split(pictures).items():  # CVAT's lists name a folder `data` that is not in the archive
        (root / f"{split}.txt").write_text("".join(f"data/images/{split}/{p.name}\n" for p in some))
    _sheet(root, {split: f"{split}.txt" for split in ("train", "val", "test")}, path=".")


def _xml(picture: Picture) -> ET.ElementTree:
    root = ET.Element("annotation")
    ET.SubElement(root, "filename").text = picture.name
    size = ET.SubElement(root, "size")
    for key, value in zip(("width", "height", "depth"), (*picture.size, 3), strict=True):
        ET.SubElement(size, key).text = str(value)
    for thing in picture.things:
        item = ET.SubElement(root, "object")
        ET.SubElement(item, "name").text = thing.label
        ET.SubElement(item, "difficult").text = "0"
        box, (x, y, w, h) = ET.SubElement(item, "bndbox"), thing.box
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h), strict=True):
            ET.SubElement(box, key).text = str(value)
    return ET.ElementTree(root)


def voc(root: Path, pictures: list[Picture]) -> None:
    """The development kit of PASCAL VOC: pixels from 1, the last one included; lists of names without suffix."""
    kit = root / "VOCdevkit" / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main"):
        (kit / folder).mkdir(parents=True)
    for picture in pictures:
        draw(picture, kit / "JPEGImages" / picture.name)
        _xml(picture).write((kit / "Annotations" / picture.name).with_suffix(".xml"))
    for split, some in by_split(pictures).items():
        (kit / f"ImageSets/Main/{split}.txt").write_text("".join(f"{Path(p.name).stem}\n" for p in some))


def voc_without_val(root: Path, pictures: list[Picture]) -> None:
    """Only the lists train and trainval: the additional images of the latter are for validation."""
    voc(root, pictures)
    lists = root / "VOCdevkit/VOC2007/ImageSets/Main"
    (lists / "trainval.txt").write_text((lists / "train.txt").read_text() + (lists / "val.txt").read_text())
    (lists / "val.txt").unlink()


def _labelme(root: Path, pictures: list[Picture], shapes: Callable[[Thing, int], list[dict[str, Any]]]) -> None:
    """One JSON file per image as labelme 5 saves it, with the image embedded."""
    for picture in pictures:
        path = root / picture.split / picture.name
        draw(picture, path)
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [s for i, thing in enumerate(picture.things) for s in shapes(thing, i)],
            "imagePath": picture.name,
            "imageData": base64.b64encode(path.read_bytes()).decode(),
            "imageHeight": picture.size[1],
            "imageWidth": picture.size[0],
        }
        path.with_suffix(".json").write_text(json.dumps(content, indent=2))


def _shape(thing: Thing, kind: str, points: list[Any], **more: Any) -> dict[str, Any]:
    plain = {"group_id": None, "description": "", "flags": {}, "mask": None}
    return {"label": thing.label, "points": points, "shape_type": kind, **plain, **more}


def _corners(polygon: list[float]) -> list[list[float]]:
    return [[x, y] for x, y in zip(polygon[::2], polygon[1::2], strict=True)]


def labelme_boxes(root: Path, pictures: list[Picture]) -> None:
    def shapes(thing: Thing, _: int) -> list[dict[str, Any]]:
        x, y, w, h = thing.box
        return [_shape(thing, "rectangle", [[x + w, y + h], [x, y]])]  # drawn from the bottom right corner

    _labelme(root, pictures, shapes)


def labelme_groups(root: Path, pictures: list[Picture]) -> None:
    """Polygons; those of one object share a group_id."""
    _labelme(
        root,
        pictures,
        lambda thing, i: [_shape(thing, "polygon", _corners(p), group_id=i) for p in thing.polygons],
    )


def labelme_masks(root: Path, pictures: list[Picture]) -> None:
    """Masks as a PNG of the box, from its first point to its last pixel, as labelme's assistant draws them."""

    def shapes(thing: Thing, _: int) -> list[dict[str, Any]]:
        x, y, w, h = thing.box
        file = io.BytesIO()
        Image.fromarray(np.ones((h, w), bool)).save(file, "PNG")
        text = base64.b64encode(file.getvalue()).decode()
        return [_shape(thing, "mask", [[x, y], [x + w - 1, y + h - 1]], mask=text)]

    _labelme(root, pictures, shapes)


def csv_corners(root: Path, pictures: list[Picture]) -> None:
    (root / "images").mkdir(parents=True)
    with (root / "BOXES.CSV").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax", "split"])
        for picture in pictures:
            draw(picture, root / "images" / picture.name)
            boxes = [(t.label, t.box[0], t.box[1], t.box[0] + t.box[2], t.box[1] + t.box[3]) for t in picture.things]
            for row in boxes or [("", "", "", "", "")]:
                writer.writerow([picture.name, *picture.size, *row, picture.split])


def csv_sides(root: Path, pictures: list[Picture]) -> None:
    for split, some in by_split(pictures).items():
        for picture in some:
            draw(picture, root / split / picture.name)
        with (root / split / "boxes.csv").open("w", newline="", encoding="utf-16") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "x", "y", "box_width", "box_height", "label"])
            for picture in some:
                for row in [(*t.box, t.label) for t in picture.things] or [("",) * 5]:
                    writer.writerow([picture.name, *row])


# The writer; whether it gives splits, and whether it has masks.
WRITERS: dict[str, tuple[Callable[[Path, list[Picture]], None], bool, bool]] = {
    "COCO, its own layout": (published, True, True),
    "Roboflow": (roboflow, True, True),
    "CVAT": (cvat, True, True),
    "Label Studio": (label_studio, False, True),
    "FiftyOne": (fiftyone, True, True),
    "one json in UTF-16": (one_json, False, True),
    "text ids": (text_ids, False, True),
    "YOLO detect": (yolo_detect, True, False),
    "YOLO segment": (yolo_segment, True, True),
    "VOC": (voc, True, False),
    "VOC without val": (voc_without_val, True, False),
    "LabelMe rectangles": (labelme_boxes, True, False),
    "LabelMe groups": (labelme_groups, True, True),
    "LabelMe masks": (labelme_masks, True, True),
    "csv of corners": (csv_corners, True, False),
    "csv of sides": (csv_sides, True, False),
}
