"""Find a row of a table by name (`demo:box`, `experiments/demo.py:box`, or a file of your own), and list rows."""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import misa
from misa.errors import UserError, counted, did_you_mean
from misa.experiment import Affinity, Comparison, Distillation, Experiment

_PACKAGE = "misa.experiments"
_LABELS = {
    "objectives": "the student's box objectives",
    "grabcut": "GrabCut in the boxes",
    "student": "a student's masks",
    "rectangles": "filled boxes",
}
_SEMANTIC = {"channels": "saliency", "class": "class map", "probability": "class probability"}


def find_row(name: str) -> Experiment:
    """Returns the experiment called `name` (file:row or table:row).

    UserError for an unknown one, with a similar name or else with a list of the known rows, as `misa rows` prints it.
    """
    table, _, row = name.rpartition(":")
    if not row or not table:
        raise UserError(not_a_row(row or table))
    module = _table(table)
    if row not in module.ROWS:
        # Without the table, which would make any two names similar.
        known = (f"{table}:{row}" for row in module.ROWS)
        hint = did_you_mean(name, known, key=lambda name: name.rpartition(":")[2])
        hint += f" `misa rows {table}:` lists all {len(module.ROWS)}." if hint and table in table_names() else ""
        raise UserError(f"{table} has no row {row!r}{hint or f'. {_rows_of(table, module)}'}")
    experiment = module.ROWS[row]
    if not isinstance(experiment, Experiment):
        raise UserError(f"{name} is {experiment!r}, not an Experiment; write ROWS = {{'name': Experiment(...)}}.")
    return experiment


def teacher_row(experiment: Experiment) -> Experiment:
    """Returns the row named by `experiment.teacher`; UserError if it is not a teacher's or is for other data."""
    teacher = find_row(experiment.teacher)
    if experiment.limit is not None:
        teacher = teacher.smoke()
    if teacher.semantic is None:
        raise UserError(f"{experiment.teacher} is a student's row; name a teacher's, such as teacher:demo.")
    if (teacher.data, teacher.scenes) != (experiment.data, experiment.scenes):
        raise UserError(f"{experiment.teacher} is for other data than its student; both must be trained on the same.")
    return teacher


def labelling_row(experiment: Experiment) -> str:
    """Name of the row of the student whose masks train a teacher; "" if none does, or a run folder's."""
    semantic = experiment.semantic
    if semantic is None or semantic.labels != "student" or experiment.supervision == "mask":
        return ""
    return semantic.student if ":" in semantic.student and not Path(semantic.student).is_dir() else ""


def lineage(experiment: Experiment) -> str:
    """Returns the row's digest, combined with those of the rows that it learns from, so that their changes count."""
    parents = [teacher_row(experiment)] if experiment.trains_teacher else []
    if name := labelling_row(experiment):
        parents.append(find_row(name))
    if not parents:
        return experiment.digest()
    every = " ".join([experiment.digest(), *map(lineage, parents)])
    return hashlib.sha256(every.encode()).hexdigest()[:10]


class Line(NamedTuple):
    """A row in a listing: its name for commands, its data set, and a description that sets it apart in its table."""

    name: str
    data: str
    text: str


def lines_of(table: str, module: ModuleType) -> list[Line]:
    """Returns the rows of a table or of a user's file, in file order."""
    comparison = getattr(module, "TABLE", None)
    texts = descriptions(module.ROWS, comparison if isinstance(comparison, Comparison) else None)
    return [Line(f"{table}:{name}", module.ROWS[name].data, text) for name, text in texts.items()]


def in_columns(lines: Iterable[Line]) -> str:
    """Format rows as text, one line each."""
    lines = list(lines)
    width = max((len(line.name) for line in lines), default=0)
    return "\n".join(f"  {line.name:<{width}}  {line.data:<5}  {line.text}" for line in lines)


def descriptions(rows: Mapping[str, Experiment], comparison: Comparison | None = None) -> dict[str, str]:
    """Returns `described` of each row; rows with equal text also list the fields in which they differ."""
    texts = {name: described(name, row, comparison) for name, row in rows.items() if isinstance(row, Experiment)}
    first: dict[tuple[str, str], str] = {}
    for name, text in list(texts.items()):
        like = first.setdefault((rows[name].data, text), name)
        if like != name:
            # The paper's scores of a row are no setting.
            before, now = (dict(_flat({**rows[key].values(), "expected": None})) for key in (like, name))
            changed = [f"{k} {now.get(k, 'default')}" for k in {**before, **now} if before.get(k) != now.get(k)]
            texts[name] = f"{text}; as {like}, but {', '.join(changed) or 'nothing else'}"
    return texts


