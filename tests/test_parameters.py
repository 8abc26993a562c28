"""Options declared once: notebook, command line, checks and help agree, and errors are one sentence."""

import argparse
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from misa.commands.figures import Figures
from misa.commands.train import Train
from misa.errors import UserError
from misa.notebooks import work_in_project
from misa.parameters import Parameters, argument, option


class Toy(Parameters):
    """Options of a toy command."""

    names: tuple[str, ...] = argument("names of things", default=("a", "b"))
    out: str = option("out", "folder, 100 % new")
    radius: float = option(10.0, "radius", low=0)
    count: int | None = option(None, "how many", low=1, high=9)
    kind: Literal["", "sum", "product"] = option("", "form")
    resume: bool = option(True, "go on")
    smoke: bool = option(False, "small", only="command")
    place: int = option(0, "index", only="notebook")


def parse(*words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    Toy.add_to(parser)
    return Toy.parsed(parser.parse_args(words))


def test_defaults_and_values_are_read():
    parameters = Train.read({"row": "demo:mask", "seed": 3, "epochs": None, "_i1": "x", "In": []})
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
        ({"precision": "half"}, "must be one of float32, bfloat16, float16, not 'half'"),
    ],
)
def test_a_wrong_one_is_named(namespace, message):
    with pytest.raises(UserError, match=message):
        Train.read(namespace)


@pytest.mark.parametrize("place", ["notebooks", "runs/notebooks"])
def test_reading_leaves_the_working_directory_alone(tmp_path, monkeypatch, place):
    for name in (place, "experiments"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / place)
    Train.read({})
    assert Path.cwd() == tmp_path / place
    work_in_project()
    assert Path.cwd() == tmp_path
    work_in_project()
    assert Path.cwd() == tmp_path


def test_names_of_later_cells_are_no_parameters():
    namespace = {"seed": 1}
    Train.read(namespace)
    namespace["threshold"] = 0.5
    assert Train.read(namespace).seed == 1


def test_names_like_a_parameter_may_be_a_notebooks_own():
    """On a second "Run All", `step` of a later cell is not taken for a misspelt `steps`."""
    namespace = {"In": ["", "seed: int = 1"], "seed": 1}
    Train.read(namespace)
    namespace["epoch"] = 5
    namespace["In"] += ["epoch = len('later')", "seed: int = 2"]
    namespace["seed"] = 2
    assert Train.read(namespace).seed == 2


def test_a_typo_in_the_cell_of_parameters_is_found_again():
    namespace = {"In": ["", "seed: int = 1"], "seed": 1}
    Train.read(namespace)
    namespace["epoch"] = 5
    namespace["In"] += ["%matplotlib inline", "seed: int = 1\nepoch: int = 5"]
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        Train.read(namespace)
    namespace["In"].append("x = 1")
    assert Train.read(namespace).seed == 1


def test_a_whole_number_serves_where_a_fraction_is_asked_for():
    radius = Toy.read({"radius": 7}).radius
    assert (radius, type(radius)) == (7.0, float)


@pytest.mark.parametrize("radius", [-0.5, float("nan"), True, "7"])
def test_a_fraction_out_of_range_is_refused(radius):
    with pytest.raises(UserError, match="parameter radius must be"):
        Toy.read({"radius": radius})


def test_a_whole_number_serves_where_text_is_asked_for():
    """`papermill -p images 12` and `-p only 4` are read as numbers by papermill."""
    figures = Figures.read({"images": 12, "only": 4})
    assert (figures.images, figures.only) == ("12", "4")
    with pytest.raises(UserError, match="parameter images must be str, not True"):
        Figures.read({"images": True})


def test_a_list_is_text_with_commas_in_a_notebook_and_words_on_the_command_line():
    assert Toy.read({"names": "x, y,"}).names == ("x", "y")
    assert parse("x,1", "y").names == ("x,1", "y")


def test_each_has_what_is_its_own():
    with pytest.raises(UserError, match="there is no parameter smoke"):
        Toy.read({"smoke": True})
    with pytest.raises(SystemExit):
        parse("x", "--place", "1")
    assert Toy.cell().splitlines() == [
        'names: str = "a,b"  # names of things',
        'out: str = "out"  # folder, 100 % new',
        "radius: float = 10.0  # radius",
        'count: "Optional[int]" = None  # how many',
        'kind: str = ""  # form',
        "resume: bool = True  # go on",
        "place: int = 0  # index",
    ]


def test_the_help_is_in_the_documentation_and_on_the_command_line():
    assert "    radius: radius" in (Toy.__doc__ or "")
    parser = argparse.ArgumentParser()
    Toy.add_to(parser)
    text = " ".join(parser.format_help().split())
    for part in ("folder, 100 % new (default: out)", "--radius X radius (default: 10.0)", "--kind {sum,product}"):
        assert part in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "^--count must be from 1 to 9, not 0"),
        (["--radius", "nan"], "^--radius must be at least 0, not nan"),
        (["--kind", "mean"], "^--kind must be one of sum, product, not 'mean'"),
    ],
)
def test_the_command_line_checks_the_same(words, message):
    with pytest.raises(UserError, match=message):
        parse("x", *words)


@given(
    names=st.lists(st.text("abc/,", min_size=1), min_size=1),
    radius=st.floats(0, 1e6),
    count=st.none() | st.integers(1, 9),
    kind=st.sampled_from(["", "sum", "product"]),
    resume=st.booleans(),
    smoke=st.booleans(),
)
def test_values_survive_the_command_line(names, **values):
    toy = Toy(names=tuple(names), **values)
    assert parse(*toy.command_line()) == toy
