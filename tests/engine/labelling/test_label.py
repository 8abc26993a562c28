"""Masks for the boxes of a data set: readable by pycocotools, complete after a kill, and never replacing the data."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from scipy.stats import spearmanr

from misa.cli import main
from misa.data.images import read_image
from misa.data.rle import Part, decode, encode
from misa.engine.labelling.annotations import Mask, labelled, write
from misa.engine.labelling.label import Form, Job, Labelled, label
from misa.engine.labelling.masks import FALLBACK_QUALITY, answers, or_box
from misa.engine.prediction.shares import Share
from misa.engine.prediction.student import load_student
from misa.engine.training.train import train
from misa.errors import UserError
from tests.helpers import CPU, killed


@pytest.fixture
def data(small_run, tmp_path):
    """A copy of the embedded data of `small_run`."""
    return shutil.copytree(small_run.source.root, tmp_path / "data")


def annotations(data, split="train"):
    return data / "annotations" / f"instances_{split}2017.json"


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def results(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".html")}


def test_every_box_has_a_mask_that_others_read(small_run, data, tmp_path):
    before = digests(data)
    done = label(Job(data, tmp_path / "masks.json", run=small_run.folder), Form(sheet=3), device="cpu")
    assert [path.name for path in done.files] == [
        *("masks_train.json", "masks_train.html"),
        *("masks_val.json", "masks_val.html"),
    ]
    assert digests(data) == before
    for split in ("train", "val"):
        original = json.loads(annotations(data, split).read_text())
        content = json.loads((tmp_path / f"masks_{split}.json").read_text())
        assert content["images"] == original["images"]
        assert content["categories"] == original["categories"]
        kept = ("id", "image_id", "category_id", "bbox")
        assert [[a[k] for k in kept] for a in content["annotations"]] == [
            [a[k] for k in kept] for a in original["annotations"]
        ]
        coco = COCO(str(tmp_path / f"masks_{split}.json"))
        for annotation in coco.dataset["annotations"]:
            mask = coco.annToMask(annotation)
            x, y, w, h = annotation["bbox"]
            assert annotation["area"] == mask.sum() > 0
            assert mask[int(y) : int(np.ceil(y + h)), int(x) : int(np.ceil(x + w))].sum() == mask.sum()
            assert all(len(polygon) >= 6 for polygon in annotation["segmentation"])
            assert annotation["iscrowd"] == 0
            assert 0 <= annotation["quality"] <= 1
    page = (tmp_path / "masks_train.html").read_text()
    assert page.count("<figure") == 3
    assert "http" not in page.replace("http://www.w3.org", "")


def test_run_lengths_are_the_students_own_masks(small_run, data, tmp_path):
    done = label(Job(data, tmp_path / "m.json", run=small_run.folder, split="val"), Form(rle=True), device="cpu")
    content, student = json.loads(done.files[0].read_text()), load_student(small_run.folder, device="cpu")
    names = {row["id"]: row["name"] for row in content["categories"]}
    for image in content["images"]:
        rows = [row for row in content["annotations"] if row["image_id"] == image["id"]]
        boxes = np.array([row["bbox"] for row in rows])
        boxes[:, 2:] += boxes[:, :2]
        pixels = read_image(data / "val2017" / image["file_name"])
        found = answers(student, pixels, boxes, [names[row["category_id"]] for row in rows])
        for row, one in zip(rows, found, strict=True):
            canvas = np.zeros(pixels.shape[:2], bool)
            part = one.part
            canvas[part.top : part.top + part.pixels.shape[0], part.left : part.left + part.pixels.shape[1]] = (
                part.pixels
            )
            np.testing.assert_array_equal(decode(row["segmentation"]), canvas)
            assert (row["quality"], row.get("fallback")) == (one.quality, "box" if one.fallback else None)


def test_three_shards_equal_one_to_the_byte(small_run, data, tmp_path):
    for name in ("one", "three"):
        (tmp_path / name).mkdir()
    label(Job(data, tmp_path / "one" / "m.json", run=small_run.folder), device="cpu")
    job = Job(data, tmp_path / "three" / "m.json", run=small_run.folder)
    left = [label(job, share=Share(3, shard), device="cpu").left for shard in (1, 2, 0)]
    assert left == [7, 4, 0]  # of ten images
    assert results(tmp_path / "three") == results(tmp_path / "one")
    # A repeated run computes nothing.
    assert label(job, device="cpu").left == 0
    assert results(tmp_path / "three") == results(tmp_path / "one")


@pytest.mark.parametrize("before", [[Share()], [Share(4, i) for i in range(4)]], ids=["whole", "four shards"])
def test_shards_after_a_change_write_the_result(small_run, data, tmp_path, before):
    """The stale record of the whole run, or of a share whose folder comes later by name, does not hide the new one."""
    job = Job(data, tmp_path / "m.json", run=small_run.folder, split="val")
    for share in before:
        label(job, share=share, device="cpu")

    def images(left):
        first, last = sorted((data / "val2017").iterdir())[0], sorted((data / "val2017").iterdir())[-1]
        for path in (first, last):
            stat = path.stat()
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
        assert [label(job, share=Share(2, shard), device="cpu").left for shard in (0, 1)] == left

    images([1, 0])
    lines = [p.read_text() for p in (tmp_path / "m.label").glob("*/**/done.jsonl")]
    assert label(job, share=Share(2, 0), device="cpu").files  # nothing is predicted again
    assert [p.read_text() for p in (tmp_path / "m.label").glob("*/**/done.jsonl")] == lines
    images([1, 0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "jobs", [[], ["--cluster", "local", "--cluster-options", "timeout_min=9"]], ids=["", "cluster"]
)
def test_shards_start_by_themselves(small_run, data, tmp_path, jobs):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    words = ["label", str(data), "--run", str(small_run.folder), "--device", "cpu", "--out"]
    assert main([*words, str(tmp_path / "one" / "m.json")]) == 0
    assert main([*words, str(tmp_path / "two" / "m.json"), "--shards", "2", *jobs]) == 0
    records = sorted((tmp_path / "two" / "m.label").glob("*/shards/*/done.jsonl"))
    assert [len(path.read_text().splitlines()) for path in records] == [5, 5]
    assert results(tmp_path / "two") == results(tmp_path / "one")


def test_a_killed_one_goes_on_and_ends_with_the_same_bytes(small_run, data, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    label(Job(data, tmp_path / "whole" / "m.json", run=small_run.folder), device="cpu")
    out = tmp_path / "killed" / "m.json"
    words = ["label", str(data), "--out", str(out), "--run", str(small_run.folder), "--device", "cpu"]

    def records():
        return list((tmp_path / "killed" / "m.label").glob("*/done.jsonl"))

    killed(main, words, when=lambda: any(record.read_bytes().count(b"\n") for record in records()))
    assert not out.exists()
    with records()[0].open("ab") as file:
        file.write(b'{"name": "m_tr')  # a line truncated by a kill
    assert main(words) == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_nothing_of_others_is_overwritten(small_run, data, tmp_path, capsys):
    out = tmp_path / "m.json"
    words = ["label", str(data), "--split", "val", "--run", str(small_run.folder), "--device", "cpu", "--out"]

    def refused(target, what):
        assert main([*words, str(target)]) == 2
        assert what in capsys.readouterr().err

    out.write_text("mine")
    refused(out, "is there already")
    assert out.read_text() == "mine"
    out.unlink()
    assert main([*words, str(out)]) == 0
    out.with_suffix(".html").unlink()
    assert main([*words, str(out), "--tolerance", "2"]) == 0  # ours: another form
    change(out, lambda content: content["annotations"][0].update(quality=1))
    refused(out, "has been changed since")
    refused(tmp_path / "masks.txt", "should end in .json")
    refused(data / "annotations" / "masks.json", "lies in the data")
    other = shutil.copytree(data, tmp_path / "other")
    words[1] = str(other)
    out.unlink()
    refused(out, f"out {out} was made with other settings (data is")


@pytest.mark.parametrize("name", ["label", "written"])
def test_a_result_called_like_a_file_of_the_record_leaves_it_intact(small_run, data, tmp_path, name):
    out, plain = tmp_path / f"{name}.json", tmp_path / "m.json"
    for form in (Form(sheet=1), Form(sheet=1, rle=True)):  # the second call resumes
        for path in (out, plain):
            label(Job(data, path, run=small_run.folder, split="val"), form, device="cpu")
        assert json.loads(out.read_text()) == json.loads(plain.read_text())


def test_a_result_that_is_changed_while_it_is_made_anew_is_kept(small_run, data, tmp_path, monkeypatch):
    job = Job(data, tmp_path / "m.json", run=small_run.folder, split="val")
    label(job, device="cpu")

    def slow_write(*arguments, **options):
        change(job.target, lambda content: content.update(corrected="by hand"))
        write(*arguments, **options)

    monkeypatch.setattr("misa.engine.labelling.label.write", slow_write)
    with pytest.raises(UserError, match=r"m\.json has been changed since misa label wrote it"):
        label(job, Form(rle=True), device="cpu")
    assert json.loads(job.target.read_text())["corrected"] == "by hand"


def test_after_a_smoke_run_the_message_says_what_to_delete(data, tmp_path, monkeypatch, capsys):
    """It names --out, and after deleting what it names the same command starts."""
    out, begun = tmp_path / "m.json", []
    monkeypatch.setattr("misa.engine.labelling.label.open_source", lambda *job: begun.append(job) or sys.exit(7))
    words = ["label", str(data), "--device", "cpu", "--out", str(out)]
    with pytest.raises(SystemExit):
        main([*words, "--smoke"])
    (tmp_path / "m_train.json").write_text("masks of the smoke run")
    written = {"m_train.json": [digests(tmp_path)["m_train.json"]], "m_val.json": []}
    (tmp_path / "m.label" / "written.json").write_text(json.dumps(written))
    assert main(words) == 2
    assert (
        f"out {out} was made with other settings (student is photos:box with seed 0 (smoke) there and photos:box with "
        "seed 0 here); choose another out, or delete m.label, m_train.json beside it to label anew."
    ) in capsys.readouterr().err
    shutil.rmtree(tmp_path / "m.label")
    (tmp_path / "m_train.json").unlink()
    with pytest.raises(SystemExit):
        main(words)
    assert len(begun) == 2
    shutil.rmtree(tmp_path / "m.label")
    (tmp_path / "m.label").mkdir()
    (tmp_path / "m.label" / "thesis.txt").write_text("years of work")
    assert main(words) == 2
    refused = "m.label beside it holds thesis.txt and no record of misa label; choose another out."
    assert refused in capsys.readouterr().err


def test_changed_boxes_are_labelled_anew_and_others_are_kept(small_run, data, tmp_path):
    job = Job(data, tmp_path / "m.json", run=small_run.folder, split="val")
    label(job, device="cpu")
    (record,) = (tmp_path / "m.label").glob("*/done.jsonl")
    lines = record.read_bytes().splitlines()

    def move(content):
        content["annotations"][0]["bbox"][0] += 1
        content["annotations"][0]["bbox"][2] -= 1

    change(annotations(data, "val"), move)
    label(job, device="cpu")
    assert len(record.read_bytes().splitlines()) == len(lines) + 1


def test_boxes_of_a_renamed_class_are_labelled_anew(small_run, data, tmp_path):
    """Its id may stay the same; a student takes the name."""
    job = Job(data, tmp_path / "m.json", run=small_run.folder, split="val")
    label(job, device="cpu")
    (record,) = (tmp_path / "m.label").glob("*/done.jsonl")
    lines = len(record.read_bytes().splitlines())
    names = [row["name"] for row in json.loads(annotations(data, "val").read_text())["categories"]]

    def swap(content):
        for row, name in zip(content["categories"], [names[1], names[0], *names[2:]], strict=True):
            row["name"] = name

    used = {a["image_id"] for a in json.loads(annotations(data, "val").read_text())["annotations"]}
    change(annotations(data, "val"), swap)
    label(job, device="cpu")
    assert lines < len(record.read_bytes().splitlines()) <= lines + len(used)


def test_a_student_of_another_row_is_not_taken(small_run, small_row, data, tmp_path, monkeypatch, capsys):
    """The row of this name has been changed since it was trained; changed boxes are a warning."""
    rows = {"mine:row": small_row.but(data="coco", scenes=())}
    monkeypatch.setattr("misa.engine.labelling.label.find_row", rows.__getitem__)
    job = Job(data, tmp_path / "m.json", row="mine:row", split="val")
    run = tmp_path / "m.label" / "run"
    shutil.copytree(small_run.folder, run)
    (tmp_path / "m.label" / "label.json").write_text(json.dumps(job.settings()))
    params = json.loads((run / "params.json").read_text())
    values = json.loads(json.dumps(rows["mine:row"].values()))
    (run / "params.json").write_text(json.dumps(params | {"experiment": values, "data_root": str(data)}))
    label(job, device="cpu")
    assert capsys.readouterr().err.count("warning") == 0
    change(annotations(data), lambda content: content["annotations"].pop())
    change(annotations(data, "val"), lambda content: content["categories"].append({"id": 99, "name": "no box yet"}))
    label(job, device="cpu")
    assert "warning: the annotations of train and val in" in capsys.readouterr().err
    monkeypatch.setattr("misa.engine.labelling.label.teacher_digest", lambda _: {"teacher_digest": "now"})
    label(job, device="cpu")  # none was recorded
    params = json.loads((run / "params.json").read_text())
    (run / "params.json").write_text(json.dumps(params | {"teacher_digest": "then"}))
    with pytest.raises(UserError, match=r"was trained when mine:row or its teacher had other values"):
        label(job, device="cpu")
    (run / "params.json").write_text(json.dumps(params))
    rows["mine:row"] = rows["mine:row"].but(schedule={"epochs": 9})
    with pytest.raises(
        UserError, match=r"was trained when mine:row or its teacher had other values; delete that folder"
    ):
        label(job, device="cpu")


def test_options_of_a_training_have_no_use_beside_a_run(small_run, data, tmp_path, capsys):
    words = ["label", str(data), "--out", str(tmp_path / "m.json"), "--device", "cpu", "--run", str(small_run.folder)]
    assert main([*words, "--seed", "3"]) == 2
    assert "--seed has no effect with --run, a student that is trained already; leave it out" in capsys.readouterr().err
    assert main([*words, "--cluster", "slurm", "--cluster-options", "timeout_min=60"]) == 2
    assert "--cluster has no effect without --shards of 2 or more" in capsys.readouterr().err
    assert list(tmp_path.glob("m*")) == []


def test_crowds_stay_and_boxes_that_cannot_have_a_mask_are_counted(small_run, data, tmp_path):
    crowd = {"iscrowd": 1, "segmentation": {"size": [52, 70], "counts": [100, 40, 3500]}, "area": 40}

    def edit(content):
        rows = content["annotations"]
        for row in rows:
            row.pop("segmentation")
        rows[0].update(crowd)
        rows[1]["bbox"] = [5.2, 6.1, 0.3, 0.4]  # less than a pixel

    change(annotations(data, "val"), edit)
    done = label(Job(data, tmp_path / "m.json", run=small_run.folder, split="val"), device="cpu")
    rows = json.loads(done.files[0].read_text())["annotations"]
    assert {key: rows[0][key] for key in crowd} == crowd
    assert "quality" not in rows[0]
    assert rows[1]["fallback"] == "box"
    assert rows[1]["quality"] == FALLBACK_QUALITY
    assert rows[1]["segmentation"] == [[5.0, 6.0, 6.0, 6.0, 6.0, 7.0, 5.0, 7.0]]
    assert done.fallback >= 1


@pytest.mark.parametrize(("width", "height"), [(640, 427), (4000, 3000)])
def test_a_box_in_shares_of_the_image_is_replaced_by_its_own_pixels(width, height):
    """Six decimals, as YOLO's tools write them, add no column or row of pixels."""
    nothing, rng = Part(0, 0, np.zeros((1, 1), bool)), np.random.default_rng(0)
    for _ in range(200):
        (left, right), (top, bottom) = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in (width, height))
        shares = [(left + right) / 2 / width, (top + bottom) / 2 / height]
        shares += [(right - left) / width, (bottom - top) / height]
        x, y, w, h = np.round(shares, 6)
        box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * [width, height, width, height]
        part = or_box(nothing, np.clip(box, 0, [width, height] * 2), 0.9).part
        assert (part.left, part.top, part.pixels.shape) == (left, top, (bottom - top, right - left))


