"""Train a row, score it, and leave a run folder.

The same command again resumes an interrupted training, or shows the finished run. Rows of photographs learn from a
folder of yours, given with --data-root. COCO layout means annotations/instances_train2017.json and
instances_val2017.json, and their images in train2017/ and val2017/; docs/data.md shows the other formats.

example: misa train demo:misa
example: misa train photos:box --data-root mydata
"""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa.commands import _shared as shared
from misa.data.formats.coco import EVERY_FORMAT
from misa.engine.runs.places import default_folder
from misa.engine.runs.record import require_own
from misa.errors import UserError, counted, option_name
from misa.experiment import Experiment, Schedule
from misa.files import shorter
from misa.machine import Machine, expected_processes, is_main_process, logger_names, split_batch
from misa.parameters import Parameters, option
from misa.rows import find_row, lineage

if TYPE_CHECKING:
    from misa.engine.runs.folder import Run


class Train(Parameters):
    """Options of `misa train`, parameters of `notebooks/train.ipynb`."""

    row: str = shared.row(default="demo:misa")
    data_root: str = shared.data_root()
    work_dir: str = option("", "run folder (default: runs/<row>-seed<seed>)")
    start: str = option("", "run folder or checkpoint to begin with; {seed} is the run's (default: the row's)")
    seed: int = shared.seed()
    epochs: int | None = shared.epochs()
    batch: int | None = option(None, "batch size over all GPUs (default: the row's)", low=1)
    gpus: int | None = shared.gpus()
    per_gpu: int | None = shared.per_gpu()
    scale_lr: bool = option(True, "with another batch size, scale the learning rate linearly")
    precision: shared.Precision = shared.precision()
    loggers: str = option("", "loggers beside TensorBoard: wandb, mlflow, or both with a comma between")
    workers: int = shared.workers()
    threads: int = shared.threads()
    resume: bool = option(True, "resume from the last checkpoint of the run folder")
    smoke: bool = shared.smoke()
    lineage: str = option(
        "", "train only if the row and those that it learns from have this hash, as misa tables planned", only="command"
    )
    interactive: bool = option(True, "a live curve and masks in place of log lines", only="notebook")

    @property
    def machine(self) -> Machine:
        """Devices, processes and loggers; UserError for a logger that is unknown or not installed."""
        return Machine(
            gpus=self.gpus,
            per_gpu=self.per_gpu,
            workers=self.workers,
            threads=self.threads,
            interactive=self.interactive,
            loggers=logger_names(self.loggers),
        )


def run(options: Train) -> int:
    """Train; only the main process prints."""
    trained = train_with(options)
    if is_main_process():
        print(trained.table())
        print(f"run folder: {trained.folder}")
        print(next_step(trained), end="")
    return 0


def next_step(trained: "Run") -> str:
    """Returns the commands that use a trained run, as a line; "" for a smoke run, whose results mean nothing."""
    if trained.experiment.limit is not None:
        return ""
    place = shlex.quote(shorter(trained.folder))
    uses = [f"misa {command} {place}" for command in ("evaluate", "figures")]
    if trained.experiment.semantic is None:
        # Errors are found by comparison with true masks.
        uses = [f"misa inspect {place} (its errors)"] * trained.source.masks
        uses += [f"misa predict {place} photos --out results", f"misa export {place} student.pth"]
    return f"now: {', '.join(uses)}\n"


def experiment_of(options: Train) -> Experiment:
    """Returns the named row with the changes of the options."""
    experiment = find_row(options.row)
    if options.start:
        experiment = experiment.but(start=options.start)
    if options.smoke:
        experiment = experiment.smoke()
    schedule: dict[str, Any] = {
        name: value for name in ("epochs", "batch") if (value := getattr(options, name)) is not None
    }
    before = experiment.schedule
    if options.scale_lr and schedule.get("batch", before.batch) != before.batch:
        schedule["lr"] = before.lr * schedule["batch"] / before.batch
    if before.decay == "step" and schedule.get("epochs", before.epochs) != before.epochs:
        share = schedule["epochs"] / before.epochs  # the rate falls at the same shares of the training
        schedule["milestones"] = tuple(
            max(1, min(schedule["epochs"] - 1, round(epoch * share))) for epoch in before.milestones
        )
    if options.precision:
        schedule["precision"] = options.precision
    try:
        return experiment.but(schedule=schedule) if schedule else experiment
    except ValueError as error:
        raise UserError(str(error)) from error


