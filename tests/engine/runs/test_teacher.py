"""The semantic teacher end to end on a few embedded scenes: every supervision, no mask read, use by a student."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.mask import encode

from experiments.teacher import DEMO
from misa.cli import main
from misa.data.dataset import CocoImages
from misa.data.label_maps import fill_boxes, read_label_map
from misa.data.semantic import boxed_images, true_maps
from misa.engine.reports.evaluate import evaluate
from misa.engine.reports.separation import teacher_maps, teacher_separation
from misa.engine.runs.samples import results, training_samples
from misa.engine.runs.scores import score_merged
from misa.engine.runs.teacher import load_teacher
from misa.engine.training.labels import prepare_labels
from misa.engine.training.train import train
from misa.errors import UserError
from misa.evaluation.miou import miou
from misa.experiment import Experiment, Semantic
from misa.machine import Machine
from misa.models.teacher.config import label_folder
from misa.models.teacher.table import build_teacher
from tests.helpers import CPU

TOY = DEMO.but(
    schedule={"epochs": 2, "batch": 2, "warmup": 2},
    augmentation={"short_sides": (64, 80), "long_side": 96, "test_short_side": 64},
    scenes=(("size", 64), ("train", 6), ("val", 3), ("objects", (1, 2))),
)
STUDENT = replace(TOY, semantic=None)
WAYS = {
    "objectives": TOY,
    "rectangles": TOY.but(semantic={"labels": "rectangles"}),
    "grabcut": TOY.but(semantic={"labels": "grabcut"}),
    "mask": TOY.but(supervision="mask"),
}


@pytest.fixture(scope="module")
def place(module_path):
    return module_path


@pytest.fixture(scope="module")
def student(place):
    return train(STUDENT, data_root=place / "data", work_dir=place / "the-student", machine=CPU)


@pytest.fixture(scope="module")
def runs(place, student):
    """One run of every kind of supervision."""
    ways = WAYS | {"student": TOY.but(semantic={"labels": "student", "student": str(student.folder)})}
    return {
        name: train(row, data_root=place / "data", work_dir=place / name, machine=CPU) for name, row in ways.items()
    }


def test_every_way_leaves_a_scored_run_folder(runs):
    for name, run in runs.items():
        metrics = json.loads((run.folder / "metrics.json").read_text())
        assert set(metrics["iou"]) == {*run.source.classes, "background"}, name
        assert 0 <= metrics["miou"] <= 100
        assert "mean" in run.table()
        assert len((run.folder / "losses.jsonl").read_text().splitlines()) == 6


def test_the_score_is_that_of_the_written_predictions(runs):
    run = runs["objectives"]
    pairs = [
        (true.make(), read_label_map(run.folder / "predictions/val" / f"{true.image_id}.png"))
        for true in true_maps(run.source.val, run.source.classes)
    ]
    assert all(truth.shape == predicted.shape == (64, 64) for truth, predicted in pairs)
    assert miou(pairs, run.source.classes)["miou"] == run.metrics["miou"]


def test_the_same_seed_gives_the_same_teacher_and_evaluation_its_score(runs, place):
    for name in ("objectives", "grabcut"):
        again = train(
            WAYS[name], data_root=place / "data", work_dir=place / f"{name}-again", machine=Machine(gpus=0, workers=2)
        )
        assert (again.folder / "losses.jsonl").read_bytes() == (runs[name].folder / "losses.jsonl").read_bytes()
        np.testing.assert_equal(again.metrics, runs[name].metrics)
    assert evaluate(runs["objectives"].folder).metrics["iou"] == runs["objectives"].metrics["iou"]


def test_a_run_stopped_between_epochs_goes_on_as_if_it_had_not_been(runs, place):
    """Everything after the first checkpoint is deleted; the rest is trained again."""
    folder = shutil.copytree(runs["grabcut"].folder, place / "stopped")
    (folder / "metrics.json").unlink()
    (folder / "checkpoints" / "epoch_2.pth").unlink()
    (folder / "checkpoints" / "last_checkpoint").write_text(str(folder / "checkpoints" / "epoch_1.pth"))
    resumed = train(WAYS["grabcut"], data_root=place / "data", work_dir=folder, machine=CPU)
    np.testing.assert_equal(resumed.metrics, runs["grabcut"].metrics)
    assert (folder / "losses.jsonl").read_bytes() == (runs["grabcut"].folder / "losses.jsonl").read_bytes()


def strip(annotation):
    return {key: value for key, value in annotation.items() if key not in ("segmentation", "area")}


def spoil(annotation):
    return {**annotation, "segmentation": [[1, 2, "x"]], "area": -1}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("objectives", spoil),
        ("student", strip),
        pytest.param("objectives", strip, marks=pytest.mark.slow),
        pytest.param("student", spoil, marks=pytest.mark.slow),
        pytest.param("grabcut", strip, marks=pytest.mark.slow),
        pytest.param("grabcut", spoil, marks=pytest.mark.slow),
        pytest.param("rectangles", spoil, marks=pytest.mark.slow),
    ],
)
def test_no_mask_is_read_in_training(runs, tmp_path, name, change):
    """With every training mask deleted or replaced by garbage, all losses of all steps are equal."""
    run = runs[name]
    root = shutil.copytree(run.source.root, tmp_path / "data")
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [change(a) for a in content["annotations"]]
    path.write_text(json.dumps(content))
    other = train(replace(run.experiment, data="coco"), data_root=root, work_dir=tmp_path / "run", machine=CPU)
    assert (other.folder / "losses.jsonl").read_bytes() == (run.folder / "losses.jsonl").read_bytes()


def test_label_maps_are_what_they_are_called(runs):
    source = runs["mask"].source
    background = len(source.classes)
    for image, true in zip(
        boxed_images(source.train, source.classes), true_maps(source.train, source.classes), strict=True
    ):
        made = {
            name: read_label_map(runs[name].folder / "labels" / f"{image.image_id}.png")
            for name in runs
            if (runs[name].folder / "labels").exists()
        }
        assert set(made) == {"mask", "rectangles", "grabcut", "student"}
        filled = fill_boxes(image.boxes, image.labels, image.size, background=background)
        assert np.array_equal(made["mask"], true.make())
        assert np.array_equal(made["rectangles"], filled)
        for name in ("grabcut", "student"):
            assert (made[name][filled == background] == background).all()
            assert set(np.unique(made[name])) <= {*image.labels, background, 255}


def test_a_students_labels_need_a_trained_box_supervised_student(runs, place, tmp_path):
    def teach(student, data=place / "data"):
        row = TOY.but(semantic={"labels": "student", "student": str(student)})
        return train(row, data_root=data, work_dir=tmp_path / "run", machine=CPU)

    with pytest.raises(UserError, match=r"no trained student in .*nowhere"):
        teach(tmp_path / "nowhere")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(UserError, match="is not a box-supervised student"):
        teach(runs["mask"].folder)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(UserError, match=r"needs Semantic\.student"):
        teach("")


# ---- the hand-off


def test_the_prior_is_that_of_the_trained_network(runs):
    run = runs["objectives"]
    teacher = load_teacher(run.folder, classes=run.source.classes)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    images = torch.randn(2, 3, 64, 96)
    features, factors = teacher.prior(images)
    assert features.shape == (2, 64, 16, 24)
    logits = torch.einsum("bdhw,cd->bchw", features, factors) + teacher.classifier.bias[:-1, None, None]
    torch.testing.assert_close(logits, teacher(images).logits[:, :-1], atol=1e-5, rtol=1e-4)
    weights = torch.load(run.folder / "checkpoints" / "epoch_2.pth", weights_only=True)["state_dict"]
    assert torch.equal(weights["network.classifier.weight"], teacher.classifier.weight)


def test_the_teacher_predicts_what_its_run_wrote(runs):
    run = runs["mask"]
    teacher = load_teacher(run.folder)
    true = next(true_maps(run.source.val, run.source.classes))
    pixels = np.asarray(Image.open(run.source.val.images / true.name).convert("RGB"))
    mean, std = np.array(teacher.contract.mean), np.array(teacher.contract.std)
    images = torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None].float()
    logits = torch.nn.functional.interpolate(teacher(images).logits, size=(64, 64), mode="bilinear")
    written = read_label_map(run.folder / "predictions/val" / f"{true.image_id}.png")
    assert (logits.argmax(dim=1)[0].numpy() == written).mean() > 0.999


def test_one_file_is_a_teacher_wherever_it_lies(runs, tmp_path):
    moved = shutil.copy(runs["objectives"].folder / "checkpoints" / "epoch_2.pth", tmp_path / "teacher.pth")
    images = torch.randn(1, 3, 64, 64)
    expected = load_teacher(runs["objectives"].folder).prior(images)
    assert torch.equal(load_teacher(moved).prior(images).features, expected.features)


def test_classes_in_another_order_are_matched_by_name(runs):
    folder, classes = runs["objectives"].folder, runs["objectives"].source.classes
    assert len(classes) > 2
    turned = (*classes[2:], *classes[:2])  # not its own inverse
    place = [classes.index(name) for name in turned]
    own, other = load_teacher(folder, classes=classes), load_teacher(folder, classes=turned)
    assert other.contract == own.contract._replace(classes=turned)
    images = torch.randn(1, 3, 64, 64)
    (features, factors), (again, reordered) = own.prior(images), other.prior(images)
    assert torch.equal(features, again)
    assert torch.equal(reordered, factors[place])
    assert not torch.equal(reordered, factors)
    layers = own.last_layer()[:4], other.last_layer()[:4]
    for name, mine, theirs in zip(own.last_layer()._fields, *layers, strict=False):
        assert torch.equal(theirs, mine if name.startswith("background") else mine[place]), name


def test_a_network_whose_rows_stay_is_refused_in_another_order(runs, monkeypatch):
    def fixed(*values):
        network = build_teacher(*values)
        layer = network.last_layer()
        network.last_layer = lambda: layer
        return network

    monkeypatch.setattr("misa.engine.runs.teacher.build_teacher", fixed)
    folder, classes = runs["objectives"].folder, runs["objectives"].source.classes
    assert load_teacher(folder, classes=classes).contract.classes == classes
    with pytest.raises(UserError, match="classes in another order, and a SeMask cannot be brought into the student's"):
        load_teacher(folder, classes=classes[::-1])


def test_a_teacher_for_other_data_is_refused(runs, student, tmp_path):
    classes = runs["objectives"].source.classes
    with pytest.raises(UserError, match=rf"knows the classes {classes[0]}, .* must be the same, in any order: train"):
        load_teacher(runs["objectives"].folder, classes=(*classes[1:], "zebra"))
    with pytest.raises(UserError, match="is not a checkpoint of a semantic teacher"):
        load_teacher(student.folder)
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_teacher(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_teacher(tmp_path)
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_teacher(tmp_path / "cut.pth")


# ---- scores and pictures


def test_a_students_instances_are_merged_by_score(student, runs, capsys):
    merged = evaluate(student.folder, merged=True, merge_score=0.0)
    np.testing.assert_equal(merged.metrics["segm"], student.metrics["segm"])
    expected = score_merged(student.source, student.folder / "predictions/val.json", threshold=0.0)
    assert merged.metrics["iou"] == expected["iou"]
    assert merged.metrics["merged_from_score"] == 0.0
    assert main(["evaluate", str(student.folder), "--miou"]) == 0
    assert "merged IoU" in capsys.readouterr().out


def test_perfect_instances_merge_into_the_truth(student, tmp_path):
    source = student.source
    content = json.loads(source.val.annotations.read_text())
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.9, "segmentation": a["segmentation"]}
        for a in content["annotations"]
    ]
    (tmp_path / "found.json").write_text(json.dumps(found))
    assert score_merged(source, tmp_path / "found.json")["miou"] == 100
    assert score_merged(source, tmp_path / "found.json", threshold=0.95)["miou_foreground"] == 0


def test_separation_is_of_each_failure_mode(runs, tmp_path, capsys):
    table = teacher_separation(runs["objectives"].folder).metrics
    assert list(table) == ["color", "S", "S x K"]
    for modes in table.values():
        assert set(modes) <= {"camouflage", "contrast", "plain", "all"}
        assert all(value is None or 0 <= value <= 100 for value in modes.values())
    command = ["evaluate", str(runs["objectives"].folder), "--separation"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert re.match(r"run: .*, epoch_\d+\.pth\ndata: val split of .*, \d+ images?\n\n.*S x K", said, re.DOTALL)
    with pytest.raises(UserError, match=r"gone\.pth"):  # the checkpoint was once ignored
        teacher_separation(runs["objectives"].folder, checkpoint=tmp_path / "gone.pth")
    for option in ("--per-class", "--boundary", "--miou"):
        assert main(["evaluate", str(runs["objectives"].folder), option]) == 2
        assert f"{option} has no effect on a semantic teacher" in capsys.readouterr().err
    assert main([*command, "--checkpoint", "none"]) == 2
    assert "separation measures a trained teacher" in capsys.readouterr().err


def test_separation_shows_images_padded_as_in_training():
    """Else S has the stages' rounded sizes, stretched against the masks that it is compared with."""
    seen = []

    class Pooled:
        def prior(self, images):
            seen.append(tuple(images.shape[-2:]))
            return torch.nn.functional.interpolate(images, scale_factor=0.25, mode="bilinear"), None

    pixels = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    sizes = replace(TOY.augmentation, short_sides=(61,), test_short_side=61)
    (color, semantic), _, size, stride = teacher_maps(Pooled(), pixels, sizes)
    assert seen == [(64, 96)]
    assert (size, stride) == ((61, 83), 4)
    torch.testing.assert_close(color, semantic)


