"""Images that several splits name: each split has them with their objects once, and one warning counts them."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from misa.data.formats.coco import DataError
from misa.data.formats.convert import open_layout, read_boxes
from misa.data.formats.plain_coco import convert
from misa.engine.labelling.annotations import open_labels
from misa.engine.reports.checkup import check_data
from tests.data.formats.test_round_trip import read, thing, wanted
from tests.data.formats.writers import Picture, coco, draw, labelme_boxes, published, roboflow, voc, yolo_detect

PICTURES = [
    Picture(f"{name}.png", "train", (60, 50), [
        thing("cat", [8, 6, 40, 6, 40, 30, 8, 30]), thing("dog", [10, 20 + i, 50, 25, 30, 45])
    ])
    for i, name in enumerate("abcd")
]  # fmt: skip
Splits = dict[str, list[Picture]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def one_yolo_folder(root: Path) -> Splits:
    """The form of Ultralytics' coco128.yaml."""
    yolo_detect(root, PICTURES)
    (root / "data.yaml").write_text("train: images/train\nval: images/train\ntest: images/train\nnames: [cat, dog]\n")
    return {"train": PICTURES, "val": PICTURES, "test": PICTURES}


def yolo_lists(root: Path) -> Splits:
    """The training list names one image twice."""
    yolo_detect(root, PICTURES)
    for split, names in (("train", "abcdb"), ("val", "bd")):
        (root / f"{split}.txt").write_text("".join(f"images/train/{name}.png\n" for name in names))
    (root / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: [cat, dog]\n")
    return {"train": PICTURES, "val": [PICTURES[1], PICTURES[3]]}


def yolo_train_and_test(root: Path) -> Splits:
    """Folders of which one is in the other, and test serves as val."""
    yolo_detect(root, PICTURES)
    (root / "data.yaml").write_text("train: [images, images/train]\ntest: images/train\nnames: [cat, dog]\n")
    return {"train": PICTURES, "val": PICTURES}


def _rows(pictures: list[Picture]) -> list[list[object]]:
    return [[p.name, x, y, w, h, t.label] for p in pictures for t in p.things for x, y, w, h in [t.box]]


def _csv(path: Path, rows: list[list[object]], *more: str) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["image", "x", "y", "box_width", "box_height", "label", *more], *rows])


def equal_csv_files(root: Path) -> Splits:
    for picture in PICTURES:
        draw(picture, root / picture.name)
    for split in ("train", "val"):
        _csv(root / f"{split}.csv", _rows(PICTURES))
    return {"train": PICTURES, "val": PICTURES}


def csv_files_of_different_boxes(root: Path) -> Splits:
    """Each file's objects are for its split: val.csv has one object of each of two images."""
    for picture in PICTURES:
        draw(picture, root / picture.name)
    few = [picture._replace(things=picture.things[:1]) for picture in PICTURES[:2]]
    _csv(root / "train.csv", _rows(PICTURES))
    _csv(root / "val.csv", _rows(few))
    return {"train": PICTURES, "val": few}


def csv_column(root: Path) -> Splits:
    for picture in PICTURES:
        draw(picture, root / picture.name)
    rows = [[*row, "train"] for row in _rows(PICTURES)] + [[*row, "val"] for row in _rows(PICTURES[:1])]
    _csv(root / "boxes.csv", rows, "split")
    return {"train": PICTURES, "val": PICTURES[:1]}


def voc_lists(root: Path) -> Splits:
    voc(root, PICTURES)
    for split, names in (("train", "abcd"), ("val", "ad"), ("test", "c")):
        (root / f"VOCdevkit/VOC2007/ImageSets/Main/{split}.txt").write_text("\n".join(names))
    return {"train": PICTURES, "val": [PICTURES[0], PICTURES[3]], "test": [PICTURES[2]]}


def voc_folders(root: Path) -> Splits:
    voc(root, PICTURES)
    kit = root / "VOCdevkit/VOC2007"
    for split, names in (("train", "abcd"), ("val", "a")):
        (kit / f"Annotations/{split}").mkdir()
        (kit / f"ImageSets/Main/{split}.txt").unlink()
        for name in names:
            (kit / f"Annotations/{split}/{name}.xml").write_bytes((kit / f"Annotations/{name}.xml").read_bytes())
    (kit / "ImageSets/Main/test.txt").unlink()
    for name in "abcd":
        (kit / f"Annotations/{name}.xml").unlink()
    return {"train": PICTURES, "val": PICTURES[:1]}


def labelme_folders(root: Path) -> Splits:
    labelme_boxes(root, PICTURES)
    (root / "train").rename(root / "images")
    for split, names in (("train", "abcd"), ("val", "bc")):
        (root / f"annotations/{split}").mkdir(parents=True)
        for name in names:
            (root / f"annotations/{split}/{name}.json").write_bytes((root / f"images/{name}.json").read_bytes())
    for name in "abcd":
        (root / f"images/{name}.json").unlink()
    return {"train": PICTURES, "val": PICTURES[1:3]}


