"""Sweeps and tables: every training once, figures as numpy computes them, and "not run" where nothing was."""

import csv
import io
import json
import math
import sys

import numpy as np
import pytest
from scipy import stats

from misa.cli import main
from misa.engine import sweep
from misa.engine.sweep import plan, run
from misa.engine.tables import open_table, summary
from misa.errors import UserError


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
    assert rows[0]["AP"] == ""
    assert rows[0]["paper_AP"] == "37.7000"
    demo = open_table(5, seeds=2, root=tmp_path).printed()
    assert not [name for name in demo if name.startswith("paper")]  # the paper has no figures for this data


@pytest.mark.shared
def test_what_the_rows_expect_is_what_the_paper_prints(shared):
    with (shared / "data" / "golden" / "paper_tables.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["table"] in "345"]
    for number in "345":
        table = open_table(int(number), data="voc", seeds=1)
        figures = table.figures().dropna(subset="paper_AP")
        printed = [[float(line[key]) for key in ("ap", "ap50", "ap75")] for line in lines if line["table"] == number]
        assert figures[["paper_AP", "paper_AP50", "paper_AP75"]].to_numpy().tolist() == printed


def test_files_are_written_in_all_three_formats(tmp_path):
    table = open_table(4, seeds=1, root=tmp_path)
    for job in table.every_job():
        finish(job, 25.0)
    html, tex, table_csv = table.save(tmp_path / "out", "table4_demo")
    assert "<caption>Table 4" in html.read_text()
    assert "25.0" in html.read_text()
    assert r"\toprule" in tex.read_text()
    assert "±" not in tex.read_text()
    assert len(list(csv.DictReader(io.StringIO(table_csv.read_text())))) == 5


def test_scores_by_mode_and_size(tmp_path):
    table = open_table("demo:box,demo:mask", seeds=2, root=tmp_path)
    for row, value in (("demo:box", 10.0), ("demo:mask", 20.0)):
        for job, more in zip(table.jobs[row], (0.0, 2.0), strict=True):
            finish(job, value + more, segm_by_mode={"plain": {"AP": value + more + 1}})
    groups = table.by_mode().set_index(["row", "group"])
    assert groups.loc[("demo:box", "plain"), "mean"] == pytest.approx(12)
    assert groups.loc[("demo:mask", "small"), "mean"] == pytest.approx(21)
    assert groups.loc[("demo:mask", "small"), "n"] == 2
    assert groups.loc[("demo:mask", "plain"), "difference"] == pytest.approx(10)
    assert groups.loc[("demo:mask", "plain"), "difference_ci"] == pytest.approx(0)  # both move with the seed
    assert groups.loc[("demo:mask", "plain"), "ci"] > 1
    assert math.isnan(groups.loc[("demo:box", "plain"), "difference"])
    assert ("demo:box", "medium") not in groups.index  # the truth has no object of that size


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["7"], "no table 7; choose one of 3, 4, 5"),
        (["3", "--data", "kitti"], "no data 'kitti'; choose one of coco_mini, demo, voc"),
        (["demo:boxx"], "did you mean 'box'"),
        (["3", "--seeds", "0"], "seeds and slots must be 1 or more"),
    ],
)
def test_a_table_that_is_none(arguments, sentence, capsys):
    assert main(["tables", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_prints_what_was_not_run(tmp_path, capsys):
    assert main(["tables", "3", "--seeds", "1", "--root", str(tmp_path), "--save", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "not run" in out
    assert "0 finished, 0 started, 6 not run" in out
    assert (tmp_path / "out" / "table3_demo.tex").exists()


def fake_train(monkeypatch, body):
    """In place of `misa train`, for the scheduler alone."""
    monkeypatch.setattr(sweep.Job, "command", lambda self, options: [sys.executable, "-c", body, str(self.folder)])


DONE = (
    "import sys, pathlib; f = pathlib.Path(sys.argv[1]); f.mkdir(parents=True);"
    "(f.parent / 'order').open('a').write(f.name + chr(10));"
    "(f / 'metrics.json').write_text('{\"segm\": {\"AP\": 1.0}}')"
)


@pytest.mark.parametrize("cluster", ["", "local"])
def test_teachers_come_first_and_only_what_is_missing_runs(tmp_path, monkeypatch, cluster):
    fake_train(monkeypatch, DONE)
    jobs = plan(["demo:box", "demo:misa"], range(2), root=tmp_path)
    finish(jobs[0], 3.0)
    run(jobs, slots=2, cluster=cluster)
    order = (tmp_path / "order").read_text().split()
    assert sorted(order) == sorted(
        {job.folder.name for job in jobs[1:]} | {job.teacher.folder.name for job in jobs if job.teacher}
    )
    assert [name.startswith("teacher") for name in order] == [True, True, False, False, False]
    assert all(job.state == "finished" for job in jobs)
    run(jobs, slots=2, cluster=cluster)  # nothing is left
    assert (tmp_path / "order").read_text().split() == order


def test_a_failed_training_is_named_and_the_others_still_run(tmp_path, monkeypatch):
    body = DONE + "; 'seed0' in sys.argv[1] and (sys.stderr.write('first\\nno room on the disk\\n'), sys.exit(3))"
    fake_train(monkeypatch, body.replace("import sys, pathlib;", "import sys, pathlib;", 1))
    jobs = plan(["demo:box"], range(3), root=tmp_path)
    with pytest.raises(UserError, match="demo:box with seed 0 failed: no room on the disk"):
        run(jobs, slots=1)
    assert [job.state for job in jobs[1:]] == ["finished", "finished"]


@pytest.mark.slow
def test_a_smoke_sweep_end_to_end(tmp_path, capsys):
    """Teacher, students and table by the real command, in two slots; the second call trains nothing."""
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
