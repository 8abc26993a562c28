"""Sweeps and tables: every training runs once, numbers agree with numpy, and missing runs are "not run"."""

import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from scipy import stats

from misa.cli import main
from misa.engine.prediction.shares import Tally
from misa.engine.reports.tables import file_name, how_counted, open_table, summary
from misa.engine.runs.places import default_folder
from misa.engine.sweeps import cluster, processes, sweep
from misa.engine.sweeps.jobs import Job, plan, planned
from misa.engine.sweeps.sweep import run, spread
from misa.errors import Stopped, UserError
from misa.files import locked
from misa.machine import Machine
from misa.rows import find_row, table_module
from tests.helpers import CPU


def finish(job, ap, **more):
    job.folder.mkdir(parents=True, exist_ok=True)
    segm = {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2, "APs": ap, "APm": None, "APl": None}
    (job.folder / "metrics.json").write_text(json.dumps({"segm": segm, **more}))


def test_tables_share_the_rows_that_are_equal(tmp_path):
    tables = [open_table(number, seeds=2, root=tmp_path) for number in (3, 4, 5)]
    folders = [{job.folder for job in table.every_job()} for table in tables]
    three, four, five = tables
    shared = three.jobs["table3_components:demo_baseline"][0].folder
    assert shared == four.jobs["table4_distillation:demo_baseline"][0].folder
    assert shared == five.jobs["table5_affinity:demo_apro_color"][0].folder
    assert len(folders[0] & folders[1]) == 2 * 2  # the baseline and FSD
    assert len(folders[0] & folders[2]) == 2 * 2  # the baseline and SEPA
    teachers = {job.teacher.folder for table in tables for job in table.every_job() if job.teacher}
    assert len(teachers) == 2  # one a seed


def test_the_plan_goes_seed_by_seed_and_has_nothing_twice(tmp_path):
    rows = ["table4_distillation:demo_baseline", "demo:mask", "table3_components:demo_baseline"]
    jobs = plan(rows, range(2), root=tmp_path)
    assert [job.seed for job in jobs] == [0, 0, 1, 1]
    assert len({job.folder for job in jobs}) == 4


@pytest.mark.parametrize("name", ["fixed", "taught"])
def test_seeds_that_share_a_start_are_refused(name, tmp_path, monkeypatch):
    """They differ less than whole trainings do, and so would the interval be too narrow."""
    taught, teacher = find_row("demo:misa"), find_row(find_row("demo:misa").teacher)
    rows = {
        "own:each": taught.but(start="runs/box-seed{seed}"),
        "own:fixed": taught.but(start="runs/box-seed0"),
        "own:taught": taught.but(teacher="own:teacher"),
        "own:teacher": teacher.but(start="runs/teacher"),
        taught.teacher: teacher,
    }
    for module in ("misa.rows", "misa.engine.sweeps.jobs"):
        monkeypatch.setattr(f"{module}.find_row", rows.__getitem__)
    assert len(plan(["own:each"], range(3), root=tmp_path)) == 3
    assert len(plan([f"own:{name}"], [1], root=tmp_path)) == 1
    assert len(plan([f"own:{name}"], range(3), root=tmp_path, smoke=True)) == 3, "it begins with nothing"
    with pytest.raises(UserError, match=r"^own:(fixed|teacher) begins with runs/\S+ in every seed, .*\{seed\}"):
        plan(["own:each", f"own:{name}"], range(2), root=tmp_path)


def test_a_missing_start_is_found_before_the_first_training(tmp_path, monkeypatch):
    """The last seed's, too: the others' trainings would take hours first."""
    rows = {
        "own:first": find_row("demo:box"),
        "own:more": find_row("demo:box").but(start=f"{tmp_path}/box{{seed}}.pth"),
    }
    for module in ("misa.rows", "misa.engine.sweeps.jobs"):
        monkeypatch.setattr(f"{module}.find_row", rows.__getitem__)
    trained = []
    monkeypatch.setattr(sweep, "run_here", lambda commands, *_: trained.extend(commands) or [])
    jobs = plan(rows, range(2), root=tmp_path / "tables")
    starts = [tmp_path / f"box{seed}.pth" for seed in range(2)]
    starts[0].touch()
    with pytest.raises(
        UserError, match=r"^own:more, seed 1, begins with .* no run folder or checkpoint .*box1\.pth; did"
    ):
        run(jobs, data_root=tmp_path)
    assert not trained
    starts[1].touch()
    run(jobs, data_root=tmp_path)
    assert trained == jobs
    for job in jobs:
        finish(job, 20.0)
    for start in starts:
        start.unlink()
    run(jobs)


