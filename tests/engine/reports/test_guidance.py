"""Oracles: the public propagation functions on the same masks, and readings with a known result."""

import dataclasses
import itertools
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from misa.cli import main
from misa.engine.reports.explore import open_networks
from misa.engine.reports.guidance import (
    AS_TRAINED,
    READINGS,
    TRUTH,
    affinities,
    class_maps,
    measure_guidance,
    objects_of,
    true_output,
    write_guidance,
)
from misa.engine.training.train import train
from misa.errors import UserError
from misa.evaluation.guidance import Pull, pull_of
from misa.experiment import TINY, Affinity, Augmentation, Experiment, Inference, Schedule, Semantic
from misa.ops.propagation import propagate_local
from tests.helpers import CPU

TEACHER = Experiment(
    data="demo",
    network=TINY,
    schedule=Schedule(epochs=1, batch=2, lr=1e-3, decay="cosine", warmup=2, clip=10.0),
    augmentation=Augmentation(short_sides=(64,), long_side=96, test_short_side=64),
    inference=Inference(score=0.001, keep=0.0, mask=0.3, candidates=30, per_image=10),
    scenes=(("size", 64), ("train", 6), ("val", 4), ("objects", (1, 3))),
    semantic=Semantic(),
)


@pytest.fixture(scope="module")
def place(module_path):
    return module_path


@pytest.fixture(scope="module")
def run(place):
    """A student with SEPA; its teacher is beside it."""
    values = json.loads(json.dumps(TEACHER.values()))
    (place / "rows.py").write_text(
        f"from misa.experiment import Experiment\nROWS = {{'teacher': Experiment.from_values({values!r})}}\n"
    )
    row = TEACHER.but(semantic=None, teacher=f"{place / 'rows.py'}:teacher", affinity={"saliency": True})
    return train(row, data_root=place / "data", work_dir=place / "runs" / "sepa", machine=CPU).folder


@pytest.fixture(scope="module")
def measured(run):
    return measure_guidance(run, images=3)


def test_every_reading_is_measured_on_the_same_objects(run, measured):
    table = measured.table()
    assert set(table["reading"]) == {AS_TRAINED, *READINGS} - {"saliency, sum (printed)"}, "that is how it was trained"
    assert set(table["objects"]) == {len(measured.images)}
    assert len(set(measured.images.tolist())) == 3
    assert table.groupby("reading")["term"].first()["PAMR: color"] == "pamr"
    # A reading that a term does not depend on is listed once.
    assert list(table[table["reading"] == "color, 3x3"]["term"]) == ["local"]
    assert list(table[table["reading"] == "color, tree 0.03"]["term"]) == ["global"]
    start = measured.started()
    assert set(start) == {"student's masks", "teacher's class maps"}
    own = table[table["reading"] == "color"].iloc[0]
    assert own["iou"] - own["gain"] == pytest.approx(start["student's masks"].value)


def test_intervals_are_given_from_ten_images_on(measured):
    text = measured.text()
    assert "of 3 images of the val split, without intervals, which mean nothing over fewer than 10 images" in text
    assert "nan" not in text
    assert measured.table()[["iou_low", "gain_high", "pull_low"]].isna().all(axis=None)
    pulls = {key: Pull(*(np.tile(part, 10) for part in pull)) for key, pull in measured.pulls.items()}
    start = {name: np.tile(values, 10) for name, values in measured.start.items()}
    images = np.arange(10 * len(measured.images))
    many = dataclasses.replace(measured, pulls=pulls, start=start, images=images, groups=measured.groups * 10)
    table = many.table()
    for name in ("iou", "gain", "pull", "moved", "growth"):
        assert (table[f"{name}_low"] <= table[name] + 1e-12).all()
        assert (table[name] <= table[f"{name}_high"] + 1e-12).all()
    text = many.text()
    assert "of the val split, in brackets 95 % intervals over images" in text
    assert "left out" not in text
    blocks = [block.splitlines() for block in text.split("\n\n")[1:-1]]
    assert [re.split(r"  +", block[0])[0] for block in blocks] == ["in windows", "along the tree", "PAMR"]
    for head, *rows in blocks:
        assert head.split()[-5:] == ["IoU", "gain", "pull", "moved", "growth"]
        names = [row[:40].strip() for row in rows]
        assert len(set(names)) == len(names), "a name occurs once in a table"
    for column in ("IoU", "gain", "pull", "moved", "growth"):
        assert f"\n{column}: " in text
    for group in many.kinds()[1:]:
        held = len({image for image, own in zip(images, many.groups, strict=True) if group in own})
        assert ("in brackets" in many.text(group)) == (held >= 10)


