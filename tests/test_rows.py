"""Rows by name: what a row learns from, and the usual mistakes in a user's file."""

import shutil
import sys

import pytest

from misa.engine.training.train import require_buildable
from misa.errors import UserError
from misa.experiment import Distillation
from misa.rows import find_row, lineage, table_module, table_names, teacher_row

OWN = "from misa.experiment import Experiment\nfrom .demo import ROWS as DEMO\n"


def own(folder, text: str, row: str = "a") -> str:
    path = folder / "mine.py"
    path.write_text(OWN + text)
    return f"{path}:{row}"


def test_every_table_is_found_by_its_name():
    names = table_names()
    assert {"demo", "teacher", "table5_affinity"} <= set(names)
    assert "__init__" not in names
    for name in names:
        module = table_module(name)
        assert module.__name__ == f"misa.experiments.{name}"
        for row, experiment in module.ROWS.items():
            assert find_row(f"{name}:{row}") is experiment
            assert find_row(f"experiments/{name}.py:{row}") is experiment


def test_a_folder_of_the_users_called_experiments_is_another_thing(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "demo.py").write_text("ROWS = {}\n")
    monkeypatch.chdir(tmp_path)
    expected = find_row("demo:box")
    with pytest.raises(UserError, match=r"write \./experiments/demo\.py for the file, or demo for the package's"):
        find_row("experiments/demo.py:box")
    with pytest.raises(UserError, match="no row 'box'"):
        find_row("./experiments/demo.py:box")
    shutil.copy(table_module("demo").__file__, tmp_path / "experiments" / "demo.py")
    assert find_row("experiments/demo.py:box") is expected, "as in a checkout of its own"
    (tmp_path / "demo.py").write_text("ROWS = {}\n")
    assert find_row("demo:box") is expected
    with pytest.raises(UserError, match="no row 'box'"):
        find_row("demo.py:box")


def test_a_constant_called_table_is_no_comparison(tmp_path):
    name = own(tmp_path, "ROWS = {'a': DEMO['box']}\nTABLE = {'a': 1}")
    with pytest.raises(UserError, match=r"(?s)has no row 'b'.*:a "):
        find_row(f"{name.rpartition(':')[0]}:b")


