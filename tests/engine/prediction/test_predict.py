"""Predictions on files: the same as in evaluation, readable by other tools, and complete after a kill."""

import csv
import json
import multiprocessing
import os
import shutil
import warnings
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from misa.cli import main
from misa.data.formats.coco import DataError
from misa.data.images import Video, find_inputs
from misa.data.rle import encode
from misa.engine.prediction import predict as predicting
from misa.engine.prediction import tiling
from misa.engine.prediction.files import film, paint, records
from misa.engine.prediction.known_boxes import find_boxes
from misa.engine.prediction.predict import Boxes, predict, require_own
from misa.engine.prediction.shares import Share, Tally
from misa.engine.prediction.student import Instances, find, load_student
from misa.engine.prediction.tiling import find_tiled, tiles
from misa.engine.runs.scores import DETECTIONS
from misa.engine.training.train import train
from misa.errors import UserError
from misa.experiment import TINY, TINY_MASK2FORMER
from tests.helpers import CPU, killed


@pytest.fixture(scope="module")
def student(small_run):
    return load_student(small_run.folder, device="cpu")


@pytest.fixture
def photos(small_run, tmp_path):
    """The four validation images under other names, one of them in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for path, name in zip(sorted(small_run.source.val.images.iterdir()), ("a", "b", "more/a", "c"), strict=True):
        shutil.copy(path, folder / f"{name}.png")
    return folder


def read(path):
    return np.asarray(Image.open(path))


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in (".lock", "done.jsonl")
    }


def movie(path, frames):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 12, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()


def test_three_shards_equal_one_to_the_byte(small_run, photos, tmp_path, capsys):
    movie(photos / "film.mp4", [np.full((48, 64, 3), 40 * i, np.uint8) for i in range(4)])
    inputs = [str(photos), str(photos / "film.mp4")]
    words = ["predict", str(small_run.folder), *inputs, "--score", "0", "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    for shard in (2, 0, 1):
        assert main([*words, str(tmp_path / "three"), "--shards", "3", "--shard", str(shard)]) == 0
        assert not (tmp_path / "three" / "instances.json").exists()
    lines = [len(p.read_text().splitlines()) for p in (tmp_path / "three" / "shards").glob("*/done.jsonl")]
    assert sorted(lines) == [2, 3, 3]
    assert main([*words, str(tmp_path / "three")]) == 0
    assert not (tmp_path / "three" / "done.jsonl").read_text()
    one, three = contents(tmp_path / "one"), contents(tmp_path / "three")
    del one["overlay/film.mp4"], three["overlay/film.mp4"]  # OpenCV writes the time into it
    assert one == three
    capsys.readouterr()
    assert main([*words, str(tmp_path / "three"), "--shards", "3", "--shard", "3"]) == 2
    assert "shard must be from 0 to 2" in capsys.readouterr().err


def test_images_on_record_are_counted_as_they_come(tmp_path):
    records, tally = [tmp_path / "shards" / f"{k}-of-2" / "done.jsonl" for k in range(2)], Tally(tmp_path)
    assert tally() == "0 images done"
    for path in records:
        path.parent.mkdir(parents=True)
        path.write_text("{}\n{}\n{")
    assert tally() == "4 images done"
    with records[0].open("a") as file:  # the rest of a line and one more
        file.write("}\n{}\n")
    assert tally() == tally() == "6 images done"
    records[1].write_text("{}\n")
    assert tally() == "5 images done"


def test_a_changed_image_is_predicted_by_its_shard_alone(small_run, photos, tmp_path):
    """And an image that is as before again is predicted anew: the files of its masks are of the change."""
    out, pixels = tmp_path / "out", (photos / "a.png").read_bytes()
    before = (photos / "a.png").stat().st_mtime_ns

    def again(content, moment):
        (photos / "a.png").write_bytes(content)
        os.utime(photos / "a.png", ns=(moment, moment))
        for shard in (0, 1):
            predict(small_run.folder, photos, out=out, share=Share(2, shard), score=0.0)
        assert predict(small_run.folder, photos, out=out, score=0.0).predicted == 0
        predict(small_run.folder, photos, out=tmp_path / str(moment), score=0.0)
        one, two = contents(tmp_path / str(moment)), contents(out)
        assert one == {name: two[name] for name in two if not name.startswith("shards/")}

    predict(small_run.folder, photos, out=out, score=0.0)
    again((photos / "b.png").read_bytes(), before + 10**9)
    again(pixels, before)


@pytest.mark.slow
def test_shards_as_jobs_equal_one_process_to_the_byte(small_run, photos, tmp_path):
    words = ["predict", str(small_run.folder), str(photos), "--score", "0", "--device", "cpu", "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    jobs = ["--shards", "2", "--cluster", "local", "--cluster-options", "timeout_min=9"]
    assert main([*words, str(tmp_path / "two"), *jobs]) == 0
    assert len(list((tmp_path / "two" / "shards" / "logs").glob("*.txt"))) == 2
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == {name: two[name] for name in two if not name.startswith("shards/")}


def test_a_shard_is_not_done_twice_at_a_time(small_run, photos, tmp_path):
    share, out = Share(3, 1), tmp_path / "out"
    with share.locked(out, "out"):
        with pytest.raises(UserError, match="is in use"):
            predict(small_run.folder, photos, out=out, share=share)
        with pytest.raises(UserError, match="is in use"):
            predict(small_run.folder, photos, out=out)
        assert predict(small_run.folder, photos, out=out, share=Share(3, 2)).images == 1


def test_predictions_are_those_of_the_evaluation(small_run, tmp_path):
    """The reference is mmdet's own pipeline, test loop and head."""
    done = predict(small_run.folder, small_run.source.val.images, out=tmp_path / "out", score=0.0, batch=3)
    expected = json.loads((small_run.folder / DETECTIONS).read_text())
    content = json.loads((done.folder / "instances.json").read_text())
    assert (done.images, done.instances) == (4, len(expected))
    truth = json.loads(small_run.source.val.annotations.read_text())
    file = {image["id"]: image["file_name"] for image in truth["images"]}
    name = {category["id"]: category["name"] for category in truth["categories"]}
    ours = {image["id"]: image["file_name"] for image in content["images"]}
    called = {category["id"]: category["name"] for category in content["categories"]}

    def order(rows, files, names):
        return sorted(rows, key=lambda r: (files[r["image_id"]], names[r["category_id"]], -r["score"]))

    pairs = zip(order(content["annotations"], ours, called), order(expected, file, name), strict=True)
    for mine, theirs in pairs:
        assert ours[mine["image_id"]] == file[theirs["image_id"]]
        assert called[mine["category_id"]] == name[theirs["category_id"]]
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert rle.iou([mine["segmentation"]], [theirs["segmentation"]], [0])[0, 0] > 0.99


