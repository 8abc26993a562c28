"""A checkpoint is scored with the labels that it was trained with, or refused."""

import json
import shutil

import pytest
import torch

from misa.engine.prediction.export import export_student
from misa.engine.reports.evaluate import evaluate, figures_folder
from misa.engine.runs.checkpoints import CARD, newest, read_checkpoint
from misa.engine.runs.folder import Run, opened
from misa.errors import UserError
from tests.helpers import CPU


def test_a_checkpoint_for_other_classes_is_refused(small_run, tmp_path):
    """The weights fit if only the order or the names differ: the labels would be swapped silently."""
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    path = shutil.copy(newest(small_run.folder), tmp_path / "other" / "checkpoints")
    params = json.loads((small_run.folder / "params.json").read_text())
    assert len(params["classes"]) > 1
    swapped = params["classes"][::-1]

    def score(checkpoint):
        return evaluate(small_run.folder, checkpoint=checkpoint, machine=CPU).metrics

    expected = score(path)  # without a record: assumed to be of these classes
    (tmp_path / "other" / "params.json").write_text(json.dumps(params | {"classes": swapped}))
    with pytest.raises(UserError, match=f"checkpoint for the classes {', '.join(swapped)}, and the run"):
        score(path)
    file = export_student(small_run.folder, tmp_path / "student.pth")
    assert score(file) == expected
    content = read_checkpoint(file)
    torch.save(content | {CARD: json.dumps(json.loads(content[CARD]) | {"classes": swapped})}, file)
    with pytest.raises(UserError, match="in this order"):
        score(file)


def test_a_val_file_that_lacks_a_class_is_scored_on_the_others(small_run, tmp_path):
    """docs/data.md allows it; the other classes keep their own ids."""
    source = small_run.source
    shutil.copytree(source.root, tmp_path / "data")
    file = tmp_path / "data" / source.val.annotations.relative_to(source.root)
    truth = json.loads(file.read_text())
    absent = next(c for c in truth["categories"] if c["name"] == source.classes[0])
    truth["categories"].remove(absent)
    truth["annotations"] = [row for row in truth["annotations"] if row["category_id"] != absent["id"]]
    file.write_text(json.dumps(truth))
    every, some = tmp_path / "every.json", tmp_path / "some.json"
    evaluate(small_run.folder, predictions=every, machine=CPU)
    run = evaluate(
        small_run.folder, data_root=tmp_path / "data", predictions=some, details=True, merged=True, machine=CPU
    )
    expected = [row for row in json.loads(every.read_text()) if row["category_id"] != absent["id"]]
    assert len(expected) < len(json.loads(every.read_text()))
    assert json.loads(some.read_text()) == expected
    assert set(run.metrics["per_class"]) == set(source.classes[1:])


def test_figures_of_other_weights_or_data_do_not_replace_the_runs(small_run, tmp_path):
    experiment, source, folder, _ = opened(small_run.folder)

    def place(checkpoint, data_root=None):
        root = source if data_root is None else opened(folder, data_root=data_root)[1]
        return figures_folder(Run(experiment, folder, root, {}, checkpoint)).relative_to(folder)

    last = newest(folder)
    earlier = last.with_name("epoch_1_step_1.pth")
    assert str(place(last)) == "figures"
    assert str(place(earlier)) == "figures/epoch_1_step_1"
    assert str(place(None)) == "figures/untrained"
    moved = shutil.copytree(source.root, tmp_path / "moved")
    assert str(place(last, moved)) == "figures"  # the same annotations
    file = moved / source.val.annotations.relative_to(source.root)
    truth = json.loads(file.read_text())
    file.write_text(json.dumps(truth | {"annotations": truth["annotations"][1:]}))
    assert str(place(last, moved)) == "figures/moved"
    assert str(place(earlier, moved)) == "figures/epoch_1_step_1/moved"
