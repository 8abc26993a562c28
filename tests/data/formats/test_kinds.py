"""Faults of real data: for each kind a minimal example, which is read correctly or reported."""

import base64
import csv
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from misa.data.check.annotations import check_coco
from misa.data.dataset import CocoImages
from misa.data.formats.coco import DataError, Split
from misa.data.formats.convert import open_layout, read_boxes
from misa.data.formats.plain_coco import convert
from misa.data.formats.splits import by_hash
from misa.data.source import open_source
from misa.engine.reports.checkup import check_data
from misa.experiment import Experiment
from tests.data.formats.test_round_trip import SCENES, read, thing, wanted
from tests.data.formats.writers import (
    Picture,
    Thing,
    coco,
    csv_corners,
    draw,
    labelme_boxes,
    published,
    roboflow,
    voc,
)

Tables = dict[str, list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def spoil(tmp_path: Path) -> Callable[..., Path]:
    """Write scenes in COCO's layout after a change of the tables of some splits."""

    def write(change: Callable[[Tables], object], *splits: str) -> Path:
        published(tmp_path / "data", SCENES)
        for split in splits or ("train", "val"):
            path = tmp_path / f"data/annotations/instances_{split}2017.json"
            tables = json.loads(path.read_text())
            change(tables)
            path.write_text(json.dumps(tables))
        return tmp_path / "data"

    return write


def each(**values: Any) -> Callable[[Tables], object]:
    return lambda tables: [row.update(values) for row in tables["annotations"]]


def trained_on(place: Split, *, masks: bool) -> Counter[str]:
    """Returns the number of training objects by class."""
    options = {"metainfo": {"classes": ("cat", "dog")}, "pipeline": [], "lazy_init": True}
    data = CocoImages(ann_file=str(place.annotations), data_prefix={"img": str(place.images)}, masks=masks, **options)
    images = data.load_data_list()
    return Counter(
        ("cat", "dog")[o["bbox_label"]] for image in images for o in image["instances"] if not o["ignore_flag"]
    )


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("area", [0, None, "12"])
def test_an_area_that_is_wrong_costs_no_object(spoil: Callable[..., Path], masks: bool, area: object) -> None:
    """mmdet drops objects without area, and pycocotools counts them as small."""
    layout = open_layout(spoil(each(area=area)))
    assert trained_on(layout.train, masks=masks) == Counter(cat=1, dog=2)
    for place in (layout.train, layout.val):
        rows = json.loads(place.annotations.read_text())["annotations"]
        assert all(0 < row["area"] <= row["bbox"][2] * row["bbox"][3] * 1.05 + 8 for row in rows)


@pytest.mark.parametrize(
    ("key", "words"), [("iscrowd", "is marked as crowd"), ("ignore", "is marked by the key ignore")]
)
def test_crowds_and_what_is_to_be_ignored_are_counted_the_same_and_told(
    spoil: Callable[..., Path], key: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = spoil(lambda tables: tables["annotations"][0].update({key: 1}))
    layout, report = open_layout(root), check_data(root).reports
    assert trained_on(layout.train, masks=False) == Counter(dog=2) == Counter(report[0].per_class) - Counter()
    assert report[0].crowds == 1
    assert f"1 of 3 objects {words} and is not learned from" in str(report[0]).replace("(iscrowd or difficult) ", "")
    assert "is not scored on" in str(report[1])
    open_source(Experiment(data="coco"), root)
    assert words in capsys.readouterr().out.replace("(iscrowd or difficult) ", "")


def test_a_missing_iscrowd_is_none(spoil: Callable[..., Path]) -> None:
    root = spoil(lambda tables: [row.pop("iscrowd") for row in tables["annotations"]])
    assert all(report.usable and not report.crowds for report in check_data(root).reports)


@pytest.mark.parametrize(
    ("value", "crowds"), [(0.0, 0), ("0", 0), ("0.0", 0), (False, 0), (1.0, 1), ("1", 1), (True, 1)]
)
def test_iscrowd_as_text_or_a_float(spoil: Callable[..., Path], value: object, crowds: int) -> None:
    """As pandas writes it after a merge."""
    root = spoil(lambda tables: tables["annotations"][0].update(iscrowd=value))
    reports = check_data(root).reports
    assert all(report.usable for report in reports)
    assert reports[0].crowds == crowds
    assert trained_on(open_layout(root).train, masks=False) == Counter(cat=1 - crowds, dog=2)


@pytest.mark.parametrize("value", [[1, 2], 5, {"a": 1}, [["a"] * 5]])
@pytest.mark.parametrize("key", ["faults", "plain_of", "converted_from"])
def test_a_file_may_have_keys_that_converted_files_have(
    spoil: Callable[..., Path], tmp_path: Path, key: str, value: object
) -> None:
    """Also where it is converted: beside its images, and with ids that have to be normalized."""
    root = spoil(lambda tables: [tables.update({key: value}), tables["annotations"][0].update(iscrowd="0")])
    alone = tmp_path / "alone"
    shutil.copytree(root / "train2017", alone)
    shutil.copy(root / "annotations" / "instances_train2017.json", alone / "labels.json")
    for place in (root, alone):
        assert all(report.usable for report in check_data(place).reports)
        assert read_boxes(place)


def test_an_image_whose_name_has_a_zero_byte_is_reported(spoil: Callable[..., Path]) -> None:
    report, _ = check_data(spoil(lambda tables: tables["images"][0].update(file_name="sub\0x/4.png"))).reports
    assert not report.usable
    assert "4.png" in str(report)


def corners(tables: Tables) -> None:
    for row in tables["annotations"]:
        x, y, w, h = row["bbox"]
        row["bbox"] = [x, y, x + w, y + h]


def shares(tables: Tables) -> None:
    sizes = {row["id"]: (row["width"], row["height"]) for row in tables["images"]}
    for row in tables["annotations"]:
        width, height = sizes[row["image_id"]]
        x, y, w, h = row["bbox"]
        row["bbox"] = [x / width, y / height, w / width, h / height]


@pytest.mark.parametrize(
    ("change", "words"),
    [(corners, "seem to be corners x1, y1, x2, y2"), (shares, "seem to be shares of the image")],
)
def test_boxes_in_another_form_are_refused(
    spoil: Callable[..., Path], change: Callable[[Tables], object], words: str
) -> None:
    root = spoil(change)
    assert all(words in report.fatal[0].message for report in check_data(root).reports)
    with pytest.raises(DataError, match=words):
        open_source(Experiment(data="coco"), root)


def test_a_coco_class_called_shapes_makes_no_labelme(tmp_path: Path) -> None:
    """Roboflow's first category is named like the project."""
    roboflow(tmp_path, SCENES)
    for path in tmp_path.glob("*/_annotations.coco.json"):
        tables = json.loads(path.read_text())
        tables["categories"] = [{"id": 99, "name": "shapes", "supercategory": "none"}, *tables["categories"]]
        path.write_text(json.dumps({key: tables[key] for key in ("categories", "images", "annotations")}))
    assert all(report.usable and report.objects for report in check_data(tmp_path).reports)


@pytest.mark.parametrize("prefix", ["", "images/"])
def test_one_json_is_checked_with_the_images_that_are_read(tmp_path: Path, prefix: str) -> None:
    """Also where another folder, here of masks, has the same names."""
    for picture in SCENES:
        draw(picture, tmp_path / "images" / picture.name)
        draw(picture, tmp_path / "masks" / picture.name)
    path = tmp_path / "labels.json"
    path.write_text(coco(SCENES, lambda picture: prefix + picture.name))
    (report,) = check_data(path).reports
    assert (report.usable, report.images) == (True, len(SCENES))
    assert open_layout(path).train.images == tmp_path
    path.write_text("{")
    assert "the file ends too early" in check_data(path).reports[0].fatal[0].message


@pytest.mark.parametrize("name", ["boxes", "instances_val"])
def test_the_splits_of_one_json_are_told_apart(tmp_path: Path, name: str) -> None:
    """Unless its name says the split."""
    for i in range(9):
        draw(SCENES[0], tmp_path / "data/images" / f"{i}.png")
    path = tmp_path / f"data/{name}.json"
    path.write_text(coco([SCENES[0]._replace(name=f"{i}.png") for i in range(9)], lambda picture: picture.name))
    train, val = (str(report).partition(": ")[0] for report in check_data(tmp_path / "data").reports)
    assert train == f"{path} (train split)"
    assert val == (f"{path} (val split)" if name == "boxes" else str(path))


@pytest.mark.parametrize(
    ("name", "train"), [("my_test_labels", True), ("test_labels", False), ("instances_val", False)]
)
def test_a_lone_json_is_of_a_split_if_it_has_its_name(tmp_path: Path, name: str, train: bool) -> None:
    for picture in SCENES:
        draw(picture, tmp_path / "images" / picture.name)
    (tmp_path / f"{name}.json").write_text(coco(SCENES, lambda picture: picture.name))
    train_report, val = check_data(tmp_path).reports
    assert bool(train_report.images) == train
    assert train_report.images + val.images == len(SCENES)


def test_a_json_of_another_kind_hides_no_labelme(tmp_path: Path) -> None:
    labelme_boxes(tmp_path, SCENES)
    (tmp_path / "train" / "0.json").write_text('["cat", "dog"]')
    (problem,) = check_data(tmp_path).reports[0].fatal
    assert problem.sentence.endswith("0.json: it has no shapes; give LabelMe's files alone, or take this one away.")


def test_labelme_beside_the_images_in_their_folder_is_found(tmp_path: Path) -> None:
    labelme_boxes(tmp_path / "split" / "images", SCENES)
    shutil.copytree(tmp_path / "split/images/train", tmp_path / "one/images")
    for name, images, val in (("split", 3, 2), ("one", 2, 1)):
        layout, reports = open_layout(tmp_path / name), check_data(tmp_path / name).reports
        assert layout.root == tmp_path / name
        assert [(report.usable, report.images) for report in reports] == [(True, images), (True, val)]


def test_a_csv_with_the_image_sides_alone_is_refused(tmp_path: Path) -> None:
    """`width, height` are taken as the box's only if nothing contradicts it."""
    csv_corners(tmp_path / "data", SCENES)
    path = tmp_path / "data/BOXES.CSV"
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter=";") if row["class"]]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "x", "y", "width", "height", "class"])
        writer.writerows(
            [r["filename"], int(r["xmin"]) + 1, r["ymin"], r["width"], r["height"], r["class"]] for r in rows
        )
    reports = check_data(tmp_path / "data").reports
    assert any("width and height seem to be the image's" in p.message for report in reports for p in report.fatal)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32"])
