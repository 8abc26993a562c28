"""A notebook's parameters: declared names, types and ranges, or one sentence."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from misa.errors import UserError
from misa.parameters import Parameters, TrainParameters, between


def test_defaults_and_values_are_read():
    parameters = TrainParameters.read({"row": "demo:mask", "seed": 3, "epochs": None, "_i1": "x", "In": []})
    assert (parameters.row, parameters.seed, parameters.epochs, parameters.threads) == ("demo:mask", 3, None, 1)


@pytest.mark.parametrize(
    ("namespace", "message"),
    [
        ({"epoch": 3}, "did you mean 'epochs'?"),
        ({"sede": 3}, "did you mean 'seed'?"),
        ({"qqq": 3}, "the parameters are row, data_root"),
        ({"epochs": 3.0}, r"epochs must be int or None, not 3\.0"),
        ({"seed": True}, "seed must be int"),
        ({"smoke": "true"}, "write True or False"),
        ({"seed": -1}, "from 0 to"),
        ({"gpus": 99}, "from 0 to"),
    ],
)
def test_a_wrong_one_is_named(namespace, message):
    with pytest.raises(UserError, match=message):
        TrainParameters.read(namespace)


def test_a_notebook_opened_in_its_folder_works_in_the_projects(tmp_path, monkeypatch):
    for name in ("notebooks", "experiments"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    TrainParameters.read({})
    assert Path.cwd() == tmp_path


def test_names_of_later_cells_are_no_parameters():
    namespace = {"seed": 1}
    TrainParameters.read(namespace)
    namespace["threshold"] = 0.5
    assert TrainParameters.read(namespace).seed == 1


def test_names_like_a_parameter_may_be_a_notebooks_own():
    """Run All a second time: `step` of a cell further down is no misspelt `steps`."""
    namespace = {"In": ["", "seed: int = 1"], "seed": 1}
    TrainParameters.read(namespace)
    namespace["epoch"] = 5
    namespace["In"] += ["epoch = len('later')", "seed: int = 2"]
    namespace["seed"] = 2
    assert TrainParameters.read(namespace).seed == 2


def test_a_typo_in_the_cell_of_parameters_is_found_again():
    namespace = {"In": ["", "seed: int = 1"], "seed": 1}
    TrainParameters.read(namespace)
    namespace["epoch"] = 5
    namespace["In"] += ["%matplotlib inline", "seed: int = 1\nepoch: int = 5"]
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        TrainParameters.read(namespace)
    namespace["In"].append("x = 1")
    assert TrainParameters.read(namespace).seed == 1


@dataclass(frozen=True, kw_only=True)
class Knobs(Parameters):
    radius: float = between(10.0, 0)


def test_a_whole_number_serves_where_a_fraction_is_asked_for():
    radius = Knobs.read({"radius": 7}).radius
    assert (radius, type(radius)) == (7.0, float)


@pytest.mark.parametrize("radius", [-0.5, float("nan"), True, "7"])
def test_a_fraction_out_of_range_is_refused(radius):
    with pytest.raises(UserError, match="parameter radius must be"):
        Knobs.read({"radius": radius})
