"""Warnings about a run folder's results: an unfinished training, a smoke run, changed annotations."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from misa.engine.runs.checkpoints import newest
from misa.engine.runs.record import SMOKE, changed_splits
from misa.errors import counted, option_name
from misa.experiment import Experiment
from misa.files import read_json


def remarks(folder: Path, experiment: Experiment, *, checkpoint: Path | None = None) -> list[str]:
    """One sentence for each reason to distrust a run's results; empty for a finished run that is not a smoke run.

    checkpoint: the one in use; by default the folder's newest.
    """
    found = []
    if experiment.limit is not None:
        found.append(f"{folder} is {SMOKE}")
    if read_json(folder / "metrics.json") is None:
        path = newest(folder) if checkpoint is None else checkpoint
        done = re.match(r"epoch_(\d+)", path.stem) if path is not None else None
        epochs = experiment.schedule.epochs
        state = f"epoch {done[1]} of {epochs}" if done else f"an unknown state of {counted(epochs, 'epoch')}"
        found.append(f"{folder} has not ended its training; what follows is of {state}.")
    return found


def smoke_mark(experiment: Experiment) -> str:
    """The prefix of a smoke run's results; "" for any other run."""
    return f"SMOKE RUN: {SMOKE.partition(': ')[2]}" if experiment.limit is not None else ""


def warn(folder: Path, experiment: Experiment, *, checkpoint: Path | None = None) -> None:
    """Print `remarks` to standard error, which a notebook shows in red."""
    for remark in remarks(folder, experiment, checkpoint=checkpoint):
        print(f"warning: {remark}", file=sys.stderr, flush=True)


def warn_changed(folder: Path, params: Mapping[str, Any], data: Mapping[str, str]) -> None:
    """Print a warning to standard error if a run's annotations differ from its record."""
    if changed := changed_splits(params, data):
        print(
            f"warning: the annotations of {' and '.join(changed)} in {params['data_root']} have changed since the run "
            f"in {folder} was trained: its recorded scores and predictions are of the earlier ones; restore them, or "
            f"train it again in another {option_name('work_dir')}.",
            file=sys.stderr,
            flush=True,
        )
