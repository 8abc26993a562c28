"""The parameters of the notebooks: names, types and ranges, checked before anything long begins.

papermill only warns of a parameter that a notebook does not declare and runs on with the defaults, so every
notebook's second cell hands its names to the `read` of its own class, which does not forgive a typo.
"""

import argparse
import ast
import dataclasses
import os
import types
import typing
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from misa.errors import UserError, did_you_mean
from misa.machine import Machine, logger_names

# What IPython itself puts into a notebook's namespace.
_IPYTHON = {"In", "Out", "get_ipython", "exit", "quit", "open"}


def between(default: Any, low: float, high: float | None = None) -> Any:
    """A field with a default and limits, both allowed."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


def at_least(low: int) -> Callable[[str], int]:
    """A whole number of the command line, with its least value; argparse turns the error into a sentence."""

    def read(text: str) -> int:
        if not text.strip().removeprefix("-").isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} on")
        return int(text)

    return read


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What a notebook takes, a field each; a class per notebook."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and float in (typing.get_args(hints[field.name]) or (hints[field.name],)):
                value = float(value)  # `-p radius 7` arrives as a whole number
                object.__setattr__(self, field.name, value)
            _check(field.name, value, hints[field.name], field.metadata)

    @classmethod
    def read(cls, namespace: MutableMapping[str, Any]) -> Self:
        """The parameters of a notebook's namespace (`globals()`); UserError for any name that is not declared.

        At the first call every name counts. Later, when the notebook's own cells have made names of theirs, those
        count that stand beside a parameter in a cell, as in the cell at the top that was changed and run again.
        Relative paths then start at the project's folder, also in JupyterLab, which starts a notebook in its own
        (this changes the working directory).
        """
        names = [field.name for field in dataclasses.fields(cls)]
        there = {
            name
            for name, value in namespace.items()
            if not name.startswith("_")
            and name not in _IPYTHON
            and not isinstance(value, types.ModuleType | type | types.FunctionType)
        }
        first = "_cells_read" not in namespace
        cells = [str(cell) for cell in namespace.get("In", [])]
        seen = 0 if first else namespace["_cells_read"]
        namespace["_cells_read"] = len(cells)
        beside = set().union(
            *(assigned for cell in cells[seen:] if not (assigned := _assigned(cell)).isdisjoint(names))
        )
        for name in sorted((there if first else there & beside) - set(names)):
            hint = did_you_mean(name, names) or f"; the parameters are {', '.join(names)}."
            raise UserError(f"there is no parameter {name}{hint}")
        _leave_notebook_folder()
        return cls(**{name: namespace[name] for name in names if name in namespace})


def _assigned(cell: str) -> set[str]:
    """The names that a cell gives a plain value at its top level; none where it is no plain Python."""
    try:
        tree = ast.parse(cell)
    except SyntaxError:
        return set()
    found: set[str] = set()
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@dataclass(frozen=True, kw_only=True)
class TrainParameters(Parameters):
    """What `notebooks/train.ipynb` and `misa train` take; None means: as the row says.

    row: file and name of the experiment, as in experiments/demo.py.
    data_root: a COCO-layout folder; for the embedded data, the folder to write it into.
    work_dir: the run folder; empty: runs/<row>-seed<seed>.
    seed: of weights, order and augmentation.
    epochs, batch: in place of the row's; batch is over all GPUs.
    gpus: 0 for the CPU, more for as many GPUs; None: a GPU if there is one.
    per_gpu: images that a GPU sees at a time; the batch is accumulated from these. None: its whole part.
    scale_lr: with another batch, the learning rate in proportion.
    precision: of the networks, float32, bfloat16 or float16; empty: as the row says.
    loggers: wandb, mlflow or both ("wandb,mlflow"), beside TensorBoard.
    workers: processes that load images.
    threads: of torch on the CPU.
    resume: go on from the last checkpoint of work_dir.
    smoke: two steps on small images, to see that a row runs.
    interactive: a progress bar instead of plain lines.
    """

    row: str = "demo:box"
    data_root: str = "datasets"
    work_dir: str = ""
    seed: int = between(0, 0, 2**32 - 1)
    epochs: int | None = between(None, 1)
    batch: int | None = between(None, 1)
    gpus: int | None = between(None, 0, 64)
    per_gpu: int | None = between(None, 1)
    scale_lr: bool = True
    precision: str = ""
    loggers: str = ""
    workers: int = between(0, 0, 64)
    threads: int = between(1, 1, 256)
    resume: bool = True
    smoke: bool = False
    interactive: bool = False

    @property
    def machine(self) -> Machine:
        """What they say of the machine; UserError for a logger that is unknown or not installed."""
        return Machine(
            gpus=self.gpus,
            per_gpu=self.per_gpu,
            workers=self.workers,
            threads=self.threads,
            interactive=self.interactive,
            loggers=logger_names(self.loggers),
        )


@dataclass(frozen=True, kw_only=True)
class AffinityParameters(Parameters):
    """What `notebooks/affinity.ipynb` takes.

    run: run folder of a student with a teacher, or of a teacher; where there is none, teacher:demo is trained once.
    data_root: where the embedded data goes.
    local_bandwidth, tree_bandwidth: of the color affinity in windows and along the tree; APro's.
    semantic_scale: how many σ of S make the bandwidth of A^f and A^c.
    balance: of A^c against A; form: how the two are joined, the "sum" of Eq. 13 or the "product".
    steps: of the propagation in windows.
    threads: of torch on the CPU.
    image: a photograph of your own, explored like the others; boxes: its objects', "x1 y1 x2 y2 label" with ; between.
    teacher: what sees it, a run or such as "torchvision:deeplabv3_resnet50"; empty: its colors alone.
    smoke: a teacher of two training steps, to see that everything runs.
    interactive: the live panel as well, below the figures that are stored.
    """

    run: str = "runs/demo-misa-seed0"
    data_root: str = "datasets"
    local_bandwidth: float = between(0.15, 1e-3, 10)
    tree_bandwidth: float = between(0.01, 1e-3, 10)
    semantic_scale: float = between(8.0, 1e-2, 100)
    balance: float = between(0.7, 0, 10)
    form: str = "sum"
    steps: int = between(20, 0, 1000)
    threads: int = between(1, 1, 256)
    image: str = ""
    boxes: str = ""
    teacher: str = ""
    smoke: bool = False
    interactive: bool = True


@dataclass(frozen=True, kw_only=True)
class FrequencyParameters(Parameters):
    """What `notebooks/frequency.ipynb` takes.

    run: run folder of a student with a teacher; where there is none, demo:misa is trained once.
    data_root: where the embedded data goes.
    place: of the image among the validation images, from 0.
    channel: of the features that is shown.
    radius, scale: t, in bins of the feature map, and θ of Eq. 4; the defaults are those of demo:misa.
    threads: of torch on the CPU.
    image: a photograph of your own, explored like the others; boxes: its objects', "x1 y1 x2 y2 label" with ; between.
    teacher: what sees it, a run or such as "torchvision:deeplabv3_resnet50"; empty: its colors alone.
    smoke: networks of two training steps, to see that everything runs.
    interactive: the live panel as well, below the figures that are stored.
    """

    run: str = "runs/demo-misa-seed0"
    data_root: str = "datasets"
    place: int = between(0, 0)
    channel: int = between(5, 0)
    radius: float = between(1.5, 0)
    scale: float = between(0.2, 0, 1)
    threads: int = between(1, 1, 256)
    image: str = ""
    boxes: str = ""
    teacher: str = ""
    smoke: bool = False
    interactive: bool = True


@dataclass(frozen=True, kw_only=True)
class TablesParameters(Parameters):
    """What `notebooks/tables.ipynb` takes.

    table: 3, 4 or 5; data: "demo", "voc", "coco_mini" or "photos"; seeds: trainings of every row, from seed 0.
    train: train what is missing; off: show what is there and what is missing.
    slots: trainings at a time on this machine; cluster: submit them through submitit instead, such as "slurm".
    cluster_options: submitit's parameters with commas between; timeout_min, the minutes of one training, is needed.
    data_root, gpus, workers, threads: of every training, as in `TrainParameters`.
    root: where the runs are.
    smoke: two steps a training, to see that the rows run.
    """

    table: int = between(3, 3, 5)
    data: str = "demo"
    seeds: int = between(5, 1, 1000)
    train: bool = False
    slots: int = between(1, 1, 1024)
    cluster: str = ""
    cluster_options: str = ""
    data_root: str = "datasets"
    root: str = "runs/tables"
    gpus: int | None = between(None, 0)
    workers: int = between(0, 0, 64)
    threads: int = between(1, 1, 256)
    smoke: bool = False

    def table_options(self) -> dict[str, Any]:
        """The arguments of `misa.engine.reports.tables.open_table`."""
        return {name: getattr(self, name) for name in ("table", "data", "seeds", "root", "smoke")}

    def sweep_options(self) -> dict[str, Any]:
        """The arguments of `misa.engine.training.sweep.run` beside the jobs."""
        names = ("slots", "cluster", "cluster_options", "data_root")
        machine = Machine(gpus=self.gpus, workers=self.workers, threads=self.threads)
        return {name: getattr(self, name) for name in names} | {"machine": machine}


@dataclass(frozen=True, kw_only=True)
class FiguresParameters(Parameters):
    """What `notebooks/figures.ipynb` and `misa figures` take.

    runs: run folders with commas between; the teachers beside students are found.
    out: the folder that the figures go into; empty: one of the run's own in runs/figures.
    only: which of Figures 1, 3, 4 and 5, with commas between.
    images: ids of validation images with commas between, to be shown in any case.
    random: how many more are drawn by chance, from `seed`.
    worst: how many of the student's worst images Figure 5 adds.
    channel: of the features in Figure 3.
    semantic_scale: how many σ of S make the bandwidth of A^f and A^c in Figure 4; 0: as the run was trained.
    form: "sum" or "product" of SEPA in Figure 4; empty: as the run was trained.
    data_root: where the embedded data goes, if demo:misa has to be trained first (the notebook only).
    smoke: with networks of two training steps, to see that everything runs (the notebook only).
    """

    runs: str = "runs/demo-misa-seed0"
    out: str = ""
    only: str = "1,3,4,5"
    images: str = ""
    random: int = between(5, 1, 100)
    worst: int = between(10, 0, 100)
    seed: int = between(0, 0, 2**32 - 1)
    channel: int = between(5, 0)
    semantic_scale: float = between(0.0, 0, 100)
    form: str = ""
    data_root: str = "datasets"
    smoke: bool = False


@dataclass(frozen=True, kw_only=True)
class OwnDataParameters(Parameters):
    """What `notebooks/own_data.ipynb` takes.

    data: folder of images and boxes (COCO layout, Pascal VOC xml, or csv); empty: an example is drawn below `out`.
    out: where everything that is made goes.
    row: what to train, file and name of an experiment.
    photos: images, or a folder of them, to predict on; empty: those of `data` that were held out.
    score: least score of an instance that is shown.
    epochs: in place of the row's.
    seed, threads: of the training.
    smoke: two training steps on small images, to see that everything runs.
    """

    data: str = ""
    out: str = "runs/own_data"
    row: str = "own:small"
    photos: str = ""
    score: float = between(0.3, 0, 1)
    epochs: int | None = between(None, 1)
    seed: int = between(0, 0, 2**32 - 1)
    threads: int = between(1, 1, 256)
    smoke: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluateParameters(Parameters):
    """What `notebooks/evaluate.ipynb` takes.

    run: a student's run folder, made by misa train.
    checkpoint: one of its checkpoints; empty: the last.
    data_root: other data to score on, with the same class names; empty: the run's own.
    boundary: boundary AP as well, which needs the package faster-coco-eval.
    test_dev: a new folder for COCO test-dev results of the run; empty: none. data_root is then COCO's.
    gpus: 0 for the CPU, 1 for a GPU; None: a GPU if there is one.
    workers: processes that load images.
    threads: of torch on the CPU.
    """

    run: str = "runs/demo-misa-seed0"
    checkpoint: str = ""
    data_root: str = ""
    boundary: bool = False
    test_dev: str = ""
    gpus: int | None = between(None, 0, 1)
    workers: int = between(0, 0, 64)
    threads: int = between(1, 1, 256)

    @property
    def machine(self) -> Machine:
        """What they say of the machine."""
        return Machine(gpus=self.gpus, workers=self.workers, threads=self.threads)


def _leave_notebook_folder() -> None:
    """JupyterLab starts a notebook in its own folder, papermill in the project's: relative paths should agree."""
    here = Path.cwd()
    if here.name == "notebooks" and (here.parent / "experiments").is_dir():
        os.chdir(here.parent)


def _check(name: str, value: Any, hint: Any, limits: Mapping[str, float]) -> None:
    allowed = typing.get_args(hint) or (hint,)
    # bool is an int to Python; as a parameter it is a mistake.
    fits = any(type(value) is kind for kind in allowed)
    if not fits:
        kinds = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
        cure = "; write True or False" if bool in allowed else ""
        raise UserError(f"parameter {name} must be {kinds}, not {value!r} ({type(value).__name__}){cure}.")
    if value is None or isinstance(value, bool | str):
        return
    low, high = limits.get("low"), limits.get("high")
    # Written so that NaN, which compares with nothing, is out of every range.
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UserError(f"parameter {name} must be {bounds}, not {value}.")
