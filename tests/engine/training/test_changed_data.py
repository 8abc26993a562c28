"""A run identifies its annotations: changed ones are reported or refused, the same ones are accepted when moved."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from misa.engine.reports.evaluate import evaluate
from misa.engine.runs.folder import finished
from misa.engine.training.train import train
from misa.errors import UserError
from misa.rows import find_row
from tests.helpers import CPU

ROW = find_row("coco_mini:box").smoke()


def write_data(root: Path) -> Path:
    (root / "annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        images, objects = [], []
        for i in range(1, 5):
            Image.fromarray(rng.integers(0, 255, (72, 96, 3), dtype=np.uint8)).save(root / f"{split}2017/{i}.jpg")
            images.append({"id": i, "file_name": f"{i}.jpg", "width": 96, "height": 72})
            objects.append({"id": i, "image_id": i, "category_id": 1, "bbox": [8 * i, 4, 40, 30], "iscrowd": 0})
            objects[-1]["area"] = 1200
        tables = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cat"}]}
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(tables))
    return root


def change(root: Path, split: str) -> None:
    path = root / f"annotations/instances_{split}2017.json"
    tables = json.loads(path.read_text())
    tables["annotations"] = tables["annotations"][:3]
    path.write_text(json.dumps(tables))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("changed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        train(ROW, data_root=write_data(home / "data"), work_dir=home / "run", machine=CPU)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run and its data, to be modified."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    params = json.loads((tmp_path / "run/params.json").read_text())
    (tmp_path / "run/params.json").write_text(json.dumps(params | {"data_root": str(tmp_path / "data")}))
    return tmp_path


def again(home: Path, data: str = "data") -> dict[str, object]:
    train(ROW, data_root=home / data, work_dir=home / "run", machine=CPU)
    params: dict[str, object] = json.loads((home / "run/params.json").read_text())
    return params


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_finished_run_says_that_its_annotations_have_changed(
    home: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    again(home)
    assert "have changed" not in capsys.readouterr().err
    change(home / "data", split)
    record = (home / "run/params.json").read_bytes()
    for show in (lambda: again(home), lambda: finished(home / "run"), lambda: evaluate(home / "run", machine=CPU)):
        show()
        assert f"warning: the annotations of {split} in {home / 'data'} have changed" in capsys.readouterr().err
    evaluate(home / "run", data_root=home / "data", machine=CPU)
    assert "have changed" not in capsys.readouterr().err, "data that is asked for is no change"
    assert (home / "run/params.json").read_bytes() == record


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_interrupted_run_does_not_go_on_with_changed_annotations(home: Path, split: str) -> None:
    (home / "run/metrics.json").unlink()
    before = {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()}
    change(home / "data", split)
    words = f"the annotations of {split} in .* have changed .* restore them, or choose another work_dir"
    with pytest.raises(UserError, match=words):
        again(home)
    assert {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_same_data_in_another_folder_is_gone_on_with(home: Path, interrupted: bool) -> None:
    if interrupted:
        (home / "run/metrics.json").unlink()
    shutil.move(home / "data", home / "moved")
    assert again(home, "moved")["data_root"] == str(home / "moved")
    assert (home / "run/metrics.json").exists()
    assert evaluate(home / "run", machine=CPU).source.root == home / "moved"


def test_other_data_in_another_folder_is_another_run(home: Path) -> None:
    shutil.copytree(home / "data", home / "other")
    change(home / "other", "train")
    with pytest.raises(UserError, match=r"holds another run \(data_root is"):
        again(home, "other")


def test_a_run_of_before_says_nothing_of_its_annotations(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = json.loads((home / "run/params.json").read_text())
    del params["data"]
    (home / "run/params.json").write_text(json.dumps(params))
    again(home)
    assert "have changed" not in capsys.readouterr().err
    shutil.copytree(home / "data", home / "copy")
    with pytest.raises(UserError, match=r"holds another run \(data_root is"):
        again(home, "copy")
