"""The report of `make gpu`, made small on the CPU, and what it says where something is missing or fails."""

import json

import pytest
import torch

from benchmarks import gpu
from misa.cli import main as misa
from misa.engine.training import estimate
from misa.errors import UserError


def test_without_a_device_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_quick_parts_on_the_cpu(tmp_path):
    arguments = ["--device", "cpu", "--small", "--out", str(tmp_path), "--parts", "checks", "losses", "utilization"]
    assert gpu.main(arguments) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["checks"]["sum"] == dict.fromkeys(("loss_global", "loss_local", "gradient"), 0.0)
    assert report["losses"]["2 masks, 1 categories"]["ms an image"] > 0
    assert report["versions"]["torch"] == torch.__version__ or report["versions"]["torch"] in torch.__version__
    assert report["utilization"] == {}
    assert "ms an image" in (tmp_path / "gpu.md").read_text()


def test_a_device_that_computes_something_else_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    right, calls = gpu.pulled, []

    def wrong(*args):
        calls.append(args)
        return {name: loss * (1 + 0.01 * (len(calls) % 2)) for name, loss in right(*args).items()}

    monkeypatch.setattr(gpu, "pulled", wrong)
    assert gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path), "--parts", "checks", "losses"]) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert "differs from the CPU by" in report["failed"]["checks"]
    assert report["losses"]
    assert "failed" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_steps_and_training_on_the_cpu(tmp_path):
    arguments = ["--device", "cpu", "--small", "--out", str(tmp_path), "--data-root", str(tmp_path / "data")]
    assert gpu.main([*arguments, "--parts", "steps", "trained"]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    for precision in gpu.PRECISIONS:
        step = report["steps"][precision]
        apart = step["ms"]["mmdet, from masks"] + step["ms"]["teacher"]
        assert step["to plain + teacher"] == pytest.approx(step["ms"]["+ FSD + SEPA"] / apart)
        assert step["waits"] == []
    assert "AP" in report["trained"]


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
        (None, "H100", "float32", "no report of `make gpu`"),
        ("{", "H100", "float32", "no report of `make gpu`"),
        ("[]", "H100", "float32", "no report of `make gpu`"),
        (json.dumps(REPORT), "A100", "float32", "was measured on 'NVIDIA H100 80GB HBM3', not on a A100"),
        (json.dumps(REPORT), "H100", "float16", "no utilization between 0 and 1 for float16"),
        (json.dumps(REPORT | {"utilization": {"float32": 41}}), "H100", "float32", "no utilization between 0 and 1"),
    ],
)
def test_a_report_that_does_not_fit_is_refused(tmp_path, text, gpu_name, precision, words):
    path = tmp_path / "gpu.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        estimate.reported(path, gpu_name, precision)
