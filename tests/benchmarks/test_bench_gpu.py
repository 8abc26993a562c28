"""The report of `make gpu`, in small size on the CPU, including missing and failed parts."""

import gzip
import json
import math

import pytest
import torch

from benchmarks import gpu, gpu_runs, launches
from benchmarks.stages import OBJECTIVES
from misa.cli import main as misa
from misa.engine.training import estimate
from misa.errors import UserError


def test_without_a_device_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def small(folder, *names):
    """Run the parts in small size on the CPU; returns the status and the report, as data and as a page."""
    arguments = ["--device", "cpu", "--small", "--out", str(folder), "--data-root", str(folder / "data")]
    status = gpu.main([*arguments, "--parts", *names])
    return status, json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_the_quick_parts_on_the_cpu(tmp_path):
    status, report, page = small(tmp_path, "checks", "stages", "objectives", "utilization", "sanitizer")
    assert status == 0
    for form in ("sum", "embedding", "product", "sum, a spread for each window"):
        assert set(report["checks"][form].values()) == {0}, form
    assert all(report["checks"]["bitwise equal in two runs"].values())
    times = report["stages"]["auto, 2 masks, 1 categories"]
    assert set(launches.PULL) | {"projection", "FSD", "host", "SEPA, ms an image", "peak MiB"} < set(times)
    assert all(value > 0 for name, value in times.items() if name != "peak MiB")
    assert times["peak MiB"] is None
    assert set(report["objectives"]["ms an image"]) == set(OBJECTIVES)
    assert report["versions"]["torch"] in torch.__version__
    assert report["utilization"] == {}
    assert report["goals"] == ["SEPA of 64 masks and 8 categories: 10 ms an image at most: not measured"]
    for words in ("a CPU's numbers", "no measurement", "## Failed\n\nNothing.", "## Machine", "- driver: none"):
        assert words in page
    for part in ("checks", "stages", "objectives", "utilization", "sanitizer"):
        assert f"## {part}" in page


def test_a_device_that_computes_something_else_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch):
    right, calls = gpu.fsd, []

    def wrong(*args):
        calls.append(args)
        return right(*args) * (1 + 0.01 * (len(calls) % 2))

    monkeypatch.setattr(gpu, "fsd", wrong)
    status, report, page = small(tmp_path, "checks", "objectives")
    assert status == 1
    assert "sum, FSD: 9.9e-03 from the CPU" in report["failed"]["checks"]
    assert report["checks"]["bitwise equal in two runs"] == {
        "loss_global": True,
        "loss_local": True,
        "projection": True,
        "FSD": False,
    }
    assert report["objectives"]
    assert page.index("from the CPU") < page.index("## Machine")


def test_a_part_that_breaks_is_said_and_has_no_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "objective_loss", lambda *_: 1 / 0)
    status, report, page = small(tmp_path, "objectives", "utilization")
    assert status == 1
    assert report["failed"] == {"objectives": "ZeroDivisionError: division by zero"}
    assert "objectives" not in report
    assert "No result: it failed" in page
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_wait_within_the_step_is_found_in_a_trace():
    events = [("cudaLaunchKernel", 1.0), ("cudaStreamSynchronize", 2.0), ("cudaDeviceSynchronize", 9.0)]
    assert gpu.waiting(events, 5.0) == ["cudaStreamSynchronize"]
    assert gpu.waiting(events, 1.5) == []


def test_goals_are_met_missed_or_not_measured():
    assert gpu.goal("a", 1.2, 1.15).endswith("1.20, MISSED")
    assert gpu.goal("a", 1.1, 1.15).endswith("1.10, met")
    assert gpu.goal("a", None, 1.15, "ms") == "a: 1.15 ms at most: not measured"


def test_a_run_that_differs_or_lacks_a_step():
    rows = [{"iter": i, "loss": 2.0 + i} for i in range(3)]
    assert gpu_runs.difference(rows, rows) == 0
    assert gpu_runs.difference(rows, [*rows[:2], {"iter": 2, "loss": 4.4}]) == pytest.approx(0.1)
    assert gpu_runs.difference(rows, rows[:2]) == gpu_runs.difference(rows, [*rows, rows[2]]) == math.inf
    assert gpu_runs.difference([], []) == math.inf


def test_a_failed_training_is_no_success(tmp_path, monkeypatch):
    """A resumed run with other losses, and one that ended before it could be stopped."""
    place = gpu_runs.Place("cpu", True, "data", tmp_path)

    def planted(loss, status):
        def trained(place, row, folder, *, stop_after=None, root=None):
            steps = 2 if stop_after else 4
            folder.mkdir(parents=True, exist_ok=True)
            value = loss if folder.name == "parts" and stop_after is None else 1.0
            (folder / "losses.jsonl").write_text("".join(f'{{"iter": {i}, "loss": {value}}}\n' for i in range(steps)))
            return {"status": status if stop_after else 0, "seconds": 1.0, "says": []}

        monkeypatch.setattr(gpu_runs, "trained", trained)
        return gpu_runs.resumed(place)["wrong"]

    assert planted(1.0, 143) == []
    assert "differs by 1.0e-01" in planted(1.1, 143)[0]
    assert "not stopped in the middle" in planted(1.0, 0)[0]
    assert "stopped ended with 1" in planted(1.0, 1)[0]


