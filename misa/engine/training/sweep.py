"""Train many rows and seeds, in parallel slots of this machine or on a cluster; finished runs are kept."""

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from tqdm.auto import tqdm

from misa.engine.runs.places import default_folder, student_row, teacher_place
from misa.engine.runs.record import COST, changed_splits, same_data, start_place, student_digest
from misa.errors import Stopped, UserError, counted, option_name
from misa.experiment import SEED, Experiment
from misa.files import IN_USE, read_json, write_json
from misa.machine import Machine
from misa.rows import find_row, lineage, teacher_row

ROOT = "runs/tables"
State = Literal["finished", "started", "not run"]
# Job states of SLURM that are not final.
AT_WORK = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED")
_LOOK, _LOOK_IN_FILE = 5.0, 60.0  # seconds between two updates of a progress bar: in a terminal, else
# What submitit writes before and after the error output of a failed command.
_FAILED, _WHERE_LOGS_ARE = "submitit.core.utils.FailedJobError: ", "\n----------------------\nYou can check full logs"


@dataclass(frozen=True)
class Job:
    """One training: a row and a seed, in a folder shared by all tables with this row."""

    row: str
    seed: int
    folder: Path
    smoke: bool = False
    teacher: "Job | None" = field(default=None, compare=False)

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
        teacher = Job(experiment.teacher, seed, teacher_place(experiment, seed, root), smoke)
    folder = f"{lineage(experiment)}-seed{seed}"
    if experiment.semantic is not None:
        table, _, name = row.rpartition(":")
        folder = f"{Path(table).stem}-{name}-{folder}"
    one = Job(row, seed, root / folder, smoke, teacher)
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


def _require_starts(jobs: Sequence[Job]) -> None:
    """UserError if the weights that a training begins with are missing and no training of these makes them."""
    for wanted in jobs:
        start = _experiment(wanted.row, wanted.smoke).start if wanted.state == "not run" else ""
        if start and _maker(wanted, jobs) is None:
            from misa.engine.runs.start import start_file  # imports torch

            try:
                start_file(start, wanted.seed)
            except UserError as error:
                raise UserError(f"{wanted.row}, seed {wanted.seed}, begins with another run: {error}") from error


def _stages(jobs: Sequence[Job]) -> list[dict[Job, list[Job]]]:
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


def run(
    jobs: Sequence[Job],
    *,
    data_root: str | Path | None = None,
    slots: int = 1,
    cluster: str = "",
    cluster_options: str = "",
    machine: Machine | None = None,
) -> None:
    """Train all jobs that are not finished; the same call again resumes them.

    Teachers are trained first, once each, and a training that begins with another one's weights after it. `slots`
    trainings at a time run on this machine, each in a process with its own GPUs, if there are enough, and its output in
    `<root>/logs`. With `cluster` ("slurm", or another that submitit supports) each job is submitted with
    `cluster_options` (see `read_options`), or only waited for if an earlier call has submitted it to SLURM. `data_root`
    and `machine` apply to each training.
    Raises UserError: a training failed; its last line is quoted, and all jobs that do not depend on it were still run.
    Or, before any training, a folder holds another run, or one on other data than `data_root`, or a start is missing;
    Stopped: by SIGTERM, which is forwarded to the trainings of this machine; the same call resumes.
    """
    every = [*jobs, *(wanted.teacher for wanted in jobs if wanted.teacher)]
    require_own_runs(every, data_root)
    _require_starts(every)
    stages = _stages(jobs)
    how, machine = _timed_options(cluster, cluster_options), machine or Machine()
    failed: dict[Path, tuple[Job, str]] = {}
    without: set[Path] = set()  # failed, or in need of one that is
    for stage in stages:
        ready = []
        for wanted in (one for one in stage if one.state != "finished"):
            if without.isdisjoint(needed.folder for needed in stage[wanted]):
                ready.append(wanted)
            else:
                without.add(wanted.folder)
        if ready:
            commands = {wanted: wanted.command(data_root, machine) for wanted in ready}
            with _sigterm_raises():
                found = _submit(commands, cluster, how) if cluster else _here(commands, slots, machine.gpus)
            without |= {wanted.folder for wanted, _ in found}
            failed |= {wanted.folder: (wanted, sentence) for wanted, sentence in found}
    if failed:
        wanted, sentence = next(iter(failed.values()))
        more = f" ({len(failed) - 1} more failed)" if len(failed) > 1 else ""
        fix = "wait for that one" if IN_USE in sentence else "fix it"
        raise UserError(
            f"{wanted.row} with seed {wanted.seed} failed: {sentence.removesuffix('.')}{more}; "
            f"see {_log(wanted)}, {fix} and run the same again."
        )


