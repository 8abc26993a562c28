"""VOC XML and CSV files of boxes become COCO annotations, and every fault is reported with its place."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from misa.data.check.annotations import check_coco
from misa.data.formats import convert
from misa.data.formats.coco import DataError
from misa.data.formats.convert import open_layout, read_boxes
from misa.data.formats.csv_boxes import COLUMNS, CSV
from misa.data.source import open_source
from misa.experiment import Experiment


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# name, (width, height), objects: label and corners x1 y1 x2 y2 from 0
TRUTH = [
    ("a", (40, 30), [("cat", (2, 3, 12, 15)), ("dog", (0, 0, 40, 30))]),
    ("b", (32, 32), [("dog", (30, 30, 32, 32))]),
    ("c", (50, 20), []),
    ("d", (20, 20), [("cat", (5, 5, 9.5, 10.5))]),
]


def draw(folder, suffix="jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, (w, h), _ in TRUTH:
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(folder / f"{name}.{suffix}")


def xml(name, size, objects, suffix="jpg", extra=""):
    parts = "".join(
        f"<object><name>{label}</name>{extra}<bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, (x1, y1, x2, y2) in objects
    )
    w, h = size
    return (
        f"<annotation><filename>{name}.{suffix}</filename><size><width>{w}</width><height>{h}</height>"
        f"<depth>3</depth></size>{parts}</annotation>"
    )


def voc(root):
    draw(root / "JPEGImages")
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name, size, objects in TRUTH:
        (root / "Annotations" / f"{name}.xml").write_text(xml(name, size, objects))
    (root / "ImageSets/Main/train.txt").write_text("a\nc\n")
    (root / "ImageSets/Main/val.txt").write_text("b\nd\n")
    return root


def xml_splits(root):
    for split, names in (("train", "ac"), ("valid", "bd")):
        draw(root / split)
        for name, size, objects in TRUTH:
            if name in names:
                (root / split / f"{name}.xml").write_text(xml(name, size, objects))
    return root


LINES = [
    {"filename": f"{name}.jpg", "class": label, "xmin": x1, "ymin": y1, "xmax": x2, "ymax": y2}
    for name, _, objects in TRUTH
    for label, (x1, y1, x2, y2) in objects or [("", ("", "", "", ""))]
]


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def split_of(row):
    return "train" if row["filename"][0] in "ac" else "val"


def csv_column(root):
    draw(root / "images")
    write_csv(root / "boxes.csv", [{**row, "Split": split_of(row)} for row in LINES], delimiter=";")
    return root


def csv_sides(root):
    draw(root)
    for split in ("train", "val"):
        rows = []
        for row in LINES:
            if split_of(row) == split:
                x1, y1, x2, y2 = (row[key] for key in ("xmin", "ymin", "xmax", "ymax"))
                sides = ("", "") if x1 == "" else (x2 - x1, y2 - y1)
                rows.append({"image_path": row["filename"], "x": x1, "y": y1, "width": sides[0], "height": sides[1]})
                rows[-1]["label"] = row["class"]
        write_csv(root / f"{split}.csv", rows)
    return root


def csv_file(root):
    """Write a file without a header, as some exporters do, with images given by path."""
    csv_column(root)
    text = [",".join(str(row[k]) for k in ("filename", "xmin", "ymin", "xmax", "ymax", "class")) for row in LINES]
    (root / "boxes.csv").write_text("".join(f"images/{line}\n" for line in text))
    return root / "boxes.csv"


FORMS = {"voc": voc, "xml_splits": xml_splits, "csv_column": csv_column, "csv_sides": csv_sides}


def read(split):
    content = json.loads(split.annotations.read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    images = {}
    for image in content["images"]:
        assert (split.images / image["file_name"]).is_file()
        objects = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in objects)
        found = [(names[a["category_id"]], tuple(a["bbox"])) for a in objects]
        images[Path(image["file_name"]).stem] = ((image["width"], image["height"]), found)
    return images


def expected(names):
    return {
        name: (size, [(label, (x1, y1, x2 - x1, y2 - y1)) for label, (x1, y1, x2, y2) in objects])
        for name, size, objects in TRUTH
        if name in names
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_data(form, tmp_path):
    layout = open_layout(FORMS[form](tmp_path / "mine"))
    assert read(layout.train) == expected("ac")
    assert read(layout.val) == expected("bd")
    assert not (tmp_path / "mine" / "annotations").exists(), "nothing is written among the data"
    for split, purpose in ((layout.train, "train"), (layout.val, "boxes")):
        report = check_coco(*split, verify_images="open", purpose=purpose)
        assert report.usable, str(report)
    source = open_source(Experiment(data="coco"), tmp_path / "mine")
    assert source.classes == ("cat", "dog")
    assert not source.masks


@pytest.mark.parametrize("form", [*FORMS, "csv_file"])
def test_a_relative_path_is_the_same_data(form, tmp_path, monkeypatch):
    made = (FORMS | {"csv_file": csv_file})[form](tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert open_layout(made.relative_to(tmp_path)) == open_layout(made)


def test_without_a_split_a_tenth_is_for_validation(tmp_path, capsys):
    layout = open_layout(csv_file(tmp_path / "mine"))
    train, val = read(layout.train), read(layout.val)
    assert {**train, **val} == expected("abcd")
    assert len(val) == 1
    assert "of 4 images 1 for validation, chosen by name" in capsys.readouterr().out
    shutil.copytree(tmp_path / "mine", tmp_path / "other")
    again = open_layout(tmp_path / "other" / "boxes.csv")
    assert read(again.val).keys() == val.keys(), "by the names, wherever they lie"


def test_what_has_not_changed_is_not_converted_again(tmp_path, monkeypatch):
    root = voc(tmp_path / "mine")
    first = open_layout(root)
    written = []
    known = convert.write_coco
    monkeypatch.setattr(convert, "write_coco", lambda *a: written.append(1) or known(*a))
    assert open_layout(root) == first
    assert not written
    (root / "Annotations/a.xml").write_text(xml("a", (40, 30), [("bird", (1, 1, 4, 4))]))
    assert read(open_layout(root).train)["a"][1] == [("bird", (1, 1, 3, 3))]
    assert written


def test_sizes_come_from_the_files_where_none_are_given(tmp_path):
    root = voc(tmp_path / "mine")
    (root / "Annotations/a.xml").write_text(xml("a", (0, 0), TRUTH[0][2]))
    assert read(open_layout(root).train) == expected("ac")


def test_difficult_objects_are_neither_taught_nor_scored(tmp_path):
    root = voc(tmp_path / "mine")
    hard = xml("a", (40, 30), TRUTH[0][2][:1], extra="<difficult>1</difficult>")
    (root / "Annotations/a.xml").write_text(hard)
    report = check_coco(*open_layout(root).val)
    assert report.objects == 2
    assert check_coco(*open_layout(root).train).crowds == 1


def test_another_suffix_than_the_annotation_says_is_found(tmp_path):
    root = voc(tmp_path / "mine")
    for path in (root / "JPEGImages").iterdir():
        path.rename(path.with_suffix(".jpeg"))
    assert check_coco(*open_layout(root).train, verify_images="open").usable


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("<annotation><object>", "a.xml: it is not readable as xml"),
        ("<html/>", "a.xml: it holds <html> and not <annotation>"),
        (xml("a", (40, 30), [("", (1, 1, 5, 5))]), "a.xml, object 1: it has no <name>"),
        (
            xml("a", (40, 30), [("cat", (1, 1, 5, 5)), ("cat", (1, 1, float("nan"), 5))]),
            "a.xml, object 2: its <bndbox>",
        ),
        (xml("a", (40, 30), [("cat", (9, 9, 5, 5))]), "a.xml, object 1: xmin 10 is greater than xmax 5; exchange them"),
        (
            xml("a", (40, 30), [("cat", (90, 9, 95, 15))]),
            "a.xml, object 1: its box (x 90 to 95, y 9 to 15 in pixels from 0) lies outside",
        ),
        (xml("a", (44, 30), []), "a.xml: the file"),
        (
            '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "'
            + "&x;" * 5000
            + '"><!ENTITY z "'
            + "&y;" * 5000
            + '">]><annotation><filename>&z;</filename></annotation>',
            "a.xml: it is not readable as xml",
        ),
    ],
)
def test_faults_of_xml_are_named_with_file_and_object(tmp_path, content, words):
    root = voc(tmp_path / "mine")
    (root / "Annotations/a.xml").write_text(content)
    report = check_coco(*open_layout(root).train, verify_images="open")
    assert not report.usable
    assert any(words in problem.sentence for problem in report.fatal), str(report)
    with pytest.raises(DataError):
        open_source(Experiment(data="coco"), root)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"xmin": "two"}, "boxes.csv, line 2: its box two, 3, 12, 15 is not four numbers"),
        ({"xmax": ""}, "boxes.csv, line 2: its box 2, 3, , 15 is not four numbers"),
        ({"class": ""}, "boxes.csv, line 2: it has a box and no label"),
        ({"filename": ""}, "boxes.csv, line 2: it names no image"),
        ({"split": "treino"}, "boxes.csv, line 2: its split is 'treino'; write train, val or test"),
        ({"filename": "zebra.jpg"}, "zebra.jpg is missing"),
        ({"xmin": 12, "xmax": 2}, "boxes.csv, line 2: its box 12, 3, 2, 15 ends before it begins; give x1 < x2"),
    ],
)
def test_faults_of_a_csv_are_named_with_the_line(tmp_path, change, words):
    root = csv_column(tmp_path / "mine")
    rows = [{**row, "split": split_of(row)} for row in LINES]
    rows[0] |= change
    write_csv(root / "boxes.csv", rows)
    report = check_coco(*open_layout(root).train)
    assert any(words in problem.sentence for problem in report.fatal), str(report)


def test_other_words_for_the_splits(tmp_path):
    root = csv_column(tmp_path / "mine")
    words = {"train": "Training", "val": "validate"}
    write_csv(root / "boxes.csv", [{**row, "split": words[split_of(row)]} for row in LINES])
    layout = open_layout(root)
    assert {
        Path(image["file_name"]).name[0] for image in json.loads(layout.train.annotations.read_text())["images"]
    } == set("ac")
    assert not {
        Path(image["file_name"]).name[0] for image in json.loads(layout.val.annotations.read_text())["images"]
    } & set("ac")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "",
            r"has no column image, xmin, ymin, xmax, ymax, label: its first line is empty; image may be called image,",
        ),
        (
            "file,x1,y1,x2,y2\na.jpg,1,2,3,4\n",
            "has no column label: its first line is file, .*; label may be called label, class, name, category,",
        ),
        ("file,label\n", "no column xmin, .*; a box is .* x1 y1 x2 y2, .* x y .* with boxwidth .*, w h, width height"),
        (
            "picture,X minimum,ymin,x_maxi,ymax,klass\n",
            "no column image, xmin, xmax, label: its first line is picture, X minimum, .*; "
            "probably 'X minimum' for xmin, 'x_maxi' for xmax, 'klass' for label; image may be called",
        ),
        # The centre of a box is not its corner, and a single column cannot serve twice.
        ("image,x_center,y_center,width,height,label\n", r"no column x, y: [^;]*; a box is"),
        ("image,bbox,label\n", "no column xmin, ymin, xmax, ymax: [^;]*; a box is"),
        ("a.jpg,1,2,3,4\n", "has no names of columns: .* columns image, x1, y1, x2, y2, label"),
        (b"\xff\xfe\x00", "cannot be read as a csv"),
    ],
)
def test_a_csv_without_its_columns_is_named(tmp_path, text, words):
    root = csv_column(tmp_path / "mine")
    (root / "boxes.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=words):
        open_layout(root)


def test_the_documented_columns_of_a_csv_are_those_that_are_read():
    """Every accepted name, in order of precedence, and no other."""
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    table = text.partition("| column of a csv |")[2].partition("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    found = {
        key.removesuffix(" (optional)"): tuple(name.strip("`") for name in names.split(", ")) for key, names in lines
    }
    assert found == COLUMNS


@pytest.mark.parametrize("key", COLUMNS)
def test_each_documented_column_of_a_csv_is_read(tmp_path, key):
    """A file with each accepted column name in turn gives the same box, class, size and split."""
    values = {
        "image": "a.png",
        "label": "cat",
        "corners of the box": "10 20 40 60",
        "or its top left corner": "10 20",
        "and its sides": "30 40",
        "size of the image": "90 80",
        "split": "valid",
    }
    sided = key in ("or its top left corner", "and its sides")
    unused = {"corners of the box"} if sided else {"or its top left corner", "and its sides"}
    for accepted in COLUMNS[key]:
        names = {other: accepted if key == other else COLUMNS[other][0] for other in COLUMNS if other not in unused}
        if accepted == "width height" and sided:
            names["size of the image"] = "imagewidth imageheight"
        path = tmp_path / "boxes.csv"
        rows = [" ".join(names.values()), " ".join(values[other] for other in names)]
        path.write_text("\n".join(row.replace(" ", ",") for row in rows))
        (entry,) = CSV.entries(CSV.find(path)[0], pytest.fail)
        assert (entry.file, entry.size, entry.split) == ("a.png", (90, 80), "val"), accepted
        assert [(o.label, o.box) for o in entry.objects] == [("cat", (10, 20, 30, 40))], accepted


def test_several_csv_files_are_not_guessed_from(tmp_path):
    root = csv_column(tmp_path / "mine")
    shutil.copy(root / "boxes.csv", root / "old.csv")
    with pytest.raises(DataError, match=r"holds several csv files \(boxes\.csv, old\.csv\)"):
        open_layout(root)


def test_a_folder_of_nothing_is_told_as_before(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="holds nothing"):
        open_layout(tmp_path / "mine")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set XDG_CACHE_HOME to a folder that can be written"):
        open_layout(voc(tmp_path / "mine"))


def test_boxes_for_predictions(tmp_path):
    root = voc(tmp_path / "mine")
    wanted = {
        f"{name}.jpg": ([list(map(float, box)) for _, box in objects], [label for label, _ in objects])
        for name, _, objects in TRUTH
    }
    assert read_boxes(root / "Annotations") == read_boxes(root) == wanted
    coco = open_layout(root).train.annotations
    assert read_boxes(coco) == {f"JPEGImages/{name}.jpg": wanted[f"{name}.jpg"] for name in "ac"}
    assert read_boxes(csv_column(tmp_path / "table") / "boxes.csv") == wanted
    for bad, words in (("nowhere.json", "there is no file of boxes"), ("mine/JPEGImages", "holds no boxes")):
        with pytest.raises(DataError, match=words):
            read_boxes(tmp_path / bad)
    (tmp_path / "bad.json").write_text('{"images": [3]}')
    with pytest.raises(DataError, match="is not a COCO json with boxes"):
        read_boxes(tmp_path / "bad.json")


def one_box(form, file, name, box):
    """Write one object of the image `name` in a form; `file` has no suffix but for csv and COCO."""
    x1, y1, x2, y2 = box
    file.parent.mkdir(parents=True, exist_ok=True)
    if form == "csv":
        file.write_text(f"image,xmin,ymin,xmax,ymax,label\n{name},{x1},{y1},{x2},{y2},cat\n")
    elif form == "voc":
        file.with_suffix(".xml").write_text(xml("0", (64, 64), [("cat", box)], suffix="png"))
    elif form == "labelme":
        shape = {"label": "cat", "points": [[x1, y1], [x2, y2]], "shape_type": "rectangle"}
        file.with_suffix(".json").write_text(json.dumps({"shapes": [shape], "imagePath": name}))
    else:
        image = {"id": 1, "file_name": name, "width": 64, "height": 64}
        row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
        content = {"images": [image], "annotations": [row], "categories": [{"id": 1, "name": "cat"}]}
        file.write_text(json.dumps(content))


@pytest.mark.parametrize("drawn", [True, False], ids=["images", "no-images"])
@pytest.mark.parametrize(
    ("form", "files", "images"),
    [
        ("csv", ("train/b.csv", "val/b.csv"), ("train", "val")),
        ("coco", ("train/_annotations.coco.json", "valid/_annotations.coco.json"), ("train", "valid")),
        (
            "coco",
            ("annotations/instances_train2017.json", "annotations/instances_val2017.json"),
            ("train2017", "val2017"),
        ),
        ("voc", ("train/0", "valid/0"), ("train", "valid")),
        ("voc", ("Annotations/day1/0", "Annotations/day2/0"), ("JPEGImages/day1", "JPEGImages/day2")),
        ("labelme", ("train/0", "val/0"), ("train", "val")),
    ],
)
def test_boxes_of_equal_names_in_two_folders_stay_apart(tmp_path, form, files, images, drawn):
    boxes = [(1, 1, 10, 10), (21, 21, 40, 40)]
    for file, folder, box in zip(files, images, boxes, strict=True):
        one_box(form, tmp_path / file, "0.png", box)
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        if drawn:
            Image.new("RGB", (64, 64)).save(tmp_path / folder / "0.png")
    (tmp_path / "JPEGImages").mkdir(exist_ok=True)
    assert read_boxes(tmp_path) == {
        f"{folder}/0.png": ([list(box)], ["cat"]) for folder, box in zip(images, boxes, strict=True)
    }


@pytest.mark.parametrize("name", ["a\0.jpg", "a\ud800.jpg"])
def test_boxes_of_an_image_that_no_file_can_be_called(tmp_path, name):
    one_box("coco", tmp_path / "boxes.json", name, (1, 1, 10, 10))
    assert read_boxes(tmp_path / "boxes.json") == {name: ([[1, 1, 10, 10]], ["cat"])}


def test_boxes_of_one_image_in_two_splits_are_of_one_name(tmp_path):
    """Its folders are the same by a link."""
    (tmp_path / "train2017").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "train2017" / "0.png")
    (tmp_path / "val2017").symlink_to("train2017")
    for split, box in (("train", (1, 1, 10, 10)), ("val", (21, 21, 40, 40))):
        one_box("coco", tmp_path / "annotations" / f"instances_{split}2017.json", "0.png", box)
    assert read_boxes(tmp_path) == {"0.png": ([[1, 1, 10, 10], [21, 21, 40, 40]], ["cat", "cat"])}


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("image,xmin,ymin,xmax,ymax\na.jpg,1,2,30,40\na.jpg,5,6,7,8\n", [None, None]),
        ("a.jpg,1,2,30,40\na.jpg,5,6,7,8\n", [None, None]),
        ("image,score,x1,y1,x2,y2,label\na.jpg,0.5,1,2,30,40,\na.jpg,0.5,5,6,7,8,cat\n", [None, "cat"]),
        ("a.jpg,1,2,30,40,\na.jpg,5,6,7,8,cat\n", [None, "cat"]),
    ],
)
def test_boxes_for_predictions_need_no_labels_in_a_csv(tmp_path, text, labels):
    """A training does, and says so."""
    (tmp_path / "boxes.csv").write_text(text)
    assert read_boxes(tmp_path / "boxes.csv") == {"a.jpg": ([[1, 2, 30, 40], [5, 6, 7, 8]], labels)}
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg")
    if "label" in text or text.endswith("cat\n"):
        assert "it has a box and no label" in str(check_coco(*open_layout(tmp_path).train))
    else:
        with pytest.raises(DataError, match=r"has no (column label|names of columns)"):
            open_layout(tmp_path)


@pytest.mark.parametrize("image", COLUMNS["image"])
@pytest.mark.parametrize("other", ["score", "frame", "video_name", "split"])
def test_no_other_column_is_taken_for_a_misspelt_label(tmp_path, image, other):
    value = "train" if other == "split" else "7"
    (tmp_path / "boxes.csv").write_text(f"{other},{image},xmin,ymin,xmax,ymax\n{value},a.jpg,1,2,30,40\n")
    assert read_boxes(tmp_path / "boxes.csv") == {"a.jpg": ([[1, 2, 30, 40]], [None])}


def test_a_misspelt_column_of_labels_is_not_left_out(tmp_path):
    (tmp_path / "boxes.csv").write_text("image,xmin,ymin,xmax,ymax,lable\na.jpg,1,2,30,40,cat\n")
    with pytest.raises(DataError, match="probably 'lable' for label"):
        read_boxes(tmp_path / "boxes.csv")