def two_coco_files(root: Path) -> Splits:
    (root / "annotations").mkdir(parents=True)
    for picture in PICTURES:
        draw(picture, root / "images" / picture.name)
    for split, some in (("train", PICTURES[:3]), ("val", PICTURES[1:])):
        (root / f"annotations/instances_{split}.json").write_text(coco(some, lambda p: p.name))
    return {"train": PICTURES[:3], "val": PICTURES[1:]}


def one_coco_file_with_lists(root: Path) -> Splits:
    for picture in PICTURES:
        draw(picture, root / "images" / picture.name)
    (root / "labels.json").write_text(coco(PICTURES, lambda p: p.name))
    (root / "train.txt").write_text("a\nb\nc\nd\n")
    (root / "val.txt").write_text("c\nd\n")
    return {"train": PICTURES, "val": PICTURES[2:]}


def linked_coco_folders(root: Path) -> Splits:
    published(root, PICTURES)
    (root / "val2017").symlink_to("train2017")
    (root / "annotations/instances_val2017.json").write_text(coco(PICTURES[:3], lambda p: p.name))
    return {"train": PICTURES, "val": PICTURES[:3]}


FORMS = [
    *(one_yolo_folder, yolo_lists, yolo_train_and_test, equal_csv_files, csv_files_of_different_boxes, csv_column),
    *(voc_lists, voc_folders, labelme_folders, two_coco_files, one_coco_file_with_lists, linked_coco_folders),
]


