"""The trainings of a sweep: their folders, what each needs first, and what is missing."""

import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from misa.engine.runs.places import default_folder, student_row, teacher_place
from misa.engine.runs.record import COST, changed_splits, same_data, start_place, student_digest
from misa.errors import UserError, counted
from misa.experiment import SEED, Experiment
from misa.files import read_json
from misa.machine import Machine
from misa.rows import find_row, lineage, teacher_row

ROOT = "runs/tables"
State = Literal["finished", "started", "not run"]


@dataclass(frozen=True)
class Job:
    """One training: a row and a seed, in a folder shared by all tables with this row."""

    row: str
    seed: int
    folder: Path
    smoke: bool = False
    teacher: "Job | None" = field(default=None, compare=False)
    lineage: str = field(default="", compare=False)  # of the row as it was when this was planned

    @property
    def log(self) -> Path:
        """The file of its process's output."""
        return self.folder.parent / "logs" / f"{self.folder.name}.txt"

    @property
    def state(self) -> State:
        """Progress of the run in the folder."""
        if (self.folder / "metrics.json").exists():
            return "finished"
        return "started" if (self.folder / "params.json").exists() else "not run"

    def metrics(self) -> dict[str, Any] | None:
        """The scores of a finished run, otherwise None."""
        return read_json(self.folder / "metrics.json")

    def cost(self) -> dict[str, Any] | None:
        """Seconds and memory of its steps (`misa.engine.training.cost`), None if not recorded."""
        return read_json(self.folder / COST)

    def identity(self) -> dict[str, Any]:
        """What its record must say: the hashes of the row and of the teacher's row, and the seed."""
        experiment = _experiment(self.row, self.smoke)
        teacher = {"teacher_digest": lineage(teacher_row(experiment))} if experiment.trains_teacher else {}
        return {"digest": experiment.digest(), "seed": self.seed} | teacher | student_digest(experiment)

    def command(self, data_root: str | Path | None, machine: Machine) -> list[str]:
        """The command that trains or resumes it; a no-op if it is finished."""
        more = ["--smoke"] if self.smoke else []
        more += [] if data_root is None else [f"--data-root={data_root}"]
        more += [f"--lineage={self.lineage}"] if self.lineage else []  # the file of the row may change meanwhile
        what = [self.row, f"--seed={self.seed}", f"--work-dir={self.folder}"]
        return [sys.executable, "-m", "misa", "train", *what, *more, *machine.options()]


def job(row: str, seed: int, *, root: str | Path = ROOT, smoke: bool = False) -> Job:
    """The training of a row; a student's folder is `<root>/<hash>-seed<seed>`, shared by tables, its teacher beside.

    A finished run in the folder that `misa train` gives it there is taken, too, also under another name of the row:
    `photos:box` is the baseline of Table 3 on photographs.
    """
    experiment = _experiment(row, smoke)
    root, teacher = Path(root).expanduser(), None
    if experiment.trains_teacher:
        place = teacher_place(experiment, seed, root)
        teacher = Job(experiment.teacher, seed, place, smoke, lineage=lineage(teacher_row(experiment)))
    folder = f"{(own := lineage(experiment))}-seed{seed}"
    if experiment.semantic is not None:
        table, _, name = row.rpartition(":")
        folder = f"{Path(table).stem}-{name}-{folder}"
    one = Job(row, seed, root / folder, smoke, teacher, own)
    return one if one.state != "not run" else next(_trained_alone(one), one)


def _trained_alone(wanted: Job) -> Iterator[Job]:
    """The finished runs of this training beside its folder that `misa train` has named, its own name first."""
    own, seed = default_folder(wanted.row, wanted.seed, smoke=wanted.smoke).name, f"-seed{wanted.seed}"
    places = {own: None} | dict.fromkeys(sorted(path.name for path in wanted.folder.parent.glob(f"*{seed}*")))
    for name in places:
        alone = replace(wanted, folder=wanted.folder.with_name(name))
        params = read_json(alone.folder / "params.json") if alone.state == "finished" else None
        if params is None or name != default_folder(params.get("row", ""), wanted.seed, smoke=wanted.smoke).name:
            continue
        if all(params.get(key, value) == value for key, value in wanted.identity().items()):
            yield alone


def _experiment(row: str, smoke: bool) -> Experiment:
    experiment = find_row(row).smoke() if smoke else find_row(row)
    if experiment.trains_teacher:
        teacher_row(experiment)  # raises errors now instead of after the first hour
    return experiment


def _require_own_starts(row: str, smoke: bool) -> None:
    """UserError if a row, or one that it learns from, has one start for all seeds."""
    experiment = _experiment(row, smoke)
    if experiment.start and SEED not in experiment.start:
        raise UserError(
            f"{row} begins with {experiment.start} in every seed, so that the intervals over the seeds would be too "
            f"narrow; write {SEED} in its start for the run's seed, or take one seed."
        )
    if experiment.trains_teacher:
        _require_own_starts(experiment.teacher, smoke)
    elif (named := student_row(experiment)) is not None:
        _require_own_starts(named[0], smoke)


def _maker(wanted: Job, every: Iterable[Job]) -> Job | None:
    """The training among these whose folder holds, or will hold, the weights that a training begins with."""
    start = _experiment(wanted.row, wanted.smoke).start
    if not start:
        return None
    place = start_place(start, wanted.seed)
    return next((one for one in every if one.folder.resolve() in (place, *place.parents)), None)