def test_separation_compares_masks_and_maps_at_the_same_places(runs, tmp_path):
    """White stripes as wide as a cell are the object, in an image whose width is no multiple of a cell."""
    root = shutil.copytree(runs["objectives"].source.root, tmp_path / "stripes")
    val = runs["objectives"].source.val
    mask = np.zeros((64, 95), np.uint8)
    mask[8:56, 40:92] = np.arange(40, 92) // 4 % 2 == 0
    path = root / "annotations" / val.annotations.name
    content = json.loads(path.read_text())
    image = content["images"][0] | {"file_name": "stripes.png", "height": 64, "width": 95}
    Image.fromarray(255 * np.repeat(mask[..., None], 3, axis=2)).save(root / val.images.name / "stripes.png")
    code = encode(np.asfortranarray(mask))
    code["counts"] = code["counts"].decode()
    whole = {"area": int(mask.sum()), "bbox": [40, 8, 52, 48], "segmentation": code}
    content |= {"images": [image], "annotations": [content["annotations"][0] | whole | {"image_id": image["id"]}]}
    path.write_text(json.dumps(content))
    metrics = teacher_separation(runs["objectives"].folder, data_root=root).metrics
    assert metrics["color"]["all"] == 100


@pytest.mark.parametrize("others", [0, None, ["camouflage"]])
def test_a_field_mode_of_the_users_own_is_no_failure_mode(runs, tmp_path, others):
    root = shutil.copytree(runs["objectives"].source.root, tmp_path / "own")
    path = root / "annotations" / runs["objectives"].source.val.annotations.name
    content = json.loads(path.read_text())
    for i, annotation in enumerate(content["annotations"]):
        annotation["mode"] = others if i else "plain"
    path.write_text(json.dumps(content))
    metrics = teacher_separation(runs["objectives"].folder, data_root=root).metrics
    assert set(metrics["color"]) == {"plain", "unknown", "all"}