def test_the_same_call_gives_the_same_numbers(run, measured):
    again = measure_guidance(run, images=3)
    pd.testing.assert_frame_equal(again.whole(), measured.whole())


def test_color_in_windows_is_the_propagation_of_the_students_masks(run, measured):
    networks = open_networks(run)
    found = []
    for objects in objects_of(
        networks.student, networks.experiment.augmentation, networks.source, split="val", images=3, seed=0
    ):
        target = propagate_local(
            objects.masks, objects.batch.images[0], box_masks=objects.boxes, valid=objects.batch.valid[0]
        )
        found.append(pull_of(objects.masks, target, objects.truth, objects.boxes))
        assert (objects.masks >= 0).all()
        assert objects.truth.any(axis=(1, 2)).all()
    pull = measured.pulls["color", "local"]
    for ours, parts in zip(pull, zip(*found, strict=True), strict=True):
        np.testing.assert_allclose(ours, np.concatenate(parts), atol=1e-6)


def test_groups_are_classes_sizes_and_modes(measured):
    kinds = measured.kinds()
    assert kinds[0] == "all"
    assert any(kind.startswith("class ") for kind in kinds)
    assert any(kind.startswith("mode ") for kind in kinds)
    assert "small" in kinds
    counts = {kind: int(measured.table(kind)["objects"].iloc[0]) for kind in kinds}
    assert sum(n for kind, n in counts.items() if kind.startswith("class ")) == counts["all"]
    assert sum(counts.get(size, 0) for size in ("small", "medium", "large")) == counts["all"]
    with pytest.raises(UserError, match="no group 'tiny'; choose one of all"):
        measured.text("tiny")


def test_a_groups_text_is_of_its_own_objects(measured):
    """The number of objects and images, and the initial IoU, are those of the table's rows below."""
    for group in measured.kinds()[1:]:
        own = [i for i, names in enumerate(measured.groups) if group in names]
        images = len({int(measured.images[i]) for i in own})
        head, *start = measured.text(group).removeprefix(f"{measured.smoke}\n").splitlines()[:3]
        objects = f"{len(own)} object{'s' * (len(own) > 1)} ({group})"
        assert head.startswith(f"{objects} of {images} image{'s' * (images > 1)} of the val split")
        for line, (name, values) in zip(start, measured.start.items(), strict=True):
            assert line == f"{name}: IoU {100 * np.nanmean(values[own]):.1f}"


def test_without_a_teacher_what_needs_one_is_left_out():
    found = affinities(Affinity(window=7), READINGS, taught=False)
    assert "color" in found
    assert found["color"].window == 7
    assert not any(a.feature or a.saliency for a in found.values())
    own = Affinity(saliency=True, semantic_scale=3.0, local_form="product")
    taught = affinities(own, READINGS, taught=True)
    assert taught[AS_TRAINED] == own
    stretching = affinities(Affinity(stretch=0.5), READINGS, taught=False)
    assert stretching[AS_TRAINED] == Affinity(stretch=0.5)
    assert stretching["color"] == Affinity()
    shared = affinities(Affinity(window_share=0.05), READINGS, taught=False)
    assert (shared["color"].window_share, shared["color, 3x3, 5 steps"].window_share) == (0.05, None)
    near = affinities(Affinity(mode="pamr", pamr_steps=5), READINGS, taught=False)
    assert near[AS_TRAINED].mode == "pamr"
    assert (near["color"].mode, near["PAMR: color"].mode) == ("apro", "pamr"), "a reading is what its name says"
    assert taught["saliency, sum (printed)"] == dataclasses.replace(Affinity(), saliency=True), (
        "nothing of the run's own"
    )
    with pytest.raises(UserError, match="Affinity has no field 'windows'; did you mean 'window'"):
        affinities(own, {"wrong": {"windows": 3}}, taught=True)
    with pytest.raises(UserError, match=r"reading 'wrong': Affinity\.stretch is True, not of type float"):
        affinities(own, {"wrong": {"stretch": True}}, taught=True)
    wrong = {"window": 4}, {"semantic_values": "logit", "saliency": True}, {"mode": "tree"}, {"local_steps": "7"}
    for changes in wrong:
        with pytest.raises(UserError, match="reading 'wrong': "):
            affinities(own, {"wrong": changes}, taught=True)


