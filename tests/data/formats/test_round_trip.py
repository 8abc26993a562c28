"""Round trip of every format: scenes of an independent writer are read, converted to plain COCO, and compared."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from misa.cli import main
from misa.data.check.annotations import check_coco
from misa.data.formats.convert import open_layout, read_boxes
from misa.data.formats.plain_coco import convert
from misa.data.formats.table import FORMATS
from misa.errors import UserError
from tests.data.formats.writers import WRITERS, Picture, Thing, box_of, roboflow, yolo_detect


def thing(label: str, *polygons: list[float]) -> Thing:
    return Thing(label, box_of(list(polygons)), list(polygons))


SCENES = [
    Picture("a.png", "train", (96, 72), [
        thing("cat", [8, 6, 40, 6, 40, 30, 8, 30]), thing("dog", [50, 20, 90, 25, 70, 60])
    ]),
    Picture("b.png", "train", (64, 80), [thing("dog", [3, 70, 33, 40, 60, 78])]),
    Picture("nothing.png", "train", (50, 50), []),
    Picture("d.png", "val", (96, 72), [
        thing("cat", [0, 0, 96, 0, 96, 72, 0, 72]), thing("cat", [10, 50, 30, 50, 20, 70])
    ]),
    Picture("e.png", "val", (70, 70), [thing("dog", [20, 20, 40, 30, 60, 66, 30, 50])]),
    Picture("f.png", "test", (60, 60), [thing("cat", [10, 10, 40, 12, 30, 40])]),
]  # fmt: skip
PARTS = Picture("g.png", "train", (90, 60), [thing("dog", [5, 5, 25, 5, 25, 30], [60, 20, 80, 22, 70, 50])])


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pictures_for(form: str) -> list[Picture]:
    """Returns scenes with one polygon per object for YOLO's lines; for other formats one object has two."""
    several = form in ("COCO, its own layout", "Roboflow", "CVAT", "LabelMe groups", "text ids")
    return [*SCENES, PARTS] if several else SCENES


