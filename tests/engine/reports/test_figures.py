"""The figure factory, from run folders of two training steps to files with their provenance."""

import dataclasses
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch

from misa.cli import main
from misa.data.scenes.scenes import named_scene
from misa.engine.reports import figures
from misa.engine.reports.explore import trained
from misa.engine.reports.figure_sources import Choice, Sources, Trained, settings_of
from misa.engine.reports.figures import Factory, deepest, seeded
from misa.engine.reports.inspection import inspect_run
from misa.engine.runs.scores import DETECTIONS
from misa.errors import UserError
from misa.experiment import Affinity, Augmentation
from misa.figures.example import Example
from misa.figures.paper import figure4
from misa.figures.provenance import provenance_of
from misa.rows import find_row

pytestmark = pytest.mark.slow
SIZES = Augmentation(test_short_side=256)


@pytest.fixture(scope="module")
def runs(module_path):
    trained(module_path / "misa", data_root=module_path / "data", smoke=True)
    trained(module_path / "mask", row="demo:mask", data_root=module_path / "data", smoke=True)
    return module_path


def test_all_figures_from_one_command(runs, tmp_path, capsys):
    given = [str(runs / "misa"), str(runs / "mask")]
    assert main(["figures", *given, "--out", str(tmp_path), "--images", "2", "--random", "2", "--worst", "3"]) == 0
    names = [f"figure{name}.{kind}" for name in (1, 3, 4, 5) for kind in ("pdf", "png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    capsys.readouterr()
    assert main(["provenance", str(tmp_path / "figure5.pdf")]) == 0
    words = capsys.readouterr().out
    assert words.startswith("command: misa figures ")
    made = provenance_of(tmp_path / "figure5.png")
    assert made["images"]["chosen"] == [2]
    assert len(made["images"]["random"]) == 2
    assert len(made["images"]["worst"]) <= 3
    params = json.loads((runs / "misa" / "params.json").read_text())
    assert made["runs"]["misa"]["hash"] == params["digest"]
    assert {card["row"] for card in made["runs"].values()} == {"demo:long", "demo:mask", "teacher:demo"}


def test_the_command_in_a_figure_makes_it_again(runs, tmp_path):
    factory = Factory([runs / "misa"], choice=Choice(drawn=2, worst=2, seed=4), wanted="5")
    (pdf, _) = factory.make(tmp_path / "first")
    assert factory.show("5") is factory.draw("5")
    assert factory.show("4") is None
    before = pdf.read_bytes()
    pdf.unlink()
    command = provenance_of(tmp_path / "first" / "figure5.png")["command"].split()
    assert command[0] == "misa"
    assert main(command[1:]) == 0
    assert pdf.read_bytes() == before


def test_figures_of_a_run_whose_data_has_moved(runs, tmp_path, capsys):
    """Its new place draws the same; other data is refused, whose images the run's predictions are not of."""
    quick = ["figures", str(runs / "misa"), "--only", "3,5", "--random", "1", "--worst", "1"]
    assert main([*quick, "--out", str(tmp_path / "before")]) == 0
    (runs / "data").rename(tmp_path / "moved")
    try:
        assert main([*quick, "--out", str(tmp_path / "out")]) == 2
        assert "is no longer at" in (words := capsys.readouterr().err)
        assert "restore it, or give --data-root" in words
        (own,) = (tmp_path / "moved").iterdir()
        for place in (own, own.parent):
            assert main([*quick, "--out", str(tmp_path / "after"), "--data-root", str(place)]) == 0
        for name in ("figure3.png", "figure5.png"):
            before, after = (mmcv.imread(tmp_path / folder / name) for folder in ("before", "after"))
            assert (before == after).all()
        assert f"--data-root {own.parent}" in provenance_of(tmp_path / "after" / "figure5.png")["command"]
        shutil.copytree(own, tmp_path / "other")
        annotations = tmp_path / "other" / "annotations" / "instances_val2017.json"
        values = json.loads(annotations.read_text())
        values["annotations"].pop()
        annotations.write_text(json.dumps(values))
        assert main([*quick, "--out", str(tmp_path / "out"), "--data-root", str(tmp_path / "other")]) == 2
        assert "of another val split than that of" in capsys.readouterr().err
    finally:
        (tmp_path / "moved").rename(runs / "data")


def test_what_is_missing_is_said_and_left_out(runs, tmp_path, capsys):
    factory = Factory([runs / "mask"], wanted="134")
    assert factory.make(tmp_path) == []
    assert factory.show("4") is None
    words = capsys.readouterr().out
    assert "figure 1 is left out: it compares a student with a semantic network" in words
    assert "figure 4 is left out: it needs a semantic teacher" in words
    assert main(["figures", str(runs / "mask"), "--only", " ,", "--out", str(tmp_path)]) == 2
    assert "--only names no figure" in capsys.readouterr().err


def test_a_channel_that_not_all_features_have_is_not_replaced_by_another(runs, tmp_path, capsys):
    factory = Factory([runs / "misa"], wanted="3", channel=10**6)
    assert factory.make(tmp_path) == []
    assert factory.show("3") is None
    assert re.search(
        r"figure 3 is left out: .* has \d+ channels, from 0 on, and no channel 1000000", capsys.readouterr().out
    )


def test_a_student_from_masks_has_predictions_to_show(runs, tmp_path):
    (given,) = Factory([runs / "mask"], choice=Choice(drawn=1, worst=2), wanted="5").make(tmp_path / "out")[1:]
    assert provenance_of(given)["runs"].keys() == {"mask"}
    both = Factory([runs / "mask", runs / "misa"]).sources
    assert both.student.folder.name == "misa", "the one from boxes comes first"


def test_what_each_figure_is_drawn_from():
    """Figure 1 compares networks of one supervision; a teacher without a run of its own has features, too."""

    def run_of(row):
        return Trained(find_row(row), None, Path(row), {})

    box, mask, teacher, teacher_mask = map(run_of, ("demo:box", "demo:mask", "teacher:demo", "teacher:demo_mask"))
    assert Sources((mask, box, teacher)).pair == (box, teacher)
    assert Sources((mask, teacher_mask)).pair == (mask, teacher_mask)
    assert Sources((mask, teacher)).pair is Sources((box,)).pair is None
    torchvision, misa = run_of("photos:torchvision"), run_of("demo:misa")
    assert Sources((torchvision,)).of_features == torchvision
    assert Sources((misa, teacher)).of_features == misa
    assert Sources((misa,)).of_features is None, "its teacher's run is missing"
    assert Sources((box, teacher_mask)).of_features == teacher_mask


def test_the_worst_images_are_those_of_the_inspection(runs):
    """After two steps every AP is 0: images of most objects come first."""
    found = Factory([runs / "misa"], choice=Choice(worst=3)).sources
    inspection = inspect_run(runs / "misa", out=None, resamples=0)
    assert len([value for value in found.scores.values() if value == 0]) > 1
    assert list(found.worst) == inspection.worst(3)
    counts = [len(inspection.errors[i].outcomes) for i in found.worst]
    assert counts == sorted(counts, reverse=True)


def test_the_draw_is_the_seeds(runs):
    first, again, other = (
        Factory([runs / "misa"], choice=Choice(drawn=2, seed=seed)).sources.drawn for seed in (0, 0, 5)
    )
    assert first == again
    assert first != other


def test_wrong_input_is_a_sentence(runs, tmp_path):
    with pytest.raises(UserError, match="has no image 99; it has 4"):
        Factory([runs / "misa"], choice=Choice(given=(99,))).draw("5")
    with pytest.raises(UserError, match="there is no figure '2'"):
        Factory([runs / "misa"], wanted="2")
    with pytest.raises(UserError, match="give one or more"):
        Factory([])
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "params.json").write_text((runs / "misa" / "params.json").read_text())
    with pytest.raises(UserError, match="is not finished"):
        Factory([unfinished])


def test_the_deepest_place_is_inside_the_largest_object(runs):
    example = Factory([runs / "misa"]).sources.networks.example(1)
    masks = example.coarse_masks()
    row, column = deepest(example)
    assert bool(masks[int(masks.sum(dim=(1, 2)).argmax()), row, column])


def objects(boxes, masks=None, side=128):
    """An example with these boxes (xyxy) and masks, in a map of a quarter of its side."""
    size = side // 4
    return Example(
        name="objects",
        image=np.zeros((side, side, 3), np.uint8),
        boxes=np.array(boxes, dtype=float),
        labels=tuple(range(len(boxes))),
        classes=tuple("abcdefgh"[: len(boxes)]),
        masks=masks,
        colors=torch.zeros(3, size, size),
    )


def test_figure_4s_seed_is_in_the_object_that_the_row_shows():
    """The middle of the larger object is in the smaller box of another, whose mask is elsewhere."""
    masks = np.zeros((2, 128, 128), bool)
    masks[0, 16:112, 16:112] = True
    masks[1, 44:84, 44:48] = masks[1, 80:84, 44:84] = True  # an L
    masks[0] &= ~masks[1]
    for example in (
        objects([[16, 16, 112, 112], [44, 44, 84, 84]], masks),
        objects([[16, 16, 112, 112], [44, 44, 84, 84]]),
    ):
        seed = deepest(example)
        shown = example.box_at(seed)
        inside = example.box_masks() if example.masks is None else example.coarse_masks()
        assert bool(inside[shown][seed])
        assert shown == 0, "the largest that has a place of its own"
    # Where only its border is its own, the object on top is shown.
    covered = objects([[0, 0, 128, 128], [4, 0, 124, 128]])
    assert covered.box_at(deepest(covered)) == 1
    nested = np.zeros((2, 128, 128), bool)
    nested[:, 32:96, 32:96] = True  # one object twice: the first box is taken
    seed = deepest(objects([[32, 32, 96, 96]] * 2, nested))
    assert seed in {(row, column) for row in (15, 16) for column in (15, 16)}


def test_figure_4s_seed_is_in_the_box_of_an_object_that_is_smaller_than_a_cell():
    masks = np.zeros((1, 128, 128), bool)
    masks[0, 60:62, 100:102] = True
    example = objects([[100, 60, 102, 62]], masks)
    assert not example.coarse_masks().any()
    assert deepest(example) == (15, 25)


def test_the_box_of_a_cell_is_the_smallest_that_contains_it():
    example = objects([[0, 0, 100, 100], [20, 20, 60, 60], [40, 40, 120, 120]])
    inside = example.box_masks()
    for row in range(32):
        for column in range(32):
            there = [n for n in range(3) if inside[n, row, column]]
            expected = min(there, key=lambda n: int(inside[n].sum())) if there else None
            assert example.box_at((row, column)) == expected
    assert objects(np.zeros((0, 4))).box_at((3, 3)) is None


@pytest.mark.parametrize("side", [128, 256])
def test_the_embedded_scenes_of_figure_4_have_their_seeds_at_every_size(runs, side):
    sources = Factory([runs / "misa"], choice=Choice(drawn=1)).sources
    sizes = replace(sources.networks.experiment.augmentation, test_short_side=side, long_side=side)
    sources.__dict__["networks"] = replace(
        sources.networks, experiment=replace(sources.networks.experiment, augmentation=sizes)
    )
    for example, seed in seeded(sources)[:2]:
        assert example.size == (side // 4, side // 4)
        assert example.box_at(seed) == 0
        assert bool(example.coarse_masks()[0][seed])


def test_the_command_in_a_figure_has_every_digit(runs):
    factory = Factory([runs / "mask"], changes={"semantic_scale": 1.23456789, "form": "sum"})
    assert "--semantic-scale 1.23456789 --form sum" in factory.provenance("5", "")["command"]


def test_figures_of_two_runs_never_mix(runs, tmp_path, monkeypatch):
    """Another run's figures are not overwritten, and by default every run has its own folder."""
    quick = {"choice": Choice(drawn=1, worst=0), "wanted": "5"}
    Factory([runs / "misa"], **quick).make(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=r"figure5.* was made from another run, misa \(demo:long\); give an empty"):
        Factory([runs / "mask"], **quick).make(tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    monkeypatch.chdir(tmp_path)
    for name in ("misa", "mask"):
        written = Factory([runs / name], **quick).make()
        assert {str(path.parent) for path in written} <= {f"runs/figures/{name}"}


def test_a_smoke_runs_figures_say_so(runs, tmp_path, capsys):
    assert main(["figures", str(runs / "misa"), "--out", str(tmp_path), "--only", "5", "--random", "1"]) == 0
    assert "is a smoke run: two training steps" in capsys.readouterr().err
    assert "is a smoke run" in provenance_of(tmp_path / "figure5.png")["beware"][0]


def test_figure_4_shows_the_affinity_that_trained():
    own = Affinity(saliency=True, semantic_scale=1.5, local_form="product", local_steps=7, local_bandwidth=0.2)
    settings = settings_of(own, SIZES)
    assert (settings.semantic_scale, settings.form, settings.steps, settings.local_bandwidth) == (
        1.5,
        "product",
        7,
        0.2,
    )
    assert settings_of(None, SIZES).semantic_scale == settings_of(Affinity(), SIZES).semantic_scale == 8.0


def test_figure_4_has_the_window_and_the_colors_of_rows_without_a_semantic_term():
    settings = settings_of(Affinity(window=3, local_steps=5, local_bandwidth=0.3, tree_bandwidth=0.03), SIZES)
    assert (settings.window, settings.steps, settings.local_bandwidth, settings.tree_bandwidth) == (3, 5, 0.3, 0.03)
    # 5 % of the 64 cells of the shorter side, on both sides of the center.
    assert settings_of(Affinity(saliency=True, window_share=0.05), SIZES).window == 7


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ([], {}),
        (["--form", "sum"], {"form": "sum"}),
        (["--semantic-scale", "8"], {"semantic_scale": 8.0}),
        (["--form", "sum", "--semantic-scale", "3"], {"form": "sum", "semantic_scale": 3.0}),
    ],
)
def test_an_option_of_figure_4_changes_nothing_else(runs, tmp_path, monkeypatch, words, changed):
    drawn, drawing = [], figures.figure4

    def figure4(examples, *, settings, trained):
        drawn.append(settings)
        assert trained
        return drawing(examples[:1], settings=settings)

    monkeypatch.setattr(figures, "figure4", figure4)
    monkeypatch.setattr(figures, "seeded", lambda sources, seeded=figures.seeded: seeded(sources)[:1])
    command = ["figures", str(runs / "misa"), "--out", str(tmp_path), "--only", "4", "--random", "1", *words]
    assert main(command) == 0
    row = find_row("demo:long")
    own = settings_of(row.affinity, row.augmentation)
    assert own.form == "product"
    assert drawn == [dataclasses.replace(own, **changed)]
    again = provenance_of(tmp_path / "figure4.png")["command"]
    assert ("--form" in again, "--semantic-scale" in again) == ("form" in changed, "semantic_scale" in changed)


def test_every_given_image_with_an_object_is_in_figure_4(runs, tmp_path):
    """The two scenes, then all that are given; drawn ones up to five rows, and provenance names what is shown."""
    sources = Sources.of([runs / "misa"])
    objects = [key for key in sources.image_ids if len(sources.example(key).labels)]
    assert len(objects) == 4
    for given, count in ((tuple(objects), 6), (tuple(objects[:1]), 5)):
        factory = Factory([runs / "misa"], choice=Choice(given=given, drawn=8, worst=0), wanted="134")
        assert len(figures.seeded(factory.sources)) == count
        images = {name: factory.provenance(name, tmp_path)["images"] for name in "134"}
        assert images["4"]["chosen"] == list(given)
        assert len({*images["4"]["chosen"], *images["4"]["random"]}) == count - 2
        assert images["3"]["chosen"] == [objects[0]]
        assert len({*images["1"]["chosen"], *images["1"]["random"]}) == 2


def test_figure_4_says_that_a_run_does_not_train_with_sepa(runs):
    teacher = Trained(find_row("teacher:demo"), None, runs, {})
    assert Sources((teacher,)).trains_sepa
    rows = {"demo:long": True, "table3_components:demo_fsd": False}
    rows |= {f"table5_affinity:demo_{name}": False for name in ("apro_feature", "pamr_saliency")}
    for row, own in rows.items():
        assert Sources((Trained(find_row(row), None, runs, {}), teacher)).trains_sepa == own, row
    example = Sources.of([runs / "misa"]).networks.scene(named_scene("two_tone_object"), "two_tone_object")
    for own in (True, False):
        axes = figure4([(example, (14, 19))], trained=own).axes
        assert ("SEPA, unused" in [ax.get_title() for ax in axes]) != own


def test_figure_4_without_an_object_is_left_out(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "seeded", lambda _: [])
    factory = Factory([runs / "misa"], choice=Choice(drawn=1, worst=0), wanted="45")
    assert {path.stem for path in factory.make(tmp_path)} == {"figure5"}
    assert "figure 4 is left out: none of the chosen images has an object" in capsys.readouterr().out


def test_predictions_that_cannot_be_read_are_named(runs, tmp_path):
    shutil.copytree(runs / "misa", tmp_path / "run")
    (tmp_path / "run" / DETECTIONS).write_text('[{"image_id": 1, "cat')
    with pytest.raises(UserError, match="is not a COCO results file with masks"):
        Factory([tmp_path / "run"], choice=Choice(drawn=1, worst=1), wanted="5").make(tmp_path / "out")
    (tmp_path / "run" / DETECTIONS).unlink()
    with pytest.raises(UserError, match="has no predictions, as a training writes them at its end"):
        Factory([tmp_path / "run"], choice=Choice(drawn=1, worst=1), wanted="5").make(tmp_path / "out")
