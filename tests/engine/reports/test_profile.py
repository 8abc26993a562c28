"""`misa profile` runs, names every part, and restores the functions that it instruments."""

import threading

import pytest

from misa.cli import main
from misa.engine.reports import profile
from misa.engine.reports.profile import (
    PARTS,
    WARM_UP,
    Setup,
    build,
    build_each,
    forms,
    has_parts,
    named_parts,
    own_times,
    peak_memory,
)
from misa.engine.reports.tables import table_rows
from misa.rows import find_row


def test_the_forms_are_the_rows_of_table_3():
    row = find_row("table3_components:demo_misa")
    every = forms(row)
    assert every["box baseline"] == find_row("table3_components:demo_baseline").but(
        affinity={"local_form": "product", "global_form": "product", "semantic_scale": row.affinity.semantic_scale}
    )
    assert every["+ SEPA"] == find_row("table3_components:demo_sepa")
    assert every["+ FSD + SEPA"] == row
    assert every["mmdet, from masks"].supervision == "mask"
    assert has_parts(row)
    assert not any(
        has_parts(find_row(name))
        for name in ("demo:box", "demo:mask2former_fsd", "demo:mask2former_sepa", "demo:boxinst")
    )


def test_the_parts_are_put_back():
    before = [getattr(owner, name) for owner, name, _ in PARTS]
    with named_parts():
        inside = [getattr(owner, name) for owner, name, _ in PARTS]
    assert all(one is not other for one, other in zip(before, inside, strict=True))
    assert [getattr(owner, name) for owner, name, _ in PARTS] == before


def test_a_part_within_another_counts_once():
    spent = {"tree": 1.0, "b": 7.0, "tree < b": 2.0, "c < b": 3.0, "tree < c < b": 1.0}
    assert own_times(spent) == {"tree": 4.0, "b": 2.0, "c": 2.0}


@pytest.mark.slow
def test_it_runs(tmp_path, capsys):
    assert main(["profile", "--smoke", "--steps", "1", "--data-root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for part in {part for _, _, part in PARTS} | set(forms(find_row("demo:misa"))):
        assert f"{part} " in out


ROWS = "demo:box,demo:mask2former_fsd,teacher:demo_student,demo:mask,demo:discobox_bank"


def test_several_rows_are_measured_as_whole_steps(tmp_path, capsys):
    """A teacher that learns from a student's masks needs no trained student here."""
    assert main(["profile", ROWS, "--smoke", "--steps", "1", "--data-root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.split()[:1] and line.split()[0] in ROWS.split(",")]
    assert [line[0] for line in lines] == ROWS.split(",")
    for name, wall, cpu, ratio, peak, *images in lines:
        assert " ".join(images) == "2 of 128 x 128", name
        assert float(wall) > 0, name
        assert float(cpu) > 0, name
        assert float(ratio.rstrip("x")) == pytest.approx(float(wall) / float(lines[0][1]), abs=0.02), name
        assert float(peak) >= 0, name
    assert "FSD+SEPA" not in out.replace(" ", "")


def test_a_teacher_of_label_maps_is_measured_beside_its_student(tmp_path):
    """Only the batch's images get label maps, and the student keeps its own teacher, not a smoke run's."""
    small = {
        "scenes": (("size", 64), ("train", 9), ("val", 2)),
        "augmentation": {"short_sides": (64,), "long_side": 64},
    }
    rows = {name: find_row(name).but(**small) for name in ("demo:box", "teacher:demo_student")}
    steps = build_each(rows, Setup(str(tmp_path / "data"), "cpu", 1), tmp_path / "runs")
    one, other = ([sample.img_id for sample in step.batch["data_samples"]] for step in steps.values())
    assert one == other
    found = (tmp_path / "runs" / "1").rglob("*.png")
    assert sorted(int(path.stem) for path in found) == sorted(one)
    assert len(one) == rows["demo:box"].schedule.batch


def middle_of(name, folder, method):
    """What a method of the student returns in the first step and in one of the middle of a training."""
    row = find_row(name).smoke().but(schedule={"epochs": 40})
    (step,) = build_each({name: row}, Setup(str(folder / "data"), "cpu", 1), folder / "runs").values()
    results = []
    original = getattr(step.model, method)
    setattr(step.model, method, lambda *a, **k: results.append(original(*a, **k)) or results[-1])
    for _ in range(WARM_UP):
        step()
    return results


def test_objectives_are_measured_when_their_terms_have_begun(tmp_path):
    """They begin after a part of the training: the EMA model's masks in DiscoBox, the pairs in SIM."""
    first, later = middle_of("demo:discobox", tmp_path / "discobox", "_of_shadow")
    assert not first
    assert later["shadow"] is not None
    first, later = middle_of("demo:sim_paste", tmp_path / "sim", "loss")
    on = [{key for key, value in found.items() if float(value.detach().sum()) != 0} for found in (first, later)]
    assert on[1] - on[0] == {"loss_pairs"}


def test_a_row_without_parts_is_measured_whole(tmp_path, capsys):
    assert main(["profile", "demo:box", "--smoke", "--steps", "1", "--data-root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "demo:box " in out
    assert "1.00x" in out
    assert "teacher forward" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["6"], "there is no table 6; choose one of"),
        (["4", "--data", "photo"], "table 4 has no data 'photo'; choose one of"),
        (["demo:box,demo:nothing"], "demo has no row 'nothing'"),
        (["misa"], "a row is named with its table. Rows called misa:"),
        (["demo"], "demo is a table; name one of its rows."),
        (["table4"], "Or give a table of the paper: "),
        (["demo:box,"], "row '' should be written table:row"),
        (["demo:box", "--smoke", "--batch", "200"], "a batch takes 200 images and the train split of"),
    ],
)
def test_what_cannot_be_measured(capsys, arguments, sentence):
    assert main(["profile", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_table_is_its_rows():
    comparison, rows = table_rows(4, "photos")
    assert list(rows) == list(comparison.rows)
    assert rows["space"] == "table4_distillation:photos_space"
    assert list(table_rows("demo:box, demo:mask")[1].values()) == ["demo:box", "demo:mask"]


def test_the_form_from_masks_is_left_out_where_there_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile, "has_masks", lambda _: False)
    steps = build(find_row("demo:misa").smoke(), Setup(str(tmp_path / "data"), "cpu", 1), tmp_path / "runs")
    assert list(steps) == ["box baseline", "+ FSD", "+ SEPA", "+ FSD + SEPA"]
    assert "mmdet, from masks is left out: the training images have no masks" in capsys.readouterr().out


def test_a_measured_task_that_fails_ends_the_measurement():
    """Else the thread that reads the memory would run on and keep the process alive."""

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        peak_memory(fail)
    assert [thread.name for thread in threading.enumerate() if "watch" in thread.name] == []
