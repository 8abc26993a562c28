"""Options shared by several commands, each declared once with its help and range, and checks of their values."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from misa.data.formats.coco import require_there
from misa.engine.runs.record import read_params
from misa.errors import UserError, option_name
from misa.files import missing
from misa.parameters import argument, option
from misa.rows import find_row

Precision = Literal["", "float32", "bfloat16", "float16"]


def require_row(name: str) -> None:
    """Raise UserError if there is no such row; this and the next checks run before torch is imported, which is slow."""
    find_row(name)


def require_run(folder: str) -> None:
    """Raise UserError if there is no such run folder."""
    read_params(Path(folder).expanduser())


def require_file(path: str, what: str, advice: str) -> None:
    """Raise UserError if there is no such file or folder; `what` names it in the message."""
    if not os.path.exists(place := Path(path).expanduser()):
        raise UserError(missing(place, what, advice))


def require_folder(path: str, name: str) -> None:
    """Raise UserError if the folder to write into, or one above it, is a file; `name` is its option, "" is unchecked.

    Checked before the work whose result is written there.
    """
    place = Path(path).expanduser()
    if path and (file := next((p for p in (place, *place.parents) if os.path.isfile(p)), None)):
        raise UserError(f"{option_name(name)} is a folder; {file} is a file.")


def require_student(path: str) -> None:
    """Raise UserError if the run folder or checkpoint of a student does not exist."""
    require_file(path, "run folder or checkpoint", "give one made by misa train or misa export")


def require_data(path: str) -> None:
    """Raise UserError if the data folder or file does not exist; "" is not checked."""
    if path:
        require_there(Path(path).expanduser())


def row(default: str, *, optional: bool = False) -> Any:
    """A row of the tables."""
    return argument("row to train, as table:name or path/to/file.py:name", default=default, optional=optional)


def run_folder() -> Any:
    """The run folder of a student or a teacher."""
    return argument("run folder made by misa train", default="runs/demo-misa-seed0")


def data_root() -> Any:
    """The data set."""
    return option("datasets", "data (formats: docs/data.md), or where to write the embedded data")


def other_data() -> Any:
    """The data of a run, or other data with the same classes."""
    return option("", "another data folder with the same class names (default: the run's own)")


def seed() -> Any:
    """The random seed."""
    return option(0, "random seed of weights, order and augmentation", low=0, high=2**32 - 1)


def epochs() -> Any:
    """The length of the training."""
    return option(None, "number of epochs (default: the row's)", low=1)


def gpus(high: int = 64) -> Any:
    """The number of GPUs."""
    return option(None, "number of GPUs, 0 for the CPU (default: one if there is one)", low=0, high=high)


def per_gpu() -> Any:
    """The micro-batch, for gradient accumulation."""
    text = "micro-batch per GPU, accumulated to the batch (default: off)"
    return option(None, text, low=1)


def precision() -> Any:
    """Automatic mixed precision."""
    return option("", "float32, bfloat16 or float16 (default: the row's precision)")


def workers() -> Any:
    """Processes of the data loader."""
    return option(0, "data-loading worker processes", low=0, high=64)


def shards() -> Any:
    """The number of processes that share the images."""
    return option(1, "number of processes that share the images, each on a GPU of its own if there are any", low=1)


def shard() -> Any:
    """The index of this process among the shards."""
    return option(None, "do one share only, from 0, such as $SLURM_ARRAY_TASK_ID (default: start all)", low=0)


def cluster() -> Any:
    """The cluster to submit jobs to."""
    return option("", "submit the shares through submitit instead, such as to slurm")


def cluster_options() -> Any:
    """Resources of a cluster job."""
    return option("", "submitit's: timeout_min=60,gpus_per_node=1 (minutes of one share)")


def start_shards(command: str, options: Any, folder: Path) -> None:
    """Run all shards of a command that takes `shards`, `shard`, `cluster` and `cluster_options`; logs go to `folder`.

    The caller then merges their results. UserError: a shard has failed.
    """
    from misa.engine.training.sweep import spread

    words = {
        f"{k}-of-{options.shards}": replace(options, shard=k, cluster="", cluster_options="").command_line()
        for k in range(options.shards)
    }
    commands = {name: [sys.executable, "-m", "misa", command, *own] for name, own in words.items()}
    how = {"cluster": options.cluster, "cluster_options": options.cluster_options}
    spread(commands, folder / "shards", slots=options.shards, **how)


def threads() -> Any:
    """The number of CPU threads."""
    return option(1, "torch threads on the CPU", low=1, high=256)


def smoke() -> Any:
    """A smoke run."""
    return option(False, "smoke test: two training steps on small images")


def channel() -> Any:
    """The feature channel in Figure 3 and the frequency notebook."""
    return option(5, "feature channel to show", low=0)
