"""A training that begins with another one's weights."""

import re
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

from misa.commands.train import Train, experiment_of, train_with
from misa.engine.runs.checkpoints import begin, last_checkpoint, read_checkpoint, start_file
from misa.engine.training.train import train
from misa.errors import UserError
from misa.models.students.table import model_config
from misa.objectives.sim import SIM
from tests.helpers import CPU


def weights(path):
    return read_checkpoint(path)["state_dict"]


def test_all_weights_of_the_same_network_are_taken(small_row, small_run):
    path = last_checkpoint(small_run.folder)
    model = MODELS.build(model_config(small_row, small_run.source.classes))
    assert begin(model, path) == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights(path)[name]), name


def test_layers_of_other_classes_begin_anew_and_are_named(small_row, small_run):
    path, classes = last_checkpoint(small_run.folder), (*small_run.source.classes, "kite")
    model = MODELS.build(model_config(small_row, classes))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert begin(model, path) == ["mask_head.conv_cls"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if "conv_cls" in name else weights(path)[name]), name


def test_another_backbone_is_refused(small_row, small_run):
    model = MODELS.build(model_config(small_row.but(network={"backbone": "resnet50"}), small_run.source.classes))
    with pytest.raises(UserError, match=r"of another network: backbone\..* has another shape, or only one"):
        begin(model, last_checkpoint(small_run.folder))


def test_a_backbone_with_more_blocks_is_refused(small_row, small_run, tmp_path):
    """A ResNet-34 has all names and shapes of a ResNet-18."""
    classes, path = small_run.source.classes, tmp_path / "deeper.pth"
    deeper = MODELS.build(model_config(small_row.but(network={"backbone": "resnet34"}), classes))
    torch.save({"state_dict": deeper.state_dict()}, path)
    with pytest.raises(UserError, match=r"of another network: backbone\.layer1\.2\."):
        begin(MODELS.build(model_config(small_row, classes)), path)


def test_the_state_of_an_objective_begins_anew(small_row, small_run, tmp_path):
    """Its prototypes, counters and EMA model are of the other run's steps and classes."""
    row, classes, path = small_row.but(affinity=None, objective=SIM()), small_run.source.classes, tmp_path / "sim.pth"
    other, model = (MODELS.build(model_config(row, classes)) for _ in range(2))
    torch.save({"state_dict": {name: value + 1 for name, value in other.state_dict().items()}}, path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert begin(model, path) == []
    assert any(name.startswith("memory.own.") for name in before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith("memory.") else weights(path)[name]), name


def test_a_start_is_a_folder_or_a_file(small_run, tmp_path):
    path = last_checkpoint(small_run.folder)
    assert start_file(str(small_run.folder)) == start_file(str(path)) == path
    with pytest.raises(UserError, match="nowhere"):
        start_file(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no checkpoint"):
        start_file(str(tmp_path))


def test_a_training_begins_there_and_resumes_without_it(small_row, small_run, module_path, tmp_path, capsys):
    """With steps too small to change a weight in single precision, its weights are those that it began with."""
    start = tmp_path / "start.pth"
    start.write_bytes(last_checkpoint(small_run.folder).read_bytes())
    row = small_row.but(start=str(start), schedule={"epochs": 1, "lr": 1e-12}, network={"norm_eval": True})
    assert row.digest() != small_row.digest()
    options = {"data_root": module_path / "data", "work_dir": tmp_path / "run", "machine": CPU}
    run = train(row, **options)
    assert "begins with the weights of" in capsys.readouterr().out
    assert "begins with the weights of" in (run.folder / "log.txt").read_text()
    after, before = weights(last_checkpoint(run.folder)), weights(start)
    names = [name for name in after if name.endswith("weight")]
    assert names
    for name in names:
        torch.testing.assert_close(after[name], before[name], atol=1e-8, rtol=1e-5)
    start.unlink()
    (run.folder / "metrics.json").unlink()
    again = train(row, **options)
    assert again.metrics == run.metrics
    assert "begins with" not in capsys.readouterr().out


def test_what_is_scored_are_the_trained_weights(small_row, small_run, module_path, tmp_path):
    """mmengine loads once more before the test: resumed there, a run without its start predicts the same."""
    row = small_row.but(start=str(small_run.folder), schedule={"epochs": 1, "lr": 0.05})
    options = {"data_root": module_path / "data", "work_dir": tmp_path / "run", "machine": CPU}
    train(row, **options)
    file = Path("predictions/val.json")
    found = (tmp_path / "run" / file).read_bytes()
    assert found != (small_run.folder / file).read_bytes()
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "run" / file).unlink()
    train(row, **options)
    assert (tmp_path / "run" / file).read_bytes() == found


def test_a_start_that_does_not_fit_is_found_before_any_work(small_row, small_run, module_path, tmp_path):
    row = small_row.but(start=str(small_run.folder), network={"backbone": "resnet50"})
    with pytest.raises(UserError, match="of another network"):
        train(row, data_root=module_path / "data", work_dir=tmp_path / "run", machine=CPU)
    assert not (tmp_path / "run" / "params.json").exists()


def test_the_log_names_four_of_many_new_layers(small_row, small_run, module_path, tmp_path, capsys):
    row = small_row.but(start=str(small_run.folder), schedule={"epochs": 1}, network={"neck_channels": 32})
    train(row, data_root=module_path / "data", work_dir=tmp_path / "run", machine=CPU)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("begins with")]
    assert re.search(r", but for [\w.]+, [\w.]+, [\w.]+, [\w.]+, \d+ more layers$", line), line


def test_the_option_changes_the_row_and_its_folder(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = Train(row="demo:box", start=str(small_run.folder))
    assert experiment_of(options).start == str(small_run.folder)
    assert experiment_of(Train(row="demo:box", start="there", smoke=True)).start == "", "its network is another"
    with pytest.raises(UserError, match="nowhere"):
        train_with(Train(row="demo:box", start="nowhere", smoke=True))
    with pytest.raises(UserError, match="nowhere"):
        train_with(Train(row="demo:box", start="nowhere"))
    assert not (tmp_path / "runs" / "demo-box-seed0-start" / "params.json").exists()