@pytest.mark.parametrize("box", [[0, 3, 0.004, 4], [6.998, 3, 7, 4], [2.999, 3.2, 3.002, 3.4], [2.4, 3.6, 4.6, 5.4]])
def test_a_thin_box_is_replaced_by_all_pixels_that_it_touches(box):
    part = or_box(Part(0, 0, np.zeros((1, 1), bool)), np.array(box), 0.9).part
    (left, top), (right, bottom) = np.floor(box[:2]), np.ceil(box[2:])
    assert (part.left, part.top, part.pixels.shape) == (left, top, (bottom - top, right - left))


@pytest.mark.parametrize("tolerance", [None, 0.0, 1.0, 40.0])
def test_no_mask_is_lost_to_the_tolerance(tolerance):
    """A line one pixel wide would vanish under any simplification within 40 pixels."""
    line = np.zeros((30, 30), bool)
    line[np.arange(25), np.arange(25)] = line[np.arange(25), np.arange(1, 26)] = True
    row = labelled({"id": 1, "bbox": [0, 0, 26, 25]}, Mask(encode(line), 0.4, False), tolerance)
    (again,) = read_back([row], 30, 30)
    assert row["area"] == again.sum() > 0
    if not tolerance:
        np.testing.assert_array_equal(again, line)