def test_the_published_layout_in_another_encoding_is_normalized(tmp_path: Path, encoding: str) -> None:
    """Also without a byte order mark: the trainings read the normalized copy."""
    published(tmp_path, [Picture(f"{split}.png", split, (60, 50), []) for split in ("train", "val")])
    path = tmp_path / "annotations/instances_train2017.json"
    path.write_bytes(path.read_text().encode(encoding))
    assert [row["file_name"] for row in COCO(open_layout(tmp_path).train.annotations).loadImgs([1])] == ["train.png"]


@pytest.mark.parametrize("crowd", ["2", "no", 2])
def test_given_boxes_that_may_be_crowds_are_refused(tmp_path: Path, crowd: object) -> None:
    """Any text is true in Python: its boxes would have been left out."""
    picture = Picture("a.png", "train", (60, 50), [Thing("cat", (1, 2, 30, 40), [])])
    content = json.loads(coco([picture], lambda p: p.name))
    content["annotations"][0]["iscrowd"] = crowd
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"iscrowd of .*annotation 1 is {crowd!r}, not 0 or 1"):
        read_boxes(tmp_path / "boxes.json")


@pytest.mark.parametrize("said", ["1", "True", " true "])
def test_difficult_objects_of_voc_are_not_trained_on(tmp_path: Path, said: str) -> None:
    picture = Picture("a.png", "train", (60, 50), [Thing("cat", (1, 2, 30, 40), []), Thing("dog", (5, 6, 9, 9), [])])
    voc(tmp_path, [picture])
    (path,) = tmp_path.rglob("*.xml")
    text = path.read_text()
    assert text.count("<difficult>0</difficult>") == 2
    path.write_text(text.replace("<difficult>0</difficult>", f"<difficult>{said}</difficult>", 1))
    rows = json.loads(open_layout(tmp_path).train.annotations.read_text())["annotations"]
    assert [row["iscrowd"] for row in rows] == [1, 0]


