"""Where the classes come from in each format, as docs/data.md has it: files written here, read by `open_layout`."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from misa.data.formats.coco import DataError
from misa.data.formats.convert import open_layout
from misa.data.source import open_source
from misa.errors import UserError
from misa.experiment import Experiment

NAMES = ("zebra", "cat", "Cat")  # of the three boxes of each image, in this order


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        pixels = np.random.default_rng(len(split)).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{split}.png")


def coco(root: Path, names: dict[str, dict[int, str]]) -> None:
    (root / "annotations").mkdir(parents=True)
    for split, categories in names.items():
        images(root / f"{split}2017")
        boxes = [
            {"id": i, "image_id": 1, "category_id": key, "bbox": [9 * i, 5, 8, 9], "area": 72, "iscrowd": 0}
            for i, key in enumerate(list(categories)[:1], 1)
        ]
        tables = {
            "images": [{"id": 1, "file_name": f"{split}.png", "width": 60, "height": 40}],
            "annotations": boxes,
            "categories": [{"id": key, "name": name} for key, name in categories.items()],
        }
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(tables))


def yolo(root: Path, names: str, numbers: tuple[int, ...] = (0, 1, 2)) -> None:
    for split in ("train", "val"):
        images(root / "images" / split)
        (root / "labels" / split).mkdir(parents=True)
        lines = [f"{number} 0.5 0.5 0.2 0.{2 + i}" for i, number in enumerate(numbers)]
        (root / f"labels/{split}/{split}.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
    (root / "classes.txt").write_text("ape\nbee\ncow\n")


def voc(root: Path) -> None:
    images(root)
    box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>{}</xmax><ymax>20</ymax></bndbox>"
    objects = [f"<object><name> {name}\n</name>{box.format(20 + i)}</object>" for i, name in enumerate(NAMES)]
    for split in ("train", "val"):
        (root / f"{split}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")


def labelme(root: Path) -> None:
    images(root)
    for split in ("train", "val"):
        shapes = [
            {"label": f" {name} ", "points": [[3, 4], [20 + i, 20]], "shape_type": "rectangle"}
            for i, name in enumerate(NAMES)
        ]
        (root / f"{split}.json").write_text(json.dumps({"shapes": shapes, "imagePath": f"{split}.png"}))


def table(root: Path, first: str) -> None:
    images(root)
    lines = [f"{split}.png,3,4,{20 + i},20, {name} " for split in ("train", "val") for i, name in enumerate(NAMES)]
    (root / "boxes.csv").write_text("\n".join([*filter(None, [first]), *lines]))


def classes(root: Path) -> list[str]:
    """Of whichever split has any: without lists of splits these few images may all be in one."""
    layout = open_layout(root)
    found = [json.loads(split.annotations.read_text())["categories"] for split in (layout.train, layout.val)]
    assert found[0] == found[1]
    return [row["name"] for row in found[0]]


COCO_IDS = {7: "zebra", 3: "cat", 90: "Cat"}
SORTED = ["Cat", "cat", "zebra"]


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda root: coco(root, dict.fromkeys(("train", "val"), COCO_IDS)), ["zebra", "cat", "Cat"]),
        (lambda root: yolo(root, "[zebra, cat, Cat, dog]"), SORTED),
        (lambda root: yolo(root, "{0: zebra, 1: cat, 2: Cat}"), SORTED),
        (lambda root: yolo(root, "{0: zebra, 1: cat, 3: dog}"), ["cat", "class 2", "zebra"]),
        (lambda root: yolo(root, "[yes, no, 010]"), ["010", "no", "yes"]),
        (lambda root: yolo(root, "{<<: {0: on}, 1: cat, 2: dog}"), ["cat", "dog", "on"]),
        (lambda root: yolo(root, "{0: 1.10, 1: on, 2: 2024-01-01}"), ["1.10", "2024-01-01", "on"]),
        (voc, SORTED),
        (labelme, SORTED),
        (lambda root: table(root, "image,xmin,ymin,xmax,ymax,label"), SORTED),
        (lambda root: table(root, "image,xmin,ymin,xmax,ymax,Class"), SORTED),
        (lambda root: table(root, ""), SORTED),
    ],
    ids=[
        "coco",
        "yolo-list",
        "yolo-mapping",
        "yolo-gap",
        "yolo-words",
        "yolo-merged",
        "yolo-numbers",
        "voc",
        "labelme",
        "csv-label",
        "csv-class",
        "csv-bare",
    ],
)
def test_the_classes_of_each_format(tmp_path: Path, write: Callable[[Path], None], expected: list[str]) -> None:
    write(tmp_path / "data")
    assert classes(tmp_path / "data") == expected


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("{0: cat, 1: , 2: dog}", "has an empty name for class 1; add its name."),
        ("[cat, ~, dog]", "has an empty name for class 1; add its name."),
        ("[cat, dog, [cow]]", "has a list as the name of class 2: ['cow']; give a text."),
        ("[{0: cat}, dog, cow]", "has a mapping as the name of class 0: {'0': 'cat'}; give a text."),
        ("[cat, dog, cat]", "names both class 0 and class 2 'cat'; give each a name of its own."),
    ],
)
def test_a_class_without_a_name_of_its_own_is_an_error(tmp_path: Path, names: str, words: str) -> None:
    yolo(tmp_path / "data", names)
    with pytest.raises(UserError) as error:
        open_layout(tmp_path / "data")
    assert str(error.value) == f"{tmp_path / 'data/data.yaml'} {words}"


def test_a_number_beyond_the_names_is_an_error_and_classes_txt_no_substitute(tmp_path: Path) -> None:
    yolo(tmp_path / "few", "[zebra, cat]")
    with pytest.raises(UserError, match=r"class 2 has no name in data.yaml \(2 classes\)"):
        open_source(Experiment(data="coco"), tmp_path / "few")
    yolo(tmp_path / "none", "[]")
    with pytest.raises(DataError, match="has no names"):
        open_layout(tmp_path / "none")
    yolo(tmp_path / "far", "{0: zebra, 99999999999: cat}")
    with pytest.raises(DataError, match="names class 99999999999; classes are numbered from 0"):
        open_layout(tmp_path / "far")


def test_the_training_split_says_which_classes_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = Experiment(data="coco")
    coco(tmp_path / "other", {"train": {1: "cat", 2: "dog"}, "val": {1: "cat", 2: "dgo"}})
    with pytest.raises(UserError, match="class 'dog' is expected, but found are cat, dgo; did you mean 'dgo'"):
        open_source(row, tmp_path / "other")
    coco(tmp_path / "fewer", {"train": {1: "cat", 2: "dog"}, "val": {5: "cat"}})
    assert open_source(row, tmp_path / "fewer").classes == ("cat", "dog")
    assert "class 'dog' does not occur in it, so it is not scored" in capsys.readouterr().out
    coco(tmp_path / "more", {"train": {1: "cat", 2: "dog"}, "val": {5: "dog", 6: "cat", 7: "zebra"}})
    assert open_source(row, tmp_path / "more").classes == ("cat", "dog")
    assert "objects of zebra are left out" in capsys.readouterr().out