def read_back(rows, height, width):
    """Returns the masks that pycocotools reads from the annotations of one image."""
    coco = COCO()
    coco.dataset = {"images": [{"id": 1, "height": height, "width": width}], "categories": [], "annotations": []}
    coco.dataset["annotations"] = [{**row, "image_id": 1, "category_id": 1} for row in rows]
    coco.createIndex()
    return [coco.annToMask(row).astype(bool) for row in coco.dataset["annotations"]]


def test_a_true_mask_that_cannot_be_read_is_named(small_run, data, tmp_path):
    change(annotations(data, "val"), lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3]]))
    job = Job(data, tmp_path / "m.json", run=small_run.folder, split="val")
    with pytest.raises(UserError, match="annotation 2 has a mask that cannot be read"):
        label(job, device="cpu", score=True)


def test_other_formats_keep_their_images(small_run, data, tmp_path):
    """A single CSV file becomes one JSON file, with names relative to it."""
    content = json.loads(annotations(data, "val").read_text())
    names = {row["id"]: row["name"] for row in content["categories"]}
    files = {row["id"]: row["file_name"] for row in content["images"]}
    lines = ["image,x,y,box_width,box_height,label"]
    for row in content["annotations"]:
        x, y, w, h = row["bbox"]
        lines.append(f"{files[row['image_id']]},{x},{y},{w},{h},{names[row['category_id']]}")
    (data / "val2017" / "boxes.csv").write_text("\n".join(lines) + "\n")
    done = label(Job(data / "val2017", tmp_path / "m.json", run=small_run.folder), device="cpu")
    found = json.loads(done.files[0].read_text())
    assert done.files[0].name == "m.json"
    assert {row["file_name"] for row in found["images"]} == set(files.values())
    assert len(found["annotations"]) == len(content["annotations"])
    assert all("where" not in row for row in found["annotations"] + found["images"])


