"""The record of a run folder: its inputs, and which run it belongs to."""

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from misa.engine.runs import record
from misa.engine.runs.record import FILES, current_commit, environment, loadable, read_params, require_own, run_params
from misa.errors import UserError
from misa.experiment import Expected
from misa.objectives.boxlevelset import BoxLevelSet
from tests.helpers import tiny_experiment


def params(row="demo:box", seed=0, root="data", **changes):
    return run_params(
        tiny_experiment(**changes),
        row=row,
        seed=seed,
        data_root=Path(root),
        data={"train": "a", "val": "b"},
        classes=("x", "y"),
    )


def written(folder, values):
    (folder / "params.json").write_text(json.dumps(values))
    return folder


def test_a_new_folder_and_the_same_run_are_ones_own(tmp_path):
    require_own(tmp_path, params())
    require_own(written(tmp_path, params()), params(row="mine:other name"))


def test_a_smoke_run_in_the_folder_is_called_so(tmp_path):
    written(tmp_path, params(limit=4))
    with pytest.raises(UserError, match="holds a smoke run, a test of the installation; choose another work_dir"):
        require_own(tmp_path, params())
    written(tmp_path, params())
    with pytest.raises(UserError, match=r"holds another run \(.* is .* there and .* here\)"):
        require_own(tmp_path, params(limit=4))


def test_a_start_named_in_another_way_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "x")
    written(tmp_path, params(start="runs/x"))
    for same in ("runs/x/", "./runs/x", str(tmp_path / "runs" / "x"), "link"):
        require_own(tmp_path, params(start=same))
    require_own(written(tmp_path, params(start="runs/x0", seed=0)), params(start="runs/x{seed}", seed=0))
    written(tmp_path, params(start="runs/x"))
    for other in ("runs/y", "runs", "runs/x{seed}", ""):
        with pytest.raises(UserError, match=r"holds another run \(start is runs/x there and "):
            require_own(tmp_path, params(start=other))


def test_a_corrected_figure_of_the_paper_makes_no_other_run(tmp_path):
    values = [params(expected=expected) for expected in (Expected(30.0, 50.0, 20.0), Expected(31.0, 50.0, 20.0), None)]
    assert len({str(value["experiment"].get("expected")) for value in values}) == 3
    for there in values:
        for here in values:
            require_own(written(tmp_path, there), here)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"params.json"}))
def test_files_without_a_record_are_foreign(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"has a {name} but no params.json"):
        require_own(tmp_path, params())


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"schedule": {"epochs": 7}}, "schedule.epochs is 2 there and 7 here"),
        ({"augmentation": {"flip": 0.0}}, "augmentation.flip is 0.5 there and 0.0 here"),
        ({"affinity": None}, "affinity is {.*} there and None here"),
    ],
)
def test_another_run_is_named_by_the_value_that_differs(tmp_path, other, sentence):
    with pytest.raises(UserError, match=sentence):
        require_own(written(tmp_path, params()), params(**other))


@pytest.mark.parametrize(("there", "here"), [(64, 1024), (1024, 64)])
def test_a_field_that_is_left_out_at_its_default_differs_both_ways(tmp_path, there, here):
    """`crop` was added later, and its default, 1024, is omitted from the stored values."""
    before, now = (params(augmentation={"crop": crop}) for crop in (there, here))
    words = {1024: "its default", 64: "64"}
    with pytest.raises(UserError, match=f"augmentation.crop is {words[there]} there and {words[here]} here"):
        require_own(written(tmp_path, before), now)


@pytest.mark.parametrize("key", ["row", "digest", "seed", "data_root", "classes", "experiment"])
def test_an_incomplete_record_is_no_run(tmp_path, key):
    with pytest.raises(UserError, match=r"no params\.json; give a folder made by misa train"):
        read_params(tmp_path)
    values = params()
    del values[key]
    with pytest.raises(UserError, match=f"lacks {key}"):
        read_params(written(tmp_path, values))


def test_the_environment_is_that_of_the_installed_packages():
    found = environment("cpu")
    assert found["torch"] == torch.__version__
    assert found["numpy"] == metadata.version("numpy")
    assert found["mmdet"] == metadata.version("onedl-mmdetection")
    assert found["device"] == "cpu"
    json.dumps(found)


def test_the_commit_is_unknown_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(record.misa, "__file__", str(tmp_path / "misa" / "__init__.py"))
    assert current_commit() is None


def test_a_config_is_written_so_that_it_loads(tmp_path):
    objective = BoxLevelSet()
    config = Config({"model": {"type": torch.nn.Linear, "parts": ({"type": torch.nn.ReLU},), "objective": objective}})
    loadable(config).dump(str(tmp_path / "config.py"))
    model = Config.fromfile(tmp_path / "config.py").model
    assert model.type == "torch.nn.modules.linear.Linear"
    assert model.parts[0].type == "torch.nn.modules.activation.ReLU"
    assert model.objective.kind == "boxlevelset"
