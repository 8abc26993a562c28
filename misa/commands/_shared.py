"""Options shared by several commands, each declared once with its help and range, and checks of their values."""

import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from misa.data.formats.coco import require_there
from misa.engine.runs.places import SMOKE_SUFFIX
from misa.engine.runs.record import read_params
from misa.errors import UserError, option_name
from misa.files import missing
from misa.parameters import Parameters, argument, option
from misa.rows import find_row

Precision = Literal["", "float32", "bfloat16", "float16"]


def require_row(name: str) -> None:
    """Raise UserError if there is no such row; this and the next checks run before torch is imported, which is slow."""
    find_row(name)


def require_run(folder: str) -> None:
    """Raise UserError if there is no such run folder."""
    read_params(Path(folder).expanduser())


def smoke_folder(folder: str, smoke: bool) -> Path:
    """Return the folder, with `SMOKE_SUFFIX` added to its name for a smoke run."""
    return Path(f"{Path(folder).expanduser()}{SMOKE_SUFFIX * smoke}")


def run_place(run: str, smoke: bool) -> Path:
    """Return the folder of a finished run, or else where a notebook trains it: a smoke run in `smoke_folder`."""
    place = Path(run).expanduser()
    return place if (place / "metrics.json").is_file() else smoke_folder(run, smoke)


def require_file(path: str, what: str, advice: str) -> None:
    """Raise UserError if there is no such file or folder; `what` names it in the message."""
    if not os.path.exists(place := Path(path).expanduser()):
        raise UserError(missing(place, what, advice))


def require_given(path: str, what: str) -> None:
    """Raise UserError if a path is empty, as an unset variable of the shell, which would mean the current folder."""
    if not path.strip():
        raise UserError(f"{what} is empty; give a path, or . for this folder.")


def require_folder(path: str, name: str) -> None:
    """Raise UserError if the folder to write into, or one above it, is a file; `name` is its option, "" is unchecked.

    Checked before the work whose result is written there.
    """
    place = Path(path).expanduser()
    if path and (file := next((p for p in (place, *place.parents) if os.path.isfile(p)), None)):
        raise UserError(f"{option_name(name)} is a folder; {file} is a file.")


def require_unused(options: Parameters, names: Sequence[str], why: str) -> None:
    """Raise UserError if an option is given that has no effect; `why` ends the sentence, such as "without --miou"."""
    defaults = {field.name: field.default for field in fields(options)}  # type: ignore[arg-type]
    for name in names:
        if getattr(options, name) != defaults[name]:
            raise UserError(f"{option_name(name)} has no effect {why}; leave it out.")


def require_shares(options: Any) -> None:
    """Raise UserError if jobs for a cluster are asked for and the command would do all of its work here."""
    if options.shards < 2 or options.shard is not None:
        without = "beside --shard, which is one share" if options.shard is not None else "without --shards of 2 or more"
        require_unused(options, ("cluster", "cluster_options"), without)
    if not options.cluster:
        require_unused(options, ("cluster_options",), "without --cluster")
    if (
        options.shards > 1
        and options.shard is None
        and options.device.startswith("cuda:")
        and options.device != "cuda:0"
    ):
        raise UserError("--shards gives each of its processes a GPU of its own; let --device be auto, cuda or cpu.")


def require_student(path: str) -> None:
    """Raise UserError if the run folder or checkpoint of a student does not exist."""
    require_file(path, "run folder or checkpoint", "give one made by misa train or misa export")


def require_data(path: str) -> None:
    """Raise UserError if the data folder or file does not exist; "" is not checked."""
    if path:
        require_there(Path(path).expanduser())


# Declarations of options, to be called for each command that has them.
row = partial(argument, "row to train, as table:name or path/to/file.py:name")
run_folder = partial(argument, "run folder made by misa train", default="runs/demo-long-seed0")
data_root = partial(option, "datasets", "data (formats: docs/data.md), or where to write the embedded data")
other_data = partial(option, "", "another data folder with the same classes (default: the run's own)")
moved_data = partial(option, "", "place of the data (default: a finished run's own; datasets to train)")
seed = partial(option, 0, "random seed of weights, order and augmentation", low=0, high=2**32 - 1)
epochs = partial(option, None, "number of epochs (default: the row's)", low=1)
gpus = partial(option, None, "number of GPUs, 0 for the CPU (default: one if there is one)", low=0, high=64)
per_gpu = partial(option, None, "micro-batch per GPU, accumulated to the batch (default: off)", low=1)
precision = partial(option, "", "float32, bfloat16 or float16 (default: the row's precision)")
workers = partial(option, 0, "data-loading worker processes", low=0, high=64)
threads = partial(option, 1, "torch threads on the CPU", low=1, high=256)
smoke = partial(option, False, "smoke test: two training steps on small images")
channel = partial(option, 5, "feature channel to show", low=0)
shards = partial(
    option, 1, "number of processes that share the images, each on a GPU of its own if there are any", low=1
)
shard = partial(option, None, "do one share only, from 0, such as $SLURM_ARRAY_TASK_ID (default: start all)", low=0)
cluster = partial(option, "", "submit the shares through submitit instead, such as to slurm")
cluster_options = partial(option, "", "submitit's: timeout_min=60,gpus_per_node=1 (minutes of one share)")


def start_shards(command: str, options: Any, folder: Path) -> None:
    """Run all shards of a command that takes `shards`, `shard`, `cluster` and `cluster_options`; logs go to `folder`.

    The caller then merges their results. UserError: a shard has failed.
    """
    from misa.engine.prediction.shares import Tally
    from misa.engine.sweeps.sweep import spread

    words = {
        f"{k}-of-{options.shards}": replace(options, shard=k, cluster="", cluster_options="").command_line()
        for k in range(options.shards)
    }
    commands = {name: [sys.executable, "-m", "misa", command, *own] for name, own in words.items()}
    how = {"cluster": options.cluster, "cluster_options": options.cluster_options}
    spread(commands, folder / "shards", slots=options.shards, note=Tally(folder), **how)