@pytest.mark.slow
def test_steps_and_training_on_the_cpu(tmp_path):
    status, report, _ = small(tmp_path, "steps", "trained")
    assert status == 0
    for precision in gpu.PRECISIONS:
        step = report["steps"][precision]
        apart = step["ms"]["mmdet, from masks"] + step["ms"]["teacher"]
        assert step["to plain + teacher"] == pytest.approx(step["ms"]["+ FSD + SEPA"] / apart)
        assert step["synchronisations"] == step["trace"]["synchronisations in the trace"] == []
        assert set(step["parts, ms"]) >= {"teacher forward", "FSD", "tree"}
        trace = json.loads(gzip.decompress((tmp_path / step["trace"]["file"]).read_bytes()))
        assert any(event.get("name") == "misa: step" for event in trace["traceEvents"])
    assert "AP" in report["trained"]


@pytest.mark.slow
def test_trainings_that_are_stopped_go_on(tmp_path):
    status, report, _ = small(tmp_path, "resumed", "endurance")
    assert status == 0, report["failed"]
    assert 0 < report["resumed"]["stopped after"] < report["resumed"]["steps"] == 12
    assert report["resumed"]["difference"] == 0
    assert report["endurance"]["steps"] > report["endurance"]["stopped after"] > 0
    assert report["endurance"]["checkpoints"]


@pytest.mark.slow
def test_tests_and_other_benchmarks_are_run(tmp_path, monkeypatch):
    status, report, _ = small(tmp_path, "tests", "benchmarks")
    assert status == 0
    assert "passed" in report["tests"]["summary"]
    assert "not run" in report["benchmarks"]["propagation"]
    monkeypatch.setattr(gpu_runs, "ran", lambda command, path, seconds: (124, "FAILED tests/a.py::b\n1 failed in 2s"))
    status, report, _ = small(tmp_path, "tests", "benchmarks")
    assert status == 1
    assert report["tests"] == {"summary": "1 failed in 2s", "failed": ["FAILED tests/a.py::b"]}
    assert set(report["failed"]) == {"tests", "benchmarks"}


REPORT = {"card": "NVIDIA H100 80GB HBM3", "utilization": {"float32": 0.41, "bfloat16": 0.23}}


def test_an_estimate_takes_what_a_report_measured(tmp_path, monkeypatch, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(REPORT))
    step = estimate.Step(3e11, 3e8, 40_000_000, 10_000_000, 20_000, 1.0, "cpu")
    small = estimate.Step(2e11, 1e8, 40_000_000, 10_000_000, 10_000, 1.0, "cpu")
    monkeypatch.setattr(estimate, "measure", lambda *args, **kwargs: estimate.Work(small, step))
    assert misa(["estimate", "table1_coco:misa_r50", "--gpus", "8", "--report", str(path)]) == 0
    assert f"u = 0.41, from {path}" in capsys.readouterr().out
    arguments = ["estimate", "table1_coco:misa_r50", "--gpus", "8", "--precision", "bfloat16", "--report", str(path)]
    assert misa(arguments) == 0
    assert f"u = 0.23, from {path}" in capsys.readouterr().out
    assert misa([*arguments, "--utilization", "0.5"]) == 2
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "gpu_name", "precision", "words"),
    [
        (None, "H100", "float32", "not a report of `make gpu`"),
        ("{", "H100", "float32", "not a report of `make gpu`"),
        ("[]", "H100", "float32", "not a report of `make gpu`"),
        (json.dumps(REPORT), "A100", "float32", "was measured on 'NVIDIA H100 80GB HBM3', not on a A100"),
        (json.dumps(REPORT | {"card": "NVIDIA RTX A1000"}), "A100", "float32", "not on a A100"),
        (json.dumps(REPORT | {"card": "NVIDIA GeForce RTX 4090 Laptop GPU"}), "RTX4090", "float32", "not on a RTX4090"),
        (json.dumps(REPORT), "H100", "float16", "no utilization between 0 and 1 for float16"),
        (json.dumps(REPORT | {"utilization": {"float32": 41}}), "H100", "float32", "no utilization between 0 and 1"),
        (
            json.dumps({"card": "H100", "failed": {"utilization": "out of memory"}}),
            "H100",
            "float32",
            "^[^ ]* has no utilization, that part of .* failed .out of memory.; run it again.$",
        ),
    ],
)
def test_a_report_that_does_not_fit_is_refused(tmp_path, text, gpu_name, precision, words):
    path = tmp_path / "gpu.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        estimate.reported(path, gpu_name, precision)