@pytest.mark.parametrize("form", ["img-{}", "{}"])
def test_text_ids_are_those_of_the_file(small_run, data, tmp_path, form):
    keys = {"images": ["id"], "annotations": ["id", "image_id", "category_id"], "categories": ["id"]}

    def name(content):
        for table in keys:
            for row in content[table]:
                row.update({key: form.format(row[key]) for key in keys[table]})

    for split in ("train", "val"):
        change(annotations(data, split), name)
    single = shutil.copy(annotations(data, "val"), data / "val2017" / "boxes.json")  # with images in both splits
    for given, out, made in ((data, "layout/m.json", "layout/m_val.json"), (single, "single/m.json", "single/m.json")):
        label(Job(given, tmp_path / out, run=small_run.folder), device="cpu")
        found, own = (json.loads(path.read_text()) for path in (tmp_path / made, single))
        for table in keys:
            wanted, got = ([[row[key] for key in keys[table]] for row in file[table]] for file in (own, found))
            assert got == wanted


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda c: c.update(annotations=[]), "has no boxes, so there is nothing to label"),
        (lambda c: c["categories"].append({"id": 99, "name": "unicorn"}), None),
        (lambda c: [row.update(name=f"new {row['name']}") for row in c["categories"]], "knows no class 'new "),
    ],
)
def test_what_cannot_be_labelled_is_said_in_a_sentence(small_run, data, tmp_path, capsys, edit, sentence):
    change(annotations(data, "val"), edit)
    words = ["label", str(data), "--out", str(tmp_path / "m.json"), "--split", "val", "--run", str(small_run.folder)]
    assert main([*words, "--device", "cpu"]) == (2 if sentence else 0)
    assert sentence is None or sentence in capsys.readouterr().err


