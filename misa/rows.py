"""Find a row of a table by its name: `demo:box`, `experiments/demo.py:box`, or a file of your own."""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

import misa
from misa.errors import UserError, did_you_mean
from misa.experiment import Experiment

_PACKAGE = "misa.experiments"


def find_row(name: str) -> Experiment:
    """The experiment that `name` (file:row or table:row) stands for; UserError names what there is instead."""
    table, colon, row = name.partition(":")
    if not colon or not row or not table:
        raise UserError(f"row {name!r} should be written table:row, for example demo:box.")
    rows = _table(table).ROWS
    if row not in rows:
        hint = did_you_mean(row, rows).replace("?", ",")
        raise UserError(f"{table} has no row {row!r}{hint or ';'} its rows are {', '.join(rows)}.")
    experiment = rows[row]
    if not isinstance(experiment, Experiment):
        raise UserError(f"{name} is {experiment!r}, not an Experiment; write ROWS = {{'name': Experiment(...)}}.")
    return experiment


def teacher_row(experiment: Experiment) -> Experiment:
    """The row that `experiment.teacher` names; UserError if it is none of a teacher, or of one for other data."""
    teacher = find_row(experiment.teacher)
    if experiment.limit is not None:
        teacher = teacher.smoke()
    if teacher.semantic is None:
        raise UserError(f"{experiment.teacher} is a student's row; name a teacher's, such as teacher:demo.")
    if (teacher.data, teacher.scenes) != (experiment.data, experiment.scenes):
        raise UserError(f"{experiment.teacher} is for other data than its student; both must be trained on the same.")
    return teacher


def lineage(experiment: Experiment) -> str:
    """The row's hash; where it learns from another row by name, together with that row's, so that it changes along."""
    parents = [teacher_row(experiment)] if experiment.trains_teacher else []
    student = experiment.semantic.student if experiment.semantic else ""
    if ":" in student and not Path(student).is_dir():
        parents.append(find_row(student))
    if not parents:
        return experiment.digest()
    every = " ".join([experiment.digest(), *map(lineage, parents)])
    return hashlib.sha256(every.encode()).hexdigest()[:10]


def _table(table: str) -> ModuleType:
    shipped = table_names()
    stem = Path(table).stem
    if table in shipped or (table == f"experiments/{stem}.py" and stem in shipped):
        return table_module(stem)
    path = Path(table)
    if path.suffix == ".py" and not path.is_file():
        raise UserError(f"there is no file {table}; a file of rows is given with its path, such as mine.py:name.")
    if path.suffix != ".py":
        hint = did_you_mean(stem, shipped).replace("?", ",")
        known = f"the tables are {', '.join(shipped)}, or a .py file with ROWS"
        raise UserError(f"there is no table {table!r}{hint or ';'} {known}.")
    # As if it stood among the tables, so that `from .demo import BASE` works in a file of one's own.
    _load_package()
    spec = importlib.util.spec_from_file_location(f"{_PACKAGE}.own_{stem}", path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's own file: any exception is reported as a configuration error
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        raise UserError(f"{path}, line {where}: {type(error).__name__}: {error}; correct the file.") from error
    if not isinstance(getattr(module, "ROWS", None), dict):
        raise UserError(f"{path} defines no dict ROWS; write ROWS = {{'name': Experiment(...)}} in it.")
    return module


def table_names() -> list[str]:
    """The modules of the experiments folder."""
    return sorted(path.stem for path in _folder().glob("*.py") if path.stem != "__init__")


def table_module(name: str) -> ModuleType:
    """One of `table_names` as a module.

    It is imported as `misa.experiments.<name>`: a folder called experiments in the user's project is another thing.
    """
    _load_package()
    return importlib.import_module(f"{_PACKAGE}.{name}")


def _load_package() -> None:
    if _PACKAGE not in sys.modules:
        folder = _folder()
        spec = importlib.util.spec_from_file_location(
            _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None, "a .py file has a loader"
        assert spec.loader is not None, "a .py file has a loader"
        package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
        sys.modules[_PACKAGE] = package


def _folder() -> Path:
    """The tables: part of an installed package, or beside it in a checkout."""
    package = Path(misa.__file__).parent
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parent / "experiments"