def read(annotations: Path, images: Path) -> dict[str, tuple[tuple[int, int], list[tuple[str, list[float]]]]]:
    """Read with pycocotools and PIL: for each image its true size, and class and box of each object."""
    file = COCO(str(annotations))
    found = {}
    for image in file.loadImgs(file.getImgIds()):
        with Image.open(images / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
            objects = file.loadAnns(file.getAnnIds(imgIds=[image["id"]], iscrowd=False))
            boxes = [(file.cats[o["category_id"]]["name"], [round(v, 4) for v in o["bbox"]]) for o in objects]
            found[Path(image["file_name"]).name] = (picture.size, sorted(boxes))
    return found


def wanted(pictures: list[Picture]) -> dict[str, tuple[tuple[int, int], list[tuple[str, list[float]]]]]:
    return {p.name: (p.size, sorted((t.label, [float(v) for v in t.box]) for t in p.things)) for p in pictures}


@pytest.mark.parametrize("form", WRITERS)
def test_what_is_written_is_read_and_converted(form: str, tmp_path: Path) -> None:
    write, splits, masks = WRITERS[form]
    pictures = pictures_for(form)
    write(tmp_path / "data", pictures)
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    layout = open_layout(tmp_path / "data")
    for split, place in (("train", layout.train), ("val", layout.val)):
        report = check_coco(*place, verify_images="open", purpose="train" if split == "train" else "score")
        assert report.usable, str(report)
        assert splits is False or report.masks == masks
    written = convert(tmp_path / "data", tmp_path / "coco")
    for root in ("read", "converted"):
        found = {}
        for split in ("train", "val", "test"):
            place = getattr(layout, split) if root == "read" else None
            file = tmp_path / f"coco/annotations/instances_{split}2017.json"
            if (place is None and root == "read") or (root == "converted" and not file.exists()):
                continue
            found[split] = read(*place) if place is not None else read(file, tmp_path / f"coco/{split}2017")
        if splits:
            assert found == {s: wanted([p for p in pictures if p.split == s]) for s in ("train", "val", "test")}
        else:
            assert {name: value for part in found.values() for name, value in part.items()} == wanted(pictures)
            assert all(found.values())
    assert sum(split.masks for split in written) == (sum(len(p.things) for p in pictures) if masks else 0)
    assert {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("form", [form for form, (_, _, masks) in WRITERS.items() if masks])
def test_masks_are_those_that_were_drawn(form: str, tmp_path: Path) -> None:
    """Compared with Pillow, which rasterises borders differently: masks differ at most on their border."""
    pictures = pictures_for(form)
    WRITERS[form][0](tmp_path / "data", pictures)
    convert(tmp_path / "data", tmp_path / "coco")
    seen = 0
    for file in sorted((tmp_path / "coco/annotations").iterdir()):
        truth = COCO(str(file))
        for image in truth.loadImgs(truth.getImgIds()):
            (picture,) = (p for p in pictures if p.name == image["file_name"])
            for row in truth.loadAnns(truth.getAnnIds(imgIds=[image["id"]])):
                mask = truth.annToMask(row).astype(bool)
                (drawn,) = (t for t in picture.things if [round(v) for v in row["bbox"]] == list(t.box))
                full = Image.new("1", picture.size)
                polygons = drawn.polygons
                if form == "LabelMe masks":  # full boxes in this format
                    x, y, w, h = drawn.box
                    polygons = [[x, y, x + w - 1, y, x + w - 1, y + h - 1, x, y + h - 1]]
                for polygon in polygons:
                    ImageDraw.Draw(full).polygon(polygon, fill=1)
                other = np.asarray(full)
                border = sum(2 * (drawn.box[2] + drawn.box[3]) for _ in polygons)
                assert (mask ^ other).sum() <= border
                assert (mask & other).sum() > 0.7 * other.sum()
                assert row["area"] == pytest.approx(mask.sum(), rel=0.05, abs=8)
                seen += 1
    assert seen == sum(len(p.things) for p in pictures)


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_boxes_for_predictions(form: str, tmp_path: Path) -> None:
    WRITERS[form][0](tmp_path / "data", SCENES)
    found = {Path(name).name: value for name, value in read_boxes(tmp_path / "data").items()}
    for picture in SCENES[:2]:
        boxes, labels = found[picture.name]
        corners = sorted(
            (t.label, [t.box[0], t.box[1], t.box[0] + t.box[2], t.box[1] + t.box[3]]) for t in picture.things
        )
        got = sorted(zip(labels, [[round(v, 4) for v in box] for box in boxes], strict=True))
        assert got == [(label, [float(v) for v in box]) for label, box in corners]


def test_every_format_of_the_table_has_a_writer(tmp_path: Path) -> None:
    found = set()
    for form, (write, _, _) in WRITERS.items():
        root = tmp_path / form.replace(" ", "_")
        write(root, SCENES)
        found.add(next(name for name, row in FORMATS.items() if row.find(root)))
    assert found == set(FORMATS)


def test_nothing_is_overwritten_or_written_among_the_data(tmp_path: Path) -> None:
    roboflow(tmp_path / "data", SCENES)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists already and was not changed; give the name of a new folder"):
        convert(tmp_path / "data", tmp_path / "there")
    with pytest.raises(UserError, match="new folder") as caught:
        convert(tmp_path / "data", tmp_path / "data")
    assert "delete" not in str(caught.value)
    with pytest.raises(UserError, match="is inside the data"):
        convert(tmp_path / "data", tmp_path / "data" / "coco")
    with pytest.raises(UserError, match="is inside the data"):
        convert(tmp_path / "data/train/_annotations.coco.json", tmp_path / "data/train/coco")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data", "there"]


def test_links_share_the_images_and_copies_do_not(tmp_path: Path) -> None:
    roboflow(tmp_path / "data", SCENES)
    for images in ("link", "copy"):
        assert main(["convert", str(tmp_path / "data"), str(tmp_path / images), "--images", images]) == 0
        same = os.path.samefile(tmp_path / "data/train/a.png", tmp_path / images / "train2017/a.png")
        assert same == (images == "link")
    shutil.rmtree(tmp_path / "data")
    assert main(["check", str(tmp_path / "link"), "--no-picture"]) == 0


def test_a_call_that_was_stopped_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roboflow(tmp_path / "data", SCENES)
    known, brought = os.link, []

    def fail(source: Path, place: Path) -> None:
        if len(brought) == 3:
            raise KeyboardInterrupt
        brought.append(place.name)
        known(source, place)

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "data", tmp_path / "coco")
    assert not (tmp_path / "coco").exists()
    monkeypatch.setattr(os, "link", lambda *a: brought.append(a[1].name) or known(*a))
    convert(tmp_path / "data", tmp_path / "coco")
    assert sorted(brought) == sorted(p.name for p in SCENES), "each once"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "coco", "data"]
    assert sorted(path.name for path in (tmp_path / "coco").iterdir()) == [
        "annotations",
        "test2017",
        "train2017",
        "val2017",
    ]


