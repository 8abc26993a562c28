"""Files that are added to data after it was converted are read: the cache depends on the folders they may be in."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from misa.data.formats.convert import open_layout

LINE = "0 0.5 0.5 0.4 0.4\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def facts(root: Path) -> dict[str, dict[str, int]]:
    """The number of objects of each image of each split."""
    layout, found = open_layout(root), {}
    for split in ("train", "val"):
        tables = json.loads(getattr(layout, split).annotations.read_text())
        owners = [row["image_id"] for row in tables["annotations"]]
        found[split] = {Path(row["file_name"]).name: owners.count(row["id"]) for row in tables["images"]}
    return found


def yolo(root: Path, *images: str) -> None:
    for name in images or ("train/1.png", "train/2.png", "val/3.png"):
        image(root / "images" / name)
    text(root / "data.yaml", "train: images/train\nval: images/val\nnames: [cat]\n")


def labelled_yolo(root: Path) -> None:
    yolo(root)
    text(root / "labels/train/1.txt", LINE)


def nested_yolo(root: Path) -> None:
    yolo(root, "train/a/b/1.png", "val/3.png")
    text(root / "labels/train/a/b/1.txt", LINE)


def listed_yolo(root: Path) -> None:
    labelled_yolo(root)
    text(root / "train.txt", "images/train/1.png\nimages/train/2.png\n")
    text(root / "data.yaml", "train: train.txt\nval: images/val\nnames: [cat]\n")


def xml(name: str) -> str:
    box = "<bndbox><xmin>11</xmin><ymin>11</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>"
    return f"<annotation><filename>{name}</filename><object><name>cat</name>{box}</object></annotation>"


def voc(root: Path) -> None:
    for i in range(1, 5):
        image(root / f"JPEGImages/{i}.png")
        text(root / f"Annotations/{i}.xml", xml(f"{i}.png"))
    text(root / "ImageSets/Main/train.txt", "1\n2\n")


def voc_with_upper_list(root: Path) -> None:
    voc(root)
    (root / "ImageSets/Main/train.txt").rename(root / "ImageSets/train.txt")


def voc_folders(root: Path) -> None:
    for i in (1, 2):
        image(root / f"JPEGImages/{i}.png")
    text(root / "Annotations/train/1.xml", xml("1.png"))


def voc_empty_folder(root: Path) -> None:
    voc_folders(root)
    (root / "Annotations/val").mkdir()


def shapes(name: str) -> str:
    shape = {"label": "cat", "points": [[10, 10], [30, 30]], "shape_type": "rectangle"}
    return json.dumps({"shapes": [shape], "imagePath": name, "imageHeight": 48, "imageWidth": 64})


def labelme(root: Path) -> None:
    for i in (1, 2):
        image(root / f"images/{i}.png")
    text(root / "annotations/train/1.json", shapes("1.png"))
    text(root / "annotations/train/2.json", shapes("2.png"))


def coco(root: Path) -> None:
    names = [f"{i}.png" for i in range(1, 4)]
    for name in names:
        image(root / "images" / name)
    rows = [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(names, 1)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 9, 9]} for i in range(1, 4)]
    tables = {"images": rows, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    text(root / "annotations/boxes.json", json.dumps(tables))


ONE, TWO = {"1.png": 1}, {"1.png": 1, "2.png": 1}


@pytest.mark.parametrize(
    ("write", "path", "content", "expected"),
    [
        (labelled_yolo, "labels/train/2.txt", LINE, {"train": TWO, "val": {"3.png": 0}}),
        (labelled_yolo, "labels/val/3.txt", LINE, {"train": {"1.png": 1, "2.png": 0}, "val": {"3.png": 1}}),
        (yolo, "Labels/train/1.txt", LINE, {"train": {"1.png": 1, "2.png": 0}, "val": {"3.png": 0}}),
        (listed_yolo, "labels/train/2.txt", LINE, {"train": TWO, "val": {"3.png": 0}}),
        (nested_yolo, "images/train/a/b/2.png", "", {"train": {"1.png": 1, "2.png": 0}, "val": {"3.png": 0}}),
        (voc, "ImageSets/Main/val.txt", "4\n", {"train": TWO, "val": {"4.png": 1}}),
        (voc_with_upper_list, "ImageSets/val.txt", "4\n", {"train": TWO, "val": {"4.png": 1}}),
        (
            voc_with_upper_list,
            "ImageSets/Main/val.txt",
            "1\n",
            {"train": {"2.png": 1, "3.png": 1, "4.png": 1}, "val": ONE},
        ),
        (voc_folders, "Annotations/val/2.xml", xml("2.png"), {"train": ONE, "val": {"2.png": 1}}),
        (voc_empty_folder, "Annotations/val/2.xml", xml("2.png"), {"train": ONE, "val": {"2.png": 1}}),
        (labelme, "annotations/val/2.json", shapes("2.png"), {"train": TWO, "val": {"2.png": 1}}),
        (coco, "val.txt", "1.png\n", {"train": {"2.png": 1, "3.png": 1}, "val": ONE}),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value).partition("\n")[0][:30],
)
def test_a_file_that_was_added_is_read(
    tmp_path: Path, write: Callable[[Path], None], path: str, content: str, expected: dict[str, dict[str, int]]
) -> None:
    root = tmp_path / "data"
    write(root)
    assert facts(root) != expected
    if path.endswith(".png"):
        image(root / path)
    else:
        text(root / path, content)
    assert facts(root) == expected