def test_an_image_that_cannot_be_read_stops_the_result_and_not_the_others(small_run, data, tmp_path):
    job = Job(data, tmp_path / "m.json", run=small_run.folder, split="val")
    first = sorted((data / "val2017").iterdir())[0]
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"the other images are done, but .*{first.name}"):
        label(job, device="cpu")
    assert not job.target.exists()
    first.write_bytes(whole)
    assert len(label(job, device="cpu").files) == 2


def test_a_shard_needs_a_student(data, tmp_path):
    with pytest.raises(UserError, match="give run, or label without shard first"):
        label(Job(data, tmp_path / "m.json"), share=Share(2, 0), device="cpu")
    with pytest.raises(UserError, match="does not learn from boxes"):
        label(Job(data, tmp_path / "other.json", row="demo:mask"), device="cpu")
    assert not (tmp_path / "other.label").exists()


def test_a_student_is_not_trained_on_another_gpu_than_asked(data, tmp_path):
    """Trainings take the first GPU that torch sees, which may be somebody else's."""
    with pytest.raises(UserError, match="set CUDA_VISIBLE_DEVICES=1, and device to cuda"):
        label(Job(data, tmp_path / "m.json"), device="cuda:1")
    assert not (tmp_path / "m.label").exists()


def test_the_score_is_that_of_the_written_masks(small_run, data, tmp_path):
    job = Job(data, tmp_path / "m.json", run=small_run.folder, split="val")
    done = label(job, device="cpu", score=True)
    truth, ours = COCO(str(annotations(data, "val"))), COCO(str(done.files[0]))
    expected, quality = [], []
    for key, row in ours.anns.items():
        a, b = ours.annToMask(row), truth.annToMask(truth.anns[key])
        expected.append((a & b).sum() / (a | b).sum())
        quality.append(row["quality"])
    assert done.truth is not None
    np.testing.assert_allclose(np.sort(done.truth), np.sort(expected))
    assert f"rank correlation (Spearman) {spearmanr(quality, expected).statistic:.3f}" in str(done)


