"""An image that is not there is reported, even where another file has its name: a mask, or a picture of another day."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from misa.engine.reports.checkup import check_data
from tests.data.formats.test_round_trip import thing
from tests.data.formats.writers import Picture, coco, draw, labelme_boxes, published, voc

THINGS = [thing("cat", [8, 6, 40, 6, 40, 30, 8, 30])]
PICTURES = [Picture(f"{name}.png", "train", (60, 50), THINGS) for name in "abcd"]
VAL = Picture("v.png", "val", (60, 50), THINGS)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def other(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 50), "white").save(path)


def table(path: Path, names: list[str]) -> None:
    with path.open("w", newline="") as file:
        rows = [[name, *THINGS[0].box, "cat"] for name in names]
        csv.writer(file).writerows([["image", "x", "y", "box_width", "box_height", "label"], *rows])


def a_mask_beside_voc(root: Path) -> Path:
    voc(root, PICTURES)
    kit = root / "VOCdevkit/VOC2007"
    for picture in PICTURES:
        other(kit / "SegmentationClass" / picture.name)
    return kit / "JPEGImages/b.png"


def a_mask_beside_a_csv(root: Path) -> Path:
    for picture in PICTURES:
        draw(picture, root / "images" / picture.name)
        other(root / "masks" / picture.name)
    table(root / "boxes.csv", [f"images/{p.name}" for p in PICTURES])
    return root / "images/b.png"


def a_depth_map_beside_a_json(root: Path) -> Path:
    for picture in PICTURES:
        draw(picture, root / "images" / picture.name)
        other(root / "depth" / picture.name)
    (root / "labels.json").write_text(coco(PICTURES, lambda p: p.name))
    return root / "images/b.png"


def another_day(p: Picture) -> str:
    return f"day{1 + (p.name in ('c.png', 'd.png'))}/{p.name}"


def another_day_in_coco(root: Path) -> Path:
    published(root, [*PICTURES, VAL])
    images = root / "train2017"
    for picture in PICTURES:
        (images / another_day(picture)).parent.mkdir(exist_ok=True)
        (images / picture.name).rename(images / another_day(picture))
    other(images / "day2/b.png")
    (root / "annotations/instances_train2017.json").write_text(coco(PICTURES, another_day))
    return images / "day1/b.png"


def another_day_in_coco_listed_twice(root: Path) -> Path:
    missing = another_day_in_coco(root)
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["images"].append({"id": 9, "file_name": "day2/b.png", "width": 60, "height": 50})
    content["annotations"].append(content["annotations"][0] | {"id": 9, "image_id": 9})
    path.write_text(json.dumps(content))
    return missing


def another_day_in_a_csv(root: Path) -> Path:
    for picture in PICTURES:
        draw(picture, root / another_day(picture))
    other(root / "day2/b.png")
    table(root / "boxes.csv", [another_day(p) for p in PICTURES])
    return root / "day1/b.png"


def one_file_for_two_names(root: Path) -> Path:
    """No name has its file in place, and one file cannot be that of both."""
    published(root, [VAL])
    draw(PICTURES[0], root / "train2017/pictures/a.png")
    pictures = [PICTURES[0]._replace(name=f"{day}/a.png") for day in ("mon", "tue")]
    (root / "annotations/instances_train2017.json").write_text(coco(pictures, lambda p: p.name))
    return root / "train2017/tue/a.png"


def names_from_the_root(root: Path) -> Path:
    """The images are not in the folder that is called so."""
    for picture in PICTURES:
        draw(picture, root / "camera" / picture.name)
        other(root / "masks" / picture.name)
    (root / "images").mkdir()
    (root / "labels.json").write_text(coco(PICTURES, lambda p: f"camera/{p.name}"))
    (root / "camera/b.png").unlink()
    return root / "images/camera/b.png"  # names are relative to this folder first


def absent(root: Path) -> list[str]:
    problems = (problem for report in check_data(root).reports for problem in report.problems)
    return [problem.message for problem in problems if problem.kind == "image-absent"]


FORMS = [
    a_mask_beside_voc,
    a_mask_beside_a_csv,
    a_depth_map_beside_a_json,
    another_day_in_coco,
    another_day_in_coco_listed_twice,
    another_day_in_a_csv,
    one_file_for_two_names,
    names_from_the_root,
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_file_of_the_same_name_elsewhere_is_another_image(form: Callable[[Path], Path], tmp_path: Path) -> None:
    missing = form(tmp_path)
    missing.unlink(missing_ok=True)
    assert absent(tmp_path) == [f"the file {missing} is missing"]


def test_names_without_their_folders_are_found_in_them(tmp_path: Path) -> None:
    """As before: `b.png` may be in a folder below that of the images, beside others that are not."""
    root = tmp_path / "data"
    for picture, folder in zip(PICTURES, ("", "day1", "day1", "day2"), strict=True):
        draw(picture, root / "images" / folder / picture.name)
    (root / "labels.json").write_text(coco(PICTURES, lambda p: p.name))
    assert absent(root) == []
    table(root / "boxes.csv", [p.name for p in PICTURES])
    (root / "labels.json").unlink()
    assert absent(root) == []


def test_a_file_called_otherwise_is_found_by_the_name_of_another_computer(tmp_path: Path) -> None:
    """Though the others of its folder are called as their images."""
    root = tmp_path / "data"
    labelme_boxes(root, PICTURES)
    path = root / "train/b.json"
    content = json.loads(path.read_text()) | {"imagePath": "C:\\Users\\me\\pictures\\b.png"}
    (root / "train/renamed.json").write_text(json.dumps(content))
    path.unlink()
    assert absent(root) == []