def train_with(options: Train) -> "Run":
    """Train with the options of the notebook or command line; UserError for invalid ones.

    Several GPUs use one process each, started here unless torchrun or SLURM has started this one.
    """
    shared.require_given(options.data_root, option_name("data_root"))
    experiment, folder = experiment_of(options), _folder_of(options)
    if options.lineage and (now := lineage(experiment)) != options.lineage:
        raise UserError(
            f"{options.row}, or a row that it learns from, has changed since this training was planned: its hash is "
            f"{now}, not {options.lineage}; restore it, or give the command that planned it again."
        )
    require_own(folder, {"seed": options.seed, "experiment": experiment.values()})
    if experiment.data != "demo":
        _require_data(options)
    import torch

    from misa.engine.runs.checkpoints import read_checkpoint
    from misa.engine.runs.folder import finished
    from misa.engine.runs.start import start_file
    from misa.engine.training.parallel import launch, leave
    from misa.engine.training.train import require_buildable, train

    if options.smoke:  # it trains a small network in the place of the row's, from scratch
        require_buildable(find_row(options.row))
        if options.start:
            read_checkpoint(start_file(options.start, options.seed))
            print(f"smoke: trained from scratch, {option_name('start')} was only read", flush=True)

    processes = options.gpus or 1
    if processes > 1 and expected_processes() == 1:
        split_batch(experiment.schedule.batch, processes, options.per_gpu)
        if processes > (found := torch.cuda.device_count()):
            raise UserError(
                f"{option_name('gpus')} is {processes}, but torch finds {counted(found, 'CUDA device')}; "
                f"set it to that: {option_name('per_gpu')} keeps the batch by accumulation."
            )
        launch(dataclasses.replace(options, interactive=False).command_line(), processes, threads=options.threads)
        return finished(folder)
    if is_main_process():
        print(*_changes(find_row(options.row).schedule, experiment.schedule), sep="", end="", flush=True)
    try:
        return train(
            experiment,
            data_root=options.data_root,
            work_dir=folder,
            row=options.row,
            seed=options.seed,
            resume=options.resume,
            machine=options.machine,
        )
    finally:
        leave()


def _changes(before: Schedule, now: Schedule) -> list[str]:
    """What changes in the learning rate with another batch or number of epochs than the row's, as lines."""
    lines = []
    if now.lr != before.lr:
        lines.append(
            f"batch {now.batch} in place of the row's: learning rate {now.lr:g} in place of {before.lr:g}, in "
            f"proportion ({option_name('scale_lr', off=True)} keeps it)\n"
        )
    if now.milestones != before.milestones:
        epochs, others = (", ".join(map(str, dict.fromkeys(own.milestones))) for own in (now, before))
        lines.append(
            f"{now.epochs} epochs in place of the row's {before.epochs}: the learning rate falls after epoch {epochs} "
            f"in place of {others}\n"
        )
    return lines


def _require_data(options: Train) -> None:
    """UserError where there is no data; without --data-root it says that this row needs a folder of the user's."""
    if options.data_root != Train.data_root:
        shared.require_data(options.data_root)
        return
    from misa.data.formats.convert import is_there

    if not is_there(Path(options.data_root)):
        raise UserError(
            f"{options.row} learns from a folder of your images and their boxes; give it with "
            f"{option_name('data_root')} ({EVERY_FORMAT})."
        )


def _folder_of(options: Train) -> Path:
    changed: dict[str, Any] = {"epochs": options.epochs, "batch": options.batch}
    changed |= {"start": bool(options.start), options.precision or "precision": bool(options.precision)}
    suffix = "".join(f"-{name}{'' if value is True else value}" for name, value in changed.items() if value)
    default = default_folder(options.row, options.seed, smoke=options.smoke, suffix=suffix)
    return Path(options.work_dir or default).expanduser()