def test_the_files_agree_with_one_another(student, photos, tmp_path):
    done = predict(student, photos, out=tmp_path / "out", score=0.0)
    out = done.folder
    coco = COCO(str(out / "instances.json"))
    assert sorted(image["file_name"] for image in coco.dataset["images"]) == ["a.png", "b.png", "c.png", "more/a.png"]
    rows = list(csv.DictReader((out / "instances.csv").read_text().splitlines()))
    assert len(rows) == len(coco.anns) == done.instances > 0
    for image in coco.dataset["images"]:
        name = image["file_name"].removesuffix(".png")
        numbers = read(out / "masks" / f"{name}.png")
        assert numbers.shape == (image["height"], image["width"]) == read(photos / image["file_name"]).shape[:2]
        mine = [row for row in rows if row["image"] == name]
        assert {row["file"] for row in mine} <= {image["file_name"]}
        assert [int(row["number"]) for row in mine] == list(range(1, len(mine) + 1))
        covered = np.zeros(numbers.shape, bool)
        for row, annotation in zip(mine, coco.imgToAnns[image["id"]], strict=True):
            mask = coco.annToMask(annotation).astype(bool)
            assert np.array_equal(numbers == int(row["number"]), mask & ~covered), "the better one is on top"
            covered |= mask
            assert (float(row["score"]), int(row["area"])) == (annotation["score"], mask.sum())
            y, x = np.nonzero(mask)
            corners = [float(row[side]) for side in ("x1", "y1", "x2", "y2")]
            assert corners == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert row["label"] == coco.cats[annotation["category_id"]]["name"]
        assert (out / "overlay" / f"{name}.jpg").is_file()


def test_a_mask_an_instance(student, photos, tmp_path):
    done = predict(student, photos / "a.png", out=tmp_path / "out", score=0.0, masks="each", overlay=False)
    annotations = json.loads((done.folder / "instances.json").read_text())["annotations"]
    found = [read(path) for path in sorted((done.folder / "masks" / "a").iterdir())]
    assert len(found) == len(annotations) > 0
    for mask, annotation in zip(found, annotations, strict=True):
        assert set(np.unique(mask)) <= {0, 255}
        assert encode(mask > 0) == annotation["segmentation"]
    assert not (done.folder / "overlay").exists()


def test_the_batch_changes_nothing_but_rounding(student, photos, tmp_path):
    one = predict(student, photos, out=tmp_path / "one", score=0.01)
    four = predict(student, photos, out=tmp_path / "four", score=0.01, batch=4)
    a, b = (json.loads((p.folder / "instances.json").read_text())["annotations"] for p in (one, four))
    assert [x["category_id"] for x in a] == [x["category_id"] for x in b]
    np.testing.assert_allclose([x["score"] for x in a], [x["score"] for x in b], atol=1e-5)


def test_the_score_is_a_threshold(student, photos, tmp_path):
    low = predict(student, photos, out=tmp_path / "low", score=0.0)
    rows = json.loads((low.folder / "instances.json").read_text())["annotations"]
    middle = float(np.median([row["score"] for row in rows]))
    high = predict(student, photos, out=tmp_path / "high", score=middle)
    assert high.instances == sum(row["score"] >= middle for row in rows)


def test_the_same_call_again_looks_at_new_and_changed_images_only(student, photos, tmp_path):
    out = tmp_path / "out"
    predict(student, photos, out=out)
    stamps = {path.name: path.stat().st_mtime_ns for path in (out / "masks").iterdir() if path.is_file()}
    shutil.copy(photos / "a.png", photos / "new.png")
    shutil.copy(photos / "c.png", photos / "b.png")
    done = predict(student, photos, out=out)
    assert done.images == 5
    after = {path.name: path.stat().st_mtime_ns for path in (out / "masks").iterdir() if path.is_file()}
    assert {name for name, stamp in after.items() if stamps.get(name) != stamp} == {"new.png", "b.png"}
    assert (read(out / "masks/b.png") == read(out / "masks/c.png")).all()


