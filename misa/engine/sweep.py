"""Many rows and seeds: what is missing is trained, here in parallel slots or on a cluster; what is there is kept."""

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Literal

from tqdm.auto import tqdm

from misa.engine.record import read_json
from misa.engine.rows import find_row, teacher_row
from misa.engine.train import teacher_folder
from misa.errors import UserError
from misa.experiment import Experiment

ROOT = "runs/tables"
State = Literal["finished", "started", "not run"]


@dataclass(frozen=True)
class Job:
    """One training: a row and a seed, in the folder that is this training's wherever the row is listed."""

    row: str
    seed: int
    folder: Path
    smoke: bool = False
    teacher: "Job | None" = field(default=None, compare=False)

    @property
    def state(self) -> State:
        """What the folder holds."""
        if (self.folder / "metrics.json").exists():
            return "finished"
        return "started" if (self.folder / "params.json").exists() else "not run"

    def metrics(self) -> dict[str, Any] | None:
        """Of a finished run; None of any other."""
        return read_json(self.folder / "metrics.json")

    def command(self, options: Mapping[str, object]) -> list[str]:
        """The command that trains it, goes on with it, or finds it finished."""
        more = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
        smoke = ["--smoke"] if self.smoke else []
        return [
            sys.executable, "-m", "misa", "train", self.row, f"--seed={self.seed}", f"--work-dir={self.folder}",
            *smoke, *more,
        ]  # fmt: skip


def job(row: str, seed: int, *, root: str | Path = ROOT, smoke: bool = False) -> Job:
    """A student's run is `<hash>-seed<seed>` below `root`, so that tables share rows; its teacher is beside it."""
    experiment = _experiment(row, smoke)
    root, teacher = Path(root), None
    if experiment.teacher:
        teacher = Job(experiment.teacher, seed, root / teacher_folder(experiment, seed), smoke)
    if experiment.semantic is not None:
        table, _, name = row.rpartition(":")
        return Job(row, seed, root / f"{Path(table).stem}-{name}-{experiment.digest()}-seed{seed}", smoke)
    return Job(row, seed, root / f"{experiment.digest()}-seed{seed}", smoke, teacher)


def _experiment(row: str, smoke: bool) -> Experiment:
    experiment = find_row(row).smoke() if smoke else find_row(row)
    if experiment.teacher:
        teacher_row(experiment)  # says what is wrong with it now, not after the first hour
    return experiment


def plan(rows: Iterable[str], seeds: Iterable[int], *, root: str | Path = ROOT, smoke: bool = False) -> list[Job]:
    """One job a row and seed, none twice: seed by seed, so that every row has as many seeds as any other."""
    seeds, rows = list(seeds), list(rows)
    unique = {
        wanted.folder: wanted for seed in seeds for row in rows for wanted in [job(row, seed, root=root, smoke=smoke)]
    }
    return list(unique.values())


def run(
    jobs: Sequence[Job],
    *,
    slots: int = 1,
    cluster: str = "",
    cluster_options: Mapping[str, Any] | None = None,
    **options: object,
) -> None:
    """Train what is not finished; the same call again goes on where it was stopped.

    Teachers come first, once each. `slots` trainings at a time run on this machine, each a process of its own whose
    output goes to `<root>/logs`; with `cluster` ("slurm", or any other that submitit knows) each is submitted with
    `cluster_options`, submitit's parameters. `options` are those of `misa train`: data_root, gpus, workers, threads.

    Raises:
        UserError: a training ended with an error; all others were still tried. Its last line is quoted.
    """
    teachers = {wanted.teacher.folder: wanted.teacher for wanted in jobs if wanted.teacher is not None}
    for stage in (list(teachers.values()), jobs):
        missing = [wanted for wanted in stage if wanted.state != "finished"]
        if not missing:
            continue
        launch = _submit if cluster else _here
        failed = launch(missing, slots=slots, cluster=cluster, how=cluster_options or {}, options=options)
        if failed:
            wanted, sentence = failed[0]
            more = f" ({len(failed) - 1} more failed)" if len(failed) > 1 else ""
            raise UserError(
                f"{wanted.row} with seed {wanted.seed} failed: {sentence}{more}; "
                f"see {_log(wanted)}, mend it and run the same again."
            )


def _log(wanted: Job) -> Path:
    return wanted.folder.parent / "logs" / f"{wanted.folder.name}.txt"


def _here(jobs: Sequence[Job], *, slots: int, options: Mapping[str, object], **_: object) -> list[tuple[Job, str]]:
    """Processes of this machine, `slots` at a time; the jobs that failed, each with its last words."""
    stopped, running = Event(), set[subprocess.Popen[bytes]]()

    def one(wanted: Job) -> str | None:
        if stopped.is_set():
            return None
        log = _log(wanted)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(wanted.command(options), stdout=output, stderr=subprocess.STDOUT)
            running.add(process)
            status = process.wait()
            running.discard(process)
        return None if status == 0 else _last_line(log) or f"exit status {status}"

    failed = []
    with ThreadPoolExecutor(slots) as pool:
        started: dict[Future[str | None], Job] = {pool.submit(one, wanted): wanted for wanted in jobs}
        try:
            for done in tqdm(as_completed(started), total=len(jobs), desc="trainings", unit="run"):
                sentence = done.result()
                if sentence is not None:
                    failed.append((started[done], sentence))
        except BaseException:
            stopped.set()
            for process in running.copy():
                process.terminate()
            raise
    return failed


def _submit(
    jobs: Sequence[Job], *, cluster: str, how: Mapping[str, Any], options: Mapping[str, object], **_: object
) -> list[tuple[Job, str]]:
    """The same through submitit, all at once: the cluster has slots of its own."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("cluster needs submitit; pip install submitit, or leave cluster out.") from error
    folder = _log(jobs[0]).parent / "cluster"
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    executor.update_parameters(**how)
    submitted = [
        (wanted, executor.submit(submitit.helpers.CommandFunction(wanted.command(options), verbose=False)))
        for wanted in jobs
    ]
    failed = []
    for wanted, task in tqdm(submitted, desc=f"trainings ({cluster})", unit="run"):
        try:
            _log(wanted).write_text(task.result())
        except Exception as error:  # submitit raises whatever went wrong over there, of many kinds
            _log(wanted).write_text(str(error))
            failed.append((wanted, _last_line(_log(wanted)) or repr(error)))
    return failed


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