def test_a_number_with_underscores_is_none(tmp_path: Path) -> None:
    draw(Picture("a.png", "train", (60, 50), []), tmp_path / "a.png")
    (tmp_path / "boxes.csv").write_text("image,xmin,ymin,xmax,ymax,label\na.png,1_0,1,30,30,cat\n")
    assert [p.kind for r in check_data(tmp_path).reports for p in r.problems if p.fatal][:1] == ["box-value"]


def test_a_panoptic_file_is_named(spoil: Callable[..., Path]) -> None:
    root = spoil(
        lambda tables: tables.update(annotations=[{"image_id": 1, "segments_info": [], "file_name": "1.png"}]), "val"
    )
    assert "this is a panoptic file, not one of instances" in check_data(root).reports[1].fatal[0].message


def test_a_validation_split_need_not_have_all_classes(spoil: Callable[..., Path]) -> None:
    def cats(tables: Tables) -> None:
        tables["categories"] = tables["categories"][:1]
        tables["annotations"] = [row for row in tables["annotations"] if row["category_id"] == 1]

    report = check_data(spoil(cats, "val")).reports[1]
    assert report.usable
    assert "class 'dog' does not occur in it, so it is not scored" in str(report)


@pytest.mark.parametrize("keep", [lambda text: b"", lambda text: text[:-9], lambda text: b'{"\xe9": 1, ' + text[1:]])
def test_a_broken_train_file_is_no_fault_of_the_val_file(
    spoil: Callable[..., Path], keep: Callable[[bytes], bytes]
) -> None:
    root = spoil(lambda tables: None)
    whole = check_data(root).reports[1]
    path = root / "annotations/instances_train2017.json"
    path.write_bytes(keep(path.read_bytes()))
    train, val = check_data(root).reports
    assert not train.usable
    assert val.usable
    assert (val.objects, val.classes, val.empty_images) == (whole.objects, whole.classes, whole.empty_images)


