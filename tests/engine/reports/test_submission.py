"""Results for test-dev, and the detailed evaluation of a student."""

import json
import shutil
import zipfile

import pytest

from misa.cli import main
from misa.engine.reports.evaluate import evaluate, load_run
from misa.engine.reports.submission import submit
from misa.engine.training.train import train
from misa.errors import UserError
from tests.helpers import CPU, tiny_experiment

TOY = tiny_experiment(schedule={"epochs": 1, "warmup": 1})


@pytest.fixture(scope="module")
def run(module_path):
    return train(TOY, data_root=module_path / "data", work_dir=module_path / "run", machine=CPU)


@pytest.fixture
def coco(run, tmp_path):
    """A COCO folder whose test-dev has the validation images without annotations."""
    val = json.loads(run.source.val.annotations.read_text())
    (tmp_path / "annotations").mkdir()
    listed = {"images": val["images"], "categories": val["categories"]}
    (tmp_path / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(listed))
    shutil.copytree(run.source.val.images, tmp_path / "test2017")
    return tmp_path


def test_what_is_sent_is_what_was_detected(run, coco, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["evaluate", str(run.folder), "--test-dev", str(out), "--data-root", str(coco), "--gpus", "0"]) == 0
    said = capsys.readouterr().out
    assert f"\nrun: {run.folder} (" in said
    assert "public scoring of test-dev is closed" in said
    results = json.loads((out / "detections_test-dev2017_run_results.json").read_text())
    assert results == json.loads((run.folder / "predictions" / "val.json").read_text())
    assert results[0].keys() == {"image_id", "category_id", "score", "segmentation"}
    with zipfile.ZipFile(out / "detections_test-dev2017_run_results.zip") as archive:
        assert archive.namelist() == ["detections_test-dev2017_run_results.json"]
        assert json.loads(archive.read(archive.namelist()[0])) == results
    with pytest.raises(UserError, match="is there already; give another folder"):
        submit(load_run(run.folder), coco, out)
    with pytest.raises(UserError, match="cannot be made"):
        submit(load_run(run.folder), coco, out / "detections_test-dev2017_run_results.json" / "below")
    below = out / "detections_test-dev2017_run_results.json" / "below"
    assert main(["evaluate", str(run.folder), "--test-dev", str(below), "--data-root", str(coco)]) == 2
    assert "--test-dev is a folder;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--separation", "--predictions", "p.json"], "--predictions has no effect with --separation"),
        (["--separation", "--threads", "2"], "--threads has no effect with --separation"),
        (["--separation", "--test-dev", "out"], "--test-dev has no effect with --separation"),
        (["--test-dev", "out", "--boundary"], "--boundary has no effect with --test-dev"),
        (["--test-dev", "out", "--per-class"], "--per-class has no effect with --test-dev"),
        (["--merge-score", "0.5"], "--merge-score has no effect without --miou"),
    ],
)
def test_options_that_do_not_go_together_are_refused(run, capsys, given, words):
    assert main(["evaluate", str(run.folder), *given]) == 2
    assert f"{words}; leave it out." in capsys.readouterr().err


def test_more_classes_than_a_label_map_holds_are_refused(run, monkeypatch):
    """255 means void in a label map, so that an image of 255 classes would be scored without its background."""
    monkeypatch.setattr("misa.engine.reports.evaluate.MOST_CLASSES", 1)
    with pytest.raises(UserError, match="label maps hold at most 1 classes, and the data has"):
        evaluate(run.folder, merged=True)


def test_what_is_missing_is_named(run, coco, tmp_path):
    name = json.loads((coco / "annotations" / "image_info_test-dev2017.json").read_text())["images"][0]["file_name"]
    (coco / "test2017" / name).unlink()
    with pytest.raises(UserError, match=f"lacks 1 of 3 listed images, such as {name}"):
        submit(load_run(run.folder), coco, tmp_path / "out")
    shutil.rmtree(coco / "test2017")
    with pytest.raises(UserError, match="no test2017 folder"):
        submit(load_run(run.folder), coco, tmp_path / "out")
    with pytest.raises(UserError, match=r"image_info_test-dev2017\.json is missing"):
        submit(load_run(run.folder), tmp_path / "elsewhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_line_a_class_and_the_boundaries(run, capsys):
    pytest.importorskip("faster_coco_eval")
    assert main(["evaluate", str(run.folder), "--per-class", "--boundary", "--gpus", "0"]) == 0
    text = capsys.readouterr().out
    weights = f"seed {json.loads((run.folder / 'params.json').read_text())['seed']}), epoch_1.pth"
    first, second, blank = text[text.index("run: ") :].splitlines()[:3]
    assert first.startswith(f"run: {run.folder} (")
    assert first.endswith(weights)
    assert second == f"data: val split of {run.source.root}, {run.metrics['images']} images"
    assert not blank
    assert "boundaries" in text
    assert all(name in text for name in run.source.classes)
    assert "objects" in text
    assert main(["evaluate", str(run.folder), "--boundary", "--gpus", "0"]) == 0
    text = capsys.readouterr().out
    assert "boundaries" in text
    assert not any(name in text for name in run.source.classes), "not asked for"


def test_data_without_masks_has_a_line_a_class_of_boxes(run, tmp_path, capsys):
    shutil.copytree(run.source.root, tmp_path / "boxes")
    annotations = tmp_path / "boxes" / run.source.val.annotations.relative_to(run.source.root)
    content = json.loads(annotations.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    annotations.write_text(json.dumps(content))
    command = ["evaluate", str(run.folder), "--data-root", str(tmp_path / "boxes"), "--gpus", "0"]
    assert main([*command, "--per-class"]) == 0
    words = capsys.readouterr().out
    assert "\nboxes " in words
    assert all(f"\n{name} " in words for name in run.source.classes)
    assert main([*command, "--boundary"]) == 2
    assert "boundary AP compares with true masks, and the val split of" in capsys.readouterr().err


def test_other_weights_are_named_by_their_whole_path(run, tmp_path, capsys):
    other = shutil.copy(run.folder / "checkpoints" / "epoch_1.pth", tmp_path / "mine.pth")
    for given, shown in ((other, other), ("none", "the untrained network")):
        assert main(["evaluate", str(run.folder), "--gpus", "0", "--checkpoint", str(given)]) == 0
        assert f", seed 0), {shown}\ndata: val split of " in capsys.readouterr().out


def test_without_the_package_the_cure_is_named(run, monkeypatch):
    from misa.engine.reports.evaluate import evaluate

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package faster-coco-eval; pip install it"):
        evaluate(run.folder, boundary=True)