def spread(
    commands: Mapping[str, list[str]],
    folder: Path,
    *,
    slots: int,
    cluster: str = "",
    cluster_options: str = "",
    note: Callable[[], str],
) -> None:
    """Run named commands in parallel, on this machine (each on its own GPU, if there are enough) or on a cluster.

    Their output goes to `<folder>/logs`; `slots`, `cluster` and `cluster_options` are those of `run`; on this machine
    the progress bar shows `note()` as well. Raises UserError: a command failed; its last line is quoted, and all others
    have ended.
    """
    jobs = {Job(name, 0, folder / name): command for name, command in commands.items()}
    how = _timed_options(cluster, cluster_options)
    with _sigterm_raises():
        failed = _submit(jobs, cluster, how) if cluster else _here(jobs, slots, None, "share", lambda _: note())
    if failed:
        wanted, sentence = failed[0]
        raise UserError(
            f"{wanted.row} failed: {sentence.removesuffix('.')}; see {_log(wanted)} and run the same again."
        )


def _timed_options(cluster: str, text: str) -> dict[str, int | str]:
    """`read_options`, which must contain a time limit on a cluster; otherwise UserError."""
    how = read_options(text)
    if cluster and not {"timeout_min", "slurm_time"} & how.keys():
        raise UserError(
            f"{option_name('cluster')} needs {option_name('cluster_options')} with timeout_min, the minutes that one "
            "job may take, and what else the cluster asks for, such as timeout_min=1440,gpus_per_node=1."
        )
    return how


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


def read_options(text: str) -> dict[str, int | str]:
    """Parse submitit's parameters from `name=value,name=value`; integers are converted.

    >>> read_options("timeout_min=1440, slurm_partition=gpu")
    {'timeout_min': 1440, 'slurm_partition': 'gpu'}
    """
    found: dict[str, int | str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise UserError(
                f"{option_name('cluster_options')} has {part!r}; write name=value with commas between, such as "
                "timeout_min=1440,gpus_per_node=1."
            )
        found[name] = int(value) if value.isdecimal() else value
    return found


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


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Context in which SIGTERM raises Stopped, so that this machine's trainings are terminated too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Stopped(
            "stopped by SIGTERM; the same command goes on with what is not finished.", status=128 + signal.SIGTERM
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _log(wanted: Job) -> Path:
    return wanted.folder.parent / "logs" / f"{wanted.folder.name}.txt"


def _steps(jobs: Iterable[Job]) -> str:
    """How far trainings are, by the last steps in their logs."""
    words = []
    for wanted in jobs:
        last = re.findall(r"step +(\d+)/(\d+)", _end(_log(wanted)))
        if last:
            words.append(f"{wanted.row} seed {wanted.seed} {int(last[-1][0]) / int(last[-1][1]):.0%}")
    return ", ".join(sorted(words))


def _here(
    commands: Mapping[Job, list[str]],
    slots: int,
    gpus: int | None,
    what: str = "training",
    note: Callable[[Iterable[Job]], str] = _steps,
) -> list[tuple[Job, str]]:
    """Run processes on this machine, `slots` at a time; return the failed jobs with their last lines.

    what, note: for the progress bar, the name of a process and how far those that run at the time are.
    """
    stopped, running = threading.Event(), dict[Job, subprocess.Popen[bytes]]()
    free: SimpleQueue[str] = SimpleQueue()
    for devices in slot_devices(slots, gpus):
        free.put(devices)

    def one(wanted: Job) -> str | None:
        if stopped.is_set():
            return None
        log = _log(wanted)
        log.parent.mkdir(parents=True, exist_ok=True)
        devices = free.get()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices} if devices else None
        try:
            with log.open("ab") as output:
                process = subprocess.Popen(commands[wanted], stdout=output, stderr=subprocess.STDOUT, env=environment)
                running[wanted] = process
                if stopped.is_set():  # in between
                    process.terminate()
                status = process.wait()
                del running[wanted]
        except OSError as error:
            return f"it cannot be started with its output in {log} ({error.strerror})"
        finally:
            free.put(devices)
        if status < 0:
            return f"{signal.Signals(-status).name} ended it; if that was for want of memory, take fewer slots"
        return None if status == 0 else _last_line(log) or f"exit status {status}"

    failed: list[tuple[Job, str]] = []
    pause = _LOOK if sys.stderr.isatty() else _LOOK_IN_FILE
    with ThreadPoolExecutor(slots) as pool:
        started: dict[Future[str | None], Job] = {pool.submit(one, wanted): wanted for wanted in commands}
        try:
            with tqdm(total=len(commands), desc=f"{what}s", unit=what) as bar:
                left = set(started)
                while left:
                    done, left = wait(left, timeout=pause, return_when=FIRST_COMPLETED)
                    failed += [(started[one], sentence) for one in done if (sentence := one.result()) is not None]
                    bar.set_postfix_str(note(list(running)), refresh=not done)
                    bar.update(len(done))
        except BaseException:
            stopped.set()
            for process in list(running.values()):
                process.terminate()
            raise
    return failed


