"""YOLO: text files are matched with images by name, and what is wrong with them is said."""

from pathlib import Path

import numpy as np
import pytest

from misa.data.formats.coco import DataError
from misa.data.formats.convert import read_boxes
from misa.engine.reports.checkup import check_data
from tests.data.formats.test_added_files import LINE, facts, image, text


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def yolo(root: Path, images: list[str], texts: list[str], *, line: str = LINE) -> Path:
    for name in [*images, "val/v.png"]:
        image(root / "images" / name)
    for name in [*texts, "val/v.txt"]:
        text(root / "labels" / name, line)
    text(root / "data.yaml", "train: images/train\nval: images/val\nnames: [cat]\n")
    return root


def test_text_files_in_another_case_are_those_of_the_image(tmp_path: Path) -> None:
    names = ["train/IMG_0.png", "train/IMG_1.png", "train/IMG_2.png", "train/a\u0308.png"]
    root = yolo(tmp_path / "data", names, ["train/IMG_0.txt", "train/img_1.txt", "train/IMG_2.TXT", "train/\u00e4.txt"])
    assert list(facts(root)["train"].values()) == [1, 1, 1, 1]


def test_an_exact_name_comes_before_one_in_another_case(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data", ["train/A.png", "train/a.png"], ["train/a.txt"])
    assert facts(root)["train"] == {"A.png": 0, "a.png": 1}


@pytest.mark.parametrize("above", ["pics", "images"])
def test_a_folder_called_images_above_the_data_does_not_matter(tmp_path: Path, above: str) -> None:
    root = tmp_path / above / "flat"
    for split in ("train", "val"):
        image(root / split / "1.png")
        text(root / split / "1.txt", LINE)
    text(root / "data.yaml", "train: train\nval: val\nnames: [cat]\n")
    assert facts(root) == {"train": {"1.png": 1}, "val": {"1.png": 1}}


def test_text_files_that_come_later_are_read(tmp_path: Path) -> None:
    root = tmp_path / "data"
    image(root / "images/train/1.png")
    image(root / "other/2.png")
    text(root / "other/2.txt", LINE)
    text(root / "labels/old/9.txt", LINE)  # labels/ is there, and its folder of these images is not
    text(root / "data.yaml", "train: images/train\nval: other\nnames: [cat]\n")
    assert facts(root)["train"] == {"1.png": 0}
    text(root / "labels/train/1.txt", LINE)
    assert facts(root)["train"] == {"1.png": 1}


@pytest.mark.parametrize(("corners", "told"), [((4, 4), True), ((4, 5), False)])
def test_polygons_that_may_be_rotated_boxes_are_told(tmp_path: Path, corners: tuple[int, int], told: bool) -> None:
    points = ((0.2, 0.1), (0.5, 0.2), (0.4, 0.6), (0.1, 0.5), (0.12, 0.3))
    lines = [" ".join(["0", *(f"{x + i / 60} {y}" for x, y in points[: corners[i % 2]])]) for i in range(24)]
    root = yolo(tmp_path / "data", ["train/1.png"], ["train/1.txt"], line="\n".join(lines))
    assert ("rotated boxes (OBB)" in str(check_data(root))) == told


def test_text_files_without_an_image_are_counted(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data", ["train/1.png"], ["train/1.txt", "train/9.txt", "train/g.txt", "train/deep/3.txt"])
    (root / "images/train/g.gif").write_bytes(b"GIF89a")
    text(root / "labels/train/classes.txt", "cat\n")
    said = str(check_data(root))
    assert "2 text files of objects have no image" in said
    assert "1 text file of objects has no image" in said, "of a folder without images"
    assert "classes.txt" not in said
    assert check_data(root).reports[0].usable


def test_images_that_a_list_leaves_out_are_images(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data", ["train/1.png", "train/2.png"], ["train/1.txt", "train/2.txt"])
    text(root / "train.txt", "images/train/1.png\n")
    text(root / "data.yaml", "train: train.txt\nval: images/val\nnames: [cat]\n")
    assert "no image" not in str(check_data(root))


@pytest.mark.parametrize(
    ("images", "texts", "words"),
    [
        (["train/0.jpg", "train/0.png"], ["train/0.txt"], ["0.txt", "it may be of", "0.jpg or", "0.png"]),
        (["train/B.png"], ["train/b.txt", "train/b.TXT"], ["B.png", "may both be of it"]),
    ],
)
def test_ambiguous_text_files_are_errors(tmp_path: Path, images: list[str], texts: list[str], words: list[str]) -> None:
    root = yolo(tmp_path / "data", images, texts)
    report = check_data(root)
    assert not report.reports[0].usable
    assert all(word in str(report) for word in words)


def test_boxes_far_beyond_the_image_are_counted(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data", ["train/1.png"], ["train/1.txt"], line="0 0.9 0.5 0.6 0.4\n0 0.5 0.5 1.004 0.5\n")
    assert "reaches beyond the image of 64 x 48 pixels" in str(check_data(root))
    far, near = np.round(read_boxes(root)[str(root / "images/train/1.png")][0], 3).tolist()
    assert far == [38.4, 14.4, 76.8, 33.6]
    assert near == [0, 12, 64, 36], "rounded shares are clipped"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 .5 .5 -.2 .4", "its width is negative: '0 .5 .5 -.2 .4'; give center, width and height."),
        ("0 .5 .5 .2 -.001", "its height is negative: '0 .5 .5 .2 -.001'; give center, width and height."),
        (
            "0 .5 .5 .2 .4 .93",
            "it has a sixth number, as predictions have for their confidence: '0 .5 .5 .2 .4 .93'; remove that number.",
        ),
        ("0 .5 .5 .2", "it is not `class x y w h` or `class x1 y1 x2 y2 ...` but '0 .5 .5 .2'; correct it."),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path: Path, line: str, words: str) -> None:
    root = yolo(tmp_path / "data", ["train/1.png"], ["train/1.txt"])
    text(root / "labels/train/1.txt", line)
    (problem,) = check_data(root).reports[0].fatal
    assert problem.sentence == f"{root / 'labels/train/1.txt'}, line 1: {words}"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_and_text_files_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    root = listed(tmp_path / "data", encoding)
    (root / "labels/train/1.txt").write_bytes(LINE.encode(encoding))
    assert facts(root)["train"] == {"1.png": 1, "ä.png": 0}


def test_a_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    for encoding in ("latin-1", "utf-16-le"):
        with pytest.raises(DataError, match=r"the list .*train\.txt cannot be read \(.*\); save it as UTF-8\.$"):
            facts(listed(tmp_path / encoding, encoding))


def listed(root: Path, encoding: str) -> Path:
    yolo(root, ["train/1.png", "train/ä.png"], ["train/1.txt"])
    (root / "train.txt").write_bytes("images/train/1.png\r\nimages/train/ä.png\r\n".encode(encoding))
    text(root / "data.yaml", "train: train.txt\nval: images/val\nnames: [cat]\n")
    return root


def test_an_impossible_date_is_named_and_matters_in_no_other_file(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data", ["train/1.png"], ["train/1.txt"])
    text(root / "other.yaml", "date: 2021-13-45\n")
    assert facts(root)["train"] == {"1.png": 1}
    text(root / "data.yaml", "date: 2021-13-45\n" + (root / "data.yaml").read_text())
    for given in (root, root / "data.yaml"):
        with pytest.raises(DataError, match=r"data\.yaml cannot be read as yaml \(month must be in 1\.\.12"):
            facts(given)


def test_numbers_of_names_may_be_text(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data", ["train/1.png"], ["train/1.txt"])
    text(root / "data.yaml", 'train: images/train\nval: images/val\nnames: {"0": cat, "1": dog}\n')
    assert read_boxes(root)[str(root / "images/train/1.png")][1] == ["cat"]


@pytest.mark.parametrize("path", ["", "path: C:\\data\\cats\n", "path: ..\\cats\n"])
def test_folders_may_have_windows_separators(tmp_path: Path, path: str) -> None:
    root = yolo(tmp_path / "cats", ["train/1.png"], ["train/1.txt"])
    text(root / "data.yaml", f"{path}train: images\\train\nval: .\\images\\val\nnames: [cat]\n")
    assert facts(root) == {"train": {"1.png": 1}, "val": {"v.png": 1}}