def test_a_file_of_ones_own_builds_on_a_table(tmp_path):
    name = own(tmp_path, "ROWS = {'a': DEMO['box'].but(projection_weight=0.5)}")
    assert find_row(name) == find_row("demo:box").but(projection_weight=0.5)
    own(
        tmp_path, "ROWS = {'a': DEMO['box'].but(projection_weight=0.25)}"
    )  # changed while the process runs, as in a notebook
    assert find_row(name).projection_weight == 0.25
    assert "misa.experiments.own_mine" not in sys.modules


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ROWS = {'a': 1}", "is 1, not an Experiment"),
        ("ROWS = []", "defines no dict ROWS"),
        ("", "defines no dict ROWS"),
        ("\nROWS = {'a': DEMO['bix']}", "line 4: KeyError: 'bix'; correct the file"),
        ("ROWS = {'a': Experiment(supervision='x')}", "line 3: ValueError: "),
        ("ROWS = {", "line 3: SyntaxError: "),
        ("import no_such_package", "line 3: ModuleNotFoundError: No module named 'no_such_package'"),
        (
            "ROWS = {'a': DEMO['box'].but(network={'head_chanels': 8})}",
            "line 3: ValueError: Network has no field 'head_chanels'; did you mean 'head_channels'?; correct the file",
        ),
        ("ROWS = {'a': DEMO['box'].but(schedule={'xyz': 8})}", "Schedule has no field 'xyz'; its fields are epochs, "),
        ("ROWS = {'a': DEMO['box'].but(schedule={'epochs': 0})}", "it is too small; correct the file."),
    ],
)
def test_what_is_wrong_with_a_file_of_ones_own_is_one_sentence(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        find_row(own(tmp_path, text))
    assert words in str(error.value)
    assert "mine.py" in str(error.value)
    assert "\n" not in str(error.value)


CHANGES = {
    "network={'pretrained': 'False'}": "Network.pretrained is 'False', not of type bool",
    "network={'backbone': None}": "Network.backbone is None, not of type str",
    "network={'head_channels': 0}": "Network.head_channels is 0; it must be a number of 1 or more",
    "network={'stacked_convs': 0}": "Network.stacked_convs is 0; it must be a number of 1 or more",
    "network={'drop_path': 1.0}": "Network.drop_path is 1.0; it must be at least 0 and below 1",
    "network={'grids': (40, 36, 0, 16, 12)}": "Network.grids is (40, 36, 0, 16, 12); each must be from 1 to 1024",
    "network={'strides': (8, 8, 16, 32, -1)}": "Network.strides is (8, 8, 16, 32, -1); each must be from 1 to 1024",
    "network=None": "Experiment.network is None, not of type Network",
    "schedule={'clip': float('inf')}": "Schedule.clip is inf, not a finite number",
    "schedule={'batch': True}": "Schedule.batch is True, not of type int",
    "schedule={'epochs': 1.5}": "Schedule.epochs is 1.5, not of type int",
    "schedule={'epochs': '3'}": "Schedule.epochs is '3', not of type int",
    "affinity={'window': 5.0}": "Affinity.window is 5.0, not of type int",
    "affinity={'kernels': ('color')}": "Affinity.kernels is 'color', not of type tuple[str, ...] | None",
    "affinity={'kernels': ()}": "Affinity.kernels is (); give one or two names",
    "scenes={'train': 8}": "Experiment.scenes is {'train': 8}, not of type tuple[tuple[str, Any], ...]",
    "distillation={'radius': -5}": "Distillation.radius is -5; it must be a number of bins of 0 or more",
    "teacher=None": "Experiment.teacher is None, not of type str",
    "objective={'a': 1}": "Experiment.objective is {'a': 1}, not of type Objective | None",
    "limit=0": "Experiment.limit is 0; it must be a number of images of 1 or more",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_value_of_another_type_is_refused_before_anything_is_trained(tmp_path, change):
    with pytest.raises(UserError) as error:
        find_row(own(tmp_path, f"ROWS = {{'a': DEMO['box'].but({change})}}"))
    assert f"line 3: ValueError: {CHANGES[change]}" in str(error.value)


def test_a_dict_for_a_part_that_a_row_lacks_changes_its_defaults(tmp_path):
    row = find_row(own(tmp_path, "ROWS = {'a': DEMO['box'].but(distillation={'radius': 5}, teacher='teacher:demo')}"))
    assert row.distillation == Distillation(radius=5)
    assert row.but(network={"strides": [8, 8, 16, 16]}).digest() == row.digest()  # a list is as good as a tuple


def test_the_types_of_a_dataclass_of_ones_own_are_found(tmp_path):
    """dataclasses looks them up in the module's namespace where annotations are strings."""
    text = "import dataclasses as d\n@d.dataclass\nclass Own:\n    a: 'd.KW_ONLY'\n    b: int = 1\n"
    assert find_row(own(tmp_path, text + "ROWS = {'a': DEMO['box'].but(limit=Own(b=3).b)}")).limit == 3
    assert "misa.experiments.own_mine" not in sys.modules


def test_an_objective_of_ones_own_file_is_told_where_it_belongs(tmp_path):
    text = (
        "from dataclasses import dataclass\nfrom misa.objectives.base import BoxObjective\n"
        "@dataclass(frozen=True)\nclass Fill(BoxObjective):\n    pass\n"
        "ROWS = {'a': DEMO['box'].but(objective=Fill(), affinity=None)}"
    )
    with pytest.raises(UserError, match=r"line 8: .*an objective belongs into a file of misa\.objectives"):
        find_row(own(tmp_path, text))


@pytest.mark.parametrize("kernels", ["('colour',)", "('color', 'texture')"])
def test_an_unknown_affinity_is_told_before_the_teacher_is_trained(tmp_path, kernels):
    row = find_row(own(tmp_path, f"ROWS = {{'a': DEMO['misa'].but(affinity={{'kernels': {kernels}}})}}"))
    with pytest.raises(UserError, match=r"there is no affinity '(colour|texture)'; there are color, feature, saliency"):
        require_buildable(row)


def test_the_line_is_found_in_a_file_with_a_relative_path(tmp_path, monkeypatch):
    own(tmp_path, "ROWS = {'a': DEMO['bix']}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^mine\.py, line 3: KeyError"):
        find_row("mine.py:a")


def test_the_teacher_of_a_row():
    student = find_row("demo:misa")
    assert teacher_row(student) == find_row(student.teacher)
    assert teacher_row(student.smoke()) == find_row(student.teacher).smoke()
    with pytest.raises(UserError, match="demo:box is a student's row"):
        teacher_row(student.but(teacher="demo:box"))
    with pytest.raises(UserError, match="teacher:coco_mini is for other data"):
        teacher_row(student.but(teacher="teacher:coco_mini"))


def test_what_a_row_is_known_by_changes_with_what_it_learns_from(tmp_path):
    """Without a teacher it is the row's digest; with one it covers the teacher's digest, but not its name."""
    box, misa = find_row("demo:box"), find_row("demo:misa")
    assert lineage(box) == box.digest()
    assert lineage(misa) != misa.digest()
    taught = find_row("photos:teacher")
    assert lineage(taught) != taught.digest()
    truth = taught.but(supervision="mask")  # learns from true masks: the student that it names is not used
    assert lineage(truth) == truth.digest()
    teacher = misa.teacher
    text = "from .teacher import ROWS as TEACHERS\nROWS = {{'a': TEACHERS['{}'].but({})}}"
    found = []
    for change in ("", "projection_weight=0.5", "projection_weight=0.25", ""):
        name = own(tmp_path, text.format(teacher.partition(":")[2], change))
        assert find_row(name).trains_teacher is False
        found.append(lineage(misa.but(teacher=name)))
    assert len(set(found)) == 3
    assert found[0] == found[3]
