"""Annotation files and images that are not read: none is left out without a word."""

import shutil

import pytest
from PIL import Image

from misa.data.formats.coco import DataError
from misa.data.formats.coco_file import CocoFile
from misa.data.formats.convert import open_layout
from misa.engine.reports.checkup import check_data
from tests.data.formats.test_convert import one_box, voc, xml

BOX = (1, 1, 10, 10)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(path)


def write(root, form, files):
    """An image and its box in each file, given with the image's path relative to the root."""
    for file, picture in files.items():
        image(root / picture)
        one_box(form, root / file, picture.rpartition("/")[2], BOX)


def listed(root):
    """Names of the images of each split."""
    layout = open_layout(root)
    return tuple(
        sorted(row["file_name"].rpartition("/")[2] for row in CocoFile(split.annotations).images)
        for split in (layout.train, layout.val)
    )


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("coco", {"labels/instances_default.json": "images/0.png", "labels/Validation.json": "images/1.png"}),
        ("coco", {"labels.json": "0.png", "valid/labels.json": "valid/1.png"}),
        ("csv", {"boxes.csv": "0.png", "val.csv": "1.png"}),
        ("csv", {"boxes.csv": "0.png", "val/b.csv": "val/1.png"}),
        ("labelme", {"0": "0.png", "val/1": "val/1.png"}),
        ("labelme", {"images/0": "images/0.png", "images/val/1": "images/val/1.png"}),
        ("voc", {"0": "0.png", "val/0": "val/1.png"}),
    ],
)  # fmt: skip
def test_annotations_beside_those_for_validation_are_for_training(tmp_path, form, files):
    root = tmp_path / "data"
    write(root, form, files)
    if form == "voc":  # each names 0.png inside
        (root / "val" / "1.png").rename(root / "val" / "0.png")
    assert listed(root) == (["0.png"], ["0.png" if form == "voc" else "1.png"])
    assert "not read" not in str(check_data(root))


@pytest.mark.parametrize(
    ("form", "files", "unread"),
    [
        (
            "coco",
            {f"annotations/instances_{name}.json": f"images/{name}.png" for name in ("train", "val", "default")},
            "annotations/instances_default.json",
        ),
        ("csv", {"train.csv": "0.png", "val.csv": "1.png", "more.csv": "2.png"}, "more.csv"),
        ("csv", {"train/b.csv": "train/0.png", "val/b.csv": "val/1.png", "more.csv": "2.png"}, "more.csv"),
        ("labelme", {"train/0": "train/0.png", "val/1": "val/1.png", "2": "2.png"}, "2.json"),
        ("labelme", {"0": "0.png", "1": "1.png", "day2/2": "day2/2.png"}, "day2/2.json"),
        ("voc", {"train/0": "train/0.png", "val/0": "val/0.png", "2": "2.png"}, "2.xml"),
        ("voc", {"0": "0.png", "day2/0": "day2/0.png"}, "day2/0.xml"),
    ],
)
def test_annotations_that_are_not_read_are_named(tmp_path, form, files, unread):
    root = tmp_path / "data"
    write(root, form, files)
    assert f"1 file of annotations is not read, such as {unread}" in str(check_data(root))


def test_lists_and_columns_of_splits_count_beside_a_folder_of_a_split(tmp_path):
    """Beside test/, or test.csv, the rest is not all for training."""
    root = tmp_path / "voc"
    for k in range(4):
        image(root / f"{k}.png")
        (root / f"{k}.xml").write_text(xml(str(k), (64, 64), [("cat", BOX)], suffix="png"))
    image(root / "test" / "9.png")
    (root / "test" / "9.xml").write_text(xml("9", (64, 64), [("cat", BOX)], suffix="png"))
    (root / "train.txt").write_text("0\n1\n2\n")
    (root / "val.txt").write_text("3\n")
    assert listed(root) == (["0.png", "1.png", "2.png"], ["3.png"])
    root = tmp_path / "csv"
    write(root, "csv", {"test.csv": "9.png"})
    rows = [f"{k}.png,1,1,10,10,cat,{'val' if k == 3 else 'train'}" for k in range(4)]
    (root / "boxes.csv").write_text("\n".join(["image,xmin,ymin,xmax,ymax,label,split", *rows]))
    for k in range(4):
        image(root / f"{k}.png")
    assert listed(root) == (["0.png", "1.png", "2.png"], ["3.png"])


def test_what_a_broken_link_is_of_does_not_matter(tmp_path):
    root = tmp_path / "data"
    write(root, "labelme", {"0": "0.png", "1": "1.png"})
    (root / "old").mkdir()
    (root / "old" / "x.json").symlink_to("/nonexistent")
    assert "not read" not in str(check_data(root))


def test_links_to_files_that_are_not_in_a_split_are_not_another_file(tmp_path):
    root = tmp_path / "data"
    for k, split in enumerate(("train", "val")):
        image(root / split / f"{k}.png")
        (root / "all").mkdir(exist_ok=True)
        (root / "all" / f"{k}.xml").write_text(xml(str(k), (64, 64), [("cat", BOX)], suffix="png"))
        (root / split / f"{k}.xml").symlink_to(f"../all/{k}.xml")
    assert "not read" not in str(check_data(root))


def test_a_file_that_is_removed_is_no_longer_named(tmp_path):
    root = tmp_path / "data"
    write(root, "coco", {f"annotations/instances_{name}.json": f"images/{name}.png" for name in ("train", "val")})
    write(root, "coco", {"labels/x.json": "images/train.png"})
    assert "such as labels/x.json" in str(check_data(root))
    (root / "labels" / "x.json").unlink()
    assert "not read" not in str(check_data(root))


def test_of_several_files_without_a_split_none_is_guessed(tmp_path):
    files = {f"annotations/{name}.json": f"images/{name}.png" for name in ("val", "day1", "day2")}
    write(tmp_path / "data", "coco", files)
    with pytest.raises(DataError, match=r"holds several COCO files \(day1\.json, day2\.json\)"):
        open_layout(tmp_path / "data")


def test_images_without_annotations_are_named(tmp_path):
    root = voc(tmp_path / "data")
    assert "no annotations" not in str(check_data(root))
    for name in ("x", "y"):
        shutil.copy(root / "JPEGImages" / "a.jpg", root / "JPEGImages" / f"{name}.jpg")
    image(root / "SegmentationClass" / "a.png")
    assert "2 images have no annotations or no split, such as JPEGImages/x.jpg" in str(check_data(root))
