"""Train a row, score it, and leave a run folder (§4.3)."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.model import is_model_wrapper

from misa.data.source import open_source
from misa.engine.runs.checkpoints import read_checkpoint, tensors_only
from misa.engine.runs.folder import (
    Run,
    _before,
    _hold,
    _require_own_teacher,
    _write_record,
    finished,
)
from misa.engine.runs.places import default_folder, named_student, student_place, student_row, teacher_place
from misa.engine.runs.record import run_params
from misa.engine.runs.scores import _figures, _write_scores
from misa.engine.runs.teacher import load_teacher
from misa.engine.training.config import run_config
from misa.engine.training.labels import prepare_labels
from misa.engine.training.parallel import launch, leave, on_main_process, report_lost_peer
from misa.engine.training.preemption import restored_signal
from misa.engine.training.runner import choose_device, quiet_runner
from misa.engine.training.watch import NaNGuard
from misa.errors import Diverged, UserError
from misa.experiment import Experiment
from misa.machine import expected_processes, is_main_process, logger_names, split_batch
from misa.models.backbones import backbone_row
from misa.parameters import TrainParameters
from misa.rows import find_row, teacher_row


def experiment_of(parameters: TrainParameters) -> Experiment:
    """The row that the parameters name, with what they change."""
    experiment = find_row(parameters.row)
    if parameters.smoke:
        experiment = experiment.smoke()
    schedule: dict[str, Any] = {
        name: value for name in ("epochs", "batch") if (value := getattr(parameters, name)) is not None
    }
    before = experiment.schedule
    if parameters.scale_lr and schedule.get("batch", before.batch) != before.batch:
        schedule["lr"] = before.lr * schedule["batch"] / before.batch
    if parameters.precision:
        schedule["precision"] = parameters.precision
    try:
        return experiment.but(schedule=schedule) if schedule else experiment
    except ValueError as error:
        raise UserError(str(error)) from error


def train_from(parameters: TrainParameters) -> Run:
    """`train` with the notebook's and the command line's parameters; UserError for wrong ones.

    More than one GPU means as many processes, started here unless torchrun or SLURM has started this one.
    """
    experiment, folder = experiment_of(parameters), _folder_of(parameters)
    processes = parameters.gpus or 1
    if processes > 1 and expected_processes() == 1:
        split_batch(experiment.schedule.batch, processes, parameters.per_gpu)
        if processes > torch.cuda.device_count():
            raise UserError(
                f"gpus is {processes}, but torch finds {torch.cuda.device_count()} CUDA devices; set gpus to "
                "that: per_gpu keeps the batch by accumulation."
            )
        launch(parameters, processes)
        return finished(folder)
    before = find_row(parameters.row).schedule
    if experiment.schedule.lr != before.lr and is_main_process():
        print(
            f"batch {experiment.schedule.batch} in place of the row's: learning rate {experiment.schedule.lr:g} in "
            f"place of {before.lr:g}, in proportion (scale_lr=False keeps it)",
            flush=True,
        )
    try:
        return train(
            experiment,
            data_root=parameters.data_root,
            work_dir=folder,
            row=parameters.row,
            seed=parameters.seed,
            gpus=parameters.gpus,
            per_gpu=parameters.per_gpu,
            workers=parameters.workers,
            threads=parameters.threads,
            resume=parameters.resume,
            interactive=parameters.interactive,
            loggers=logger_names(parameters.loggers),
        )
    finally:
        leave()


def _folder_of(parameters: TrainParameters) -> Path:
    changed: dict[str, Any] = {"smoke": parameters.smoke, "epochs": parameters.epochs, "batch": parameters.batch}
    changed |= {parameters.precision or "precision": bool(parameters.precision)}
    suffix = "".join(f"-{name}{'' if value is True else value}" for name, value in changed.items() if value)
    return Path(parameters.work_dir or default_folder(parameters.row, parameters.seed, suffix=suffix))


def train(
    experiment: Experiment,
    *,
    data_root: str | Path,
    work_dir: str | Path,
    row: str = "custom",
    seed: int = 0,
    gpus: int | None = None,
    per_gpu: int | None = None,
    workers: int = 0,
    threads: int = 1,
    resume: bool = True,
    interactive: bool = False,
    loggers: tuple[str, ...] = (),
) -> Run:
    """Train and evaluate; the same call again resumes where it was stopped or returns the finished run.

    Called in each of several processes that torchrun or SLURM started, they train together: each takes its part of
    every batch, the first one writes.

    Args:
        experiment: what to train.
        data_root: a COCO-layout folder; for data="demo" the folder that the embedded data goes into.
        work_dir: the run folder; it must be new, or this very run's.
        row: the row's name in the experiments folder, for the record.
        seed: of weights, order and augmentation.
        gpus: 0 for the CPU, more for GPUs, one a process; None: a GPU if there is one.
        per_gpu: images that a process sees at a time; its part of the batch is accumulated from these. None: all of it.
        workers: processes that load images; the result does not depend on it.
        threads: of torch on the CPU. Two busy threads on two busy cores are many times slower than one.
        resume: go on from the last checkpoint; off: a folder with checkpoints is an error.
        interactive: progress bars instead of lines.
        loggers: "wandb", "mlflow", beside TensorBoard.

    Raises:
        UserError: wrong input, before any long work and with nothing overwritten.
        Stopped: by SIGTERM, or another process has ended; the same call goes on.
    """
    backbone_row(experiment.network.backbone)  # a misspelt one is known before a teacher is trained
    device = choose_device(gpus, threads)
    if experiment.schedule.precision == "float16" and device == "cpu":
        raise UserError("float16 needs a GPU, its gradients vanish or overflow on a CPU; choose bfloat16 or float32.")
    split = split_batch(experiment.schedule.batch, get_world_size(), per_gpu)
    folder = Path(work_dir).expanduser().resolve()
    with report_lost_peer(), restored_signal(), contextlib.ExitStack() as stack:
        on_main_process(lambda: _hold(folder, stack))
        source = on_main_process(lambda: open_source(experiment, data_root))
        if source.images < experiment.schedule.batch:
            raise UserError(
                f"a batch takes {experiment.schedule.batch} images and {source.train.annotations} has "
                f"{source.images}; set batch to {source.images} or less."
            )
        params = run_params(experiment, row=row, seed=seed, data_root=source.root, classes=source.classes)
        metrics, checkpoint = on_main_process(lambda: _before(folder, params, resume))
        if metrics is None:
            if checkpoint is not None:
                read_checkpoint(checkpoint)  # the folder may be a stranger's: said in a sentence, before any work
            # What it learns from comes first: the same data and seed, in folders of their own beside this one.
            before = partial(
                train,
                data_root=data_root,
                seed=seed,
                gpus=gpus,
                per_gpu=per_gpu,
                workers=workers,
                threads=threads,
                interactive=interactive,
                loggers=loggers,
            )
            teacher, labelled_by = None, named_student(experiment)
            if experiment.teacher:
                place = teacher_place(experiment, seed, folder.parent, data_root=source.root)
                on_main_process(lambda: _require_own_teacher(place, source))
                trained = before(teacher_row(experiment), work_dir=place, row=experiment.teacher)
                teacher = load_teacher(trained.folder, classes=source.classes)
            elif (named := student_row(experiment)) is not None:
                place = student_place(*named, seed, folder.parent, data_root=source.root)
                labelled_by = before(named[1], work_dir=place, row=named[0]).folder
            labels = partial(prepare_labels, experiment, source, folder, workers=workers)
            on_main_process(lambda: labels(student=labelled_by))
            config = run_config(
                experiment,
                source,
                folder=folder,
                seed=seed,
                workers=workers,
                checkpoint=checkpoint,
                interactive=interactive,
                split=split,
                loggers=loggers,
            )
            runner = quiet_runner(config)
            if teacher is not None:
                student = runner.model.module if is_model_wrapper(runner.model) else runner.model
                student.attach(teacher)
            on_main_process(lambda: _write_record(folder, params, config, device if checkpoint is None else None))
            try:
                with tensors_only():
                    runner.train()
            except Diverged as error:
                guard = next(hook for hook in runner.hooks if isinstance(hook, NaNGuard))
                raise guard.explain(error) from error
            runner.test()
            metrics = on_main_process(lambda: _write_scores(experiment, source, folder, params))
            runner.visualizer.add_scalars(
                {f"{name}/{key}": value for name, key, value in _figures(metrics)}, step=runner.max_iters
            )
            runner.visualizer.close()
        elif is_main_process():
            print(f"{folder.name} is finished; nothing to train. Choose another work_dir to train again.")
    return Run(experiment, folder, source, metrics)