@pytest.mark.parametrize("mask", [[[]], [], None, {"counts": "", "size": [1, 1]}])
def test_masks_that_are_none_make_the_score_one_of_boxes(spoil: Callable[..., Path], mask: object) -> None:
    report = check_data(spoil(each(segmentation=mask), "val")).reports[1]
    assert report.usable
    assert not report.masks


def test_a_picture_that_cannot_be_written_costs_no_report(spoil: Callable[..., Path], tmp_path: Path) -> None:
    found = check_data(spoil(lambda tables: None), picture=tmp_path / "data/train2017/a.png/check.png")
    assert found.usable
    assert found.picture is None
    assert "no picture was drawn: the picture" in str(found)


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_picture_replaces_an_earlier_one_and_no_other_file(
    spoil: Callable[..., Path], tmp_path: Path, suffix: str
) -> None:
    data, picture = spoil(lambda tables: None), tmp_path / f"check.{suffix}"
    for _ in range(2):
        assert check_data(data, picture=picture).picture == picture
    photo = next((data / "val2017").iterdir())
    before = photo.read_bytes()
    found = check_data(data, picture=photo)
    assert found.picture is None
    assert found.fault == (
        f"{photo} exists already and was not drawn by this version's misa check; delete it, or give another name."
    )
    for name in ("check", "check.jpg"):
        assert "should end in .png, .pdf, .svg" in check_data(data, picture=tmp_path / name).fault
    assert photo.read_bytes() == before
    assert not list(photo.parent.glob(f"{photo.name}?*"))