def test_a_stopped_command_says_where_its_part_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    roboflow(tmp_path / "data", SCENES)
    words = ["convert", str(tmp_path / "data"), str(tmp_path / "coco")]
    left = f"what is done is in {tmp_path / '.coco.unfinished'}: the same command resumes from it, or delete it.\n"
    with monkeypatch.context() as patch:
        patch.setattr("misa.data.formats.plain_coco.write_coco", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words) == 130
    assert capsys.readouterr().err == f"misa convert: stopped; {left}"
    picture = next((tmp_path / "data").rglob("*.png"))
    picture.rename(tmp_path / "away.png")
    assert main(words) == 2
    assert capsys.readouterr().err.endswith(f"misa check says where. W{left[1:]}")
    (tmp_path / "away.png").rename(picture)
    assert main(words) == 0
    assert not (tmp_path / ".coco.unfinished").exists()
    shutil.rmtree(tmp_path / "coco")
    picture.unlink()
    assert main(words) == 2
    assert ".coco.unfinished" in capsys.readouterr().err
    assert (tmp_path / ".coco.unfinished").exists()


def test_changed_data_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roboflow(tmp_path / "data", SCENES)
    with monkeypatch.context() as patch:
        patch.setattr("misa.data.formats.plain_coco.write_coco", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "data", tmp_path / "coco")
    shutil.rmtree(tmp_path / "data")
    roboflow(tmp_path / "data", SCENES[1:])
    convert(tmp_path / "data", tmp_path / "coco")
    assert sorted(path.name for path in (tmp_path / "coco/train2017").iterdir()) == ["b.png", "nothing.png"]


def test_what_cannot_be_converted_whole_is_named(tmp_path: Path) -> None:
    yolo_detect(tmp_path / "data", SCENES)
    (tmp_path / "data/labels/train/a.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    with pytest.raises(UserError, match=r"a.txt, line 1: class 7 has no name"):
        convert(tmp_path / "data", tmp_path / "coco")
    roboflow(tmp_path / "other", SCENES)
    (tmp_path / "other/train/a.png").unlink()
    with pytest.raises(UserError, match=r"the image .*/train/a.png is missing"):
        convert(tmp_path / "other", tmp_path / "coco")
    assert not (tmp_path / "coco").exists()


def test_a_name_that_ends_like_a_mark_of_voc_is_a_name(tmp_path: Path) -> None:
    """Lists of one class have `name -1` and `name  1`; an image may be named `name 1` as well."""
    shot = Picture("shot.png", "train", (40, 40), [thing("cat", [3, 3, 20, 3, 20, 20])])
    later = shot._replace(name="shot 1.png", split="val")
    WRITERS["VOC"][0](tmp_path / "data", [shot, later])
    layout = open_layout(tmp_path / "data")
    assert read(*layout.train) == wanted([shot])
    assert read(*layout.val) == wanted([later])
    (tmp_path / "data/VOCdevkit/VOC2007/ImageSets/Main/train.txt").write_text("shot -1\n")
    assert read(*open_layout(tmp_path / "data").train) == wanted([shot])


def test_names_in_folders_stay_apart(tmp_path: Path) -> None:
    """Two images with the same name in two folders keep the folders."""
    roboflow(tmp_path / "data", SCENES)
    root = tmp_path / "data/train"
    for folder, name in (("x", "a.png"), ("y", "b.png")):
        (root / folder).mkdir()
        (root / name).rename(root / folder / "same.png")
    text = (root / "_annotations.coco.json").read_text()
    (root / "_annotations.coco.json").write_text(text.replace("a.png", "x/same.png").replace("b.png", "y/same.png"))
    convert(tmp_path / "data", tmp_path / "coco")
    content = json.loads((tmp_path / "coco/annotations/instances_train2017.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["x/same.png", "y/same.png", "nothing.png"]
    assert check_coco(tmp_path / "coco/annotations/instances_train2017.json", tmp_path / "coco/train2017").usable


_OPEN = """
import json, sys
from misa.data.formats.convert import open_layout
layout = open_layout(sys.argv[1])
print(sum(len(json.load(open(s.annotations))["images"]) for s in (layout.train, layout.val)))
"""


@pytest.mark.slow
def test_eight_processes_open_one_csv_at_once(tmp_path: Path) -> None:
    WRITERS["csv of corners"][0](tmp_path / "data", SCENES)
    command = [sys.executable, "-c", _OPEN, str(tmp_path / "data")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    answers = [process.communicate(timeout=280) for process in started]
    assert [out.strip() for out, _ in answers] == ["5"] * 8, answers
    assert not [path for path in (tmp_path / "cache/misa").iterdir() if path.name.startswith(".making")]
