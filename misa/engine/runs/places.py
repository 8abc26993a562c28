"""Run folders of rows, and of the teachers and students they depend on. Imports no framework."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from misa.engine.runs.record import learned_from_same, read_params, student_digest
from misa.experiment import Experiment
from misa.files import read_json
from misa.rows import find_row, labelling_row, lineage, teacher_row

SMOKE_SUFFIX = "-smoke"
"""End of the name of a smoke run's folder, so that a real run finds its place free."""


def default_folder(row: str, seed: int, *, smoke: bool = False, suffix: str = "") -> Path:
    """The run folder of a row if no work_dir is given; suffix: of the options that change the row."""
    table, _, name = row.rpartition(":")
    return Path(f"runs/{Path(table).stem}-{name}-seed{seed}{SMOKE_SUFFIX * smoke}{suffix}")


def teacher_folder(experiment: Experiment, seed: int) -> str:
    """Name of the run folder of a student's teacher, the same for all students of this teacher."""
    table, _, name = experiment.teacher.rpartition(":")
    return f"{Path(table).stem}-{name}-{lineage(teacher_row(experiment))}-seed{seed}"


def teacher_place(experiment: Experiment, seed: int, beside: Path, *, student: Mapping[str, Any] | None = None) -> Path:
    """Existing or future run folder of a student's teacher: the default one if the teacher was trained separately.

    student: the student's record, to require the same data.
    """
    alone = beside / default_folder(experiment.teacher, seed).name
    if (alone / "metrics.json").exists():
        params, row = read_params(alone), teacher_row(experiment)
        own = {"digest": row.digest(), "seed": seed} | student_digest(row)
        same = student is None or learned_from_same(params, student)
        if same and all(params.get(key, value) == value for key, value in own.items()):
            return alone
    return beside / teacher_folder(experiment, seed)


def named_student(experiment: Experiment) -> Path | None:
    """The student's run folder that a teacher's row names, or None."""
    name = experiment.semantic.student if experiment.semantic else ""
    return Path(name).expanduser() if name else None


def student_row(experiment: Experiment) -> tuple[str, Experiment] | None:
    """Name and row of the student whose masks train a teacher; None unless it is given as a row."""
    name = labelling_row(experiment)
    if not name:
        return None
    row = find_row(name)
    return name, row if experiment.limit is None else row.smoke()


def student_place(row: str, experiment: Experiment, seed: int, beside: Path, *, teacher: Mapping[str, Any]) -> Path:
    """Existing or future run folder of the student whose masks train a teacher, named as by `train` or by a table.

    teacher: the teacher's record, to require the same data.
    """
    name = default_folder(row, seed)
    for alone in (beside / name.name, name):
        params = read_json(alone / "params.json")
        if params is None or not (alone / "metrics.json").exists():
            continue
        if (params["digest"], params["seed"]) == (experiment.digest(), seed) and learned_from_same(params, teacher):
            return alone
    return beside / f"{lineage(experiment)}-seed{seed}"
