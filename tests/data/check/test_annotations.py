"""Bad data is reported before training: the file, the id in it, and what to do."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mmcv
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle

from misa.data.check.annotations import Twins, check_coco, require_usable
from misa.data.check.masks import broken_runs
from misa.data.check.report import Report
from misa.data.formats.coco import DataError
from misa.data.images import read_image

Spoil = Callable[..., tuple[Path, Path]]
Data = dict[str, Any]


def message(file: Path, folder: Path, **options: Any) -> str:
    """Returns the message of the error that require_usable raises."""
    with pytest.raises(DataError) as error:
        require_usable(file, folder, **options)
    sentence = str(error.value)
    assert sentence.startswith(str(file)), "names the file"
    assert sentence[-1] in ".?", "is a sentence"
    assert "\n" not in sentence
    return sentence


def wrong(report: Report) -> set[str]:
    """Returns the kinds of problems, except the note on the one crowd in the small data."""
    return {problem.kind for problem in report.problems} - {"crowds"}


@pytest.mark.parametrize(("count", "last"), [(1, "c00 1"), (20, "c19 1"), (21, "c19 1 and 1 more")])
def test_a_report_names_twenty_classes(count: int, last: str) -> None:
    report = Report(Path("a.json"), Path("images"), per_class={f"c{i:02d}": 1 for i in range(count)})
    (line,) = str(report).splitlines()[1:]
    assert line.startswith("classes: c00 1")
    assert line.rpartition(", ")[2].removeprefix("classes: ") == last


def test_good_data_is_counted(spoil: Spoil) -> None:
    report = require_usable(*spoil(), classes=("dog", "cat"))
    assert not wrong(report)
    assert (report.images, report.objects, report.crowds, report.empty_images) == (2, 2, 1, 0)
    assert report.per_class == {"dog": 1, "cat": 1}
    assert report.classes == ("dog", "cat")
    assert "2 images (0 without objects), 2 objects in 2 classes, 1 crowd\nclasses: cat 1, dog 1\n" in str(report)


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco_images_pass(shared: Path, split: str) -> None:
    root = shared / "data" / "coco_mini"
    file = root / "annotations" / f"instances_{split}2017.json"
    report = require_usable(file, root / f"{split}2017", verify_images="open", purpose="eval")
    assert not wrong(report)
    assert (report.images, report.objects, report.crowds) == {"train": (76, 571, 7), "val": (20, 140, 0)}[split]


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([5, 5, 0, 4], "bbox [5, 5, 0, 4] has no area; give it a width and height above 0, or remove it."),
        ([5, 5, -3, 4], "bbox [5, 5, -3, 4] has negative size; give it as [x, y, width, height], not as corners."),
        ([40, 5, 3, 4], "bbox [40, 5, 3, 4] lies outside the image of 40 x 30 pixels; correct or remove it."),
        ([-9, 5, 9, 4], "lies outside the image of 40 x 30 pixels"),
        ([1, 2, 3], "bbox [1, 2, 3] is not four finite numbers; give it as [x, y, width, height]."),
        ([1, 2, 3, math.nan], "is not four finite numbers"),
        ([1, 2, 3, math.inf], "is not four finite numbers"),
        ([1, 2, 3, "4"], "is not four finite numbers"),
        ([1, 2, 3, True], "is not four finite numbers"),
        (None, "bbox null is not four finite numbers"),
        ([1, 2, 3, 10**400], "is not four finite numbers"),
    ],
)
def test_bad_boxes_are_named(spoil: Spoil, box: Any, words: str) -> None:
    files = spoil(lambda data: data["annotations"][0].update(bbox=box))
    sentence = message(*files)
    assert "annotation 11 on image 7: " in sentence
    assert words in sentence


def test_a_box_beyond_the_border_is_clipped_with_a_warning(spoil: Spoil) -> None:
    report = require_usable(*spoil(lambda data: data["annotations"][0].update(bbox=[-5, 3, 60, 10])))
    warning = report.warnings[0]
    assert "annotation 11 on image 7" in warning.sentence
    assert "it is clipped" in warning.sentence
    assert report.objects == 2


def test_a_rounded_box_is_no_matter(spoil: Spoil) -> None:
    assert not wrong(check_coco(*spoil(lambda data: data["annotations"][0].update(bbox=[30, 3, 10.4, 10]))))


def test_a_box_thinner_than_a_pixel_is_left_out_with_a_warning(spoil: Spoil) -> None:
    report = require_usable(*spoil(lambda data: data["annotations"][0].update(bbox=[3, 3, 0.4, 10])))
    assert "thinner than a pixel; it is left out" in report.warnings[0].sentence
    assert report.objects == 1


@pytest.mark.parametrize(("copies", "usable"), [(9_990, False), (20_000, True)])
def test_two_flat_boxes_in_all_of_coco_are_no_reason_to_stop(spoil: Spoil, copies: int, usable: bool) -> None:
    def change(data: Data) -> None:
        data["annotations"] += [{**data["annotations"][0], "id": 100 + i} for i in range(copies)]
        for i in (0, 2):
            data["annotations"][i]["bbox"] = [3, 3, 5.0, 0.0]

    report = check_coco(*spoil(change))
    assert report.usable is usable
    assert report.totals["box-size"] == 2


def test_an_absent_image_is_named(spoil: Spoil) -> None:
    file, folder = spoil()
    (folder / "a.jpg").unlink()
    sentence = message(file, folder, verify_images="exists")
    assert f"image 7: the file {folder / 'a.jpg'} is missing; add it" in sentence


def test_another_suffix_is_suggested(spoil: Spoil) -> None:
    assert message(*spoil(lambda data: data["images"][1].update(file_name="b.jpg"))).endswith("did you mean 'b.png'?")


@pytest.mark.parametrize(
    ("written", "unlisted", "meant"),
    [
        ("img01.png", ["img1.png", "img2.png"], "img1.png"),
        ("img01.png", ["IMG01.PNG", "img02.png"], "IMG01.PNG"),
        ("img-7 (2).png", ["img_7_(2).jpg", "img_7_(3).jpg"], "img_7_(2).jpg"),
        ("fotos/rocket.png", ["fotos/rockt.png", "rocket.txt"], "rockt.png"),
        ("img_0001.png", ["img_0002.png", "img_0001.txt"], ""),  # another number is another image
        ("a.png", ["c.png"], ""),
    ],
)
def test_an_unlisted_image_of_nearly_the_same_name_is_suggested(
    spoil: Spoil, written: str, unlisted: list[str], meant: str
) -> None:
    """Listed images, such as a.jpg, are never suggested."""
    file, folder = spoil(lambda data: data["images"][1].update(file_name=written))
    picture = (folder / "b.png").rename(folder / "elsewhere.png")
    for name in unlisted:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(picture, folder / name)
    assert message(file, folder).endswith(f"did you mean {meant!r}?" if meant else "take image 8 out of the list.")


@pytest.mark.parametrize("name", ["a.jpg", "b.png"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, -2])
def test_a_truncated_image_is_named(spoil: Spoil, name: str, kept: float) -> None:
    file, folder = spoil()
    whole = (folder / name).read_bytes()
    end = int(kept * len(whole)) if kept == 0.5 else int(kept)
    (folder / name).write_bytes(whole[:end])
    sentence = message(file, folder)
    assert f"the file {folder / name} is " in sentence
    assert ("is empty" if kept == 0 else "is truncated or not an image") in sentence
    assert sentence.endswith("copy or download it again.")
    assert check_coco(file, folder, verify_images="exists").usable, "which looks at names only"


def test_a_whole_image_with_bytes_after_its_end_passes(spoil: Spoil) -> None:
    file, folder = spoil()
    for name in ("a.jpg", "b.png"):
        with (folder / name).open("ab") as stream:
            stream.write(b"appended by a camera")
    assert require_usable(file, folder).usable


def test_a_format_that_is_not_read_is_named(spoil: Spoil) -> None:
    file, folder = spoil(lambda data: data["images"][0].update(file_name="a.tga"))
    Image.open(folder / "a.jpg").save(folder / "a.tga")
    sentence = message(file, folder)
    assert "is TGA, which OpenCV does not read here; convert it to PNG or JPEG." in sentence


def test_a_wrong_size_is_named(spoil: Spoil) -> None:
    sentence = message(*spoil(lambda data: data["images"][0].update(width=80)))
    assert "is 40 x 30 pixels, but 80 x 30 are listed; correct width and height" in sentence


def turn(path: Path, orientation: int = 6) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).save(path, exif=exif)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_an_image_turned_by_exif_lists_the_size_that_is_read(spoil: Spoil, name: str) -> None:
    """With the raw size listed, boxes and masks would not align with the rotated pixels that training reads."""

    def listed(width: int, height: int) -> tuple[Path, Path]:
        file, folder = spoil(lambda data: data["images"][0].update(width=width, height=height, file_name=name))
        Image.open(folder / "a.jpg").save(folder / name)
        data = json.loads(file.read_text())
        data["annotations"] = data["annotations"][2:]
        file.write_text(json.dumps(data))
        turn(folder / name)
        return file, folder

    read = mmcv.imread(listed(30, 40)[1] / name).shape[:2]
    assert read == (40, 30)
    assert require_usable(*listed(30, 40)).usable
    sentence = message(*listed(40, 30))
    assert "is read as 30 x 40 pixels, turned by its EXIF orientation, but 40 x 30 are listed" in sentence
    assert sentence.endswith("list the turned size and boxes, or remove the orientation.")


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("name", ["x.webp", "x.png", "x.tif", "x.jpg"])
def test_what_is_told_of_an_orientation_is_what_happens(tmp_path: Path, name: str, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).convert("RGB").save(tmp_path / name)
    plain = mmcv.imread(tmp_path / name, flag="grayscale")
    turn(tmp_path / name, orientation)
    read = mmcv.imread(tmp_path / name, flag="color").mean(2)
    turned = read.shape != plain.shape or np.abs(read - plain).mean() > 30
    said = "is turned by its EXIF orientation" if turned else "by which it is not turned when it is read; save it"
    size = {"width": read.shape[1], "height": read.shape[0]}
    tables = {"images": [{"id": 1, "file_name": name, **size}], "categories": [{"id": 1, "name": "cat"}]}
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
    (tmp_path / "a.json").write_text(json.dumps(tables | {"annotations": [row]}))
    report = check_coco(tmp_path / "a.json", tmp_path, verify_images="open")
    assert report.usable
    assert said in str(report)


def test_listed_sides_of_an_image_that_is_not_turned(spoil: Spoil) -> None:
    file, folder = spoil(lambda data: data["images"][0].update(file_name="a.webp", width=30, height=40))
    Image.open(folder / "a.jpg").save(folder / "a.webp")
    turn(folder / "a.webp")
    assert "it is not turned by its EXIF orientation; save it upright." in message(file, folder)


@pytest.mark.parametrize(("name", "words"), [("x.png", "what is hidden there appears"), ("x.tif", "are darkened")])
def test_what_is_told_of_transparency_is_what_happens(spoil: Spoil, name: str, words: str) -> None:
    file, folder = spoil(lambda data: data["images"][0].update(file_name=name))
    Image.new("RGBA", (40, 30), (200, 100, 50, 128)).save(folder / name)
    assert mmcv.imread(folder / name)[0, 0, 2] == (200 if name == "x.png" else 100)
    assert words in str(check_coco(file, folder, verify_images="open"))


def test_an_orientation_that_swaps_no_sides_and_broken_exif_pass(spoil: Spoil) -> None:
    file, folder = spoil()
    turn(folder / "a.jpg", 3)
    assert require_usable(file, folder).usable
    Image.open(folder / "a.jpg").save(folder / "a.jpg", exif=b"Exif\0\0nothing of the kind")
    assert require_usable(file, folder).usable


def test_images_in_folders_are_found(spoil: Spoil) -> None:
    file, folder = spoil(lambda data: data["images"][0].update(file_name="day/a.jpg"))
    (folder / "day").mkdir()
    (folder / "a.jpg").rename(folder / "day" / "a.jpg")
    assert require_usable(file, folder).usable


def test_class_names_that_do_not_match_are_named(spoil: Spoil) -> None:
    sentence = message(*spoil(), classes=("cat", "dogs"))
    assert "class 'dogs' is expected, but found are cat, dog; did you mean 'dog'?" in sentence
    assert "give the class names of this file" in message(*spoil(), classes=("aeroplane",))


def test_classes_not_asked_for_are_left_out_with_a_warning(spoil: Spoil) -> None:
    report = require_usable(*spoil(), classes=("cat",))
    assert "objects of dog are left out" in report.warnings[0].sentence
    assert (report.objects, report.empty_images) == (1, 1)


def test_an_empty_data_set_is_named(spoil: Spoil) -> None:
    assert "it lists no images" in message(*spoil(lambda data: data.update(images=[], annotations=[])))
    assert "it has no object to learn from" in message(*spoil(lambda data: data.update(annotations=[])))
    assert "it has no object to learn from" in message(
        *spoil(lambda data: data.update(annotations=data["annotations"][1:2]))
    )
    none = spoil(lambda data: data.update(annotations=[]))
    assert "it has no object to score on" in message(*none, purpose="eval")
    assert "it lists no categories" in message(*spoil(lambda data: data.update(categories=[], annotations=[])))


@pytest.mark.parametrize(
    ("table", "row", "change", "words"),
    [
        ("images", 1, {"id": 7}, "image 7: this id is used more than once"),
        ("annotations", 1, {"id": 11}, "annotation 11: this id is used more than once"),
        ("categories", 1, {"id": 1}, "category 1: this id is used more than once"),
        ("categories", 1, {"name": "cat"}, "category 3: the name 'cat' is used more than once"),
        ("categories", 1, {"name": 5}, "category 3: its name is 5, not a text; give the name of the class."),
        ("categories", 1, {"name": None}, "category 3: its name is null, not a text"),
        ("categories", 1, {"name": ""}, "category 3: its name is empty; give the name of the class."),
        ("annotations", 0, {"image_id": 9}, "annotation 11: image_id 9 is not in 'images'"),
        ("annotations", 0, {"image_id": [7]}, "annotation 11: image_id [7] is not in 'images'"),
        ("annotations", 0, {"category_id": 2}, "annotation 11: category_id 2 is not in 'categories'"),
        ("annotations", 0, {"iscrowd": 5}, "annotation 11: iscrowd is 5; give 0 or 1."),
        ("images", 0, {"width": 0}, "image 7: its size is 0 x 30"),
        ("images", 0, {"height": 30.5}, "image 7: its size is 40 x 30.5"),
        ("images", 0, {"file_name": None}, "image 7: file_name is null"),
        ("images", 0, {"id": "7"}, 'image number 1 in the list: its id is "7"; give a whole number'),
        ("annotations", 1, {"id": 2**63}, "its id is 9223372036854775808; give a whole number below 2^63."),
    ],
)
def test_wrong_values_are_named(spoil: Spoil, table: str, row: int, change: Data, words: str) -> None:
    assert words in message(*spoil(lambda data: data[table][row].update(change)))


@pytest.mark.parametrize("row", [{}, {"name": 5}, {"name": ""}, {"name": "cat"}])
def test_annotations_of_a_category_without_a_name_of_its_own_are_no_faults(spoil: Spoil, row: Data) -> None:
    report = check_coco(*spoil(lambda data: data["categories"].__setitem__(1, {"id": 3, **row})))
    assert len(report.fatal) == 1
    assert report.fatal[0].where.endswith("category 3")
    assert (report.classes, report.per_class) == (("cat",), {"cat": 1})


@pytest.mark.parametrize(
    ("table", "key", "place"),
    [
        ("images", "id", "image number 1 in the list"),
        ("images", "file_name", "image 7"),
        ("categories", "name", "category 1"),
        ("annotations", "id", "annotation number 1 in the list"),
        ("annotations", "image_id", "annotation 11"),
        ("annotations", "category_id", "annotation 11"),
        ("annotations", "bbox", "annotation 11"),
    ],
)
def test_missing_keys_are_named(spoil: Spoil, table: str, key: str, place: str) -> None:
    sentence = message(*spoil(lambda data: data[table][0].pop(key)))
    assert f"{place}: it has no '{key}'; add the key" in sentence


@pytest.mark.parametrize("change", [lambda row: row.pop("width"), lambda row: row.update(width=None)])
def test_a_missing_size_is_read_from_the_file_as_for_training(spoil: Spoil, change: Callable[[Data], object]) -> None:
    """Without the file the image is reported as missing."""
    file, folder = spoil(lambda data: change(data["images"][0]))
    assert check_coco(file, folder).usable
    (folder / "a.jpg").unlink()
    assert message(file, folder).endswith(
        f"image 7: the file {folder / 'a.jpg'} is missing; add it, or take image 7 out of the list."
    )
    assert "2 images (1 of them missing, " in str(check_coco(file, folder))
    shutil.rmtree(folder)
    assert f"its image folder {folder} does not exist" in message(file, folder)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_missing_tables_are_named(spoil: Spoil, key: str) -> None:
    assert f"it has no '{key}'" in message(*spoil(lambda data: data.pop(key)))
    assert f"'{key}' is a number, not a list" in message(*spoil(lambda data: data.update({key: 3})))


def test_a_mistyped_table_is_suggested(spoil: Spoil) -> None:
    sentence = message(*spoil(lambda data: data.update(annotation=data.pop("annotations"))))
    assert "it has no 'annotations' but images, categories, annotation; did you mean 'annotation'" in sentence


def test_truncated_json_gives_line_and_column(spoil: Spoil) -> None:
    file, folder = spoil()
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1)[:-40])
    sentence = message(file, folder)
    assert "line " in sentence
    assert "column " in sentence
    assert "the file ends too early; copy or download it again." in sentence


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1, column 1: the file ends too early"),
        (b'{"images": [}', "line 1, column 13: it is not json"),
        (b"[]", "it holds a list, not an object"),
        (b"\xff\xfe\xfa", "it is not json"),
        (b"[" * 100_000, "it is not json"),
        (b"9" * 10_000, "it is not json"),
    ],
)
def test_what_is_not_an_annotation_file_is_named(spoil: Spoil, content: bytes, words: str) -> None:
    file, folder = spoil()
    file.write_bytes(content)
    assert words in message(file, folder)


def test_absent_files_are_named(spoil: Spoil) -> None:
    file, folder = spoil()
    shutil.rmtree(folder)
    assert f"its image folder {folder} does not exist" in message(file, folder)
    file.unlink()
    assert "it cannot be read (No such file or directory)" in message(file, folder)


def test_segmentation_is_not_looked_at_for_training(spoil: Spoil) -> None:
    def change(data: Data) -> None:
        for annotation, junk in zip(data["annotations"], (None, "none", [[1, 2]]), strict=True):
            annotation["segmentation"] = junk

    assert not wrong(check_coco(*spoil(change)))


def test_evaluation_asks_for_what_scoring_needs(spoil: Spoil) -> None:
    sentence = message(*spoil(), purpose="eval")
    assert "annotation 11: it has no 'segmentation', and scoring compares with true masks" in sentence
    assert "only the val split needs masks" in sentence
    assert "this row learns from masks; give every training object one, or" in message(*spoil(), purpose="mask")


SQUARE = [[2, 2, 8, 2, 8, 8.5]]


def masked(change: Data) -> Callable[[Data], None]:
    """Returns a change that gives every object a mask and modifies the first annotation."""

    def spoiled(data: Data) -> None:
        for annotation in data["annotations"]:
            annotation.update(segmentation=SQUARE, area=20, iscrowd=annotation.get("iscrowd", 0))
        data["annotations"][0].update(change)

    return spoiled


def runs(mask: np.ndarray, *, text: bool = True) -> Data:
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    if text:
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}
    flat = mask.astype(int).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    return {"size": encoded["size"], "counts": np.diff([0, *edges, flat.size]).tolist()}


MASK = np.random.default_rng(0).random((30, 40)) < 0.3


@pytest.mark.parametrize("purpose", ["mask", "eval"])
@pytest.mark.parametrize("mask", [SQUARE, SQUARE * 2, runs(MASK), runs(MASK, text=False), runs(0 * MASK)])
def test_masks_that_decode_pass(spoil: Spoil, purpose: Literal["mask", "eval"], mask: Any) -> None:
    assert not wrong(check_coco(*spoil(masked({"segmentation": mask})), purpose=purpose))


@pytest.mark.parametrize("purpose", ["mask", "eval"])
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([], "is empty"),
        ([[1, 2, 3, 4]], "has a polygon that is not 3 or more corners x, y"),
        ([*SQUARE, [1, 2, 3, 4, 5, 6, 7]], "has a polygon"),
        ([[1, 2, 3, 4, 5, math.nan]], "has a polygon"),
        ([[1, 2, 3, 4, 5, "6"]], "has a polygon"),
        ([[1, 2, 3, 4, 5, [6]]], "has a polygon"),
        ([[1, 2, 3, 4, 5, 1e12]], "has a polygon"),
        ([[1, 2, 3, 4, 5, 10**400]], "has a polygon"),
        (SQUARE[0], "has a polygon"),
        (None, "is empty"),
        ("circle", "is neither"),
        ({}, "is empty"),
        ({"counts": [1200]}, "is of size None (h, w), the image of [30, 40]"),
        (runs(MASK.T), "is of size [40, 30] (h, w), the image of [30, 40]"),
        ({"size": [30, 40], "counts": [1000, 100]}, "has counts that do not add up to the image"),
        ({"size": [30, 40], "counts": [1300, -100]}, "has counts that are not run lengths"),
        ({"size": [30, 40], "counts": ""}, "is empty"),
        ([[]], "is empty"),
        ({"size": [30, 40], "counts": runs(MASK)["counts"][:-5]}, "has counts that cannot be decoded"),
        ({"size": [30, 40], "counts": "not a mask"}, "has counts that cannot be decoded"),
        ({"size": [30, 40], "counts": "\ud800é"}, "has counts that cannot be decoded"),
    ],
)
def test_masks_that_do_not_decode_are_named(
    spoil: Spoil, purpose: Literal["mask", "eval"], mask: Any, words: str
) -> None:
    files = spoil(masked({"segmentation": mask}))
    sentence = message(*files, purpose=purpose)
    assert f"annotation 11: segmentation {words}" in sentence
    assert sentence.endswith("draw or encode it again.")
    assert check_coco(*files).usable, "boxes are enough to train on"


def test_masks_of_classes_that_are_left_out_are_not_asked_for(spoil: Spoil) -> None:
    files = spoil(masked({"segmentation": None}))
    assert check_coco(*files, classes=["dog"], purpose="eval").usable


def decoded(text: str) -> list[int] | None:
    """Decode an RLE as pycocotools' C code does, one character at a time; None where that would read garbage."""
    found: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        if shift > 35:
            return None
        found.append(value + (found[-2] if len(found) > 2 else 0))
        value = shift = 0
    return found if shift == 0 and min(found) >= 0 else None


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_run_lengths_are_judged_as_by_a_reader_of_one_character_at_a_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts, pixels = [], []
    for _ in range(20):
        h, w = rng.integers(1, 40, 2)
        text = list(runs(rng.random((h, w)) < rng.random())["counts"])
        if rng.random() < 0.6:
            for _ in range(rng.integers(1, 3)):
                text[rng.integers(len(text))] = chr(rng.integers(40, 120))
        texts.append("".join(text))
        pixels.append(int(h * w))
    expected = [(found := decoded(text)) is None or sum(found) != n for text, n in zip(texts, pixels, strict=True)]
    assert broken_runs(texts, pixels).tolist() == expected