def shot(name: str, split: str, x: int) -> Picture:
    return Picture(name, split, (60, 40), [thing("cat", [x, 3, x + 10, 3, x + 10, 20])])


def test_names_with_dots_keep_their_boxes(tmp_path: Path) -> None:
    """`frame.0` is not `frame` with a suffix, even if `frame` exists."""
    pictures = [shot("frame.png", "train", 1)] + [shot(f"frame.{i}.png", "train", 5 + i) for i in range(3)]
    pictures.append(shot("other.png", "val", 30))
    voc(tmp_path / "data", pictures)
    for path in (tmp_path / "data/VOCdevkit/VOC2007/Annotations").iterdir():
        path.write_text(path.read_text().replace(".png</filename>", "</filename>"))
    assert read(*open_layout(tmp_path / "data").train) == wanted(pictures[:-1])


def test_the_names_inside_may_be_old(tmp_path: Path) -> None:
    """If images and annotation files were renamed together, the file names count, with a warning."""
    pictures = [shot(f"{i}.png", "train" if i < 4 else "val", 4 * i) for i in range(6)]
    voc(tmp_path / "data", pictures)
    folder = tmp_path / "data/VOCdevkit/VOC2007/Annotations"
    for i in range(6):
        path = folder / f"{i}.xml"
        path.write_text(path.read_text().replace(f"{i}.png", f"{(i + 1) % 6}.png"))
    layout = open_layout(tmp_path / "data")
    assert read(*layout.train) == wanted(pictures[:4])
    assert "it names 1.png inside and is called as 0.png" in str(check_coco(*layout.train))
    with pytest.raises(DataError, match=r"names .* inside, which is another file's image"):
        read_boxes(tmp_path / "data")


def test_a_name_that_fits_several_files_is_no_name(tmp_path: Path) -> None:
    csv_corners(tmp_path / "data", SCENES)
    for folder in ("x", "y"):
        (tmp_path / "data/images" / folder).mkdir()
    (tmp_path / "data/images/a.png").rename(tmp_path / "data/images/x/a.png")
    shutil.copy(tmp_path / "data/images/x/a.png", tmp_path / "data/images/y/a.png")
    report = check_coco(*open_layout(tmp_path / "data").train)
    assert any("a.png may be " in p.message and p.fatal for p in report.problems)


def test_trainval_and_test_are_the_lists_of_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [shot(f"{i}.png", "train" if i < 4 else "test", 4 * i) for i in range(6)]
    voc(tmp_path / "data", pictures)
    lists = tmp_path / "data/VOCdevkit/VOC2007/ImageSets/Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "val.txt").unlink()
    layout = open_layout(tmp_path / "data")
    assert read(*layout.train) == wanted(pictures[:4])
    assert read(*layout.val) == wanted(pictures[4:])
    assert "those of the test list are scored on" in capsys.readouterr().out


def test_data_that_grows_moves_no_image_from_one_split_to_the_other() -> None:
    names = [f"{i}.jpg" for i in range(400)]
    for size in (30, 90, 200):
        small, large = by_hash(names[:size], lambda _: None), by_hash(names, lambda _: None)
        assert small == large[:size]
        assert 0.02 < large.count("val") / 400 < 0.25


def test_an_image_that_was_copied_again_is_read_again(tmp_path: Path) -> None:
    """Its size was unknown while it was empty; the cache depends on the file."""
    csv_corners(tmp_path / "data", SCENES)
    path = tmp_path / "data/BOXES.CSV"
    text = path.read_text(encoding="utf-8-sig").splitlines()
    path.write_text("\n".join(";".join(line.split(";")[:1] + line.split(";")[3:]) for line in text))
    image = tmp_path / "data/images/a.png"
    whole = image.read_bytes()
    image.write_bytes(b"")
    assert "is empty; copy or download it again" in str(check_data(tmp_path / "data"))
    image.write_bytes(whole)
    assert check_data(tmp_path / "data").reports[0].usable


