"""Bad data is named before any long work: the file, the id in it, and the cure."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from misa.data.check import Report, check_coco, require_usable
from misa.data.layout import DataError

Spoil = Callable[..., tuple[Path, Path]]
Data = dict[str, Any]


def told(file: Path, folder: Path, **options: Any) -> str:
    """The sentence that require_usable stops with."""
    with pytest.raises(DataError) as error:
        require_usable(file, folder, **options)
    sentence = str(error.value)
    assert sentence.startswith(str(file)), "names the file"
    assert sentence[-1] in ".?", "is a sentence"
    assert "\n" not in sentence
    return sentence


def test_good_data_is_counted(spoil: Spoil) -> None:
    report = require_usable(*spoil(), classes=("dog", "cat"))
    assert not report.problems
    assert (report.images, report.objects, report.crowds, report.empty_images) == (2, 2, 1, 0)
    assert report.per_class == {"dog": 1, "cat": 1}
    assert report.classes == ("dog", "cat")
    assert "2 images (0 without objects), 2 objects in 2 classes, 1 crowds" in str(report)


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco_images_pass(shared: Path, split: str) -> None:
    root = shared / "data" / "coco_mini"
    file = root / "annotations" / f"instances_{split}2017.json"
    report = require_usable(file, root / f"{split}2017", verify_images="open", purpose="eval")
    assert not report.problems
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
    sentence = told(*files)
    assert "annotation 11 on image 7: " in sentence
    assert words in sentence


def test_a_box_beyond_the_border_is_clipped_with_a_warning(spoil: Spoil) -> None:
    report = require_usable(*spoil(lambda data: data["annotations"][0].update(bbox=[-5, 3, 60, 10])))
    (warning,) = report.warnings
    assert "annotation 11 on image 7" in warning.sentence
    assert "it is clipped" in warning.sentence
    assert report.objects == 2


def test_a_rounded_box_is_no_matter(spoil: Spoil) -> None:
    assert not check_coco(*spoil(lambda data: data["annotations"][0].update(bbox=[30, 3, 10.4, 10]))).problems


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
    assert report.totals == {"box-size": 2}


def test_an_absent_image_is_named(spoil: Spoil) -> None:
    file, folder = spoil()
    (folder / "a.jpg").unlink()
    sentence = told(file, folder, verify_images="exists")
    assert f"image 7: the file {folder / 'a.jpg'} is absent; add it" in sentence


def test_another_suffix_is_suggested(spoil: Spoil) -> None:
    assert told(*spoil(lambda data: data["images"][1].update(file_name="b.jpg"))).endswith("did you mean 'b.png'?")


@pytest.mark.parametrize("name", ["a.jpg", "b.png"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, -2])
def test_a_truncated_image_is_named(spoil: Spoil, name: str, kept: float) -> None:
    file, folder = spoil()
    whole = (folder / name).read_bytes()
    end = int(kept * len(whole)) if kept == 0.5 else int(kept)
    (folder / name).write_bytes(whole[:end])
    sentence = told(file, folder)
    assert f"the file {folder / name} is " in sentence
    assert ("is empty" if kept == 0 else "is truncated or no image") in sentence
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
    sentence = told(file, folder)
    assert "is TGA, which OpenCV does not read here; convert it to PNG or JPEG." in sentence


def test_a_wrong_size_is_named(spoil: Spoil) -> None:
    sentence = told(*spoil(lambda data: data["images"][0].update(width=80)))
    assert "is 40 x 30 pixels, but 80 x 30 are listed; correct width and height" in sentence


def test_an_image_turned_by_exif_may_list_either_size(spoil: Spoil) -> None:
    file, folder = spoil(lambda data: data["images"][0].update(width=30, height=40))
    data = json.loads(file.read_text())
    data["annotations"] = data["annotations"][2:]
    file.write_text(json.dumps(data))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / "a.jpg").save(folder / "a.jpg", exif=exif)
    assert require_usable(file, folder).usable


def test_images_in_folders_are_found(spoil: Spoil) -> None:
    file, folder = spoil(lambda data: data["images"][0].update(file_name="day/a.jpg"))
    (folder / "day").mkdir()
    (folder / "a.jpg").rename(folder / "day" / "a.jpg")
    assert require_usable(file, folder).usable


def test_class_names_that_do_not_match_are_named(spoil: Spoil) -> None:
    sentence = told(*spoil(), classes=("cat", "dogs"))
    assert "class 'dogs' is expected, but found are cat, dog; did you mean 'dog'?" in sentence
    assert "give the class names of this file" in told(*spoil(), classes=("aeroplane",))


def test_classes_not_asked_for_are_left_out_with_a_warning(spoil: Spoil) -> None:
    report = require_usable(*spoil(), classes=("cat",))
    assert "objects of dog are left out" in report.warnings[0].sentence
    assert (report.objects, report.empty_images) == (1, 1)


def test_an_empty_data_set_is_named(spoil: Spoil) -> None:
    assert "it lists no images" in told(*spoil(lambda data: data.update(images=[], annotations=[])))
    assert "it has no object to learn from" in told(*spoil(lambda data: data.update(annotations=[])))
    assert "it has no object to learn from" in told(
        *spoil(lambda data: data.update(annotations=data["annotations"][1:2]))
    )
    assert "it lists no categories" in told(*spoil(lambda data: data.update(categories=[], annotations=[])))


@pytest.mark.parametrize(
    ("table", "row", "change", "words"),
    [
        ("images", 1, {"id": 7}, "image 7: this id is used more than once"),
        ("annotations", 1, {"id": 11}, "annotation 11: this id is used more than once"),
        ("categories", 1, {"id": 1}, "category 1: this id is used more than once"),
        ("categories", 1, {"name": "cat"}, "category 3: the name 'cat' is used more than once"),
        ("annotations", 0, {"image_id": 9}, "annotation 11: image_id 9 is not in 'images'"),
        ("annotations", 0, {"image_id": [7]}, "annotation 11: image_id [7] is not in 'images'"),
        ("annotations", 0, {"category_id": 2}, "annotation 11: category_id 2 is not in 'categories'"),
        ("annotations", 0, {"iscrowd": 5}, "annotation 11: iscrowd is 5; give 0 or 1."),
        ("images", 0, {"width": 0}, "image 7: its size is 0 x 30"),
        ("images", 0, {"height": 30.5}, "image 7: its size is 40 x 30.5"),
        ("images", 0, {"file_name": None}, "image 7: file_name is null"),
        ("images", 0, {"id": "7"}, 'image number 1 in the list: its id is "7"; give a whole number'),
    ],
)
def test_wrong_values_are_named(spoil: Spoil, table: str, row: int, change: Data, words: str) -> None:
    assert words in told(*spoil(lambda data: data[table][row].update(change)))


@pytest.mark.parametrize(
    ("table", "key", "place"),
    [
        ("images", "id", "image number 1 in the list"),
        ("images", "file_name", "image 7"),
        ("images", "width", "image 7"),
        ("categories", "name", "category 1"),
        ("annotations", "id", "annotation number 1 in the list"),
        ("annotations", "image_id", "annotation 11"),
        ("annotations", "category_id", "annotation 11"),
        ("annotations", "bbox", "annotation 11"),
    ],
)
def test_missing_keys_are_named(spoil: Spoil, table: str, key: str, place: str) -> None:
    sentence = told(*spoil(lambda data: data[table][0].pop(key)))
    assert f"{place}: it has no '{key}'; add the key" in sentence


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_missing_tables_are_named(spoil: Spoil, key: str) -> None:
    assert f"it has no '{key}'" in told(*spoil(lambda data: data.pop(key)))
    assert f"'{key}' is a number, not a list" in told(*spoil(lambda data: data.update({key: 3})))


def test_a_mistyped_table_is_suggested(spoil: Spoil) -> None:
    sentence = told(*spoil(lambda data: data.update(annotation=data.pop("annotations"))))
    assert "it has no 'annotations' but images, categories, annotation; did you mean 'annotation'" in sentence


def test_truncated_json_gives_line_and_column(spoil: Spoil) -> None:
    file, folder = spoil()
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1)[:-40])
    sentence = told(file, folder)
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
    assert words in told(file, folder)


def test_absent_files_are_named(spoil: Spoil) -> None:
    file, folder = spoil()
    shutil.rmtree(folder)
    assert f"its image folder {folder} does not exist" in told(file, folder)
    file.unlink()
    assert "it cannot be read (No such file or directory)" in told(file, folder)


def test_segmentation_is_not_looked_at_for_training(spoil: Spoil) -> None:
    def change(data: Data) -> None:
        for annotation, junk in zip(data["annotations"], (None, "none", [[1, 2]]), strict=True):
            annotation["segmentation"] = junk

    assert not check_coco(*spoil(change)).problems


def test_evaluation_asks_for_what_scoring_needs(spoil: Spoil) -> None:
    assert "annotation 11: it has no 'segmentation'" in told(*spoil(), purpose="eval")


def test_the_others_are_counted_and_listed(spoil: Spoil) -> None:
    def change(data: Data) -> None:
        data["annotations"] += [{**data["annotations"][0], "id": 100 + i, "category_id": 9} for i in range(70)]
        data["annotations"][0]["bbox"] = [1, 1, -1, 1]

    files = spoil(change)
    assert "(70 more; `misa check` lists them)" in told(*files)
    text = str(check_coco(*files))
    assert text.count("error: ") == 51
    assert "... and 20 more of unknown-category" in text


def test_wrong_arguments_are_named(spoil: Spoil) -> None:
    files = spoil()
    with pytest.raises(ValueError, match="verify_images must be 'exists' or 'open'"):
        check_coco(*files, verify_images="decode")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="purpose must be 'train' or 'eval'"):
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
    """Every place in a JSON value, the root excepted."""
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
    report = check_coco(file, folder, verify_images="open", purpose=random.draw(st.sampled_from(["train", "eval"])))
    assert isinstance(report, Report)
    assert str(report)
    with contextlib.suppress(DataError):
        assert require_usable(file, folder).usable