def test_no_run_lengths_at_all_are_none_broken() -> None:
    assert broken_runs([], []).tolist() == []


def test_images_too_thin_for_the_resizing_are_named(spoil: Spoil) -> None:
    files = spoil(lambda data: data["images"][0].update(width=900, height=3))
    thin = check_coco(*files, verify_images="exists", long_side=192)
    assert "image 7: its 900 x 3 pixels are less than one across when the long side is shrunk to 192" in str(thin)
    assert "image-thin" in {problem.kind for problem in thin.fatal}
    assert "image-thin" not in check_coco(*files, verify_images="exists", long_side=300).totals
    assert "image-thin" not in check_coco(*files, verify_images="exists").totals


def test_the_others_are_counted_and_listed(spoil: Spoil) -> None:
    def change(data: Data) -> None:
        data["annotations"] += [{**data["annotations"][0], "id": 100 + i, "category_id": 9} for i in range(70)]
        data["annotations"][0]["bbox"] = [1, 1, -1, 1]

    files = spoil(change)
    assert "(70 more; `misa check` lists them)" in message(*files)
    text = str(check_coco(*files))
    assert text.count("error: ") == 51
    assert "... and 20 more of unknown-category" in text


def test_wrong_arguments_are_named(spoil: Spoil) -> None:
    files = spoil()
    with pytest.raises(ValueError, match="verify_images must be 'exists' or 'open'"):
        check_coco(*files, verify_images="decode")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="purpose must be 'train', 'mask', 'eval', 'boxes' or 'score'"):
        check_coco(*files, purpose="test")  # type: ignore[arg-type]


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**30, 1e308, -0.0]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the path of every node in a JSON value except the root."""
    steps = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    return [place for key, inner in steps for place in [(*path, key), *places(inner, (*path, key))]]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random=st.data())
def test_no_mutation_escapes(spoil: Spoil, random: st.DataObject) -> None:
    file, folder = spoil()
    data = json.loads(file.read_text())
    for _ in range(random.draw(st.integers(1, 3))):
        *way, key = random.draw(st.sampled_from(places(data) or [("images",)]))
        node: Any = data
        for step in way:
            node = node[step]
        if isinstance(node, dict | list) and random.draw(st.booleans()) and len(node) > 0:
            del node[key]
        else:
            node[key] = random.draw(JUNK)
    text = json.dumps(data)
    if random.draw(st.integers(0, 4)) == 0:
        text = text[: random.draw(st.integers(0, len(text)))]
    file.write_text(text)
    report = check_coco(
        file, folder, verify_images="open", purpose=random.draw(st.sampled_from(["train", "mask", "eval", "boxes"]))
    )
    assert isinstance(report, Report)
    assert str(report)
    with contextlib.suppress(DataError):
        assert require_usable(file, folder).usable


def grey(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0])


ODD: dict[str, tuple[Callable[[np.ndarray], Image.Image], str, str]] = {
    "grey": (grey, "x.png", "note: {}, image 7: the file {} is gray"),
    "grey jpeg": (grey, "x.jpg", "note: {}, image 7: the file {} is gray"),
    "alpha": (
        lambda p: Image.fromarray(p).convert("RGBA"),
        "x.png",
        "warning: {}, image 7: the file {} has transparency",
    ),
    "palette with alpha": (
        lambda p: Image.fromarray(p).convert("RGBA").quantize(8),
        "x.png",
        "warning: {}, image 7: the file {} has transparency",
    ),
    "16 bits": (
        lambda p: Image.fromarray(p[..., 0].astype(np.uint16) * 200),
        "x.png",
        "warning: {}, image 7: the file {} has 16 bits a channel",
    ),
    "CMYK": (lambda p: Image.fromarray(p).convert("CMYK"), "x.jpg", "warning: {}, image 7: the file {} is CMYK"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_kinds_of_files_are_told_and_usable(spoil: Spoil, kind: str) -> None:
    make, name, words = ODD[kind]
    file, folder = spoil(lambda data: data["images"][0].update(file_name=name))
    make(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / name)
    report = check_coco(file, folder, verify_images="open")
    assert report.usable
    assert words.format(file, folder / name) in str(report)
    assert mmcv.imread(folder / name).shape == (30, 40, 3), "and it is read"


def test_16_bits_in_color_are_told(spoil: Spoil) -> None:
    import cv2

    file, folder = spoil(lambda data: data["images"][0].update(file_name="x.png"))
    cv2.imwrite(str(folder / "x.png"), np.full((30, 40, 3), 4000, np.uint16))
    assert "has 16 bits a channel" in str(check_coco(file, folder, verify_images="open"))


def test_pages_that_are_not_read_are_told(spoil: Spoil) -> None:
    file, folder = spoil(lambda data: data["images"][0].update(file_name="x.tif"))
    pages = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    pages[0].save(folder / "x.tif")
    assert "image-pages" not in check_coco(file, folder, verify_images="open").totals
    pages[0].save(folder / "x.tif", save_all=True, append_images=pages[1:])
    said: list[str] = []
    assert read_image(folder / "x.tif", say=said.append)[0, 0].tolist() == [255, 0, 0]
    words = f"the file {folder / 'x.tif'} has 2 pages, of which the first is read; save each page"
    assert said[0].startswith(words)
    report = require_usable(file, folder)
    assert f"warning: {file}, image 7: {words}" in str(report)


@pytest.mark.parametrize(
    ("dtype", "options", "form"),
    [
        (np.uint8, {"compression": "zstd"}, "pixels RGB, compression zstd"),
        (np.uint8, {"compression": "lzma"}, "pixels RGB, compression lzma"),
        (np.float32, {}, "pixels F, compression raw"),
        (np.int32, {}, "pixels I, compression raw"),
    ],
)
def test_a_tiff_that_training_does_not_read_is_told(
    spoil: Spoil, capfd: pytest.CaptureFixture[str], dtype: Any, options: Data, form: str
) -> None:
    file, folder = spoil(lambda data: data["images"][0].update(file_name="x.tif"))
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels if dtype == np.uint8 else pixels[..., 0].astype(dtype))
    image.save(folder / "x.tif", **options)
    capfd.readouterr()
    report = check_coco(file, folder, verify_images="open")
    (problem,) = report.fatal
    sentence = f"is TIFF ({form}), which OpenCV does not read here; convert it to 8-bit PNG or JPEG."
    assert problem.sentence.endswith(sentence)
    assert "16 bits" not in str(report)
    assert capfd.readouterr() == ("", ""), "no words of OpenCV's"
    with pytest.raises(DataError, match="convert it to 8-bit PNG or JPEG"):
        read_image(folder / "x.tif")


def test_a_name_in_two_unicode_forms_is_told(spoil: Spoil) -> None:
    def change(data: Data) -> None:
        data["categories"] += [{"id": 8, "name": "Caf\u00e9"}, {"id": 9, "name": "Cafe\u0301"}]

    assert "differs from 'Caf\u00e9' in case, spaces or Unicode form only" in str(check_coco(*spoil(change)))


def test_what_is_given_twice_is_told(spoil: Spoil) -> None:
    def change(data: Data) -> None:
        data["images"].append({**data["images"][0], "id": 70})
        data["annotations"].append({**data["annotations"][0], "id": 70})
        data["categories"].append({"id": 9, "name": "Cat "})

    file, folder = spoil(change)
    Image.open(folder / "b.png").save(folder / "c.png")
    text = str(check_coco(file, folder, verify_images="open"))
    assert "warning: " in text
    assert "image 70: a.jpg is listed before, as image 7" in text
    assert "annotation 70 on image 7: another cat of this image has the same box" in text
    assert "category 9: the class 'Cat ' differs from 'cat' in case, spaces or Unicode form only" in text
    assert "note: " in text
    assert "has 1 image not listed in the annotations" in text
    assert "image 70: a.jpg has no object" in text


def test_equal_files_are_told_across_splits(spoil: Spoil) -> None:
    file, folder = spoil(lambda data: data["images"][1].update(file_name="copy.jpg", width=40, height=30))
    shutil.copy(folder / "a.jpg", folder / "copy.jpg")
    twins: Twins = {}
    report = check_coco(file, folder, verify_images="open", twins=twins)
    assert report.totals["image-duplicate"] == 1
    assert f"copy.jpg has the same content as {folder / 'a.jpg'}" in str(report)
    assert "image-duplicate" not in check_coco(file, folder, verify_images="open").totals, "only where asked for"
    other = shutil.copytree(folder, folder.parent / "val")
    totals = check_coco(file, other, verify_images="open", twins=twins).totals
    assert (totals["image-shared"], totals["image-duplicate"]) == (1, 1), "a.jpg by its name, and its copy"
    with (other / "a.jpg").open("r+b") as stream:  # equal ends alone are not equal files
        stream.seek(100)
        stream.write(b"\0\1\2")
    assert check_coco(file, other, twins=twins, verify_images="open").totals["image-duplicate"] == 1


def test_some_images_are_kept_to_look_at(spoil: Spoil) -> None:
    file, folder = spoil()
    samples = {sample.path.name: sample for sample in check_coco(file, folder, samples=16).samples}
    assert set(samples) == {"a.jpg", "b.png"}
    assert samples["a.jpg"].boxes == [[2.0, 3.0, 12.0, 15.5]], "the crowd is not drawn"
    assert samples["b.png"].labels == ["dog"]
    assert len(check_coco(file, folder, samples=1).samples) == 1
    assert check_coco(file, folder).samples == ()


@pytest.mark.parametrize(
    ("mask", "there"), [([], False), (None, False), ([[]], False), ({}, False), ([[2, 2, 8, 2, 8, 8.5]], True)]
)
def test_an_empty_segmentation_is_no_mask(spoil: Spoil, mask: object, there: bool) -> None:
    def change(data: Data) -> None:
        for annotation in data["annotations"]:
            annotation["segmentation"] = mask

    file, folder = spoil(change)
    assert check_coco(file, folder).masks == there
    assert not wrong(check_coco(file, folder, purpose="boxes"))


def test_an_object_thinner_than_a_pixel_is_scored_by_its_mask(spoil: Spoil) -> None:
    """As pycocotools does: it is not left out, and the warning does not say so."""

    def thin(data: Any) -> None:
        for annotation in data["annotations"]:
            annotation.update(segmentation=SQUARE, area=20, iscrowd=annotation.get("iscrowd", 0))
        data["annotations"][0].update(bbox=[3, 3, 0.4, 10])

    report = require_usable(*spoil(thin), purpose="eval")
    assert "thinner than a pixel; it is scored by its mask" in report.warnings[0].sentence
    assert report.objects == 1 + require_usable(*spoil(thin), purpose="boxes").objects