def _flat(values: Mapping[str, object], above: str = "") -> Iterable[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def described(name: str, row: Experiment, comparison: Comparison | None = None) -> str:
    """Describe a row in one line: its name in the paper's table, if any, and what is trained from what."""
    label = next((text for end, text in comparison.rows.items() if name.endswith(f"_{end}")), "") if comparison else ""
    epochs = row.schedule.epochs
    weights = "pretrained, " if row.network.pretrained and not row.start else ""
    backbone = f"{row.network.backbone}, {weights}{counted(epochs, 'epoch')}"
    if row.semantic is not None:
        source = "true masks" if row.supervision == "mask" else _LABELS[row.semantic.labels]
        if row.supervision == "box" and row.semantic.labels == "objectives" and row.semantic.sure_weight:
            source += " and self-training"
        text = f"semantic teacher ({backbone}) from {source}"
    else:
        parts = [f"{row.student} ({backbone}) from {'masks' if row.supervision == 'mask' else 'boxes'}"]
        if row.objective is not None:
            parts.append(f"objective {row.objective.described}")
        if row.supervision == "box" and row.affinity is not None:
            parts.append(f"{row.affinity.mode} with affinity of {_affinities(row.affinity)}")
        if row.distillation is not None:
            parts.append(f"distillation{_split(row.distillation)}")
        parts += [f"taught by {row.teacher}"] if row.teacher else []
        parts += [f"begins with {row.start}"] if row.start else []
        text = ", ".join(parts)
    return f"{label}: {text}" if label else text


def _affinities(affinity: Affinity) -> str:
    return _joined(affinity) + (", stretched" if affinity.stretch else "")


def _joined(affinity: Affinity) -> str:
    if affinity.kernels is not None:
        return " + ".join(affinity.kernels)
    if not (affinity.saliency or affinity.feature):
        return "color"
    semantic = _SEMANTIC[affinity.semantic_values] if affinity.saliency else "feature"
    return f"color {'×' if affinity.local_form == 'product' else '+'} {semantic}"


def _split(distillation: Distillation) -> str:
    """Describe how features are split; by frequency and space is FSD."""
    if distillation.frequency and distillation.space:
        return " by frequency and space (FSD)"
    return " by frequency" if distillation.frequency else " by space" if distillation.space else ""


def not_a_row(name: str) -> str:
    """Returns the message for a name that is not table:row: lists the table's rows, or all rows of that name."""
    if name in table_names() or Path(name).suffix == ".py":
        return f"{name} is a table; name one of its rows. {_rows_of(name, _table(name))}"
    every = [line for table in table_names() for line in lines_of(table, table_module(table))]
    called = [line for line in every if line.name.endswith(f":{name}")]
    if called:
        return f"a row is named with its table. Rows called {name}:\n{in_columns(called)}"
    hint = did_you_mean(name, [*(line.name for line in every), *table_names()])
    return f"row {name!r} should be written table:row, such as demo:box{hint or '; `misa rows` lists all.'}"


def _rows_of(table: str, module: ModuleType) -> str:
    return f"Its rows are:\n{in_columns(lines_of(table, module))}"


def _table(table: str) -> ModuleType:
    shipped = table_names()
    stem = Path(table).stem
    path = Path(table)
    if table in shipped or (table == f"experiments/{stem}.py" and stem in shipped):
        module = table_module(stem)
        if table != stem and path.is_file() and path.read_bytes() != Path(str(module.__file__)).read_bytes():
            raise UserError(
                f"{table} is a file here that differs from the table of this name in the package; write ./{table} for "
                f"the file, or {stem} for the package's."
            )
        return module
    if path.suffix == ".py" and not path.is_file():
        raise UserError(f"there is no file {table}; a file of rows is given with its path, such as mine.py:name.")
    if path.suffix != ".py":
        known = f"; the tables are {', '.join(shipped)}, or a .py file with ROWS."
        raise UserError(f"there is no table {table!r}{did_you_mean(stem, shipped) or known}")
    # Imported as a module of the package, so that `from .demo import BASE` works in a user's file.
    _load_package()
    spec = importlib.util.spec_from_file_location(f"{_PACKAGE}.own_{stem}", path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the types of their fields
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's own file: any exception is reported as a configuration error
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
        where = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        raise UserError(
            f"{path}, line {where}: {type(error).__name__}: {str(error).rstrip('.')}; correct the file."
        ) from error
    finally:
        del sys.modules[spec.name]  # the file may change while the process runs, as in a notebook
    if not isinstance(getattr(module, "ROWS", None), dict):
        raise UserError(f"{path} defines no dict ROWS; write ROWS = {{'name': Experiment(...)}} in it.")
    return module


def table_names() -> list[str]:
    """Returns the names of the modules in the experiments folder."""
    return sorted(path.stem for path in _folder().glob("*.py") if path.stem != "__init__")


def table_module(name: str) -> ModuleType:
    """Import a table of `table_names` as `misa.experiments.<name>`, not from an experiments folder of the user's."""
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
    """Returns the folder of the tables: inside an installed package, or beside it in a checkout."""
    package = Path(misa.__file__).parent
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parent / "experiments"
