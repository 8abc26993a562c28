"""Train many rows and seeds, in parallel slots of this machine or on a cluster; finished runs are kept."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from misa.engine.sweeps.cluster import TIME_OVER, submit
from misa.engine.sweeps.jobs import Job, require_own_runs, require_starts, stages
from misa.engine.sweeps.processes import run_here
from misa.errors import Stopped, UserError, option_name
from misa.files import IN_USE
from misa.machine import Machine


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
    require_starts(every)
    how, machine = _timed_options(cluster, cluster_options), machine or Machine()
    failed: dict[Path, tuple[Job, str]] = {}
    without: set[Path] = set()  # failed, or in need of one that is
    for stage in stages(jobs):
        ready = []
        for wanted in (one for one in stage if one.state != "finished"):
            if without.isdisjoint(needed.folder for needed in stage[wanted]):
                ready.append(wanted)
            else:
                without.add(wanted.folder)
        if ready:
            commands = {wanted: wanted.command(data_root, machine) for wanted in ready}
            with _sigterm_raises():
                found = submit(commands, cluster, how) if cluster else run_here(commands, slots, machine.gpus)
            without |= {wanted.folder for wanted, _ in found}
            failed |= {wanted.folder: (wanted, sentence) for wanted, sentence in found}
    if failed:
        wanted, sentence = next(iter(failed.values()))
        more = f" ({len(failed) - 1} more failed)" if len(failed) > 1 else ""
        fix = "wait for that one" if IN_USE in sentence else "fix it"
        fix = f"allow more of it in {option_name('cluster_options')}" if sentence == TIME_OVER else fix
        raise UserError(
            f"{wanted.row} with seed {wanted.seed} failed: {sentence.removesuffix('.')}{more}; "
            f"see {wanted.log}, {fix} and run the same again."
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
        failed = submit(jobs, cluster, how) if cluster else run_here(jobs, slots, None, "share", lambda _: note())
    if failed:
        wanted, sentence = failed[0]
        raise UserError(f"{wanted.row} failed: {sentence.removesuffix('.')}; see {wanted.log} and run the same again.")


def _timed_options(cluster: str, text: str) -> dict[str, int | str]:
    """`read_options`, which must contain a time limit on a cluster; otherwise UserError."""
    how = read_options(text)
    if cluster and not {"timeout_min", "slurm_time"} & how.keys():
        raise UserError(
            f"{option_name('cluster')} needs {option_name('cluster_options')} with timeout_min, the minutes that one "
            "job may take, and what else the cluster asks for, such as timeout_min=1440,gpus_per_node=1."
        )
    return how


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
