"""The command line: exit status 0, 2 with one sentence, examples in every --help."""

import json
import shutil
import subprocess
import sys

import pytest

from misa.cli import main
from misa.data.synthetic import Scenes, write_scenes


@pytest.fixture
def root(tmp_path):
    return write_scenes(tmp_path / "toy", Scenes(size=48, train=4, val=2, classes=2))


def edit(root, change, split="train"):
    path = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


BAD = {
    "no such folder": (lambda root: shutil.rmtree(root), "toy"),
    "no annotation file": (
        lambda root: (root / "annotations/instances_train2017.json").unlink(),
        "instances_train2017",
    ),
    "an image is absent": (lambda root: next((root / "train2017").iterdir()).unlink(), "train2017"),
    "an image is cut": (lambda root: cut(next((root / "train2017").iterdir())), "train2017"),
    "a box without area": (
        lambda root: edit(root, lambda c: c["annotations"][0].update(bbox=[3, 3, 0, 5])),
        "annotation",
    ),
    "a negative box": (lambda root: edit(root, lambda c: c["annotations"][0].update(bbox=[9, 9, -4, 5])), "annotation"),
    "a box outside": (lambda root: edit(root, lambda c: c["annotations"][0].update(bbox=[500, 3, 4, 5])), "annotation"),
    "no objects": (lambda root: edit(root, lambda c: c.update(annotations=[])), "no object"),
    "no images": (lambda root: edit(root, lambda c: c.update(images=[], annotations=[])), "instances_train2017"),
    "other classes": (
        lambda root: edit(root, lambda c: [x.update(name=x["name"] + "s") for x in c["categories"]], "val"),
        "did you mean",
    ),
    "cut json": (lambda root: cut(root / "annotations/instances_train2017.json"), "instances_train2017"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_sentence_before_any_work(name, root, tmp_path, capsys):
    spoil, message = BAD[name]
    spoil(root)
    run = tmp_path / "run"
    assert main(["train", "coco_mini:box", "--smoke", "--data-root", str(root), "--work-dir", str(run)]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    assert message in error
    assert not run.exists()


def test_check_lists_problems_and_exits_with_2(root, capsys):
    assert main(["check", str(root)]) == 0
    assert "4 images" in capsys.readouterr().out
    next((root / "train2017").iterdir()).unlink()
    assert main(["check", str(root)]) == 2
    assert "error:" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "evaluate", "check"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"misa {command}" in capsys.readouterr().out


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "misa", "--help"], capture_output=True, text=True, check=True)
    assert "train a row" in done.stdout


def test_help_loads_no_framework():
    code = "import sys; from misa.cli import _parser; _parser(); print(sorted({'torch', 'mmdet'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
