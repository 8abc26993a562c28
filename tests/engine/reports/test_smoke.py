"""Results of a smoke run are marked as such wherever they are shown."""

import json
import shutil

import pytest

from misa.cli import main
from misa.engine.runs.state import SMOKE

MARK = "SMOKE RUN: two training steps on small images, to see that everything runs; its numbers mean nothing."


@pytest.fixture(params=[True, False], ids=["smoke", "not smoke"])
def run(request, small_run, tmp_path):
    """A run folder recorded as a smoke run, and one that is not."""
    folder = shutil.copytree(small_run.folder, tmp_path / "run")
    params = json.loads((folder / "params.json").read_text())
    params["experiment"]["limit"] = 4 if request.param else None
    (folder / "params.json").write_text(json.dumps(params))
    return folder, request.param


def test_inspect(run, capsys):
    folder, smoke = run
    assert main(["inspect", str(folder), "--resamples", "2"]) == 0
    assert capsys.readouterr().out.startswith(MARK) == smoke
    assert (SMOKE in (folder / "inspection.html").read_text()) == smoke


def test_guidance(run, capsys):
    folder, smoke = run
    assert main(["guidance", str(folder), "--images", "2", "--only", "3x3"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(MARK) == smoke
    assert (f"warning: {folder} is {SMOKE}" in err) == smoke


def test_label(run, small_run, tmp_path, capsys):
    folder, smoke = run
    words = ["label", str(small_run.source.root), "--run", str(folder), "--split", "val"]
    assert main([*words, "--out", str(tmp_path / "masks.json")]) == 0
    out, err = capsys.readouterr()
    assert (MARK in out.splitlines()) == smoke
    assert (f"warning: {folder} is {SMOKE}" in err) == smoke
    assert (MARK in (tmp_path / "masks.html").read_text()) == smoke
