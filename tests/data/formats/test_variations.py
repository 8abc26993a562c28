"""Forty generated variations of names, encodings, splits and sizes, compared with an independent reader.

The reference is read from the same files with pycocotools, PIL, xml.etree and csv.
"""

import csv
import json
import shutil
import tempfile
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from misa.data.check.annotations import check_coco
from misa.data.formats.convert import open_layout

LABELS = ("cat", "dog", "Ñandú", "$x_1$", "background")
# For each image its true size by PIL, its split ("" if not given), and its objects: label and x y w h.
Facts = dict[str, tuple[tuple[int, int], str, list[tuple[str, list[float]]]]]

stems = st.text(st.sampled_from("abcé漢 ._-$'&#%😀ñ0"), min_size=1, max_size=12).filter(
    lambda s: s.strip(" .") == s and not s.startswith("_")
)


@st.composite
def pictures(draw: Callable[..., Any]) -> list[dict[str, Any]]:
    """Draw images with distinct NFC names, sizes, suffixes and splits; the first two have objects in train and val."""
    names = draw(st.lists(stems, min_size=3, max_size=6, unique_by=lambda s: unicodedata.normalize("NFC", s).lower()))
    found = []
    for i, name in enumerate(names):
        width, height = draw(st.integers(12, 80)), draw(st.integers(12, 80))
        boxes = []
        for _ in range(draw(st.integers(1 if i < 2 else 0, 3))):
            x, y = draw(st.integers(0, width - 6)), draw(st.integers(0, height - 6))
            w, h = draw(st.integers(3, width - x)), draw(st.integers(3, height - y))
            boxes.append((draw(st.sampled_from(LABELS)), [x, y, w, h]))
        split = ("train", "val")[i] if i < 2 else draw(st.sampled_from(["train", "val", "test"]))
        suffix = draw(st.sampled_from([".png", ".jpg", ".PNG", ".bmp"]))
        name = unicodedata.normalize("NFC", name)
        found.append({"name": name + suffix, "size": (width, height), "split": split, "objects": boxes})
    return found