@pytest.mark.parametrize(
    ("ids", "references"),
    [(int, float), (float, float), (float, int), (str, int), (str, float), (str, lambda i: f"{i}.0"), (int, str)],
)
def test_whole_numbers_in_any_form_are_the_same_ids(
    tmp_path: Path, ids: Callable[[int], object], references: Callable[[int], object]
) -> None:
    """pandas writes references as floats where a column has gaps, other tools ids as text."""
    content = json.loads(coco(SCENES, lambda p: p.name))
    for name, id_, reference in (("plain", int, int), ("data", ids, references)):
        changed = json.loads(json.dumps(content))
        for key in ("images", "categories", "annotations"):
            for row in changed[key]:
                row["id"] = id_(row["id"])
        for row in changed["annotations"]:
            row.update(image_id=reference(row["image_id"]), category_id=reference(row["category_id"]))
        (tmp_path / name).mkdir()
        (tmp_path / name / "boxes.json").write_text(json.dumps(changed))
        for picture in SCENES:
            draw(picture, tmp_path / name / picture.name)
    assert all(report.usable for report in check_data(tmp_path / "data").reports)
    layouts = open_layout(tmp_path / "data"), open_layout(tmp_path / "plain")
    for split in ("train", "val"):
        one, other = (facts_of(getattr(layout, split).annotations) for layout in layouts)
        assert one == other
        assert one["images"]
    written, expected = (convert(tmp_path / name, tmp_path / f"{name} as coco") for name in ("data", "plain"))
    assert written == expected


def facts_of(path: Path) -> Any:
    content = json.loads(path.read_text())
    return {key: content[key] for key in ("images", "categories", "annotations")}