@pytest.mark.parametrize("inside", ["", "/checkpoints/epoch_12.pth"])
def test_a_start_may_be_made_by_a_training_of_the_same_call(inside, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(sweep, "run_here", lambda commands, *_: trained.extend(commands) or [])
    (first,) = plan(["demo:box"], [0], root=tmp_path)
    rows = {"demo:box": find_row("demo:box"), "own:more": find_row("demo:box").but(start=f"{first.folder}{inside}")}
    for module in ("misa.rows", "misa.engine.sweeps.jobs"):
        monkeypatch.setattr(f"{module}.find_row", rows.__getitem__)
    jobs = plan(rows, [0], root=tmp_path)
    run(jobs)
    assert trained == jobs
    with pytest.raises(UserError, match=r"^own:more, seed 0, begins with another run"):
        run(jobs[1:])


@pytest.fixture
def staged(monkeypatch):
    """Stages of trainings that a sweep starts; those named in the set fail."""
    calls, failing = [], set()

    def start(commands, *_):
        calls.append([wanted.row for wanted in commands])
        return [(wanted, "it broke.") for wanted in commands if wanted.row in failing]

    monkeypatch.setattr(sweep, "run_here", start)
    return calls, failing


def own_rows(monkeypatch, starts):
    """Define rows own:<name> that begin with these weights."""
    rows = {f"own:{name}": find_row("demo:box").but(start=str(start)) for name, start in starts.items()}
    rows |= {name: find_row(name) for name in ("demo:box", "demo:mask", "demo:misa")}
    rows |= {rows["demo:misa"].teacher: find_row(rows["demo:misa"].teacher)}
    for module in ("misa.rows", "misa.engine.sweeps.jobs"):
        monkeypatch.setattr(f"{module}.find_row", rows.__getitem__)


def test_a_training_runs_after_the_one_that_it_begins_with(tmp_path, monkeypatch, staged):
    """Whatever the order of the rows; all others keep theirs, after the teachers."""
    calls, failing = staged
    (first,) = plan(["demo:box"], [0], root=tmp_path)
    own_rows(monkeypatch, {"more": first.folder, "again": ""})
    more = next(iter(plan(["own:more"], [0], root=tmp_path)))
    own_rows(monkeypatch, {"more": first.folder, "again": more.folder})
    rows = ["own:again", "own:more", "demo:misa", "demo:mask", "demo:box"]
    jobs = plan(rows, [0], root=tmp_path)
    (teacher,) = (job.teacher.row for job in jobs if job.teacher)
    run(jobs)
    assert calls == [[teacher], ["demo:misa", "demo:mask", "demo:box"], ["own:more"], ["own:again"]]
    calls.clear()
    failing.add("demo:box")
    with pytest.raises(UserError, match="demo:box with seed 0 failed: it broke"):
        run(jobs)
    assert calls == [[teacher], ["demo:misa", "demo:mask", "demo:box"]]


@pytest.mark.parametrize("starts", [{"one": "one"}, {"one": "two", "two": "one"}, {"one": "two", "two": "two"}])
def test_trainings_that_need_each_other_are_refused(starts, tmp_path, monkeypatch, staged):
    own_rows(monkeypatch, {name: tmp_path / start for name, start in starts.items()})
    jobs = [Job("demo:box", 0, tmp_path / "box"), *(Job(f"own:{n}", 0, tmp_path / n) for n in starts)]
    with pytest.raises(UserError, match=r"own:(one|two), seed 0, waits for its own weights; change its start"):
        run(jobs)
    assert not staged[0]


def test_the_time_of_a_training_is_not_read_off_copied_files(tmp_path):
    """A copy changes the file times, and the scores may then be older than the record."""
    jobs = plan(["demo:box", "demo:mask"], range(1), root=tmp_path)
    finish(jobs[0], 20.0)
    record, scores = jobs[0].folder / "env.json", jobs[0].folder / "metrics.json"
    record.touch()
    (jobs[0].folder / "config.py").touch()  # written again when a run is resumed
    for ended, words in (
        (1600.0, "at 10.0 minutes each"),
        (999.0, "how long one takes"),
        (1000.1, "how long one takes"),
    ):
        os.utime(record, (1000.0, 1000.0))
        os.utime(scores, (ended, ended))
        assert words in planned(jobs)


def test_figures_are_the_mean_and_the_paired_difference(tmp_path):
    table = open_table(3, seeds=4, root=tmp_path)
    rng = np.random.default_rng(0)
    base, fsd = rng.normal(25, 1, 4), rng.normal(27, 1, 4)
    for job, ap in zip(table.jobs["table3_components:demo_baseline"], base, strict=True):
        finish(job, ap)
    for job, ap in list(zip(table.jobs["table3_components:demo_fsd"], fsd, strict=True))[:3]:
        finish(job, ap)
    figures = table.figures()
    line = figures.loc["+ FSD"]
    assert (line["n"], line["pairs"]) == (3, 3)
    assert line["AP"] == pytest.approx(fsd[:3].mean())
    assert line["AP50"] == pytest.approx(2 * fsd[:3].mean())
    paired = stats.ttest_rel(fsd[:3], base[:3]).confidence_interval()
    assert line["difference"] - line["difference_ci"] == pytest.approx(paired.low)
    assert line["difference"] + line["difference_ci"] == pytest.approx(paired.high)
    assert math.isnan(figures.loc["baseline (APro)", "difference"])
    text = table.printed()
    assert text.loc["+ SEPA", "AP"] == "not run"
    assert text.loc["+ FSD", "AP"].startswith(f"{fsd[:3].mean():.1f} ± ")
    assert summary(table.every_job()) == "7 finished, 0 started, 17 not run"


def test_the_paper_stands_beside_and_never_in_the_place_of_a_result(tmp_path):
    table = open_table(5, data="voc", seeds=2, root=tmp_path)
    printed = table.printed()
    assert printed.loc["APro: color", "paper AP"] == "38.3"
    assert (printed["AP"] == "not run").all()
    rows = list(csv.DictReader(io.StringIO(table.render("csv"))))
    assert (rows[0]["AP"], rows[0]["AP75"], rows[0]["AP_ci"]) == ("not run", "not run", "")
    assert rows[0]["paper_AP"] == "37.7000"
    demo = open_table(5, seeds=2, root=tmp_path).printed()
    assert demo.loc["APro: color", "paper AP, VOC"] == "38.3"  # the column names the other data set
    own = open_table("demo:box,demo:mask", seeds=2, root=tmp_path).printed()
    assert not [name for name in own if name.startswith("paper")]


@pytest.mark.shared
def test_what_the_rows_expect_is_what_the_paper_prints(shared):
    with (shared / "data" / "golden" / "paper_tables.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["table"] in "345"]
    for number in "345":
        table = open_table(int(number), data="voc", seeds=1)
        figures = table.figures().drop(index="+ FSD + SEPA, literal", errors="ignore").dropna(subset="paper_AP")
        printed = [[float(line[key]) for key in ("ap", "ap50", "ap75")] for line in lines if line["table"] == number]
        assert figures[["paper_AP", "paper_AP50", "paper_AP75"]].to_numpy().tolist() == printed


def test_files_are_written_in_all_three_formats(tmp_path):
    table = open_table(4, seeds=1, root=tmp_path)
    for job in table.every_job():
        finish(job, 25.0)
    html, tex, table_csv = table.save(tmp_path / "out", "table4_demo")
    assert html.read_text().startswith('<meta charset="utf-8">\n<table')
    assert "<caption>Table 4" in html.read_text()
    assert "25.0" in html.read_text()
    assert r"\toprule" in tex.read_text()
    assert "±" not in tex.read_text()
    assert len(list(csv.DictReader(io.StringIO(table_csv.read_text())))) == 5


def test_any_comparison_can_be_saved_and_typeset(tmp_path, capsys):
    """For rows of files, the names of the saved files have no slash, the caption no unescaped underscore."""
    rows = "experiments/teacher.py:demo_mask,experiments/teacher.py:demo_boxes"
    arguments = ["tables", rows, "--seeds", "1", "--root", str(tmp_path / "runs"), "--save", str(tmp_path / "out")]
    assert main(arguments) == 0
    (latex,) = (tmp_path / "out").glob("*.tex")
    caption = latex.read_text().split("\\caption")[1].splitlines()[0]
    assert r"demo\_mask" in caption
    assert not re.search(r"(?<!\\)_", caption)


def test_scores_by_mode_and_size(tmp_path):
    table = open_table("demo:box,demo:mask", seeds=2, root=tmp_path)
    for row, value in (("demo:box", 10.0), ("demo:mask", 20.0)):
        for job, more in zip(table.jobs[row], (0.0, 2.0), strict=True):
            finish(job, value + more, segm_of_mode={"plain": {"AP": value + more + 1}})
    groups = table.by_mode().set_index(["row", "group"])
    assert groups.loc[("demo:box", "plain"), "mean"] == pytest.approx(12)
    assert groups.loc[("demo:mask", "small"), "mean"] == pytest.approx(21)
    assert groups.loc[("demo:mask", "small"), "n"] == 2
    assert groups.loc[("demo:mask", "plain"), "difference"] == pytest.approx(10)
    assert groups.loc[("demo:mask", "plain"), "difference_ci"] == pytest.approx(0)  # both move with the seed
    assert groups.loc[("demo:mask", "plain"), "ci"] > 1
    assert math.isnan(groups.loc[("demo:box", "plain"), "difference"])
    assert ("demo:box", "medium") not in groups.index  # the ground truth has no object of that size


def test_details_are_means_over_the_runs_that_know_them(tmp_path, capsys):
    rows = "demo:box,demo:mask,demo:misa"
    table = open_table(rows, seeds=2, root=tmp_path, details=True)
    whole = {"segm_any_class": {"AP": 30.0, "AP50": 60.0, "AP75": 20.0}, "segm_as_rectangles": {"AP": 4.0, "AP50": 9.0}}
    first, second = table.jobs["demo:box"]
    finish(first, 10.0, segm_of_mode={"plain": {"AP": 12.0}}, **whole)
    finish(second, 20.0, segm_of_mode={"plain": {"AP": 13.0}}, **whole | {"segm_any_class": {"AP": 31.0}})
    (first.folder / "cost.json").write_text('{"seconds_per_step": 0.25, "memory_gib": 1.5}')
    finish(table.jobs["demo:mask"][0], 40.0)
    details = table.details()
    box = details.loc["demo:box"]
    assert box["class-agnostic AP"] == "30.5"
    assert box["class-agnostic AP75"] == "20.0"  # of the only run that recorded it
    assert box["AP of rectangles"] == "4.0"
    assert box["plain"] == "12.5"
    assert (box["s/step"], box["CPU s/step"], box["GiB"]) == ("0.25", "–", "1.50")
    assert details.loc["demo:mask", "small"] == "40.0"
    assert set(details.loc["demo:misa"]) == {"–"}  # never trained
    assert "class-agnostic AP75" in table.render("text")
    assert "class-agnostic AP75" in table.render("html")
    legend = "means over the seeds, AP in percent; plain: AP on the objects of one mode; those of the others and"
    assert all(legend in table.render(kind) for kind in ("text", "html"))
    assert "class-agnostic" not in open_table(rows, seeds=2, root=tmp_path).render("text")
    assert (tmp_path / "out" / "t_details.csv") in table.save(tmp_path / "out", "t")
    assert main(["tables", rows, "--seeds", "2", "--root", str(tmp_path), "--details"]) == 0
    assert "CPU s/step" in capsys.readouterr().out


def test_comparators_come_with_their_details(tmp_path):
    table = open_table("comparators", seeds=1, root=tmp_path)
    assert "class-agnostic" not in table.render("text")  # no run has recorded it yet
    finish(table.every_job()[0], 10.0, segm_any_class={"AP": 30.0})
    assert "class-agnostic AP" in table.render("text")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["7"], "no table 7; choose one of comparators, 3, 4, 5"),
        (["3", "--data", "kitti"], "no data 'kitti'; choose one of coco_mini, demo, photos, voc"),
        (["demo:boxx"], "did you mean 'demo:box'"),
        (["3", "--seeds", "0"], "--seeds must be from 1 to 1000, not 0"),
    ],
)
def test_a_table_that_is_none(arguments, sentence, capsys):
    assert main(["tables", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_prints_what_was_not_run(tmp_path, capsys):
    assert main(["tables", "3", "--seeds", "1", "--root", str(tmp_path), "--save", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "not run" in out
    assert "0 finished, 0 started, 6 not run; --run trains what is missing" in out
    assert (tmp_path / "out" / "table3_demo.tex").exists()


def test_a_run_that_is_moved_to_the_tables_root_is_counted(tmp_path, capsys):
    """By the name that `misa train` gives it, and only if its record says that it is the row's."""
    root = tmp_path / "root"
    words = ["tables", "demo:box,demo:mask", "--seeds", "1", "--root", str(root)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"runs are looked for in {root}, which does not exist, only" in out
    name = re.search(r"such as (\S+)$", out.strip())[1]
    assert name == default_folder("demo:box", 0).name
    mine = Job("demo:box", 0, root / name)
    finish(mine, 25.0)
    place(mine, "data", seed=1)
    assert main(words) == 0
    assert "0 finished, 0 started, 2 not run" in capsys.readouterr().out
    place(mine, "data")
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "1 finished, 0 started, 1 not run" in out
    assert re.search(r"demo:box +25\.0 ", out)
    (other,) = plan(["demo:box"], range(1), root=tmp_path)  # the table's own folder comes first
    other = dataclasses.replace(other, folder=root / other.folder.name)
    finish(other, 26.0)
    place(other, "data")
    assert open_table("demo:box", seeds=1, root=root).figures()["AP"].tolist() == [26.0]
    assert how_counted([mine]) == ""


def test_a_run_under_another_name_of_its_row_is_counted(tmp_path):
    """`photos:box` is Table 3's baseline on photographs; a copy under a name of one's own is not counted."""
    alone = Job("photos:box", 1, tmp_path / default_folder("photos:box", 1).name)
    for folder in (alone.folder, tmp_path / "copy-seed1", tmp_path / default_folder("photos:box", 11).name):
        finish(dataclasses.replace(alone, folder=folder), 18.0)
        place(dataclasses.replace(alone, folder=folder), "data")
    table = open_table(3, data="photos", seeds=2, root=tmp_path)
    assert [job.folder for job in table.every_job() if job.state == "finished"] == [alone.folder]
    assert table.figures()["AP"].dropna().to_dict() == {"baseline (APro)": 18.0}
    place(alone, "data", seed=2)
    assert open_table(3, data="photos", seeds=2, root=tmp_path).figures()["n"].sum() == 0


def test_a_table_of_smoke_runs_says_so(tmp_path):
    table, real = (open_table("demo:box", seeds=1, root=tmp_path, smoke=smoke) for smoke in (True, False))
    for kind in ("text", "html", "latex"):
        assert "SMOKE RUNS: two training steps" in table.render(kind)
        assert "SMOKE" not in real.render(kind)
    assert how_counted(table.every_job()).endswith(" such as demo-box-seed0-smoke\n")
    assert file_name("demo:box", "demo", smoke=True) == "table_demo_box_smoke"
    assert file_name(3, "voc", smoke=False) == "table3_voc"


def test_data_beside_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="data photos chooses the rows of a table of the paper; demo:box,demo:mask"):
        open_table("demo:box,demo:mask", data="photos", seeds=1, root=tmp_path)


def test_teachers_are_compared_by_mean_iou(tmp_path):
    table = open_table("teacher:demo,teacher:demo_boxes", seeds=1, root=tmp_path)
    for one, miou in zip(table.every_job(), (61.9, 50.0), strict=True):
        one.folder.mkdir()
        (one.folder / "metrics.json").write_text(json.dumps({"miou": miou}))
    text = table.printed()
    assert list(text) == ["mIoU", "n", "mIoU − baseline"]
    assert text["mIoU"].tolist() == ["61.9", "50.0"]
    assert text["mIoU − baseline"].tolist() == ["–", "−11.9"]
    assert "AP" not in table.render("csv") + table.render("html") + table.render("latex") + table.render("text")
    with pytest.raises(UserError, match="teacher:demo is scored by mean IoU, demo:box by AP"):
        open_table("demo:box,teacher:demo", seeds=1, root=tmp_path)


def fake_train(monkeypatch, body):
    """Replace `misa train` by `body`, to test the scheduler only."""
    monkeypatch.setattr(Job, "command", lambda self, *_: [sys.executable, "-c", body, str(self.folder)])


debug = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # submitit's executor of that name
DONE = (
    "import sys, pathlib; f = pathlib.Path(sys.argv[1]); f.mkdir(parents=True);"
    "(f.parent / 'order').open('a').write(f.name + chr(10));"
    "(f / 'metrics.json').write_text('{\"segm\": {\"AP\": 1.0}}')"
)


@debug
@pytest.mark.parametrize("cluster", ["", "local", "debug"])
def test_teachers_come_first_and_only_what_is_missing_runs(tmp_path, monkeypatch, cluster):
    fake_train(monkeypatch, DONE)
    jobs = plan(["demo:box", "demo:misa"], range(2), root=tmp_path)
    finish(jobs[0], 3.0)
    options = "timeout_min=5" if cluster else ""
    run(jobs, slots=2, cluster=cluster, cluster_options=options)
    order = (tmp_path / "order").read_text().split()
    assert sorted(order) == sorted(
        {job.folder.name for job in jobs[1:]} | {job.teacher.folder.name for job in jobs if job.teacher}
    )
    assert [name.startswith("teacher") for name in order] == [True, True, False, False, False]
    assert all(job.state == "finished" for job in jobs)
    run(jobs, slots=2, cluster=cluster, cluster_options=options)  # nothing is left to run
    assert (tmp_path / "order").read_text().split() == order


@pytest.mark.parametrize("cluster", ["", "local"])
def test_a_failed_training_is_named_and_the_others_still_run(tmp_path, monkeypatch, cluster):
    body = DONE + "; 'seed0' in sys.argv[1] and (sys.stderr.write('first\\nno room on the disk\\n'), sys.exit(3))"
    fake_train(monkeypatch, body.replace("import sys, pathlib;", "import sys, pathlib;", 1))
    jobs = plan(["demo:box"], range(3), root=tmp_path)
    with pytest.raises(UserError, match="demo:box with seed 0 failed: no room on the disk; see"):
        run(jobs, slots=1, cluster=cluster, cluster_options="timeout_min=5" if cluster else "")
    assert [job.state for job in jobs[1:]] == ["finished", "finished"]


def test_a_training_that_was_killed_says_so(tmp_path, monkeypatch):
    fake_train(monkeypatch, "import os, signal; print('epoch 3/12 | 3:54 left', flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match=r"with seed 0 failed: SIGKILL ended it; .*fewer slots"):
        run(plan(["demo:box"], range(1), root=tmp_path))


@pytest.mark.parametrize(
    ("visible", "slots", "gpus", "found"),
    [
        (None, 3, None, ["0", "1", "2"]),
        (None, 2, 2, ["0,1", "2,3"]),
        (None, 3, 2, ["0,1", "2,3", "0,1"]),
        ("5, 7", 3, 1, ["5", "7", "5"]),
        ("GPU-a", 1, None, ["GPU-a"]),
        (None, 2, 0, ["", ""]),
        (None, 1, 5, [""]),
    ],
)
def test_each_slot_has_gpus_of_its_own(tmp_path, monkeypatch, visible, slots, gpus, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert processes.slot_devices(slots, gpus) == found
    if gpus == 2 and slots == 2:  # and the trainings see these devices
        tell = "import os; (f / 'seen').write_text(os.environ['CUDA_VISIBLE_DEVICES']); import time; time.sleep(0.5);"
        fake_train(monkeypatch, DONE.replace("(f.parent / 'order')", tell + "(f.parent / 'order')"))
        jobs = plan(["demo:box"], range(2), root=tmp_path)
        run(jobs, slots=2, machine=Machine(gpus=2))
        assert {(job.folder / "seen").read_text() for job in jobs} == set(found)


def test_a_failed_teacher_stops_only_the_students_of_its_seed(tmp_path, monkeypatch):
    fails = "import sys; '/teacher-' in sys.argv[1] and 'seed1' in sys.argv[1] and sys.exit('no');"
    fake_train(monkeypatch, fails + DONE)
    jobs = plan(["demo:box", "demo:misa"], range(3), root=tmp_path)
    with pytest.raises(UserError, match=r"teacher:demo.* with seed 1 failed: no; see"):
        run(jobs, slots=2)
    assert [job.state for job in jobs] == ["finished", "finished", "finished", "not run", "finished", "finished"]


def test_a_training_of_another_process_is_to_be_waited_for(tmp_path):
    wanted = plan(["demo:box"], range(1), root=tmp_path)
    with locked(wanted[0].folder), pytest.raises(UserError, match=r"in use by another run.*wait for that one and run"):
        run(wanted, machine=CPU, data_root=tmp_path / "data")


SLEEP = (
    "import pathlib, signal, sys, time; f = pathlib.Path(sys.argv[1]); f.mkdir(parents=True);"
    "signal.signal(signal.SIGTERM, lambda *_: ((f / 'stopped').touch(), sys.exit(143)));"
    '(f / \'params.json\').write_text(\'{"experiment": {"data": "demo"}}\'); time.sleep(60)'
)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("cluster", "begun"), [("", 2), ("local", 3)])
def test_sigterm_reaches_the_trainings(tmp_path, monkeypatch, cluster, begun):
    """With a cluster all are submitted at once."""
    fake_train(monkeypatch, SLEEP)
    jobs = plan(["demo:box"], range(3), root=tmp_path)

    def tell():
        while sum(job.state == "started" for job in jobs) < begun:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    watch = threading.Thread(target=tell)
    watch.start()
    with pytest.raises(Stopped, match="the same command goes on") as stopped:
        run(jobs, slots=2, cluster=cluster, cluster_options="timeout_min=5" if cluster else "")
    watch.join()
    assert stopped.value.status == 143
    assert [(job.folder / "stopped").exists() for job in jobs] == [i < begun for i in range(3)]
    assert [job.state for job in jobs] == ["started" if i < begun else "not run" for i in range(3)]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_at_its_time_limit_a_job_saves_and_is_submitted_again(tmp_path, monkeypatch):
    """The signal comes 30 seconds after the start; the second time there is something to resume."""
    resumed = "import pathlib, sys; f = pathlib.Path(sys.argv[1]);"
    resumed += "(f / 'stopped').exists() and ((f / 'metrics.json').write_text('{}'), print('resumed'), sys.exit());"
    fake_train(monkeypatch, resumed + SLEEP)
    (job,) = jobs = plan(["demo:box"], range(1), root=tmp_path)
    run(jobs, cluster="local", cluster_options="timeout_min=1")
    assert job.state == "finished"
    assert job.log.read_text() == "resumed\n"


def test_a_job_that_runs_out_of_time_again_says_what_to_change(tmp_path, monkeypatch):
    class Task:
        def result(self):
            raise RuntimeError("Traceback\nUncompletedJobError: Job not requeued because: timed-out too many times.")

    jobs = plan(["demo:box"], range(1), root=tmp_path)
    jobs[0].log.parent.mkdir()
    monkeypatch.setattr(cluster, "_submitted", lambda *_: Task())
    words = r"failed: its time was over, also .*; see .*\.txt, allow more of it in (--)?cluster.options and run"
    with pytest.raises(UserError, match=words):
        run(jobs, cluster="local", cluster_options="timeout_min=1")
    assert "timed-out too many times" in jobs[0].log.read_text()


def test_a_row_that_changes_during_a_sweep_is_not_trained_in_the_place_of_the_planned_one(tmp_path):
    file = tmp_path / "own.py"
    text = (
        "from misa.rows import find_row\nMISA = find_row('demo:misa')\nROWS = {'t': find_row(MISA.teacher)}\n"
        f"ROWS['a'] = MISA.but(projection_weight=4.0, teacher={str(file)!r} + ':t')\n"
    )
    file.write_text(text)
    (job,) = plan([f"{file}:a"], range(1), root=tmp_path / "tables", smoke=True)
    for changed in (
        text.replace("4.0", "9.0"),
        text.replace("teacher)}", "teacher).but(semantic={'stage_weight': 0.9})}"),
    ):
        file.write_text(changed)
        command = job.command(tmp_path / "data", CPU)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert f"{file}:a, or a row that it learns from, has changed since this training was planned" in done.stderr
    assert not job.folder.exists()
    assert f"--lineage={job.teacher.lineage}" in job.teacher.command(None, CPU)


def place(job, data_root, **changes):
    job.folder.mkdir(parents=True, exist_ok=True)
    record = {"row": job.row, "digest": find_row(job.row).digest(), "seed": job.seed, "data_root": str(data_root)}
    (job.folder / "params.json").write_text(
        json.dumps(record | {"experiment": {"data": find_row(job.row).data}} | changes)
    )


def test_a_run_that_was_moved_under_the_name_of_another_is_not_counted(tmp_path):
    """Neither another row, seed or length nor a smoke run enters a mean because of its folder's name."""
    (one,) = plan(["demo:box"], range(1), root=tmp_path)
    finish(one, 20.0)
    smoke, longer = find_row("demo:box").smoke(), find_row("demo:box").but(schedule={"epochs": 13})
    for other in (
        {"digest": find_row("demo:mask").digest(), "row": "demo:mask"},
        {"digest": longer.digest()},
        {"seed": 1},
        {"digest": smoke.digest(), "experiment": {"data": "demo", "limit": smoke.limit}},
    ):
        place(one, tmp_path / "data", **other)
        kind, key = "smoke run" if "experiment" in other else "run", next(iter(other))
        said = f"holds a {kind} of {other.get('row', 'demo:box')} with another {key} than demo:box with seed 0"
        with pytest.raises(UserError, match=said):
            open_table("demo:box", seeds=1, root=tmp_path)
        with pytest.raises(UserError, match=said):
            run([one], data_root=tmp_path / "data")
    (taught,) = plan(["demo:misa"], range(1), root=tmp_path)
    place(taught, tmp_path / "data", teacher_digest="0123456789")
    with pytest.raises(UserError, match=r"with another teacher_digest than demo:misa .*\(0123456789, not"):
        open_table("demo:misa", seeds=1, root=tmp_path)
    place(one, tmp_path / "data", row="mine.py:box")
    assert open_table("demo:box", seeds=1, root=tmp_path).figures()["n"].tolist() == [1]


def empty_layouts(root):
    """Two data sets in COCO layout, a and b."""
    for name in "ab":
        annotations = root / name / "annotations"
        annotations.mkdir(parents=True)
        for split in ("train", "val"):
            (annotations / f"instances_{split}2017.json").write_text("{}")
            (root / name / f"{split}2017").mkdir()


def test_runs_on_other_data_are_not_taken_for_this_ones(tmp_path, monkeypatch):
    """The hash of a row does not include its data folder."""
    fake_train(monkeypatch, DONE)
    empty_layouts(tmp_path)
    jobs = plan(["coco_mini:box"], range(2), root=tmp_path / "runs")
    place(jobs[0], tmp_path / "a")
    finish(jobs[0], 3.0)
    with pytest.raises(UserError, match=r"is a run on .*/a, not on .*/b; give each folder of data a root of its own"):
        run(jobs, data_root=tmp_path / "b")
    assert jobs[1].state == "not run"
    run(jobs, data_root=tmp_path / "a")
    assert jobs[1].state == "finished"
    place(jobs[1], tmp_path / "b")
    with pytest.raises(UserError, match="give each folder of data a root of its own"):
        open_table("coco_mini:box", seeds=2, root=tmp_path / "runs")


def test_a_root_in_the_home_folder_is_found(tmp_path, monkeypatch):
    """A training expands it, so that a table which does not would never find the run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (job,) = plan(["demo:box"], [0], root="~/tables")
    assert job.folder.parent == tmp_path / "tables"


@pytest.mark.timeout(60)
def test_a_log_that_cannot_be_opened_stops_nothing_for_ever(tmp_path):
    """Three commands on one slot: the first one's place is given back."""
    (tmp_path / "logs" / "a.txt").mkdir(parents=True)
    with pytest.raises(UserError, match=r"a failed: it cannot be started with its output in .*a\.txt \(Is a directory"):
        spread({name: [sys.executable, "-c", "pass"] for name in "abc"}, tmp_path, slots=1, note=str)


@pytest.mark.timeout(60)
def test_the_progress_bar_says_how_far_trainings_are(tmp_path, monkeypatch, capfd):
    """By the last step in the log of each that runs at the time: here each waits for the other before it ends."""
    line = f"""if True:
        import pathlib, sys, time
        seed, folder = int(sys.argv[1]), pathlib.Path({str(tmp_path)!r})
        print(f"epoch 1/2 step {{3 + 6 * seed}}/12    0.5", flush=True)
        (folder / f"seen{{seed}}").touch()
        while not (folder / f"seen{{1 - seed}}").exists():
            time.sleep(0.05)
        time.sleep(1)"""
    monkeypatch.setattr(Job, "command", lambda job, *_: [sys.executable, "-c", line, str(job.seed)])
    monkeypatch.setattr(processes, "_LOOK_IN_FILE", 0.1)
    run(plan(["demo:box"], range(2), root=tmp_path), slots=2)
    assert "demo:box seed 0 25%, demo:box seed 1 75%" in capfd.readouterr().err


@pytest.mark.timeout(60)
def test_the_progress_bar_says_how_many_images_shares_have_done(tmp_path, monkeypatch, capfd):
    record, seen, tally = tmp_path / "shards" / "0-of-1" / "done.jsonl", tmp_path / "seen", Tally(tmp_path)
    line = f"""if True:
        import pathlib, time
        pathlib.Path({str(record)!r}).write_text("{{}}\\n")
        while not pathlib.Path({str(seen)!r}).exists():
            time.sleep(0.05)"""

    def note():
        text = tally()
        if text == "1 image done":  # only now the process may end
            seen.touch()
        return text

    record.parent.mkdir(parents=True)
    monkeypatch.setattr(processes, "_LOOK_IN_FILE", 0.1)
    spread({"0-of-1": [sys.executable, "-c", line]}, record.parent.parent, slots=1, note=note)
    assert "shares:   0%|          | 0/1 [00:00<?, ?share/s, 1 image done]" in capfd.readouterr().err


def test_names_of_rows_are_text_in_every_format(tmp_path):
    file = tmp_path / "R&D.py"
    file.write_text("from misa.rows import find_row\nROWS = {n: find_row('demo:box') for n in ('a<b>c', 'm{x}$~^2')}\n")
    table = open_table(f"{file}:a<b>c,{file}:m{{x}}$~^2", seeds=1, root=tmp_path)
    assert "R&amp;D.py:a&lt;b&gt;c" in table.render("html").partition("</caption>")[0]
    assert "<b>" not in table.render("html")
    assert r"R\&D.py:m\{x\}\$\textasciitilde{}\textasciicircum{}2" in table.render("latex")


def test_the_file_of_many_rows_has_a_name_that_fits(tmp_path):
    rows = ",".join(f"photos:{name}" for name in table_module("photos").ROWS if "teacher" not in name)
    names = {file_name(rows[:end], "photos", smoke=False) for end in (len(rows), len(rows) - 9)}
    assert len(names) == 2
    assert max(map(len, names)) < 240
    letters = file_name(f"{'ä' * 150}.py:a,{'ä' * 150}.py:b", "photos", smoke=True)
    (tmp_path / letters).with_suffix(".html").write_text("fits")


def test_options_without_an_effect_on_a_table_are_refused(tmp_path, capsys, monkeypatch):
    assert main(["tables", "demo:box", "--root", str(tmp_path), "--cluster-options", "timeout_min=60"]) == 2
    assert "--cluster-options has no effect without --cluster; leave it out." in capsys.readouterr().err
    empty_layouts(tmp_path)
    (job,) = plan(["coco_mini:box"], [0], root=tmp_path)
    place(job, tmp_path / "a")
    finish(job, 20.0)
    words = ["tables", "coco_mini:box", "--seeds", "1", "--root", str(tmp_path)]
    assert main([*words, "--data-root", str(tmp_path / "b")]) == 2
    assert "give each folder of data a root of its own" in capsys.readouterr().err
    for more in (["--data-root", str(tmp_path / "a")], ["--run"]):  # nothing is missing
        assert main([*words, *more]) == 0
        assert "20.0" in capsys.readouterr().out
    shutil.copytree(tmp_path / "b", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    words[words.index("--seeds") + 1] = "2"
    assert main([*words, "--run"]) == 2, "the missing one would learn from the default folder"
    assert "give each folder of data a root of its own" in capsys.readouterr().err


def test_runs_on_other_annotations_of_one_folder_are_not_compared(tmp_path):
    jobs = plan(["photos:box", "photos:mask"], [0], root=tmp_path)
    for job, val in zip(jobs, ("first", "second"), strict=True):
        place(job, tmp_path / "data", data={"train": "same", "val": val})
        finish(job, 20.0)
    words = r"is a run on other val annotations of .*/data than photos:box with seed 0; restore the annotations"
    with pytest.raises(UserError, match=words):
        open_table("photos:box,photos:mask", seeds=1, root=tmp_path)
    old, *_ = plan(["photos:fsd"], [0], root=tmp_path)
    place(old, tmp_path / "data")  # before annotations were recorded
    with pytest.raises(UserError, match=words):
        open_table("photos:fsd,photos:box,photos:mask", seeds=1, root=tmp_path)
    place(jobs[1], tmp_path / "data", data={"train": "same", "val": "first"})
    assert len(open_table("photos:fsd,photos:box,photos:mask", seeds=1, root=tmp_path).figures()) == 3


def test_rows_of_equal_validation_images_are_compared(tmp_path):
    """The number of training images, as in a learning curve, and the order of the parameters may differ."""
    (tmp_path / "rows.py").write_text(
        "from misa.rows import find_row\nBOX = find_row('demo:box')\n"
        "ROWS = {'few': BOX.but(scenes=(('val', 20), ('train', 30)))}\n"
        "ROWS['more'] = BOX.but(scenes=(('train', 90), ('val', 20)))\n"
    )
    assert len(open_table(f"{tmp_path}/rows.py:few,{tmp_path}/rows.py:more", seeds=1, root=tmp_path).rows) == 2
    assert len(open_table("demo:box,demo:mask2former_box", seeds=1, root=tmp_path, smoke=True).rows) == 2


@pytest.mark.parametrize("rows", ["demo:box,photos:mask", "demo:box,table3_components:demo_baseline"])
def test_rows_on_different_images_are_not_compared(tmp_path, rows):
    with pytest.raises(UserError, match=r"demo:box and .* are scored on different images; compare rows of the same"):
        open_table(rows, seeds=1, root=tmp_path)


def test_a_difference_says_over_how_many_pairs_it_is(tmp_path):
    table = open_table("demo:box,demo:mask", seeds=3, root=tmp_path)
    for row, scores in (("demo:box", (20.0, 22.0)), ("demo:mask", (31.0, 32.0, 40.0))):
        for job, ap in zip(table.jobs[row], scores, strict=False):
            finish(job, ap)
    own = table.printed().loc["demo:mask"]
    assert own["AP − baseline"] == f"{own['AP − baseline'].partition(' (')[0]} (2 pairs)"
    assert own["AP − baseline"].startswith("+10.5 ± ")
    finish(table.jobs["demo:box"][2], 21.0)
    assert "pair" not in table.printed().loc["demo:mask", "AP − baseline"]


def test_data_without_masks_is_compared_by_the_boxes(tmp_path):
    table = open_table("demo:box", seeds=1, root=tmp_path)
    (job,) = table.every_job()
    job.folder.mkdir()
    scores = {"AP": 12.5, "AP50": 30.0, "AP75": 9.0, "APs": 8.0, "APm": 14.0, "APl": None}
    (job.folder / "metrics.json").write_text(json.dumps({"bbox": scores}))
    assert table.figures().loc["demo:box", "AP75"] == 9
    assert "AP of boxes, since the data has no masks" in table.render("text")
    assert table.by_mode().set_index("group")["mean"].to_dict() == {"small": 8, "medium": 14}


def test_one_row_by_two_names_is_trained_once(tmp_path):
    table = open_table("table3_components:demo_baseline,table5_affinity:demo_apro_color", seeds=2, root=tmp_path)
    assert len(table.every_job()) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("", "needs cluster_options with timeout_min"),
        ("timeout_min", "cluster_options has 'timeout_min'; write name=value"),
        ("timeout_min=5,gpu_number=1", "submitit says: .*gpu_number"),
    ],
)
def test_a_cluster_is_told_how_long_a_training_takes(tmp_path, options, sentence):
    with pytest.raises(UserError, match=sentence):
        run(plan(["demo:box"], range(1), root=tmp_path), cluster="local", cluster_options=options)


@debug
@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_shares_run_as_jobs(tmp_path, cluster):
    """By submitit's own executors; each command's output is in its log."""
    commands = {name: [sys.executable, "-c", f"print('did {name}')"] for name in ("0-of-2", "1-of-2")}
    spread(commands, tmp_path, slots=2, cluster=cluster, cluster_options="timeout_min=5", note=str)
    assert {path.stem: path.read_text() for path in (tmp_path / "logs").glob("*.txt")} == {
        name: f"did {name}\n" for name in commands
    }
    if cluster == "local":  # after a failure the other opens a debugger
        commands["1-of-2"] = [sys.executable, "-c", "raise SystemExit('no room')"]
        with pytest.raises(UserError, match=r"^1-of-2 failed: no room; see .*1-of-2"):
            spread(commands, tmp_path, slots=2, cluster=cluster, cluster_options="timeout_min=5", note=str)


@pytest.mark.parametrize(
    ("cluster", "sentence"),
    [("slrm", "cluster slrm cannot be used: .*slrm"), ("slurm", "cluster slurm cannot be used: .*srun")],
)
def test_a_cluster_that_is_none_is_named(tmp_path, monkeypatch, cluster, sentence):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=sentence):
        run(plan(["demo:box"], range(1), root=tmp_path), cluster=cluster, cluster_options="timeout_min=5")


def slurm(folder, monkeypatch, state):
    """Fake sbatch, which logs its arguments, and sacct, which reports `state` until the job's result exists."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    scripts = {
        "sbatch": f"echo x >> {folder}/asked; cp $1 {folder}/batch.sh; echo Submitted batch job 7",
        "sacct": f"echo 'JobID|State'; echo '7|{state}'",
        "srun": "exit 1",
        "scancel": "exit 0",
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")


def test_a_submitted_training_is_waited_for_and_not_submitted_again(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    jobs = plan(["demo:box"], range(1), root=tmp_path)
    slurm(tmp_path, monkeypatch, "RUNNING")
    options = {"cluster": "slurm", "cluster_options": "timeout_min=1440,gpus_per_node=1"}
    waited = []

    def result(task):
        waited.append(task.job_id)
        if len(waited) == 1:
            raise KeyboardInterrupt  # by the user
        return 0

    monkeypatch.setattr(submitit.SlurmJob, "result", result)
    with pytest.raises(KeyboardInterrupt):
        run(jobs, **options)
    batch = (tmp_path / "batch.sh").read_text()
    assert "--time=1440" in batch
    assert "--gpus-per-node=1" in batch
    submitit.SlurmJob.watcher.clear()
    run(jobs, **options)
    assert waited == ["7", "7"]
    assert (tmp_path / "asked").read_text() == "x\n"
    slurm(tmp_path, monkeypatch, "FAILED")  # ended without a result: it is submitted again
    submitit.SlurmJob.watcher.clear()
    run(jobs, **options)
    assert (tmp_path / "asked").read_text() == "x\nx\n"


@pytest.mark.slow
def test_a_smoke_sweep_end_to_end(tmp_path, capsys):
    """Teacher, students and table with the real command, in two slots; the second call trains nothing."""
    arguments = [
        "tables", "demo:misa,demo:box", "--seeds", "1", "--smoke", "--run", "--slots", "2",
        "--root", str(tmp_path / "runs"), "--data-root", str(tmp_path / "data"), "--gpus", "0",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "2 finished, 0 started, 0 not run" in capsys.readouterr().out
    logs = sorted((tmp_path / "runs" / "logs").iterdir())
    before = [log.stat().st_size for log in logs]
    assert len(logs) == 3
    assert main(arguments) == 0
    assert [log.stat().st_size for log in logs] == before