@pytest.mark.parametrize("form", FORMS)
def test_each_split_has_its_images_with_their_objects_once(
    form: Callable[[Path], Splits], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, coco_root = tmp_path / "data", tmp_path / "coco"
    expected = {split: wanted(pictures) for split, pictures in form(root).items()}
    both, count = len(expected["train"].keys() & expected["val"]), len(expected["val"])
    warning = f"{both} of the {count} validation images are also training images"
    warning = "1 of the 1 validation image is also a training image" if count == 1 else warning
    warning += ": scores on them are not of held-out images"

    report = str(check_data(root))
    before = capsys.readouterr().out
    assert report.count(warning) == 1
    assert "split is given" not in before
    assert "not of held-out" not in before
    assert "same box" not in report
    assert "same content" not in report

    written = convert(root, coco_root)
    layout = open_layout(root)
    assert capsys.readouterr().out.count(f"data: {warning}\n") == 1
    assert {"train": read(*layout.train), "val": read(*layout.val)} == {s: expected[s] for s in ("train", "val")}
    files = {split: coco_root / f"annotations/instances_{split}2017.json" for split in expected}
    assert {s: read(file, coco_root / f"{s}2017") for s, file in files.items()} == expected
    report = str(check_data(coco_root))  # its images are links in the folder of each split
    assert report.count(warning) == 1
    assert report.count("same content") == 1, "as an example"
    assert {s.split: s.objects for s in written} == {
        split: sum(len(things) for _, things in pictures.values()) for split, pictures in expected.items()
    }
    for file in files.values():
        ids = [row["id"] for row in json.loads(file.read_text())["annotations"]]
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("form", FORMS)
def test_each_object_is_labelled_and_given_as_a_box_once(form: Callable[[Path], Splits], tmp_path: Path) -> None:
    expected = {split: wanted(pictures) for split, pictures in form(tmp_path / "data").items()}
    files = open_labels(tmp_path / "data", tmp_path / "masks.json")
    train, val = (
        {(name, *map(str, o)) for name, (_, own) in expected[s].items() for o in own} for s in ("train", "val")
    )
    several = form in (two_coco_files, linked_coco_folders)  # annotation files of their own
    counts = [len(train), len(val)] if several else [len(train | val)]
    assert [len(labels.content["annotations"]) for labels in files] == counts
    assert [sum(len(target.rows) for target in labels.targets) for labels in files] == counts
    boxes = read_boxes(tmp_path / "data" / ("data.yaml" if "yolo" in form.__name__ else ""))
    assert sum(len(labels) for _, labels in boxes.values()) == len(train | val)


def test_equal_objects_within_a_split_remain_apart(tmp_path: Path) -> None:
    """They are reported by the check, not merged."""
    draw(PICTURES[0], tmp_path / "data/a.png")
    rows = _rows(PICTURES[:1])
    _csv(tmp_path / "data/train.csv", [*rows, rows[0]])
    _csv(tmp_path / "data/val.csv", rows)
    layout = open_layout(tmp_path / "data")
    found = [json.loads(place.annotations.read_text())["annotations"] for place in (layout.train, layout.val)]
    assert [len(own) for own in found] == [3, 2]
    assert len({row["id"] for own in found for row in own}) == 3


def csv_folders(root: Path) -> Splits:
    for split, some in (("train", PICTURES[:2]), ("val", PICTURES[2:])):
        for picture in some:
            draw(picture, root / split / picture.name)
        _csv(root / split / "boxes.csv", _rows(some))
    return {"train": PICTURES[:2], "val": PICTURES[2:]}


def roboflow_folders(root: Path) -> Splits:
    roboflow(root, [*PICTURES[:2], *(picture._replace(split="val") for picture in PICTURES[2:])])
    return {"train": PICTURES[:2], "val": PICTURES[2:]}


@pytest.mark.parametrize(
    ("form", "first", "second", "split"),
    [
        (equal_csv_files, "val.csv", "valid.csv", "val"),
        (csv_folders, "dev", "val", "val"),
        (csv_folders, "train", "training", "train"),
        (labelme_folders, "annotations/val", "annotations/validation", "val"),
        (roboflow_folders, "val", "valid", "val"),
    ],
)
def test_two_names_of_one_split_are_refused(
    form: Callable[[Path], Splits], first: str, second: str, split: str, tmp_path: Path
) -> None:
    """The boxes of an image in both would be added up."""
    form(tmp_path)
    there, other = (first, second) if (tmp_path / first).exists() else (second, first)
    copied = shutil.copytree if (tmp_path / there).is_dir() else shutil.copy
    copied(tmp_path / there, tmp_path / other)
    message = f"{tmp_path} holds {first} and {second}, both the {split} split by name; keep one of the two."
    for reader in (open_layout, read_boxes):
        with pytest.raises(DataError) as error:
            reader(tmp_path)
        assert str(error.value) == message


def test_two_folders_of_voc_annotations_of_one_split_are_refused(tmp_path: Path) -> None:
    voc_folders(tmp_path)
    kit = tmp_path / "VOCdevkit/VOC2007"
    (kit / "Annotations/valid").mkdir()
    assert len(read(*open_layout(tmp_path).val)) == 1, "a folder without annotations is no split"
    shutil.copy(kit / "Annotations/train/b.xml", kit / "Annotations/valid")
    for given in (tmp_path, kit, kit / "Annotations"):
        with pytest.raises(DataError) as error:
            open_layout(given)
        assert str(error.value) == (
            f"{kit} holds Annotations/val and Annotations/valid, both the val split by name; keep one of the two."
        )


def test_two_keys_of_one_split_in_a_yolo_file_are_refused(tmp_path: Path) -> None:
    yolo_detect(tmp_path, PICTURES)
    sheet = tmp_path / "data.yaml"
    text = "train: images/train\nval: images/train\nnames: [cat, dog]\n"
    sheet.write_text(text + "valid:\n")
    assert open_layout(tmp_path).val is not None, "an empty key is no split"
    sheet.write_text(text + "valid: images\n")
    with pytest.raises(DataError) as error:
        open_layout(tmp_path)
    assert str(error.value) == f"{sheet} holds val and valid, both the val split by name; keep one of the two."


def test_an_image_has_its_boxes_in_one_csv_of_a_split(tmp_path: Path) -> None:
    csv_folders(tmp_path)
    (tmp_path / "val/boxes.csv").rename(tmp_path / "val/both.csv")
    _csv(tmp_path / "val/c.csv", _rows(PICTURES[2:3]))
    _csv(tmp_path / "val/d.csv", _rows(PICTURES[3:]))
    with pytest.raises(DataError, match=r"both\.csv and .*c\.csv both have boxes of val/c\.png; use one file"):
        open_layout(tmp_path)
    (tmp_path / "val/both.csv").unlink()
    assert read(*open_layout(tmp_path).val).keys() == {"c.png", "d.png"}


def test_only_copies_of_the_same_name_are_counted(tmp_path: Path) -> None:
    """A copy of another name is reported with both names, and another image of the same name is none."""
    others = [PICTURES[0], PICTURES[1]._replace(name="e.png"), PICTURES[2]]
    published(tmp_path, [*PICTURES, *(picture._replace(split="val") for picture in others)])
    shutil.copy(tmp_path / "train2017/b.png", tmp_path / "val2017/e.png")
    draw(PICTURES[2]._replace(things=PICTURES[3].things), tmp_path / "val2017/c.png")
    report = check_data(tmp_path).reports[1]
    assert [problem.message for problem in report.problems] == [
        f"the file {tmp_path}/val2017/e.png has the same content as {tmp_path}/train2017/b.png",
        "1 of the 3 validation images is also a training image: scores on them are not of held-out images",
    ]
