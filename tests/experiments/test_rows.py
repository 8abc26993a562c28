"""The rows of the experiments: plain values that import fast, hash stably and document their command."""

import importlib
import json
import re
from pathlib import Path

import pytest

from misa.errors import UserError
from misa.experiment import Experiment
from misa.rows import descriptions, find_row, lines_of, table_module, table_names, teacher_row

FOLDER = Path(__file__).parents[2] / "experiments"
TABLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
ROWS = [f"{table}:{row}" for table in TABLES for row in importlib.import_module(f"experiments.{table}").ROWS]


@pytest.mark.parametrize("table", TABLES)
def test_the_docstring_names_commands_that_exist(table):
    module = importlib.import_module(f"experiments.{table}")
    commands = re.findall(r"misa train experiments/(\w+)\.py:(\w+)", module.__doc__)
    assert commands
    for file, row in commands:
        assert file == table
        assert row in module.ROWS


@pytest.mark.parametrize("name", ROWS)
def test_a_row_survives_json(name):
    row = find_row(name)
    again = Experiment.from_values(json.loads(json.dumps(row.values())))
    assert again == row
    assert again.digest() == row.digest()
    assert row.smoke().digest() != row.digest()


@pytest.mark.parametrize("name", [name for name in ROWS if find_row(name).trains_teacher])
def test_teacher_and_student_share_data_and_backbone(name):
    row = find_row(name)
    teacher = teacher_row(row)
    assert (teacher.data, teacher.scenes, teacher.network.backbone) == (row.data, row.scenes, row.network.backbone)


def test_what_the_paper_expects_does_not_change_the_hash():
    assert Experiment().expecting(1.0, 2.0, 3.0).digest() == Experiment().digest()
    assert Experiment().but(projection_weight=1.0).digest() != Experiment().digest()


def test_a_row_can_be_named_by_its_file(tmp_path):
    assert find_row("experiments/demo.py:box") == find_row("demo:box")
    own = tmp_path / "own.py"
    own.write_text("from misa.experiment import Experiment\nROWS = {'a': Experiment(projection_weight=2.0)}\n")
    assert find_row(f"{own}:a").projection_weight == 2.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo:boxx", r"^demo has no row 'boxx'; did you mean 'demo:box'\? `misa rows demo:` lists all \d+\.$"),
        ("experiments/own.py:smal", r"^experiments/own.py has no row 'smal'; did you mean '.*own.py:small'\?$"),
        ("demo:zzz", r"^demo has no row 'zzz'. Its rows are:\n  demo:box  "),
        ("demp:box", r"^there is no table 'demp'; did you mean 'demo'\?$"),
        ("zzz:box", "the tables are"),
        ("zzz.py:box", "there is no file zzz.py;"),
        ("own", r"own is a table; name one of its rows. Its rows are:\n  own:small   coco   solov2"),
        ("experiments/own.py:", r"Its rows are:\n  experiments/own.py:small   coco   solov2"),
        (
            "scratch",
            r"Rows called scratch:\n  photos:scratch  coco   solov2 \(efficientnet_lite0, 6 epochs\)",
        ),
        (":scratch", r"Rows called scratch:\n  photos:scratch  "),
        ("polarmsk", "row 'polarmsk' should be written table:row, such as demo:box"),
        ("", "row '' should be written table:row"),
    ],
)
def test_an_unknown_row_is_named(name, message):
    with pytest.raises(UserError, match=message):
        find_row(name)


def test_a_file_of_ones_own_lists_its_rows(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("from misa.experiment import Experiment\nROWS = {'a': Experiment(data='coco'), 'b': Experiment()}\n")
    with pytest.raises(UserError, match=rf"Its rows are:\n  {own}:a  coco   solov2 .*\n  {own}:b  voc    solov2"):
        find_row(str(own))


def test_descriptions_tell_the_rows_of_a_table_apart():
    """By description if it differs, else by the fields in which two rows differ."""
    for table in table_names():
        rows = table_module(table).ROWS
        lines = [(line.data, line.text) for line in lines_of(table, table_module(table))]
        assert len(set(lines)) == len(lines) == len(rows), table
    row = Experiment()
    texts = descriptions({"a": row, "b": row.but(schedule={"lr": 0.5}), "c": row.but(inference={"from_shadow": False})})
    assert texts["b"] == f"{texts['a']}; as a, but schedule.lr 0.5"
    assert texts["c"].endswith("as a, but nothing else")


def test_a_file_without_rows_is_named(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="defines no dict ROWS"):
        find_row(f"{tmp_path / 'empty.py'}:a")


def test_but_names_a_field_that_does_not_exist():
    with pytest.raises(ValueError, match="no field 'epoch'"):
        Experiment().but(epoch=3)