@pytest.mark.parametrize(("quality", "truth"), [([0.5, 0.5], [0.4, 0.6]), ([0.5, 0.7], [0.6, 0.6]), ([0.5], [0.6])])
def test_a_rank_correlation_that_is_not_defined_is_no_warning(quality, truth):
    """As after a smoke run, in which a box stands in for every mask."""
    done = Labelled((Path("m.json"),), np.array(quality), 0, 0, truth=np.array(truth))
    assert "rank correlation (Spearman) not defined, since all are equal" in str(done)


@pytest.mark.slow
def test_label_train_on_the_labels_and_evaluate(data, tmp_path, small_row, capsys):
    """From boxes to a student trained on masks: the two-step recipe, end to end."""
    rows = "from misa.experiment import Experiment\nfrom tests.engine.conftest import SMALL\nROWS = {'small': SMALL}\n"
    (tmp_path / "rows.py").write_text(rows)
    words = ["label", str(data), "--out", str(tmp_path / "m.json"), "--row", f"{tmp_path / 'rows.py'}:small"]
    assert main([*words, "--device", "cpu", "--score"]) == 0
    assert "is trained from these boxes: 6 images, 8 epochs, about 1 minute" in capsys.readouterr().out
    assert (tmp_path / "m.label" / "run" / "metrics.json").is_file()
    taught = shutil.copytree(data, tmp_path / "taught")
    shutil.copy(tmp_path / "m_train.json", annotations(taught))
    ours = COCO(str(annotations(taught)))
    assert all(rle.area(ours.annToRLE(row)) == row["area"] for row in ours.anns.values())
    row = small_row.but(data="coco", scenes=(), supervision="mask", affinity=None, schedule={"epochs": 1})
    torch.manual_seed(0)
    run = train(row, data_root=taught, work_dir=tmp_path / "student", machine=CPU)
    losses = (run.folder / "losses.jsonl").read_text().splitlines()
    assert len(losses) >= 2
    assert "AP" in run.metrics["segm"]
