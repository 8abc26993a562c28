"""Logs of the processes of a sweep."""

import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path

from misa.engine.sweeps.jobs import Job


def steps(jobs: Iterable[Job]) -> str:
    """How far trainings are, by the last steps in their logs."""
    words = []
    for wanted in jobs:
        last = re.findall(r"step +(\d+)/(\d+)", _end(wanted.log))
        if last:
            words.append(f"{wanted.row} seed {wanted.seed} {int(last[-1][0]) / int(last[-1][1]):.0%}")
    return ", ".join(sorted(words))


def _end(log: Path) -> str:
    """The last lines of a log, as far as they fit in 64 KiB; "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 2**16, 0))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def last_line(log: Path) -> str:
    """The last line of a log that is not blank; "" if there is none."""
    lines = [line for line in _end(log).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def failure(status: int, log: Path, *, advice: str) -> str | None:
    """What a process's status says, in a sentence with the last line of its log; None for 0. advice: where killed."""
    if status < 0:
        return f"{signal.Signals(-status).name} ended it; if that was for want of memory, {advice}"
    return None if status == 0 else last_line(log) or f"exit status {status}"