def test_data_without_failure_modes_has_no_column_of_unknown_ones(runs, tmp_path):
    root = shutil.copytree(runs["objectives"].source.root, tmp_path / "plain")
    path = root / "annotations" / runs["objectives"].source.val.annotations.name
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation.pop("mode", None)
    path.write_text(json.dumps(content))
    metrics = teacher_separation(runs["objectives"].folder, data_root=root).metrics
    assert [list(modes) for modes in metrics.values()] == [["all"]] * 3


def test_what_a_teacher_cannot_be_asked_is_told_before_any_work(runs, tmp_path):
    with pytest.raises(UserError, match="is a semantic teacher, which detects nothing"):
        evaluate(runs["objectives"].folder, predictions=tmp_path / "out.json")
    root = shutil.copytree(runs["objectives"].source.root, tmp_path / "boxes")
    path = root / "annotations" / runs["objectives"].source.val.annotations.name
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="separation compares with true masks"):
        teacher_separation(runs["objectives"].folder, data_root=root)


def test_a_teachers_results_can_be_drawn(runs):
    run = runs["mask"]
    rows = results(run, count=2)
    assert len(rows) == 2
    for row in rows:
        assert row["predicted"].shape[1:] == (64, 64)
        assert len(row["predicted"]) == len(row["predicted_labels"])
    assert training_samples(run.source, count=1)


