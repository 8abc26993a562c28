"""Objectives as values: ramps, and rows that name one."""

import importlib
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import misa.objectives
from misa.experiment import Affinity, Experiment, Objective, objective_from
from misa.objectives.base import BoxObjective, Ramp
from misa.objectives.misa import MISA

BARE = Experiment(affinity=None)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 120))
def test_a_ramp_rises_from_start_to_end(start, length, iteration):
    ramp = Ramp(start, start + length)
    expected = min(max((iteration - start) / length, 0), 1) if length else float(iteration >= start)
    assert ramp.at(iteration, 1000) == pytest.approx(expected)
    of_the_run = Ramp(start / 100, (start + length) / 100, of="run")
    assert of_the_run.at(iteration, 100) == pytest.approx(expected, abs=1e-6) or length == 0


def test_an_objective_survives_json():
    row = BARE.but(objective=MISA(projection_weight=2.0, affinity=Affinity(window=3)))
    values = json.loads(json.dumps(row.values()))
    assert values["objective"]["kind"] == "misa"
    again = Experiment.from_values(values)
    assert again == row
    assert again.digest() == row.digest() != BARE.digest()


def test_a_row_without_an_objective_has_the_values_of_before():
    assert "objective" not in Experiment().values()


def test_a_field_of_an_objective_is_checked_too():
    values = BARE.but(objective=MISA()).values()
    values["objective"]["projection_weight"] = "high"
    with pytest.raises(ValueError, match=r"Experiment\.objective\.projection_weight is 'high', not of type float"):
        Experiment.from_values(values)
    values["objective"]["projection_weight"] = 3.0
    values["objective"]["affinity"]["mode"] = "apra"
    with pytest.raises(ValueError, match=r"Affinity\.mode is 'apra'"):
        Experiment.from_values(values)


@pytest.mark.parametrize("kind", ["misb", "base", "os", "../misa", "misa.objectives.misa", None, 3, ["misa"]])
def test_a_kind_that_is_none_is_named_and_not_imported(kind):
    with pytest.raises(ValueError, match=r"no objective .*; the objectives are .*misa"):
        objective_from({"kind": kind})


def test_an_objective_belongs_into_its_room():
    class Own(BoxObjective):
        pass

    with pytest.raises(ValueError, match=r"belongs into a file of misa\.objectives"):
        BARE.but(objective=Own()).values()
    with pytest.raises(ValueError, match=r"belongs into a file of misa\.objectives"):
        Objective().kind  # noqa: B018


OWN = """
from dataclasses import dataclass

from misa.objectives.base import BoxObjective


@dataclass(frozen=True)
class FillShare(BoxObjective):
    weight: float = 1.0
"""


@pytest.fixture
def own_objective(tmp_path, monkeypatch):
    """Returns a function that imports the objective FillShare from a file of that name in misa/objectives."""
    monkeypatch.setattr(misa.objectives, "__path__", [*misa.objectives.__path__, str(tmp_path)])
    made = []

    def imported(name):
        (tmp_path / f"{name}.py").write_text(OWN)
        importlib.invalidate_caches()
        made.append(name)
        return importlib.import_module(f"misa.objectives.{name}").FillShare

    yield imported
    for name in made:
        sys.modules.pop(f"misa.objectives.{name}", None)
        vars(misa.objectives).pop(name, None)


@pytest.mark.parametrize("file", ["fill_share", "fillshare"])
def test_a_class_in_camel_case_is_found_in_a_file_of_several_words(own_objective, file):
    row = BARE.but(objective=own_objective(file)(weight=2.0))
    assert row.values()["objective"] == {"kind": file, "weight": 2.0}
    assert Experiment.from_values(row.values()) == row


def test_a_class_that_is_not_named_like_its_file_is_refused_by_name(own_objective):
    with pytest.raises(ValueError, match=r"FillShare is in share\.py of misa\.objectives, .*name class and file alike"):
        BARE.but(objective=own_objective("share")()).values()
    with pytest.raises(ValueError, match=r"share\.py of misa\.objectives needs one class named like it"):
        objective_from({"kind": "share"})


@pytest.mark.parametrize(
    "changes",
    [
        {"affinity": Affinity()},
        {"projection_weight": 2.0},
        {"supervision": "mask"},
    ],
)
def test_an_objective_stands_in_place_of_the_terms(changes):
    with pytest.raises(ValueError, match=r"objective \(misa\) supervises a student from boxes in place of"):
        BARE.but(objective=MISA(), **changes)


def test_an_objective_that_needs_a_teacher_is_refused_without_one():
    with pytest.raises(ValueError, match="belong together"):
        BARE.but(objective=MISA(affinity=Affinity(saliency=True)))
    with pytest.raises(ValueError, match="belong together"):
        BARE.but(objective=MISA(), teacher="teacher:demo")


def test_a_row_with_an_objective_loads_without_torch():
    code = "import misa.objectives.misa, misa.objectives.base, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
