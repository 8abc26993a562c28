"""Finding a data set: errors name what is missing and what was found instead."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from misa.data.formats.coco import DataError, find_layout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    for name in ("annotations", "train2017", "val2017"):
        (root / name).mkdir(parents=True)
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text("{}")
    return root


def message(root: Path) -> str:
    with pytest.raises(DataError) as error:
        find_layout(root)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_usual_layout_is_found(root: Path) -> None:
    layout = find_layout(root)
    assert layout.root == root
    assert layout.train == (root / "annotations/instances_train2017.json", root / "train2017")
    assert layout.val == (root / "annotations/instances_val2017.json", root / "val2017")


def test_images_may_lie_one_folder_deeper(root: Path) -> None:
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images" / "train2017")
    assert find_layout(str(root)).train.images == root / "images" / "train2017"


def test_the_reference_data_is_found(shared: Path) -> None:
    assert find_layout(shared / "data" / "coco_mini").val.images.name == "val2017"


def test_a_wrong_root_is_named_with_the_right_one(root: Path) -> None:
    sentence = message(root.parent / "COCO2")
    assert sentence == f"there is no folder {root.parent / 'COCO2'}; did you mean 'coco'?"
    assert "mine; give the folder or file of your annotations (docs/data.md" in message(
        root.parent / "pictures" / "mine"
    )


def test_a_file_as_root_is_named(root: Path) -> None:
    assert "is a file, but not of annotations that can be read; give the folder" in message(
        root / "annotations" / "instances_val2017.json"
    )


@pytest.mark.parametrize("place", ["..", "annotations"])
def test_a_folder_one_level_off_is_noticed(root: Path, place: str) -> None:
    assert message((root / place).resolve()).endswith(f"did you mean {str(root)!r}?")


def test_a_missing_annotation_file_is_named(root: Path) -> None:
    file = root / "annotations/instances_val2017.json"
    file.rename(file.with_name("instances_valid2017.json"))
    sentence = message(root)
    assert f"the val annotation file {file} is missing" in sentence
    assert "holds instances_train2017.json, instances_valid2017.json" in sentence
    assert sentence.endswith("did you mean 'instances_valid2017.json'? Rename or link it to this name.")


def test_the_cure_is_one_that_the_command_line_has(root: Path) -> None:
    file = root / "annotations/instances_train2017.json"
    file.rename(file.with_name("cells.json"))
    (root / "annotations/instances_val2017.json").rename(root / "annotations/x.json")
    assert message(root).endswith("holds cells.json, x.json; rename or link the right one to this name.")
    (root / "annotations/x.json").rename(root / "annotations/instances_val2017.json")
    assert "did you mean" not in message(root), "the other split's file is not meant"
    shutil.rmtree(root / "annotations")
    assert message(root).endswith("give the folder or file of your annotations (docs/data.md shows every format).")


def test_validation_alone_needs_no_training_split(root: Path) -> None:
    shutil.rmtree(root / "train2017")
    (root / "annotations/instances_train2017.json").unlink()
    layout = find_layout(root, need_train=False)
    assert layout.val.images == root / "val2017"
    assert layout.train == (root / "annotations/instances_train2017.json", root / "train2017")
    with pytest.raises(DataError, match="did you mean"):
        find_layout(root / "annotations", need_train=False)


def test_a_missing_image_folder_is_named(root: Path) -> None:
    (root / "train2017").rename(root / "Train2017")
    sentence = message(root)
    assert f"the train image folder {root / 'train2017'} is missing" in sentence
    assert sentence.endswith("did you mean 'Train2017'? Rename or link it to this name.")
    (root / "Train2017").rename(root / "x")
    for name in ("x", "val2017"):  # the other split's folder must not be suggested
        shutil.rmtree(root / name)
    assert message(root).endswith("put the images there, or rename or link their folder to it.")


def test_an_empty_root_says_so(tmp_path: Path) -> None:
    assert f"{tmp_path} holds nothing; give the folder or file of your annotations (docs" in message(tmp_path)


@pytest.mark.parametrize(
    ("files", "holds", "needs"),
    [
        ({"jpg": 12}, "12 jpg files", "add the boxes, such as a csv beside the images"),
        ({"jpg": 12, "txt": 1}, "12 jpg files, 1 txt file", "add the boxes, such as a csv"),
        ({"png": 3, "txt": 3}, "3 png files, 3 txt files", "YOLO needs a data.yaml"),
        ({"png": 3, "json": 2}, "3 png files, 2 json files", "a json must be COCO's"),
        ({"a": 5, "b": 4, "c": 3, "d": 2}, "5 a files, 4 b files, 3 c files and others", "give the folder or file"),
    ],
)
def test_a_folder_without_annotations_is_described_by_what_it_holds_and_lacks(tmp_path, files, holds, needs) -> None:
    for suffix, count in files.items():
        for i in range(count):
            (tmp_path / "deep" / suffix / f"{i}.{suffix}").parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "deep" / suffix / f"{i}.{suffix}").touch()
    (tmp_path / "demo-0123abcd").mkdir()
    (tmp_path / "demo-0123abcd" / "drawn.png").touch()
    sentence = message(tmp_path)
    assert sentence.startswith(f"{tmp_path} holds {holds} and no annotations; {needs}")
    assert sentence.endswith("(docs/data.md shows every format).")


def test_the_layout_needs_the_standard_library_only() -> None:
    code = "import sys, misa.data.formats.coco; assert not {'numpy', 'torch', 'cv2', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
