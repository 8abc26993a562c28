"""A format is one file with `find` and `entries`, and one row: a toy format is found, checked and trained from."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from misa.data.formats.convert import open_layout, read_boxes
from misa.data.formats.table import FORMATS
from misa.engine.reports.checkup import check_data
from misa.engine.training.train import train
from misa.rows import find_row
from tests.helpers import CPU

TOY = '''
"""Of each image a file NAME.toy with lines `label x y w h`."""
from misa.data.formats.parts import Boxed, Entry, Format, Part, files_of

def find(root):
    files = files_of(root, ".toy")
    return [Part(tuple(files), root, "", root)] if files else []

def entries(part, report):
    for path in part.files:
        rows = [line.split() for line in path.read_text().splitlines()]
        objects = [Boxed(label, tuple(map(float, box)), str(path)) for label, *box in rows]
        yield Entry(f"{path.stem}.png", None, objects, str(path))

TOY = Format(find, entries, "1.toy beside 1.png")
'''


def install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("toy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "toy", module)
    monkeypatch.setitem(FORMATS, "toy", module.TOY)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "toy.py").write_text(TOY)
    install(tmp_path / "toy.py", monkeypatch)
    root = tmp_path / "data"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (72, 96, 3), dtype=np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.toy").write_text(f"cat {i} 4 40 30\ndog 50 20 40 44\n")
    return root


def test_a_toy_format_is_read_checked_and_trained_from(toy: Path, tmp_path: Path) -> None:
    layout = open_layout(toy)
    assert layout.root == toy
    checkup = check_data(toy)
    assert checkup.usable
    assert sum(report.objects for report in checkup.reports) == 12
    assert read_boxes(toy)["3.png"] == ([[3, 4, 43, 34], [50, 20, 90, 64]], ["cat", "dog"])
    run = train(find_row("coco_mini:box").smoke(), data_root=toy, work_dir=tmp_path / "run", machine=CPU)
    assert run.source.classes == ("cat", "dog")
    assert "bbox" in run.metrics
    steps = (tmp_path / "run" / "losses.jsonl").read_text().splitlines()
    assert len(steps) == 2


def test_data_is_read_again_by_a_format_that_was_edited(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader of a format that is being written changes more often than the data."""
    before = json.loads(open_layout(toy).train.annotations.read_text())["annotations"]
    (tmp_path / "toy.py").write_text(TOY.replace("tuple(map(float, box))", "(1.0, 2.0, 3.0, 4.0)"))
    install(tmp_path / "toy.py", monkeypatch)
    after = json.loads(open_layout(toy).train.annotations.read_text())["annotations"]
    assert before[0]["bbox"] != [1, 2, 3, 4]
    assert {tuple(row["bbox"]) for row in after} == {(1, 2, 3, 4)}
