"""Trainings as jobs of a cluster, by submitit."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from misa.engine.sweeps.jobs import Job
from misa.engine.sweeps.logs import failure
from misa.errors import Stopped, UserError, option_name
from misa.files import read_json, write_json

if TYPE_CHECKING:
    import submitit

# Job states of SLURM that are not final.
AT_WORK = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED")
TIME_OVER = "its time was over, also after it was submitted again"
_WHERE_LOGS_ARE = "\n----------------------\nYou can check full logs"  # begins what submitit adds to an error


@dataclass
class Command:
    """A command as a job, with its output in a log; returns its status.

    What ends the job, such as its time limit, ends the command by SIGTERM, upon which a training saves its step.
    forward: pass SIGTERM on, which submitit's jobs ignore; False in this process, where it has a handler.
    """

    command: list[str]
    log: Path
    forward: bool = True
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def __call__(self) -> int:
        """Run the command to its end."""
        if self.forward:
            signal.signal(signal.SIGTERM, self._pass_on)
        # SLURM sends the signal before the time limit to every process of a job; it is meant for this one.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
        with self.log.open("ab") as output:
            try:
                self.process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.STDOUT)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            try:
                return self.process.wait()
            except BaseException:
                self._end()
                raise

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """Called by submitit before the time limit: end the command, and have the job submitted again."""
        from submitit.helpers import DelayedSubmission

        self._end()
        return DelayedSubmission(self)

    def _pass_on(self, *_: object) -> None:
        if self.process is None:
            raise SystemExit(128 + signal.SIGTERM)
        self.process.terminate()

    def _end(self) -> None:
        """Wait for the command to end after SIGTERM. In a signal handler: `process.wait` could wait for itself."""
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process": None}


def submit(commands: Mapping[Job, list[str]], cluster: str, how: Mapping[str, Any]) -> list[tuple[Job, str]]:
    """Submit all jobs at once and wait; return the failed ones with their last lines.

    SLURM's jobs go on if this process is stopped, and the next call waits for them; those of this machine are ended.
    """
    folder = next(iter(commands)).log.parent / "cluster"
    executor = _executor(folder, cluster, how)
    submitted: list[tuple[Job, submitit.Job[int]]] = []
    failed = []
    try:
        for wanted, command in commands.items():
            submitted.append((wanted, _submitted(wanted, command, executor, folder, cluster)))
        for wanted, task in tqdm(submitted, desc=f"jobs ({cluster})", unit="job"):
            if (sentence := _result(wanted, task)) is not None:
                failed.append((wanted, sentence))
    except BaseException:
        if cluster == "local":
            _end_all([task for _, task in submitted])
        raise
    return failed


def _end_all(tasks: "Sequence[submitit.Job[int]]") -> None:
    """Send SIGTERM to the jobs on this machine, and wait until they have saved their step."""
    for task in tasks:
        if not task.done():
            os.kill(int(task.job_id), signal.SIGTERM)
    while not all(task.done() for task in tasks):
        time.sleep(0.1)


def _executor(folder: Path, cluster: str, how: Mapping[str, Any]) -> "submitit.AutoExecutor":
    """submitit's executor; UserError for a cluster or an option that it does not know."""
    name = option_name("cluster")
    try:
        import submitit
    except ImportError as error:
        raise UserError(f"{name} needs submitit; pip install submitit, or leave {name} out.") from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{name} {cluster} cannot be used: submitit says: {error}") from error
    try:
        executor.update_parameters(**how)
    except (NameError, TypeError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{option_name('cluster_options')}: submitit says: {words}") from error
    return executor


def _submitted(
    wanted: Job, command: list[str], executor: "submitit.AutoExecutor", folder: Path, cluster: str
) -> "submitit.Job[int]":
    """Submit a job, or find the one that an earlier call has submitted to SLURM."""
    import submitit

    ids: dict[str, str] = read_json(folder / "jobs.json") or {}
    if wanted.folder.name in ids:
        earlier: submitit.Job[int] = submitit.SlurmJob(folder, ids[wanted.folder.name])
        if earlier.state in AT_WORK:
            return earlier
    task = executor.submit(Command(command, wanted.log, forward=cluster != "debug"))
    if cluster == "slurm":  # only SLURM's jobs can be found again by another process
        ids[wanted.folder.name] = task.job_id
        write_json(folder / "jobs.json", ids)
    return task


def _result(wanted: Job, task: "submitit.Job[int]") -> str | None:
    """Wait for a job; return why it failed, or None."""
    try:
        status = task.result()
    except Stopped:  # this process, not the job
        raise
    except Exception as error:  # submitit raises whatever the job raised, or that it has left no result
        text = str(error).partition(_WHERE_LOGS_ARE)[0].strip()
        with wanted.log.open("a") as log:
            log.write(f"{text}\n")
        if "Job not requeued because: timed-out" in text:  # its log may have an earlier time limit
            return TIME_OVER
        return re.sub(r"^submitit\.\S+: ", "", text.splitlines()[-1]) if text else repr(error)
    return failure(status, wanted.log, advice="ask for more of it")