def test_nothing_is_left_of_the_earlier_content_of_an_image_that_fails_now(student, photos, tmp_path):
    out = tmp_path / "out"
    before = predict(student, photos, out=out, score=0.0)
    whole = (photos / "b.png").read_bytes()
    held = {path.relative_to(out) for path in out.rglob("b.*")}
    assert {path.parts[0] for path in held} == {"masks", "overlay"}
    (photos / "b.png").write_bytes(whole[: len(whole) // 2])
    after = predict(student, photos, out=out, score=0.0)
    assert list(after.failed) == ["b"]
    assert after.images == before.images - 1
    images = json.loads((out / "instances.json").read_text())["images"]
    assert "b.png" not in [image["file_name"] for image in images]
    assert not any((out / path).exists() for path in held)
    (photos / "b.png").write_bytes(whole)
    assert predict(student, photos, out=out, score=0.0).images == before.images


def test_a_killed_call_goes_on_and_ends_as_if_it_had_not_been_killed(small_run, photos, tmp_path):
    for i in range(20):
        shutil.copy(photos / "a.png", photos / f"copy{i:02d}.png")
    words = ["predict", str(small_run.folder), str(photos), "--score", "0", "--out"]
    out = tmp_path / "killed"
    record = out / "done.jsonl"
    killed(main, [*words, str(out)], when=lambda: record.exists() and record.read_bytes().count(b"\n") >= 3)
    assert not (out / "instances.json").exists()
    with (out / "done.jsonl").open("a") as file:
        file.write('{"name": "c", "stamp": [1')  # a truncated line
    assert main([*words, str(out)]) == 0
    assert main([*words, str(tmp_path / "whole")]) == 0
    assert contents(out) == contents(tmp_path / "whole")
    names = [json.loads(line)["name"] for line in (out / "done.jsonl").read_text().splitlines() if line.endswith("}")]
    assert len(names) == len(set(names)) == 24, "nothing was done twice"


def test_a_folder_of_something_else_is_left_alone(student, photos, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.txt and no predictions"):
        predict(student, photos, out=mine)
    assert [p.name for p in mine.iterdir() if p.name != ".lock"] == ["thesis.txt"]
    predict(student, photos, out=tmp_path / "out", score=0.5)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"made with other settings \(score is 0\.5 there and 0\.4 here\)"):
        predict(student, photos, out=tmp_path / "out", score=0.4)
    assert contents(tmp_path / "out") == before


def test_bad_images_are_told_and_the_others_done(small_run, photos, tmp_path, capsys):
    cut = (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(cut[: len(cut) // 2])
    (photos / "none.jpg").write_text("not an image")
    arguments = ["predict", str(small_run.folder), str(photos), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    *warnings, error = capsys.readouterr().err.strip().splitlines()
    assert "the other images are done, but the file" in error
    assert "b.png is truncated or not an image" in error
    assert "(1 other above)" in error
    assert any("none.jpg is truncated or not an image" in line for line in warnings)
    assert len(list((tmp_path / "out" / "masks").rglob("*.png"))) == 3
    (photos / "b.png").write_bytes(cut)
    (photos / "none.jpg").unlink()
    assert main(arguments) == 0, "a mended image is tried again"
    assert len(list((tmp_path / "out" / "masks").rglob("*.png"))) == 4


@pytest.mark.parametrize("kind", ["grey", "alpha", "palette", "16 bits", "turned", "1x1", "thin", "grey-alpha"])
def test_every_kind_of_image_is_read_at_its_size(student, tmp_path, kind):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    path, expected = tmp_path / "x.png", (40, 60)
    if kind == "grey":
        Image.fromarray(pixels[..., 0]).save(path)
    elif kind == "alpha":
        Image.fromarray(pixels).convert("RGBA").save(path)
    elif kind == "grey-alpha":
        Image.fromarray(pixels[..., 0]).convert("LA").save(path)
    elif kind == "palette":
        Image.fromarray(pixels).convert("P").save(path)
    elif kind == "16 bits":
        cv2.imwrite(str(path), pixels.astype(np.uint16) * 256)
    elif kind == "turned":
        path, expected = tmp_path / "x.jpg", (60, 40)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(path, exif=exif)
    else:
        expected = (1, 1) if kind == "1x1" else (1, 900)
        Image.fromarray(rng.integers(0, 255, (*expected, 3), dtype=np.uint8)).save(path)
    done = predict(student, path, out=tmp_path / "out", score=0.0)
    assert done.failed == {}
    (image,) = json.loads((done.folder / "instances.json").read_text())["images"]
    assert (image["height"], image["width"]) == expected
    assert read(done.folder / "masks" / "x.png").shape == expected


def test_a_video_gives_its_frames_and_a_video(student, small_run, tmp_path):
    frames = [cv2.imread(str(path)) for path in sorted(small_run.source.val.images.iterdir())] * 2
    film = tmp_path / "film.mp4"
    movie(film, frames)
    done = predict(student, film, out=tmp_path / "out", score=0.0, every=3)
    assert sorted(p.stem for p in (done.folder / "masks" / "film").iterdir()) == ["000000", "000003", "000006"]
    capture = cv2.VideoCapture(str(done.folder / "overlay" / "film.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(4)
    assert [capture.read()[0] for _ in range(4)] == [True, True, True, False]


def test_tiles_cover_the_image_and_overlap():
    for size, side, overlap in (((100, 257), 64, 16), ((10, 10), 64, 16), ((64, 65), 64, 63), ((300, 64), 100, 0)):
        seen = np.zeros(size, int)
        places = tiles(size, side, overlap)
        for t in places:
            assert t.bottom - t.top == min(side, size[0])
            assert t.right - t.left == min(side, size[1])
            seen[t.top : t.bottom, t.left : t.right] += 1
        assert seen.min() >= 1
        rows = sorted({t.top for t in places})
        assert all(a + side - b >= overlap for a, b in pairwise(rows))


def test_objects_cut_by_tiles_are_joined_again(student, monkeypatch):
    """Every tile sees its part of given objects; the merged result equals the objects."""
    size = (150, 200)
    truth = {}
    for name, window in {
        "striped star": (slice(10, 140), slice(20, 60)),
        "checked ring": (slice(60, 100), slice(15, 190)),  # crosses the first, of another class
        "dotted cross": (slice(3, 9), slice(150, 160)),
    }.items():
        truth[name] = np.zeros(size, bool)
        truth[name][window] = True
    where = np.arange(size[0] * size[1]).reshape(size)
    image = np.stack([where >> 16, (where >> 8) & 255, where & 255], axis=-1).astype(np.uint8)

    def seen(_, crops, **options):
        results = []
        for crop in crops:
            index = (crop[..., 0].astype(int) << 16) | (crop[..., 1].astype(int) << 8) | crop[..., 2]
            masks = {name: mask.reshape(-1)[index] for name, mask in truth.items() if mask.reshape(-1)[index].any()}
            runs = tuple(encode(mask) for mask in masks.values())
            results.append(
                Instances(crop.shape[:2], np.full(len(masks), 0.9), tuple(masks), np.zeros((len(masks), 4)), runs)
            )
        return results

    monkeypatch.setattr(tiling, "find", seen)
    found = find_tiled(student, image, side=64, overlap=24, batch=5)
    assert sorted(found.labels) == sorted(truth)
    for label, mask, box in zip(found.labels, found.masks(), found.boxes, strict=True):
        assert np.array_equal(mask, truth[label]), label
        y, x = np.nonzero(mask)
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_one_tile_is_the_whole_image(student, photos):
    image = np.asarray(Image.open(photos / "a.png").convert("RGB"))
    (whole,) = find(student, [image], score=0.01)
    tiled = find_tiled(student, image, side=100, overlap=10, score=0.01)
    assert tiled.labels == whole.labels
    assert tiled.runs == whole.runs


def test_known_boxes_get_a_mask_each_within_the_box(student, photos):
    image = np.asarray(Image.open(photos / "a.png").convert("RGB"))
    boxes = np.array([[3, 4, 30, 40], [20.5, 10, 60, 51], [3, 4, 30, 40], [40, 40, 44, 43]])
    found = find_boxes(student, image, boxes, ["dotted cross", None, "striped star", None], mask=0.1)
    assert len(set(found.prompts)) == len(found) > 0
    assert all(0 < score <= 1 for score in found.scores)
    for prompt, label, mask in zip(found.prompts, found.labels, found.masks(), strict=True):
        assert label == {0: "dotted cross", 2: "striped star"}.get(prompt, label)
        y, x = np.nonzero(mask)
        x1, y1, x2, y2 = boxes[prompt]
        assert x.min() + 0.5 >= x1
        assert x.max() + 0.5 < x2
        assert y.min() + 0.5 >= y1
        assert y.max() + 0.5 < y2
    assert len(find_boxes(student, image, np.zeros((0, 4)))) == 0


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        ([[5, 5, 5, 9]], None, r"the box \[5.0, 5.0, 5.0, 9.0\] has no area in the image of 70 x 52 pixels"),
        ([[80, 5, 90, 9]], None, "has no area in the image"),
        ([[5, 5, np.nan, 9]], None, "finite x1 y1 x2 y2"),
        ([5, 5, 6], None, r"an array \(n 4\)"),
        ([[5, 5, 16, 17]], ["zebra"], "knows no class 'zebra'; its classes are striped star"),
        ([[5, 5, 16, 17]], ["dotted cross"] * 2, "1 box is given and 2 labels; give one label for each box"),
    ],
)
def test_wrong_boxes_are_named(student, photos, boxes, labels, message):
    image = np.asarray(Image.open(photos / "a.png").convert("RGB"))
    with pytest.raises(UserError, match=message):
        find_boxes(student, image, boxes, labels)


def test_boxes_by_image_name(student, photos, tmp_path):
    boxes = {"a.png": Boxes(np.array([[3.0, 4, 30, 40]]), [None])}
    done = predict(student, photos, out=tmp_path / "out", boxes=boxes, mask=0.1)
    assert done.images == 1
    with pytest.raises(UserError, match=r"no box is of an image that was given: boxes are of other\.png"):
        predict(student, photos, out=tmp_path / "no", boxes={"other.png": boxes["a.png"]})


def test_a_box_outside_the_image_costs_the_others_nothing(student, photos, tmp_path, small_run, capsys):
    good, other = [3.0, 4, 30, 40], [20.0, 10, 60, 51]
    given = {"a.png": Boxes(np.array([[80.0, 5, 90, 9], good, [5.0, 5, 5, 9], other]), [None] * 4)}
    done = predict(student, photos, out=tmp_path / "out", boxes=given, mask=0.1)
    assert (done.images, done.failed, done.outside, done.clipped) == (1, {}, {"a": 2}, {})
    image = np.asarray(Image.open(photos / "a.png").convert("RGB"))
    expected = find_boxes(student, image, np.array([good, other]), mask=0.1)
    ((_, row),) = records(done.folder)
    assert [one["prompt"] for one in row["instances"]] == [1 + 2 * i for i in expected.prompts]
    assert done.instances == len(expected)
    file = tmp_path / "boxes.csv"
    lines = [f"a.png,{box},{student.classes[0]}" for box in ("80,5,90,9", "3,4,30,40")]
    file.write_text("\n".join(["image,x1,y1,x2,y2,label", *lines]))
    words = ["predict", str(small_run.folder), str(photos / "a.png"), "--boxes", str(file), "--out"]
    assert main([*words, str(tmp_path / "again")]) == 0
    assert "1 box has no area in the image and got no mask" in capsys.readouterr().err
    file.write_text(file.read_text().rpartition("a.png")[0])
    assert main([*words, str(tmp_path / "none")]) == 2
    assert "has no area in the image of 70 x 52 pixels" in capsys.readouterr().err


def test_an_image_listed_without_boxes_does_not_get_another_ones(student, photos, tmp_path):
    box, none = Boxes(np.array([[3.0, 4, 30, 40]]), [None]), Boxes(np.array([]), [])
    boxes = {"b.png": box, "photos/a.png": none, "y/a.png": box}
    done = predict(student, [photos / "a.png", photos / "b.png"], out=tmp_path / "out", boxes=boxes, overlay=False)
    assert [name for name, _ in records(done.folder)] == ["b"]
    assert done.unused == ("y/a.png",)


def test_boxes_of_images_with_equal_names_in_two_folders(student, photos, tmp_path):
    """As in YOLO data, whose image names are full paths; also where the data has been moved."""
    root = tmp_path / "data/images"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        shutil.copy(photos / "a.png", root / split / "0.png")
    box = {"train": [3.0, 4, 30, 40], "val": [20.0, 10, 60, 51]}
    for home in (tmp_path, "/moved"):
        boxes = {f"{home}/data/images/{split}/0.png": Boxes(np.array([box[split]]), [None]) for split in box}
        for given in ("train", "val", ""):
            done = predict(
                student, root / given, out=tmp_path / f"out{len(str(home))}{given}", boxes=boxes, overlay=False
            )
            assert done.images == (1 if given else 2)
            assert done.unused == tuple(name for name in boxes if given and f"/{given}/" not in name)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x/a.png", "y/a.png"], {}),
        (["a.png"], {"a": "a.png"}),
        (["more/a.png"], {"more/a": "more/a.png"}),
        (["/elsewhere/more/a.png", "/elsewhere/a.png"], {"more/a": "/elsewhere/more/a.png"}),
        (["/elsewhere/photos/a.png"], {"a": "/elsewhere/photos/a.png"}),
        (["x/b.png"], {"b": "x/b.png"}),
        (["x/b.png", "y/b.png"], {}),
        (["b.jpg", "b.tif"], {}),
        (["b.jpg"], {"b": "b.jpg"}),
        (["a.png", "photos/a.png"], {"a": "photos/a.png"}),
        (["more/a.png", "x/b.png"], {"more/a": "more/a.png"}),
        (["y/a.png", "x/b.png"], {"b": "x/b.png"}),
        (["labels/../more/a.png", "photos/b.png"], {"more/a": "labels/../more/a.png", "b": "photos/b.png"}),
        (["../photos/a.png", "photos/b.png"], {"a": "../photos/a.png", "b": "photos/b.png"}),
    ],
)
def test_the_image_that_a_name_of_boxes_is_of(student, photos, tmp_path, names, expected):
    """The nearest on both sides; a name that may be of several images is of none.

    Where a name's folders are those of its image, another folder's image has no boxes here.
    """
    boxes = {name: Boxes(np.array([[3.0, 4, 30, 40]]), [None]) for name in names}
    if not expected:
        with pytest.raises(UserError, match="no box is of an image that was given"):
            predict(student, photos, out=tmp_path / "out", boxes=boxes)
        return
    done = predict(student, photos, out=tmp_path / "out", boxes=boxes, overlay=False)
    assert {name for name, _ in records(done.folder)} == expected.keys()
    assert set(done.unused) == set(names) - set(expected.values())


def test_names_that_are_no_utf_8_or_as_long_as_can_be(student, photos, tmp_path):
    """As older systems wrote them: they are predicted on, and the results use Python's decoding of such names."""
    names = [os.fsdecode(b"caf\xe9.png"), "x" * 251 + ".png"]
    folder = tmp_path / "old"
    folder.mkdir()
    for name in names:
        shutil.copy(photos / "a.png", folder / name)
    for _ in range(2):
        done = predict(student, [folder], out=tmp_path / "out", score=0.02)
        assert (done.images, done.failed) == (2, {})
    content = json.loads((tmp_path / "out/instances.json").read_text())
    assert {image["file_name"] for image in content["images"]} == set(names)
    assert (tmp_path / "out/instances.csv").is_file()


def test_names_of_results(tmp_path):
    for name in ("one/x.jpg", "one/x.png", "one/y.png", "two/x.jpg", "two/.hidden.png", "one/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = {item.path.relative_to(tmp_path).as_posix(): item.name for item in find_inputs([tmp_path])}
    assert names == {"one/x.jpg": "one/x.jpg", "one/x.png": "one/x.png", "one/y.png": "one/y", "two/x.jpg": "two/x"}
    two = find_inputs([tmp_path / "one", tmp_path / "two", tmp_path / "one" / "y.png"])
    assert sorted(item.name for item in two) == ["one/x.jpg", "two/x.jpg", "x.png", "y"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("phtoos", "did you mean 'photos'"),
        ("empty", "holds no image"),
        ("https://example.org/a.jpg", "is an address; download it"),
        ("photos/notes.txt", "neither an image nor a video"),
        ("photos/broken.mp4", "cannot be read by OpenCV"),
    ],
)
def test_wrong_inputs_are_named_before_the_checkpoint_is_read(photos, tmp_path, inputs, message):
    (tmp_path / "empty").mkdir()
    (photos / "notes.txt").write_text("")
    (photos / "broken.mp4").write_bytes(b"0" * 100)
    given = inputs if ":" in inputs else tmp_path / inputs
    with pytest.raises(DataError, match=message):
        predict("/no/checkpoint", given, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_known_boxes_from_a_file(small_run, photos, tmp_path, capsys):
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("image,x1,y1,x2,y2,label\na.png,3,4,30,40,dotted cross\nmore/a.png,20,10,60,51,striped star\n")
    common = ["predict", str(small_run.folder), str(photos), "--mask", "0.1"]
    assert main([*common, "--boxes", str(boxes), "--out", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out/instances.json").read_text())
    assert sorted(image["file_name"] for image in content["images"]) == ["a.png", "more/a.png"]
    boxes.write_text("image,x1,y1,x2,y2,label\na.png,3,4,30,40,zebra\n")
    assert main([*common, "--boxes", str(boxes), "--out", str(tmp_path / "zebra")]) == 2
    error = capsys.readouterr().err
    assert "the student knows no class 'zebra'; its classes are " in error
    assert error.endswith("; it is the label of a box of a.png.\n")
    assert not (tmp_path / "zebra").exists(), "it is known before anything is written"
    assert main([*common, "--boxes", str(tmp_path / "no.csv"), "--out", str(tmp_path / "no")]) == 2
    assert "there is no file of boxes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("student", ["mask2former", "boxinst"])
def test_other_students_predict_as_they_are_evaluated(student, small_row, tmp_path):
    row = small_row.but(student=student, network=TINY_MASK2FORMER if student == "mask2former" else TINY)
    run = train(row.but(schedule={"epochs": 1}), data_root=tmp_path / "data", work_dir=tmp_path / "run", machine=CPU)
    expected = json.loads((run.folder / DETECTIONS).read_text())
    done = predict(run.folder, run.source.val.images, out=tmp_path / "out", score=0.0)
    found = json.loads((done.folder / "instances.json").read_text())["annotations"]
    whole = [row for row in expected if rle.area(row["segmentation"])]
    assert len(found) == len(whole)
    scores = sorted(row["score"] for row in whole)
    np.testing.assert_allclose(sorted(row["score"] for row in found), scores, atol=1e-5)
    assert sum(row["area"] for row in found) == sum(int(rle.area(row["segmentation"])) for row in whole)
    image = np.asarray(Image.open(next(run.source.val.images.iterdir())).convert("RGB"))
    answers = find_boxes(load_student(run.folder), image, [[3, 4, 30, 40], [20, 10, 60, 51]])
    assert len(set(answers.prompts)) == len(answers)
    with pytest.raises(UserError, match="mask is a threshold of solov2 students"):
        find(load_student(run.folder), [image], mask=0.5)


def test_a_threshold_that_a_student_lacks_is_known_before_anything_is_written(student, photos, tmp_path):
    other = replace(student, experiment=student.experiment.but(student="condinst"))
    for boxes in (None, {"a": Boxes(np.array([[3.0, 4, 30, 40]]), (None,))}):
        with pytest.raises(UserError, match="mask is a threshold of solov2 students"):
            predict(other, photos, out=tmp_path / "out", mask=0.5, boxes=boxes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("known", [False, True])
def test_an_image_that_does_not_fit_into_memory_is_a_sentence(student, photos, tmp_path, monkeypatch, known):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(predicting, "find_boxes" if known else "find", full)
    boxes = {"a": Boxes(np.array([[3.0, 4, 30, 40]]), (None,))} if known else None
    advice = "set device cpu" if known else "set a smaller batch, tile, or device cpu"
    with pytest.raises(UserError, match=rf"a\.png does not fit into the memory of cpu; {advice}\."):
        predict(student, photos, out=tmp_path / "out", boxes=boxes)


def test_shares_that_start_together_agree_on_the_record(tmp_path):
    """Each writes the settings unless another has; earlier, one in sixteen refused the other's half-written file."""

    def begin(folder, own):
        for k in range(20):
            place = folder / str(k)
            place.mkdir(exist_ok=True)
            require_own(place, {"score": 0.3, "classes": ["a", "b"]})
            (place / f"mask-{own}.png").write_bytes(b"first result")

    context = multiprocessing.get_context("fork")
    shares = [context.Process(target=begin, args=(tmp_path, own), daemon=True) for own in range(6)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        for share in shares:
            share.start()
    for share in shares:
        share.join(60)
    assert [share.exitcode for share in shares] == [0] * 6
    for k in range(20):
        assert json.loads((tmp_path / str(k) / "predict.json").read_text())["score"] == 0.3
        assert not list((tmp_path / str(k)).glob("*.part"))
    with pytest.raises(UserError, match="was made with other settings"):
        require_own(tmp_path / "0", {"score": 0.4, "classes": ["a", "b"]})


@pytest.mark.parametrize(
    ("fps", "every"), [(239.874, 1), (500.0, 7), (30.0, 40000), (25.0, 1), (700.33, 1), (999.99, 1)]
)
def test_a_film_of_any_rate_is_written(tmp_path, fps, every):
    """MPEG-4 has no time base above 65535, and OpenCV writes nothing then."""
    for k in range(3):
        (tmp_path / "overlay" / "v").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 48, 3), 80 * k, np.uint8)).save(tmp_path / "overlay" / "v" / f"{k:06d}.jpg")
    film(tmp_path, Video("v", tmp_path / "v.avi", (0, 0), 3, fps), every)
    capture = cv2.VideoCapture(str(tmp_path / "overlay" / "v.mp4"))
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 3
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(max(fps / every, 0.01), rel=2e-4)
    capture.release()


def test_frames_beyond_a_million_are_shown_in_their_order(tmp_path):
    (tmp_path / "overlay" / "v").mkdir(parents=True)
    for index, gray in ((999_998, 0), (999_999, 80), (1_000_000, 160)):
        Image.fromarray(np.full((32, 48, 3), gray, np.uint8)).save(tmp_path / "overlay" / "v" / f"{index:06d}.jpg")
    film(tmp_path, Video("v", tmp_path / "v.avi", (0, 0), 3, 25.0), 1)
    capture = cv2.VideoCapture(str(tmp_path / "overlay" / "v.mp4"))
    shown = [capture.read()[1].mean() for _ in range(3)]
    capture.release()
    assert shown == pytest.approx([0, 80, 160], abs=8)


def test_the_overlay_of_an_image_longer_than_a_jpeg_is_smaller(tmp_path):
    image = np.zeros((3, 66000, 3), np.uint8)
    nothing = Instances((3, 66000), np.zeros(0), (), np.zeros((0, 4)), ())
    paint(tmp_path, "long", image, nothing, masks="map", pictures=True)
    assert max(cv2.imread(str(tmp_path / "overlay" / "long.jpg")).shape) == 65500
    assert read(tmp_path / "masks" / "long.png").shape == (3, 66000)


def test_results_of_shares_that_are_not_merged_are_no_inputs(photos, student, tmp_path):
    for shard in range(2):
        predict(student, photos, out=photos / "results", share=Share(2, shard))
    assert {item.name for item in find_inputs([photos])} == {"a", "b", "more/a", "c"}


def test_images_in_the_folder_above_keep_their_results_inside(photos, tmp_path, monkeypatch):
    (photos / "inside").mkdir()
    monkeypatch.chdir(photos / "inside")
    names = {item.name for item in find_inputs(["..", "../more"])}
    assert not any(name.startswith("..") for name in names)
    assert len(names) == 4


def test_what_was_given_is_named_among_earlier_results(photos, student, tmp_path):
    predict(student, photos / "more", out=tmp_path / "out")
    done = predict(student, [photos / "b.png", photos / "c.png"], out=tmp_path / "out")
    assert done.names == ("b", "c")
    assert (done.given[0], done.images) == (2, 3)


def test_jobs_of_a_cluster_need_shares(student, photos, tmp_path, capsys):
    common = ["predict", str(student.path), str(photos), "--out", str(tmp_path / "out")]
    wrong = {
        "--cluster has no effect without --shards of 2 or more": ["--cluster", "slurm"],
        "--cluster has no effect beside --shard, which is one": ["--cluster", "slurm", "--shards", "2", "--shard", "0"],
        "--cluster-options has no effect without --cluster": ["--cluster-options", "timeout_min=9", "--shards", "2"],
        "--score has no effect with --boxes": ["--score", "0.5", "--boxes", "boxes.csv"],
        "--overlap has no effect without --tile": ["--overlap", "64"],
        "--shards gives each of its processes a GPU of its own": ["--shards", "2", "--device", "cuda:1"],
    }
    for words, options in wrong.items():
        assert main([*common, *options]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_boxes_without_a_mask_are_counted_aloud(small_run, photos, tmp_path, capsys):
    boxes = tmp_path / "boxes.csv"
    lines = [
        "image,x1,y1,x2,y2,label",
        "a.png,3,4,30,40,dotted cross",
        "a.png,20,10,60,51,striped star",
        "nowhere.png,3,4,30,40,dotted cross",
    ]
    boxes.write_text("\n".join(lines))
    command = ["predict", str(small_run.folder), str(photos), "--device", "cpu", "--boxes", str(boxes), "--out"]
    for _ in range(2):  # the second time nothing is left to do, and the output is the same
        assert main([*command, str(tmp_path / "none"), "--mask", "1"]) == 0
        printed = capsys.readouterr().err
        assert "2 boxes have no mask, the student found nothing there (first: 2 boxes of a)" in printed
        assert "the boxes of nowhere.png are of no image that was given." in printed
    boxes.write_text("\n".join(lines[:3]))
    assert main([*command, str(tmp_path / "all"), "--mask", "0"]) == 0
    assert "no mask" not in capsys.readouterr().err


def test_boxes_beyond_their_image_are_counted_aloud_and_rounded_ones_are_not(small_run, photos, tmp_path, capsys):
    with Image.open(photos / "a.png") as one:
        w, h = one.size
    boxes = tmp_path / "boxes.csv"
    command = ["predict", str(small_run.folder), str(photos), "--device", "cpu", "--mask", "0.1", "--boxes", str(boxes)]

    def warned(name, *lines):
        boxes.write_text("\n".join(["image,x1,y1,x2,y2,label", *lines]))
        assert main([*command, "--out", str(tmp_path / name)]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "beyond" in line]

    assert warned("rounded", f"a.png,3,4,{w + 1},{h},dotted cross", f"a.png,-0.9,-1,30,{h + 0.7},striped star") == []
    lines = [
        f"a.png,3,4,{w + 1.1},40,dotted cross",
        f"a.png,3,4,30,{2 * h},dotted cross",
        "a.png,3,4,30,40,dotted cross",
    ]
    for name in ("one", "one"):  # the second time nothing is left to do, and the line is the same
        (line,) = warned(name, *lines)
        assert line.startswith(
            "warning: 2 boxes reach more than a pixel beyond the image, and only the part inside was used"
        )
        assert line.endswith("have the same size (first: 2 boxes of a).")
    (line,) = warned("other", lines[2], "more/a.png,-1.5,4,30,40,dotted cross")
    assert line.startswith("warning: 1 box reaches more than a pixel")
    assert line.endswith("(first: 1 box of more/a).")


def test_corrected_boxes_are_looked_at_again(student, photos, tmp_path):
    def table(boxes):
        known = {"a.png": Boxes(np.array(boxes), [None] * len(boxes))}
        done = predict(student, photos, out=tmp_path / "out", boxes=known, mask=0.1)
        return list(csv.DictReader((done.folder / "instances.csv").read_text().splitlines()))

    first = table([[3.0, 4, 30, 40]])
    stamp = (tmp_path / "out" / "masks" / "a.png").stat().st_mtime_ns
    assert table([[3.0, 4, 30, 40]]) == first
    assert (tmp_path / "out" / "masks" / "a.png").stat().st_mtime_ns == stamp
    other = [[3.0, 4, 30, 40], [35.0, 10, 66, 50]]
    again = table(other)
    assert {row["box"] for row in again} == {"1", "2"} != {row["box"] for row in first}
    image = np.asarray(Image.open(photos / "a.png").convert("RGB"))
    assert len(again) == len(find_boxes(student, image, np.array(other), [None] * 2, mask=0.1))


def test_nothing_is_left_of_an_image_that_changed_or_has_another_name_now(student, photos, tmp_path):
    out = tmp_path / "out"

    def numbers(masks):
        done = predict(student, photos, out=out, score=0.0, masks=masks)
        rows = list(csv.DictReader((out / "instances.csv").read_text().splitlines()))
        return done, {row["image"] for row in rows}, sum(row["image"] == "a" for row in rows)

    _, names, before = numbers("each")
    assert before == len(list((out / "masks" / "a").iterdir()))
    assert "a" in names
    (out / "masks" / "a" / "0999.png").touch()  # as if there had been more instances
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    _, _, after = numbers("each")
    assert after == len(list((out / "masks" / "a").iterdir()))
    shutil.copy(photos / "b.png", photos / "a.png")
    shutil.copy(photos / "c.png", photos / "a.bmp")  # now both keep their suffix in the name
    done, names, _ = numbers("each")
    assert done.images == 5
    assert "a" not in names
    assert {"a.png", "a.bmp"} <= names
    assert not list((out / "masks" / "a").iterdir())
    assert not (out / "overlay" / "a.jpg").exists()
    # Only files of the image are removed: a folder may have its name and contain numbered images.
    assert (out / "masks" / "more" / "a").is_dir()


def test_a_folder_with_the_name_of_a_video_keeps_its_images(student, small_run, tmp_path):
    frame = cv2.imread(str(next(iter(small_run.source.val.images.iterdir()))))
    movie(tmp_path / "in.mp4", [frame])
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "x.png"), frame)
    found = [tmp_path / "in.mp4", tmp_path / "in" / "x.png"]
    for _ in range(2):
        assert predict(student, found, out=tmp_path / "out", score=0.0).images == 2


def test_a_shorter_video_has_no_frames_of_the_longer_one(student, small_run, tmp_path):
    frame = cv2.imread(str(next(iter(small_run.source.val.images.iterdir()))))
    for length in (7, 4):
        movie(tmp_path / "film.mp4", [frame] * length)
        done = predict(student, tmp_path / "film.mp4", out=tmp_path / "out", score=0.0)
        assert done.images == length
        for kind in ("masks", "overlay"):
            assert len(list((tmp_path / "out" / kind / "film").iterdir())) == length


def test_other_images_join_those_of_earlier_calls_and_replace_none(small_run, photos, tmp_path, capsys):
    """The summary is of this call's images; an image that is called as one of another folder is refused."""
    out = tmp_path / "out"
    other = photos.rename(tmp_path / "first") / "more"

    def said(*inputs):
        words = ["predict", str(small_run.folder), *map(str, inputs), "--out", str(out), "--device", "cpu"]
        status = main([*words, "--score", "0"])
        printed = capsys.readouterr()
        return printed.err.splitlines()[-1] if status else printed.out.strip()

    def held():
        tables = json.loads((out / "instances.json").read_text())
        names = {image["id"]: image["file_name"] for image in tables["images"]}
        return Counter(names[row["image_id"]] for row in tables["annotations"])

    first = [tmp_path / "first" / name for name in ("b.png", "c.png")]
    assert said(first[0]) == f"{out}: {sum(held().values())} instances in 1 image"
    before = held()["b.png"]
    alone = said(other)
    assert set(held()) == {"a.png", "b.png"}
    assert held()["b.png"] == before > 0
    assert alone == (
        f"{out}: {held()['a.png']} instances in 1 image; with those of earlier calls, instances.json holds "
        f"{sum(held().values())} instances in 2 images"
    )
    both = said(*first)
    assert f"{held()['b.png'] + held()['c.png']} instances in 2 images, of which 1 was new or changed; with" in both
    whole = contents(out)
    refused = said(tmp_path / "first" / "a.png")
    assert f"holds results of {other / 'a.png'}, which those of {tmp_path / 'first' / 'a.png'} would replace" in refused
    assert contents(out) == whole
    Image.new("RGB", (50, 40)).save(first[0])  # the same file, changed
    assert f"{out}: " in said(first[0])
    sizes = {image["file_name"]: image["width"] for image in json.loads((out / "instances.json").read_text())["images"]}
    assert sizes["b.png"] == 50
    # Under a longer name, as another of its name is given as well, the image is not held twice.
    Image.new("RGB", (50, 40)).save(first[1].with_suffix(".bmp"))
    said(first[1], first[1].with_suffix(".bmp"))
    tables = json.loads((out / "instances.json").read_text())
    assert sorted(image["file_name"] for image in tables["images"]) == ["a.png", "b.png", "c.bmp", "c.png"]


def test_an_unreadable_file_costs_no_shard_the_others(small_run, tmp_path, capsys):
    """The call for all shards, which tries it again, says so and writes the tables of the rest."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "c", "d"):
        Image.new("RGB", (48, 40), (name == "c" and "red") or "blue").save(folder / f"{name}.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    words = ["predict", str(small_run.folder), str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for shard in (0, 1):
        assert main([*words, "--shards", "2", "--shard", str(shard)]) == 0
        assert ("warning: " in capsys.readouterr().err) is (shard == 1)
    assert main(words) == 2
    assert "the other images are done, but " in capsys.readouterr().err
    tables = json.loads((tmp_path / "out" / "instances.json").read_text())
    assert [image["file_name"] for image in tables["images"]] == ["a.png", "c.png", "d.png"]


def test_another_file_of_equal_name_size_and_time_is_refused(small_run, tmp_path, capsys):
    """As after unzipping; a file that was moved, or copied, is the same."""
    rng = np.random.default_rng(0)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(tmp_path / folder / "a.bmp")
        os.utime(tmp_path / folder / "a.bmp", (1e9, 1e9))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")

    def predicted(folder):
        command = ["predict", str(small_run.folder), str(tmp_path / folder), "--out", str(tmp_path / "out")]
        return main([*command, "--device", "cpu"])

    assert predicted("one") == 0
    assert predicted("copy") == 0
    assert predicted("two") == 2
    assert "would replace, as both are called a" in capsys.readouterr().err
    (tmp_path / "copy").rename(tmp_path / "moved")
    assert predicted("moved") == 0
    assert "0 were new or changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("calls", "valid"), [((None, None), "whole"), ((1, 2), "whole"), ((2, 2), "whole"), ((3, 2), "shard")]
)
def test_of_two_records_of_an_image_that_of_the_later_call_is_valid(tmp_path, calls, valid):
    """Older records have no call; in equal ones that of the run without a share is valid, as before."""
    files = {"shard": tmp_path / "shards" / "0-of-2" / "done.jsonl", "whole": tmp_path / "done.jsonl"}
    files["shard"].parent.mkdir(parents=True)
    for (who, path), call in zip(files.items(), calls, strict=True):
        row = {"name": "a", "file": "a.png", "stamp": who, "size": [1, 1], "instances": []}
        row |= {} if call is None else {"call": call}
        path.write_text(json.dumps(row) + "\n")
    assert [(name, row["stamp"]) for name, row in records(tmp_path)] == [("a", valid)]


@pytest.mark.parametrize("together", [True, False])
def test_an_image_called_as_a_mask_of_another_keeps_its_masks(student, photos, tmp_path, together):
    """The image a/0001 and the first mask of the image a, which is masks/a/0001.png."""
    (photos / "a").mkdir()
    shutil.copy(photos / "b.png", photos / "a" / "0001.png")
    inputs = [photos / "a.png", photos / "a" / "0001.png"]
    for given in [[photos]] if together else [inputs[:1], [photos]] + [[path] for path in inputs]:
        done = predict(student, given, out=tmp_path / "out", score=0.0, masks="each")
    assert len(list((tmp_path / "out" / "masks").rglob("*.png"))) == done.instances > 0


def test_a_video_that_is_called_otherwise_is_counted_once(student, small_run, tmp_path):
    """Beside film.png the frames of film.mp4 are film.mp4/000000 and so on."""
    frame = cv2.imread(str(next(iter(small_run.source.val.images.iterdir()))))
    movie(tmp_path / "film.mp4", [frame] * 3)
    cv2.imwrite(str(tmp_path / "film.png"), frame)
    video, both = [tmp_path / "film.mp4"], [tmp_path / "film.mp4", tmp_path / "film.png"]
    for given, images, name in (
        (video, 3, "film.mp4"),
        (both, 4, "film.mp4.mp4"),
        (video, 4, "film.video.mp4"),  # beside the folder of the name before
        (both, 4, "film.mp4.mp4"),
    ):
        assert predict(student, given, out=tmp_path / "out", score=0.0).images == images
        overlays = (tmp_path / "out" / "overlay").iterdir()
        assert [path.name for path in overlays if path.suffix == ".mp4" and path.is_file()] == [name]
        files = [row["file_name"] for row in json.loads((tmp_path / "out" / "instances.json").read_text())["images"]]
        assert len([file for file in files if file.startswith("film")]) == images


@pytest.mark.parametrize("first", [0, 1, None])
def test_a_film_beside_a_folder_of_its_name(student, small_run, tmp_path, first):
    """Frames are often extracted into a folder that is called as the clip."""
    frame = cv2.imread(str(next(iter(small_run.source.val.images.iterdir()))))
    movie(tmp_path / "film.mp4", [frame] * 2)
    (tmp_path / "in" / "film.mp4").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "in" / "film.mp4" / "0001.png"), frame)
    inputs = [tmp_path / "film.mp4", tmp_path / "in"]
    if first is not None:
        predict(student, inputs[first], out=tmp_path / "out", score=0.0)
    assert predict(student, inputs, out=tmp_path / "out", score=0.0).images == 3
    assert (tmp_path / "out" / "overlay" / "film.mp4" / "0001.jpg").is_file()
    assert (tmp_path / "out" / "overlay" / "film.video.mp4").is_file()


@pytest.mark.parametrize("name", ["photo", "7"])
def test_a_photograph_below_the_name_of_a_video_is_no_frame(student, small_run, tmp_path, name):
    frame = cv2.imread(str(next(iter(small_run.source.val.images.iterdir()))))
    movie(tmp_path / "film.mp4", [frame] * 2)
    (tmp_path / "in" / "film").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "in" / "film" / f"{name}.png"), frame[:40, :40])
    for given, predicted, images in (("film.mp4", 2, 2), ("in", 1, 3), ("film.mp4", 0, 3)):
        done = predict(student, tmp_path / given, out=tmp_path / "out", score=0.0)
        assert (done.predicted, done.images) == (predicted, images)


def test_an_image_whose_known_boxes_were_removed_has_no_results(student, photos, tmp_path):
    boxes = {name: Boxes(np.array([[5.0, 5, 40, 40]]), [None]) for name in ("a.png", "b.png")}
    assert predict(student, photos, out=tmp_path / "out", boxes=boxes, mask=0.001).given[0] == 2
    done = predict(student, photos, out=tmp_path / "out", boxes={"a.png": boxes["a.png"]}, mask=0.001)
    assert (done.images, done.given[0], done.predicted) == (1, 1, 0)
    assert not (tmp_path / "out" / "masks" / "b.png").exists()
    assert predict(student, photos, out=tmp_path / "out", boxes=boxes, mask=0.001).predicted == 1