def test_a_teacher_can_be_given_and_the_training_images_looked_at(run, place, capsys):
    box = TEACHER.but(semantic=None)
    student = train(box, data_root=place / "data", work_dir=place / "alone" / "box", machine=CPU).folder
    teacher = next(path for path in run.parent.iterdir() if "teacher" in path.name)
    alone = measure_guidance(student, images=2, readings={"color": {}, "class map": READINGS["class map, 0.3σ"]})
    assert {reading for reading, _ in alone.pulls} == {"color"}
    assert "\n1 reading needs a teacher and is left out; teacher gives one\n" in alone.text()
    out = place / "out"
    words = ["--teacher", str(teacher), "--split", "train", "--images", "2", "--only", "color,probability"]
    assert main(["guidance", str(student), *words, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "objects of 2 images of the train split" in text
    assert "probability, 3x3" in text
    assert "class map" not in text.replace("teacher's class maps", "")
    written = pd.read_csv(out / "guidance.csv")
    assert {"all", "small"} <= set(written["group"])
    assert (out / "guidance.pdf").stat().st_size > 1000
    assert (out / "guidance.png").stat().st_size > 1000
    assert main(["guidance", str(student), "--only", "nonsense"]) == 2
    assert main(["guidance", str(student), "--images", "0"]) == 2
    assert main(["guidance", str(teacher)]) == 2
    said = capsys.readouterr().err
    assert "no reading has 'nonsense' in its name" in said
    assert "is not a box-supervised student" in said


def test_the_students_own_teacher_need_not_be_there_if_another_is_given(run, place):
    moved = shutil.copytree(run, place / "moved" / "sepa")
    teacher = next(path for path in run.parent.iterdir() if "teacher" in path.name)
    options = {"images": 2, "readings": {"class map": READINGS["class map, 0.3σ"]}}
    for given in ("truth", teacher):
        assert measure_guidance(moved, teacher=given, **options).text() == (
            measure_guidance(run, teacher=given, **options).text()
        )
    with pytest.raises(UserError, match=r"the teacher of .* should be in"):
        measure_guidance(moved, **options)


def test_the_figure_holds_every_reading(measured, tmp_path):
    csv, *_ = write_guidance(measured, tmp_path / "new")
    assert csv.name == "guidance.csv"
    from misa.figures.guidance import guidance_chart

    chart = guidance_chart(measured.table(), title="what this is")
    FigureCanvasAgg(chart).draw()
    tops = [axes.get_tightbbox().y1 for axes in chart.axes]
    (legend,) = chart.legends
    assert legend.get_title().get_text() == "what this is"
    assert legend.get_window_extent().y0 >= max(tops)
    names = {label.get_text() for label in chart.axes[0].get_yticklabels()}
    assert names == set(measured.table()["reading"])
    spans = [axes.xaxis.label.get_window_extent() for axes in chart.axes]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(spans, 2))
    drawn = sorted(value for line in chart.axes[3].lines[:-1] for value in line.get_xdata())
    np.testing.assert_allclose(drawn, sorted(100 * measured.table()["growth"]))


def test_true_masks_are_needed(run, place, monkeypatch):
    from misa.engine.reports import guidance

    monkeypatch.setattr(guidance, "has_masks", lambda _: False)
    with pytest.raises(UserError, match="has none"):
        measure_guidance(run, images=1)
    with pytest.raises(UserError, match="choose val or train"):
        measure_guidance(run, images=1, split="test")


@pytest.mark.parametrize("empty", [None, [], [[]]])
def test_objects_without_a_mask_are_left_out(run, tmp_path, empty):
    networks = open_networks(run)
    val = networks.source.val
    truth = json.loads(val.annotations.read_text())
    for row in truth["annotations"][::2]:
        row["segmentation"] = empty
    (tmp_path / "half.json").write_text(json.dumps(truth))
    half = val._replace(annotations=tmp_path / "half.json")
    sizes, count = networks.experiment.augmentation, len(truth["annotations"])
    found = {}
    for own in (val, half):
        source = dataclasses.replace(networks.source, val=own)
        seen = objects_of(networks.student, sizes, source, split="val", images=4, seed=0)
        found[own] = sum(len(objects.truth) for objects in seen)
    assert found[val] == count
    assert found[half] == count // 2


def test_it_reads_no_gradient(run):
    networks = open_networks(run)
    shown = objects_of(
        networks.student, networks.experiment.augmentation, networks.source, split="val", images=1, seed=0
    )
    assert not any(torch.is_tensor(v) and v.requires_grad for o in shown for v in vars(o).values())


def test_a_perfect_teacher_has_one_class_a_cell(run):
    """The smaller object is on top: a label map, as of a semantic network, not a set of masks."""
    networks = open_networks(run)
    (first,) = objects_of(
        networks.student, networks.experiment.augmentation, networks.source, split="val", images=1, seed=0
    )
    true = torch.zeros(3, *first.classes.shape[1:], dtype=torch.bool)
    true[0, 2:10, 2:10] = true[1, 4:6, 4:6] = true[2, 8:12, 8:12] = True
    maps = class_maps(true, torch.tensor([0, 1, 0]), 2)
    assert maps.sum(dim=0).max() == 1
    assert torch.equal(maps[1], true[1])
    assert torch.equal(maps[0], (true[0] | true[2]) & ~true[1])
    output = true_output(dataclasses.replace(first, classes=maps))
    torch.testing.assert_close(output.probabilities[0], maps.float(), atol=1e-3, rtol=0)


def test_a_perfect_teacher_has_the_true_class_maps(run):
    """A run without a teacher has them, too; IoU of the class maps by hand, from the annotations."""
    networks = open_networks(run)
    for objects in objects_of(
        networks.student, networks.experiment.augmentation, networks.source, split="val", images=4, seed=0
    ):
        output = true_output(objects)
        np.testing.assert_array_equal(output.features[0].numpy() > 0.5, objects.classes.numpy())
        torch.testing.assert_close(output.probabilities[0], objects.classes.float(), atol=1e-3, rtol=0)
        for true, label in zip(objects.truth, objects.labels.tolist(), strict=True):
            assert (objects.classes[label].numpy() >= true).all()
    readings = {"class map": {**READINGS["class map, 0.3σ"]}, "color": {}}
    measured = measure_guidance(run, teacher=TRUTH, readings=readings, images=4)
    start = measured.started()
    assert set(start) == {"student's masks", "true class maps"}
    assert start["true class maps"].value > 0.9  # 1 but where boxes of one class overlap
    own = measured.table().set_index(["reading", "term"])
    assert own.loc[("class map", "local"), "pull"] > own.loc[("color", "local"), "pull"]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[10, 10, 20, 20]], "has a polygon that is not 3 or more corners"),
        ({"size": [5, 5], "counts": [10, 15]}, r"is of size \[5, 5\]"),
        ({"size": [52, 70], "counts": "zzz"}, "has counts that cannot be decoded"),
    ],
)
def test_masks_that_training_from_boxes_never_read_are_checked(run, tmp_path, mask, words):
    networks = open_networks(run)
    place = networks.source.train
    truth = json.loads(place.annotations.read_text())
    size = [truth["images"][0][side] for side in ("height", "width")]
    for row in truth["annotations"]:
        row["segmentation"] = {**mask, "size": size} if isinstance(mask, dict) and mask["size"] == [52, 70] else mask
    (tmp_path / "spoilt.json").write_text(json.dumps(truth))
    source = dataclasses.replace(networks.source, train=place._replace(annotations=tmp_path / "spoilt.json"))
    with pytest.raises(UserError, match=f"the mask of an object of .* {words}"):
        next(objects_of(networks.student, networks.experiment.augmentation, source, split="train", images=1, seed=0))