def slot_devices(slots: int, gpus: int | None) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each slot; "" leaves the variable unset."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    names = [name.strip() for name in visible.split(",") if name.strip()]
    each = 1 if gpus is None else gpus
    if not 0 < each <= len(names):  # on the CPU, or more than available, which the training reports
        return [""] * slots
    return [",".join(names[(slot * each + i) % len(names)] for i in range(each)) for slot in range(slots)]


def _submit(commands: Mapping[Job, list[str]], cluster: str, how: Mapping[str, Any]) -> list[tuple[Job, str]]:
    """Submit all jobs through submitit at once and wait; return the failed jobs with their last lines."""
    name = option_name("cluster")
    try:
        import submitit
    except ImportError as error:
        raise UserError(f"{name} needs submitit; pip install submitit, or leave {name} out.") from error
    folder = _log(next(iter(commands))).parent / "cluster"
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{name} {cluster} cannot be used: submitit says: {error}") from error
    try:
        executor.update_parameters(**how)
    except (NameError, TypeError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{option_name('cluster_options')}: submitit says: {words}") from error
    ids: dict[str, str] = read_json(folder / "jobs.json") or {}
    submitted: list[tuple[Job, submitit.Job[str]]] = []
    for wanted, command in commands.items():
        task: submitit.Job[str] | None = None
        if wanted.folder.name in ids:
            task = submitit.SlurmJob(folder, ids[wanted.folder.name])
        if task is None or task.state not in AT_WORK:
            task = executor.submit(submitit.helpers.CommandFunction(command, verbose=False))
            if cluster == "slurm":  # only SLURM's jobs can be found again by another process
                ids[wanted.folder.name] = task.job_id
                write_json(folder / "jobs.json", ids)
        submitted.append((wanted, task))
    failed = []
    for wanted, task in tqdm(submitted, desc=f"jobs ({cluster})", unit="job"):
        try:
            _log(wanted).write_text(task.result())
        except Exception as error:  # submitit raises whatever the job raised
            _log(wanted).write_text(str(error).partition(_WHERE_LOGS_ARE)[0])
            failed.append((wanted, _last_line(_log(wanted)).removeprefix(_FAILED) or repr(error)))
    return failed


def _end(log: Path) -> str:
    """The last lines of a log, as far as they fit in 64 KiB; "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 2**16, 0))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _last_line(log: Path) -> str:
    lines = [line for line in _end(log).splitlines() if line.strip()]
    return lines[-1] if lines else ""