def test_unknown_labels_are_named():
    with pytest.raises(ValueError, match=r"Semantic\.labels is 'magic'"):
        Experiment(semantic=Semantic(labels="magic"))


def test_label_maps_of_an_interrupted_run_are_not_taken_for_those_of_other_boxes(runs, tmp_path):
    """The maps are written before the run's record, by which a change of the data would be noticed."""
    source, row = runs["rectangles"].source, WAYS["rectangles"]
    prepare_labels(row, source, tmp_path / "run")
    content = json.loads(source.train.annotations.read_text())
    content["annotations"] = content["annotations"][1:]
    annotations = tmp_path / "corrected.json"
    annotations.write_text(json.dumps(content))
    corrected = replace(source, train=source.train._replace(annotations=annotations))
    with pytest.raises(UserError, match="holds labels of other annotations; choose another work_dir or delete that"):
        prepare_labels(row, corrected, tmp_path / "run")
    card = label_folder(row, tmp_path / "run") / "labels.json"
    kept = json.loads(card.read_text())
    card.write_text(json.dumps({"labels": kept["labels"], "student": None}))  # as before the digest was recorded
    prepare_labels(row, source, tmp_path / "run")
    assert json.loads(card.read_text()) == kept
    card.write_text(json.dumps(kept | {"labels": "grabcut"}))
    with pytest.raises(UserError, match=r"holds labels made otherwise \(.*grabcut"):
        prepare_labels(row, source, tmp_path / "run")


