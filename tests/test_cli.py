"""The command line: exit status 0, 2 with one sentence, examples in every --help."""

import json
import shutil
import subprocess
import sys

import pytest

from misa.cli import main
from misa.data.scenes.scenes import Scenes, write_scenes


@pytest.fixture
def root(tmp_path):
    return write_scenes(tmp_path / "toy", Scenes(size=48, train=4, val=2, classes=2))


def edit(root, change, split="train"):
    path = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first(root, split="train"):
    return min((root / f"{split}2017").iterdir())


def box(*values):
    return lambda root: edit(root, lambda c: c["annotations"][0].update(bbox=list(values)))


# How it is spoilt, and the cause that must be told: words that stand in no path.
BAD = {
    "no such folder": (lambda root: shutil.rmtree(root), "toy does not exist"),
    "no annotation file": (
        lambda root: (root / "annotations/instances_train2017.json").unlink(),
        "instances_train2017.json is missing",
    ),
    "an image is absent": (lambda root: first(root).unlink(), "000000000001.png is absent"),
    "an image is cut": (lambda root: cut(first(root)), "000000000001.png is truncated or no image"),
    "an image of another size": (
        lambda root: edit(root, lambda c: c["images"][0].update(width=47)),
        "is 48 x 48 pixels, but 47 x 48 are listed",
    ),
    "a box without area": (box(3, 3, 0, 5), "bbox [3, 3, 0, 5] has no area"),
    "a negative box": (box(9, 9, -4, 5), "bbox [9, 9, -4, 5] has negative size"),
    "a box outside": (box(500, 3, 4, 5), "bbox [500, 3, 4, 5] lies outside the image"),
    "no objects": (lambda root: edit(root, lambda c: c.update(annotations=[])), "no object to learn from"),
    "no objects in val": (lambda root: edit(root, lambda c: c.update(annotations=[]), "val"), "no object to score on"),
    "no images": (lambda root: edit(root, lambda c: c.update(images=[], annotations=[])), "it lists no images"),
    "other classes": (
        lambda root: edit(root, lambda c: [x.update(name=x["name"] + "s") for x in c["categories"]], "val"),
        "is expected, but found are",
    ),
    "no masks in val": (
        lambda root: edit(root, lambda c: c["annotations"][0].pop("segmentation"), "val"),
        "it has no 'segmentation', and scoring compares with true masks",
    ),
    "a mask in val that does not decode": (
        lambda root: edit(root, lambda c: c["annotations"][0]["segmentation"].update(counts="nonsense"), "val"),
        "segmentation has counts that cannot be decoded",
    ),
    "cut json": (
        lambda root: cut(root / "annotations/instances_train2017.json"),
        "the file ends too early; copy or download it again",
    ),
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["estimate", "demo:box", "--gpus", "0"],
        ["estimate", "demo:box", "--per-gpu", "-1"],
        ["estimate", "demo:box", "--images", "many"],
        ["profile", "--batch", "0"],
        ["profile", "--steps", "0"],
        ["profile", "--threads", "-2"],
    ],
)
def test_counts_are_counts(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert f"argument {arguments[-2]}: {arguments[-1]!r} is no whole number from 1 on" in capsys.readouterr().err


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


def boxes_only(root):
    """The same data as csv files, which cannot hold masks."""
    for split in ("train", "val"):
        content = json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())
        file = {image["id"]: f"{split}2017/{image['file_name']}" for image in content["images"]}
        name = {category["id"]: category["name"] for category in content["categories"]}
        lines = ["image,x,y,w,h,label"]
        for a in content["annotations"]:
            lines.append(",".join(map(str, [file[a["image_id"]], *a["bbox"], name[a["category_id"]]])))
        (root / f"{split}.csv").write_text("\n".join(lines))
    shutil.rmtree(root / "annotations")


def test_boxes_in_csv_files_train_from_the_same_command(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    boxes_only(root)
    run = tmp_path / "run"
    assert main(["check", str(root), "--picture", str(tmp_path / "check.png")]) == 0
    assert (tmp_path / "check.png").is_file()
    assert "(train split): 4 images" in capsys.readouterr().out
    assert main(["train", "coco_mini:box", "--smoke", "--data-root", str(root), "--work-dir", str(run)]) == 0
    out = capsys.readouterr().out
    assert "the val split has no masks; the score compares boxes" in out
    metrics = json.loads((run / "metrics.json").read_text())
    assert "segm" not in metrics
    assert set(metrics["bbox"]) == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    assert main(["evaluate", str(run)]) == 0
    assert "boxes" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--miou"]) == 2
    assert "mean IoU compares with true masks" in capsys.readouterr().err


def test_check_of_one_json_and_what_it_tells(root, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(first(root), root / "val2017" / first(root, "val").name)  # an image of both splits
    edit(root, lambda c: c["annotations"].append({**c["annotations"][0], "id": 999}))
    edit(root, lambda c: c["categories"].append({"id": 77, "name": " ".join(c["categories"][0]["name"]).upper()}))
    json_file = root / "annotations/instances_train2017.json"
    assert main(["check", str(json_file), "--images", str(root / "train2017")]) == 0
    out = capsys.readouterr().out
    assert "has the same box; remove one of them" in out
    assert "differs from" in out
    assert (tmp_path / "runs/check-instances_train2017.png").is_file()
    assert main(["check", str(root), "--no-picture"]) == 2
    assert "has the same content as" in capsys.readouterr().out
    assert main(["check", str(root), "--images", str(root)]) == 2
    assert "images goes with one COCO json" in capsys.readouterr().err