def test_a_number_is_no_image_whose_text_id_was_numbered_anew(tmp_path: Path) -> None:
    """Ids "01", "1" and "2" become 1, 2 and 3: the number 2 is then not the second image."""
    pictures = [Picture(f"{i}.png", "train", (60, 50), [Thing("cat", (1, 2, 30, 40), [])]) for i in range(3)]
    content = json.loads(coco(pictures, lambda p: p.name))
    for row, key in zip(content["images"], ("01", "1", "2"), strict=True):
        row["id"] = key
    for row, key in zip(content["annotations"], ("01", 1, 3), strict=True):
        row["image_id"] = key
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    for picture in pictures:
        draw(picture, tmp_path / picture.name)
    (problem,) = check_data(tmp_path).reports[0].fatal
    assert 'annotation 3: image_id "number 3" is not in' in problem.sentence
    with pytest.raises(DataError, match="has an annotation of image"):
        convert(tmp_path, tmp_path.with_name("out"))
    content["annotations"].pop()
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    counts = Counter({row["file_name"]: 0 for row in content["images"]})
    for split in (open_layout(tmp_path).train, open_layout(tmp_path).val):
        truth = COCO(split.annotations)
        counts.update(truth.imgs[row["image_id"]]["file_name"] for row in truth.anns.values())
    assert counts == {"0.png": 1, "1.png": 1, "2.png": 0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": 5}, "its label is 5, not a text"),
        ({"label": None}, "it has no label"),
        ({"label": " "}, "its label is empty"),
        ({"points": None}, "it has no points"),
        ({"points": [[1, 2, 0], [9, 9, 0]]}, "its point [1, 2, 0] is not two finite numbers"),
        ({"points": [[1, 2], [float("nan"), 9]]}, "its point [nan, 9] is not two finite numbers"),
    ],
)
def test_what_is_wrong_with_a_shape_is_said(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    labelme_boxes(tmp_path, SCENES)
    path = tmp_path / "train/a.json"
    content = json.loads(path.read_text())
    content["shapes"][0].update(change)
    path.write_text(json.dumps(content))
    (problem,) = check_data(tmp_path).reports[0].fatal
    assert problem.sentence == f"{path}, shape 1: {words}; correct or remove it."


@pytest.mark.parametrize(("left", "top"), [(-5, -4), (-5, 30), (40, -4), (40, 30)])
def test_a_mask_beyond_the_image_is_cropped(tmp_path: Path, left: int, top: int) -> None:
    draw(Picture("a.png", "train", (60, 50), []), tmp_path / "a.png")
    file = io.BytesIO()
    Image.fromarray(np.ones((24, 26), bool)).save(file, "PNG")
    shape = {"label": "cat", "points": [[left, top], [left + 25, top + 23]], "shape_type": "mask"}
    shape["mask"] = base64.b64encode(file.getvalue()).decode()
    content = {"shapes": [shape], "imagePath": "a.png", "imageHeight": 50, "imageWidth": 60}
    (tmp_path / "a.json").write_text(json.dumps(content))
    layout = open_layout(tmp_path)
    rows = [row for split in (layout.train, layout.val) for row in facts_of(split.annotations)["annotations"]]
    expected = np.zeros((50, 60), np.uint8)
    expected[max(top, 0) : top + 24, max(left, 0) : left + 26] = 1
    np.testing.assert_array_equal(truth_mask(rows[0]["segmentation"]), expected)


def test_shapes_of_a_group_are_one_object(tmp_path: Path) -> None:
    """LabelMe's own converter joins shapes of all kinds by label and group_id."""
    squares = {x: [[x, 5], [x + 8, 5], [x + 8, 13], [x, 13]] for x in (2, 20)}
    file = io.BytesIO()
    Image.fromarray(np.ones((8, 8), bool)).save(file, "PNG")
    drawn = {
        "polygon": lambda x: {"points": squares[x]},
        "rectangle": lambda x: {"points": [squares[x][0], squares[x][2]]},
        "mask": lambda x: {"points": [[x, 5], [x + 7, 12]], "mask": base64.b64encode(file.getvalue()).decode()},
    }
    kinds = [("polygon", "polygon"), ("rectangle", "rectangle"), ("mask", "mask"), ("mask", "polygon")]
    for i, pair in enumerate(kinds):
        draw(Picture(f"{i}.png", "train", (60, 50), []), tmp_path / f"{i}.png")
        shapes = [
            {"label": "cat", "group_id": 3, "shape_type": kind, **drawn[kind](x)}
            for kind, x in zip(pair, squares, strict=True)
        ]
        shapes.append({"label": "dog", "group_id": 3, "shape_type": "rectangle", **drawn["rectangle"](2)})
        shapes.append({"label": "dog", "group_id": None, "shape_type": "rectangle", **drawn["rectangle"](20)})
        content = {"shapes": shapes, "imagePath": f"{i}.png", "imageHeight": 50, "imageWidth": 60}
        (tmp_path / f"{i}.json").write_text(json.dumps(content))
    found: dict[str, list[Any]] = {}
    for split in open_layout(tmp_path).train, open_layout(tmp_path).val:
        truth = COCO(split.annotations)
        cat = truth.getCatIds(["cat"])
        for image, record in truth.imgs.items():
            assert len(truth.getAnnIds(image)) == 3
            found[record["file_name"]] = truth.loadAnns(truth.getAnnIds(image, cat))
    true = np.zeros((50, 60), np.uint8)
    true[5:13, 2:10] = true[5:13, 20:28] = 1
    for i, pair in enumerate(kinds):
        (cat,) = found[f"{i}.png"]
        assert cat["bbox"] == [2, 5, 26, 8]
        if "rectangle" in pair:
            assert not cat.get("segmentation")
        else:
            np.testing.assert_array_equal(truth_mask(cat["segmentation"]), true)


def truth_mask(mask: Any) -> Any:
    return rle.decode(rle.merge(rle.frPyObjects(mask, 50, 60)) if isinstance(mask, list) else mask)