def require_starts(jobs: Sequence[Job]) -> None:
    """UserError if the weights that a training begins with are missing and no training of these makes them."""
    for wanted in jobs:
        start = _experiment(wanted.row, wanted.smoke).start if wanted.state == "not run" else ""
        if start and _maker(wanted, jobs) is None:
            from misa.engine.runs.start import start_file  # imports torch

            try:
                start_file(start, wanted.seed)
            except UserError as error:
                raise UserError(f"{wanted.row}, seed {wanted.seed}, begins with another run: {error}") from error


def stages(jobs: Sequence[Job]) -> list[dict[Job, list[Job]]]:
    """Trainings in the order in which they can run, each with those that it needs: its teacher and its start's.

    Teachers come first, then all others in the given order, but for those that need one of these.
    UserError if a training waits, directly or not, for its own weights.
    """
    teachers = {wanted.teacher.folder: wanted.teacher for wanted in jobs if wanted.teacher is not None}
    every = {**teachers, **{wanted.folder: wanted for wanted in jobs}}
    needs = {
        one: [every[other.folder] for other in (one.teacher, _maker(one, every.values())) if other is not None]
        for one in every.values()
    }
    ranks: dict[Job, int] = {}
    try:
        for one in TopologicalSorter(needs).static_order():
            ranks[one] = max([int(one.folder not in teachers), *(ranks[other] + 1 for other in needs[one])])
    except CycleError as error:
        one = error.args[1][0]
        raise UserError(f"{one.row}, seed {one.seed}, waits for its own weights; change its start.") from None
    return [{one: needs[one] for one in needs if ranks[one] == rank} for rank in sorted(set(ranks.values()))]


def plan(rows: Iterable[str], seeds: Iterable[int], *, root: str | Path = ROOT, smoke: bool = False) -> list[Job]:
    """One job per row and seed, no duplicates; ordered by seed: an interrupted sweep has equal seeds of every row.

    UserError for several seeds of a row that begins with the same weights in all: their spread would be too small.
    """
    seeds, rows = list(seeds), list(rows)
    if len(seeds) > 1:
        for row in rows:
            _require_own_starts(row, smoke)
    unique = {one.folder: one for seed in seeds for row in rows for one in [job(row, seed, root=root, smoke=smoke)]}
    return list(unique.values())


def planned(jobs: Sequence[Job], *, slots: int = 1) -> str:
    """Describe what `run` would train and how long it would take; empty if everything is finished."""
    every = {one.folder: one for wanted in jobs for one in (wanted.teacher, wanted) if one is not None}
    missing = [one for one in every.values() if one.state != "finished"]
    if not missing:
        return ""
    took = [seconds / 60 for one in every.values() if (seconds := _seconds(one)) is not None]
    each = statistics.median(took) if took else None
    rows = Counter(one.row for one in missing)
    listed = ", ".join(f"{n} x {row}" for row, n in rows.items())
    lines = [f"{counted(len(missing), 'training is', 'trainings are')} missing: {listed}"]
    if each is None:
        lines.append("how long one takes is known here when the first has ended; misa estimate ROW measures it")
    else:
        total = each * len(missing) / max(slots, 1)
        about = f"{total / 60:.1f} hours" if total >= 90 else counted(max(round(total), 1), "minute")
        lines.append(f"about {about} here with slots={slots}, at {each:.1f} minutes each as those that are finished")
    return "\n".join(lines)


def _seconds(one: Job) -> float | None:
    """Duration of a finished training, pauses included, by the times of its files; None where a copy changed them."""
    if one.state != "finished":
        return None
    begun, ended = (one.folder / name for name in ("env.json", "metrics.json"))  # a resume leaves env.json as it is
    took = ended.stat().st_mtime - begun.stat().st_mtime if begun.exists() else 0.0
    return took if took > 1 else None


def require_own_runs(jobs: Iterable[Job], data_root: object = None) -> None:
    """Raise UserError if a folder holds another run, or runs are on other data than `data_root` or than one another.

    A moved folder may have another row's name. The hash of a row does not include the data folder, and the embedded
    data is the same in any folder.
    """
    wanted = None
    for one in jobs:
        params = read_json(one.folder / "params.json")
        if params is None:
            continue
        for key, wanted_value in one.identity().items():  # older runs did not record the teacher's hash
            if (found := params.get(key, wanted_value)) != wanted_value:
                smoke = "smoke run" if params["experiment"].get("limit") is not None else "run"
                raise UserError(
                    f"{one.folder} holds a {smoke} of {params['row']} with another {key} than {one.row} with seed "
                    f"{one.seed} ({found}, not {wanted_value}); move it elsewhere: a table finds runs by their folder."
                )
        if params["experiment"]["data"] == "demo":
            continue
        if wanted is None or ("data" not in wanted and "data" in params and same_data(params, wanted)):
            wanted = params if data_root is None else _data_of(data_root)
        if not same_data(params, wanted):
            raise UserError(
                f"{one.folder} is a run on {params['data_root']}, not on {wanted['data_root']}; give each folder of "
                "data a root of its own."
            )
        if changed := changed_splits(params, wanted.get("data", {})):
            than = f"{wanted['row']} with seed {wanted['seed']}" if "row" in wanted else "those that are there now"
            raise UserError(
                f"{one.folder} is a run on other {' and '.join(changed)} annotations of {params['data_root']} than "
                f"{than}; restore the annotations, or train in another root."
            )


def _data_of(data_root: object) -> dict[str, Any]:
    """The record of this data in a run's parameters."""
    from misa.data.digest import data_digests
    from misa.data.formats.convert import open_layout  # imports OpenCV, which a table of finished runs does not need

    layout = open_layout(Path(str(data_root)).expanduser().resolve())
    return {"data_root": str(layout.root), "data": data_digests(layout.train, layout.val)}