def test_label_maps_are_named_by_the_image_and_not_by_its_file(runs, tmp_path):
    """Absolute names, as in tables of boxes, and names that differ only in the suffix."""
    source = runs["rectangles"].source
    content = json.loads(source.train.annotations.read_text())
    place = tmp_path / "photos"
    place.mkdir()
    for image, name in zip(content["images"], ("p.png", "p.bmp", "c.png", "d.png", "e.png", "f.png"), strict=True):
        Image.open(source.train.images / image["file_name"]).save(place / name)
        image["file_name"] = str(place / name)
    annotations = tmp_path / "boxes.json"
    annotations.write_text(json.dumps(content))
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    named = replace(source, train=source.train._replace(annotations=annotations, images=tmp_path))
    row = WAYS["rectangles"]
    prepare_labels(row, named, tmp_path / "run")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    data = CocoImages(
        ann_file=str(annotations),
        data_prefix={"img": str(tmp_path), "seg": str(label_folder(row, tmp_path / "run"))},
        metainfo={"classes": source.classes},
        masks=False,
        pipeline=[],
    )
    boxed = boxed_images(named.train, named.classes)
    assert len(data) == len(boxed) == 6
    for i, image in enumerate(boxed):
        found = read_label_map(Path(data.get_data_info(i)["seg_map_path"]))
        expected = fill_boxes(image.boxes, image.labels, image.size, background=len(named.classes))
        np.testing.assert_array_equal(found, expected)


def test_separation_sees_the_classes_of_the_training(runs, tmp_path):
    root = shutil.copytree(runs["objectives"].source.root, tmp_path / "more")
    path = root / "annotations" / runs["objectives"].source.val.annotations.name
    content = json.loads(path.read_text())
    content["categories"].insert(0, {"id": 99, "name": "unseen"})
    content["annotations"].append({**content["annotations"][0], "id": 9999, "category_id": 99})
    path.write_text(json.dumps(content))
    folder = runs["objectives"].folder
    assert teacher_separation(folder, data_root=root).metrics == teacher_separation(folder).metrics