def paint(folder: Path, picture: dict[str, Any], form: str) -> None:
    """Write the image under its name in a Unicode form."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = picture["size"]
    pixels = np.random.default_rng(len(picture["name"])).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / unicodedata.normalize(form, picture["name"]))


def size_of(folder: Path, name: str) -> tuple[int, int]:
    """Read with PIL the size of the one file with this name in any Unicode form."""
    (path,) = (p for p in folder.rglob("*") if unicodedata.normalize("NFC", p.name) == name)
    with Image.open(path) as image:
        return image.size


def write_coco(root: Path, made: list[dict[str, Any]], draw: Callable[..., Any]) -> Facts:
    """COCO's layout, or a tool's, in one of four encodings, with ids as numbers or strings; read by pycocotools."""
    form, encoding = (
        draw(st.sampled_from(["NFC", "NFD"])),
        draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"])),
    )
    split_by = draw(st.sampled_from(["published", "roboflow", "cvat"]))
    start, text = draw(st.sampled_from([0, 1, 1000])), draw(st.booleans())
    facts: Facts = {}
    for split in {picture["split"] for picture in made}:
        some = [picture for picture in made if picture["split"] == split]
        place, file = {
            "published": (root / f"{split}2017", root / f"annotations/instances_{split}2017.json"),
            "roboflow": (root / split, root / split / "_annotations.coco.json"),
            "cvat": (root / "images" / split, root / f"annotations/instances_{split}.json"),
        }[split_by]
        tables: dict[str, Any] = {"images": [], "annotations": []}
        tables["categories"] = [{"id": i, "name": label} for i, label in enumerate(LABELS, 1)]
        for i, picture in enumerate(some, start):
            paint(place, picture, form)
            width, height = picture["size"]
            tables["images"].append({"id": i, "file_name": picture["name"], "width": width, "height": height})
            for label, box in picture["objects"]:
                row = {"id": len(tables["annotations"]) + start, "image_id": i, "bbox": box, "iscrowd": 0}
                tables["annotations"].append(row | {"category_id": LABELS.index(label) + 1, "area": box[2] * box[3]})
        file.parent.mkdir(parents=True, exist_ok=True)
        plain = json.dumps(tables, ensure_ascii=False)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as other:
            other.write(plain)
            other.flush()
            truth = COCO(other.name)
        for image in truth.loadImgs(truth.getImgIds()):
            rows = truth.loadAnns(truth.getAnnIds(imgIds=[image["id"]]))
            objects = [(truth.cats[row["category_id"]]["name"], [float(v) for v in row["bbox"]]) for row in rows]
            facts[image["file_name"]] = (size_of(place, image["file_name"]), split, objects)
        if text:  # the same as some tools write it
            for table in ("images", "annotations"):
                for row in tables[table]:
                    row["id"] = f"{table} {row['id']}"
            for row in tables["annotations"]:
                row["image_id"] = f"images {row['image_id']}"
            plain = json.dumps(tables, ensure_ascii=False)
        file.write_bytes(plain.encode(encoding))
    return facts


def write_voc(root: Path, made: list[dict[str, Any]], draw: Callable[..., Any]) -> Facts:
    """A devkit with lists that have suffixes, paths or neither; read by xml.etree."""
    form = draw(st.sampled_from(["NFC", "NFD"]))
    stems_seen: dict[str, int] = {}
    for picture in made:  # a list without suffixes needs distinct names
        stem = picture["name"].rpartition(".")[0]
        stems_seen[stem] = stems_seen.get(stem, 0) + 1
    listed = draw(st.sampled_from(["{stem}", "{name}", "JPEGImages/{name}"]))
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (root / "Annotations").mkdir()
    facts: Facts = {}
    for picture in made:
        paint(root / "JPEGImages", picture, form)
        stem = picture["name"].rpartition(".")[0]
        tree = ET.Element("annotation")
        ET.SubElement(tree, "filename").text = picture["name"]
        if draw(st.booleans()):  # else the size is read from the file
            for side, value in zip(("width", "height"), picture["size"], strict=True):
                ET.SubElement(
                    tree.find("size") if tree.find("size") is not None else ET.SubElement(tree, "size"), side
                ).text = str(value)  # type: ignore[arg-type]
        for label, (x, y, w, h) in picture["objects"]:
            item = ET.SubElement(tree, "object")
            ET.SubElement(item, "name").text = label
            box = ET.SubElement(item, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h), strict=True):
                ET.SubElement(box, key).text = str(value)
        path = root / "Annotations" / f"{stem}.xml"
        ET.ElementTree(tree).write(path, encoding=draw(st.sampled_from(["utf-8", "utf-16", "us-ascii"])))
        with (lists / f"{picture['split']}.txt").open("a", encoding="utf-8") as file:
            file.write(listed.format(stem=stem, name=picture["name"]) + draw(st.sampled_from(["\n", "\r\n", "  1\n"])))
        read = ET.parse(path).getroot()
        objects = []
        for item in read.iter("object"):
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{key}") or "") for key in ("xmin", "ymin", "xmax", "ymax"))
            objects.append((item.findtext("name") or "", [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]))
        facts[picture["name"]] = (size_of(root, picture["name"]), picture["split"], objects)
    return facts


def write_csv(root: Path, made: list[dict[str, Any]], draw: Callable[..., Any]) -> Facts:
    """One CSV with or without splits, with corners or sides, three delimiters, three encodings; read by csv."""
    sides, split = draw(st.booleans()), draw(st.booleans())
    delimiter, encoding = draw(st.sampled_from(",;\t")), draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    folder = draw(st.sampled_from(["", "images/", "deep/er/"]))
    named = draw(st.sampled_from([folder, "", folder.replace("/", "\\")]))
    box_names = ["x", "y", "box_width", "box_height"] if sides else ["xmin", "ymin", "xmax", "ymax"]
    root.mkdir(parents=True)
    path = root / draw(st.sampled_from(["boxes.csv", "My Boxes.CSV"]))
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["filename", *box_names, "class", *(["split"] if split else [])])
        for picture in made:
            paint(root / folder, picture, "NFC")
            for label, (x, y, w, h) in picture["objects"] or [("", [""] * 4)]:
                box = [x, y, w, h] if sides or not label else [x, y, x + w, y + h]
                writer.writerow([named + picture["name"], *box, label, *([picture["split"]] if split else [])])
    facts: Facts = {}
    with path.open(newline="", encoding=encoding) as file:
        for row in csv.DictReader(file, delimiter=delimiter):
            name = row["filename"].replace("\\", "/").rpartition("/")[2]
            facts.setdefault(name, (size_of(root, name), row.get("split", ""), []))
            if row["class"]:
                a, b, c, d = (float(row[key]) for key in box_names)
                facts[name][2].append((row["class"], [a, b, c, d] if sides else [a, b, c - a, d - b]))
    return facts


def write_yolo(root: Path, made: list[dict[str, Any]], draw: Callable[..., Any]) -> Facts:
    """data.yaml with names as a list or numbered, folders or lists of images; read by yaml and PIL."""
    listed, numbered = draw(st.booleans()), draw(st.booleans())
    places = {}
    for picture in made:
        split = picture["split"]
        paint(root / "images" / split, picture, "NFC")
        labels = root / "labels" / split / (picture["name"].rpartition(".")[0] + ".txt")
        labels.parent.mkdir(parents=True, exist_ok=True)
        width, height = picture["size"]
        rows = [
            [LABELS.index(label), (x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
            for label, (x, y, w, h) in picture["objects"]
        ]
        if rows or draw(st.booleans()):
            labels.write_text("".join(" ".join(f"{v:.12g}" for v in row) + "\n" for row in rows))
        places[split] = f"{split}.txt" if listed else f"images/{split}"
        with (root / f"{split}.txt").open("a", encoding="utf-8") as file:
            file.write(f"./images/{split}/{picture['name']}\n")
    names = dict(enumerate(LABELS)) if numbered else list(LABELS)
    (root / "data.yaml").write_text(
        yaml.safe_dump({"path": ".", **places, "names": names}, allow_unicode=True), "utf-8"
    )
    facts: Facts = {}
    for picture in made:
        (width, height), split = size_of(root / "images", picture["name"]), picture["split"]
        labels = root / "labels" / split / (picture["name"].rpartition(".")[0] + ".txt")
        objects = []
        for line in labels.read_text().splitlines() if labels.exists() else []:
            number, x, y, w, h = map(float, line.split())
            objects.append((LABELS[int(number)], [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]))
        facts[picture["name"]] = ((width, height), split, objects)
    return facts


def apart(made: list[dict[str, Any]]) -> bool:
    """Whether names without suffix are distinct, which formats with one file per image need."""
    return len({picture["name"].rpartition(".")[0].lower() for picture in made}) == len(made)


@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_variation_agrees_with_an_independent_reading(data: st.DataObject) -> None:
    made = data.draw(pictures().filter(apart))
    write = data.draw(st.sampled_from([write_coco, write_voc, write_csv, write_yolo]))
    home = Path(tempfile.mkdtemp())
    try:
        with mock.patch.dict("os.environ", {"XDG_CACHE_HOME": str(home / "cache")}):
            facts = write(home / "data", made, data.draw)
            layout = open_layout(home / "data")
            found = {}
            for split in ("train", "val", "test"):
                place = getattr(layout, split)
                if place is None:
                    continue
                truth = COCO(str(place.annotations))
                for image in truth.loadImgs(truth.getImgIds()):
                    rows = truth.loadAnns(truth.getAnnIds(imgIds=[image["id"]]))
                    objects = [(truth.cats[row["category_id"]]["name"], row["bbox"]) for row in rows]
                    assert (place.images / image["file_name"]).is_file()
                    name = unicodedata.normalize("NFC", Path(image["file_name"]).name)
                    found[name] = ((image["width"], image["height"]), split, objects)
                if split != "test":
                    report = check_coco(*place, verify_images="open")
                    assert {p.kind for p in report.fatal} <= {"no-objects"}, str(report)
        assert found.keys() == facts.keys()
        for name, (size, split, objects) in facts.items():
            assert found[name][0] == size
            assert found[name][1] == split or not split
            assert [label for label, _ in found[name][2]] == [label for label, _ in objects]
            np.testing.assert_allclose([b for _, b in found[name][2]], [b for _, b in objects], atol=1e-6)
    finally:
        shutil.rmtree(home)
