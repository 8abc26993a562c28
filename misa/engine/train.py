"""Train a row, score it, and leave a run folder (§4.3)."""

import contextlib
import io
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mmengine.device.utils
import torch
from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from misa.data.source import Source, open_source
from misa.engine.checkpoints import newest, read_checkpoint, tensors_only
from misa.engine.config import DETECTIONS, loadable, run_config
from misa.engine.health import NaNGuard
from misa.engine.labels import prepare_labels
from misa.engine.loggers import logger_names
from misa.engine.parallel import (
    expected_processes,
    from_first,
    is_first,
    join,
    launch,
    leave,
    share_batch,
    told_when_lost,
)
from misa.engine.preemption import restored_signal
from misa.engine.record import environment, held, read_json, read_params, require_own, run_params, write_json
from misa.engine.rows import find_row, lineage, teacher_row
from misa.engine.teacher import LABEL_MAPS, load_teacher, score_label_maps
from misa.errors import Diverged, UserError
from misa.evaluation.ap import score
from misa.experiment import Experiment
from misa.models.backbones import backbone_row
from misa.parameters import TrainParameters

_RUNNERS = itertools.count(1)


@dataclass(frozen=True)
class Run:
    """A scored run: what was trained, its folder, the data it was scored on, and its metrics in percent."""

    experiment: Experiment
    folder: Path
    source: Source
    metrics: dict[str, Any]

    def scores(self) -> dict[str, dict[str, float | None]]:
        """A student's mask AP, also as full rectangles and with all classes taken for one; a teacher's IoU a class.

        Where the validation data has no masks, the AP of the boxes around the predicted ones.
        """
        if "bbox" in self.metrics:
            return {"boxes": self.metrics["bbox"]}
        if "segm" not in self.metrics:
            return {"IoU": iou_figures(self.metrics)}
        rows = {"masks": self.metrics["segm"], "as rectangles": self.metrics["segm_as_rectangles"]}
        rows |= {"any class": self.metrics["segm_any_class"]} if "segm_any_class" in self.metrics else {}
        return rows | ({"boundaries": self.metrics["boundary"]} if "boundary" in self.metrics else {})

    def leading(self) -> dict[str, float | None]:
        """The first of the scores."""
        return next(iter(self.scores().values()))

    def table(self) -> str:
        """The scores as text, with the IoU of a student's merged instances where it was asked for."""
        tables = [] if self.metrics.keys().isdisjoint(("segm", "bbox")) else [score_table(self.scores())]
        if "per_class" in self.metrics:
            tables.append(score_table(self.metrics["per_class"]))
        if "miou" in self.metrics:
            # A line a class: there may be eighty.
            name = "merged IoU" if tables else "IoU"
            tables.append(score_table({label: {name: value} for label, value in iou_figures(self.metrics).items()}))
        return "\n\n".join(tables)


def iou_figures(metrics: dict[str, Any]) -> dict[str, float | None]:
    """The mean IoU and that of each class, None where the data has none of it."""
    return {"mean": metrics["miou"], **metrics["iou"]}


def score_table(scores: Mapping[str, Mapping[str, float | None]]) -> str:
    """Rows of figures as plain text; a dash where the data has nothing to measure one on."""
    names = list(next(iter(scores.values())))
    width, margin = max(7, 1 + max(map(len, names))), max(16, 1 + max(map(len, scores)))
    lines = [" " * margin + "".join(f"{name:>{width}}" for name in names)]
    for label, values in scores.items():
        cells = ("-" if (value := values[name]) is None else f"{value:.1f}" for name in names)
        lines.append(f"{label:<{margin}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


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
        share_batch(experiment.schedule.batch, processes, parameters.per_gpu)
        if processes > torch.cuda.device_count():
            raise UserError(
                f"gpus is {processes}, but torch finds {torch.cuda.device_count()} CUDA devices; set gpus to "
                "that: per_gpu keeps the batch by accumulation."
            )
        launch(parameters, processes)
        return finished(folder)
    before = find_row(parameters.row).schedule
    if experiment.schedule.lr != before.lr and is_first():
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


def finished(folder: str | Path) -> Run:
    """The run that a folder holds, as `train` returned it; UserError where it has not been scored."""
    experiment, source, folder, _ = opened(folder)
    metrics = read_json(folder / "metrics.json")
    if metrics is None:
        raise UserError(f"{folder} has no metrics.json: its training has not ended; train it on.")
    return Run(experiment, folder, source, metrics)


def default_folder(row: str, seed: int, *, suffix: str = "") -> Path:
    """Where a row is trained unless a work_dir is given."""
    table, _, name = row.rpartition(":")
    return Path(f"runs/{Path(table).stem}-{name}-seed{seed}{suffix}")


def teacher_folder(experiment: Experiment, seed: int) -> str:
    """The name of the run folder of a student's teacher: the same for every student that learns from it."""
    table, _, name = experiment.teacher.rpartition(":")
    return f"{Path(table).stem}-{name}-{lineage(teacher_row(experiment))}-seed{seed}"


def teacher_place(experiment: Experiment, seed: int, beside: Path, *, data_root: object = None) -> Path:
    """Where a student's teacher is, or will be: a folder of its own, or the default one if it was trained alone.

    Only on the same data, where `data_root` says which.
    """
    alone = beside / default_folder(experiment.teacher, seed).name
    if (alone / "metrics.json").exists():
        params = read_params(alone)
        same = data_root is None or params["data_root"] == str(data_root)
        if same and (params["digest"], params["seed"]) == (teacher_row(experiment).digest(), seed):
            return alone
    return beside / teacher_folder(experiment, seed)


def _require_own_teacher(place: Path, source: Source) -> None:
    """The user never named the folder of a teacher, so the cure is to move the student's."""
    params = read_json(place / "params.json")
    if params is not None and params["data_root"] != str(source.root):
        raise UserError(
            f"the teacher beside this work_dir, {place}, learned from {params['data_root']}, and the student is to "
            f"learn from {source.root}; choose a work_dir in another folder, where a teacher of its own is trained."
        )


def _student_folder(experiment: Experiment, seed: int) -> Path | None:
    """The trained student that a teacher's labels come from: a run folder as named, or the default one of a row."""
    name = experiment.semantic.student if experiment.semantic else ""
    if not name:
        return None
    return default_folder(name, seed) if ":" in name and not Path(name).is_dir() else Path(name).expanduser()


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
    sharing = share_batch(experiment.schedule.batch, get_world_size(), per_gpu)
    folder = Path(work_dir).expanduser().resolve()
    with told_when_lost(), restored_signal(), contextlib.ExitStack() as stack:
        from_first(lambda: _hold(folder, stack))
        source = from_first(lambda: open_source(experiment, data_root))
        if source.images < experiment.schedule.batch:
            raise UserError(
                f"a batch takes {experiment.schedule.batch} images and {source.train.annotations} has "
                f"{source.images}; set batch to {source.images} or less."
            )
        params = run_params(experiment, row=row, seed=seed, data_root=source.root, classes=source.classes)
        metrics, checkpoint = from_first(lambda: _before(folder, params, resume))
        if metrics is None:
            if checkpoint is not None:
                read_checkpoint(checkpoint)  # the folder may be a stranger's: said in a sentence, before any work
            teacher = None
            if experiment.teacher:
                # The first of two stages: the same data and seed, in a folder of its own beside this one.
                place = teacher_place(experiment, seed, folder.parent, data_root=source.root)
                from_first(lambda: _require_own_teacher(place, source))
                trained = train(
                    teacher_row(experiment),
                    data_root=data_root,
                    work_dir=place,
                    row=experiment.teacher,
                    seed=seed,
                    gpus=gpus,
                    per_gpu=per_gpu,
                    workers=workers,
                    threads=threads,
                    interactive=interactive,
                    loggers=loggers,
                )
                teacher = load_teacher(trained.folder, classes=source.classes)
            labels = partial(prepare_labels, experiment, source, folder, workers=workers)
            from_first(lambda: labels(student=_student_folder(experiment, seed)))
            config = run_config(
                experiment,
                source,
                folder=folder,
                seed=seed,
                workers=workers,
                checkpoint=checkpoint,
                interactive=interactive,
                sharing=sharing,
                loggers=loggers,
            )
            runner = quiet_runner(config)
            if teacher is not None:
                student = runner.model.module if is_model_wrapper(runner.model) else runner.model
                student.attach(teacher)
            from_first(lambda: _write_record(folder, params, config, device if checkpoint is None else None))
            try:
                with tensors_only():
                    runner.train()
            except Diverged as error:
                guard = next(hook for hook in runner.hooks if isinstance(hook, NaNGuard))
                raise guard.explain(error) from error
            runner.test()
            metrics = from_first(lambda: _write_scores(experiment, source, folder, params))
            runner.visualizer.add_scalars(
                {f"{name}/{key}": value for name, key, value in _figures(metrics)}, step=runner.max_iters
            )
            runner.visualizer.close()
        elif is_first():
            print(f"{folder.name} is finished; nothing to train. Choose another work_dir to train again.")
    return Run(experiment, folder, source, metrics)


def _hold(folder: Path, stack: contextlib.ExitStack) -> None:
    """Nobody writes into a finished run, so several students may look at one teacher at a time."""
    if read_json(folder / "metrics.json") is None:
        stack.enter_context(held(folder))


def _before(folder: Path, params: dict[str, Any], resume: bool) -> tuple[dict[str, Any] | None, Path | None]:
    """The metrics and the newest checkpoint of an earlier call; UserError where the folder is another run's."""
    require_own(folder, params)
    metrics, checkpoint = read_json(folder / "metrics.json"), newest(folder)
    if not resume and (metrics or checkpoint):
        raise UserError(f"work_dir {folder} holds this run already; set resume or choose another work_dir.")
    return metrics, checkpoint


def _write_record(folder: Path, params: dict[str, Any], config: Config, device: str | None) -> None:
    """What the folder says of itself: once everything is known to fit together, and before the long work."""
    write_json(folder / "params.json", params)
    if device is not None:
        write_json(folder / "env.json", environment(device) | {"processes": get_world_size()})
    loadable(config).dump(str(folder / "config.py"))


def _write_scores(experiment: Experiment, source: Source, folder: Path, params: dict[str, Any]) -> dict[str, Any]:
    metrics = scored(experiment, source, folder)
    metrics |= {name: params[name] for name in ("row", "digest", "seed")} | {"data": experiment.data}
    write_json(folder / "metrics.json", metrics)
    return metrics


def _figures(metrics: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """The scores for the loggers: those that could be measured."""
    for name in ("segm", "segm_as_rectangles", "segm_any_class", "bbox", "iou"):
        for key, value in metrics.get(name, {}).items():
            if value is not None:
                yield name, key, value


def scored(experiment: Experiment, source: Source, folder: Path) -> dict[str, Any]:
    """The scores of the predictions in a run folder."""
    if experiment.semantic is not None and not source.masks:
        # Its label maps have nothing to be compared with; a student still learns from it.
        return {"miou": None, "miou_foreground": None, "iou": dict.fromkeys((*source.classes, "background"))}
    if experiment.semantic is not None:
        return score_label_maps(source, folder / LABEL_MAPS, limit=experiment.limit)
    return score(
        source.val.annotations,
        folder / DETECTIONS,
        limit=experiment.limit,
        classes=source.classes,
        masks=source.masks,
    )


def choose_device(gpus: int | None, threads: int) -> str:
    """Set threads and device for mmengine, which otherwise takes a GPU whenever there is one; returns the device.

    Joins the other processes where torchrun or SLURM has started several.
    """
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # mmengine sets its own where this is missing
    if gpus and not torch.cuda.is_available():
        raise UserError(f"gpus is {gpus}, but torch finds no CUDA device; set gpus to 0, or see `misa doctor`.")
    use_cuda = torch.cuda.is_available() if gpus is None else gpus > 0
    mmengine.device.utils.DEVICE = device = "cuda" if use_cuda else "cpu"
    join(cuda=use_cuda)
    return device


def quiet_runner(config: Config) -> Runner:
    """mmengine's Runner without its greeting; its own log goes below checkpoints/.

    Runners of one name share history, logger and writers, and mmengine tells names apart by the second only.
    """
    warnings.filterwarnings("ignore", message=".*torch.meshgrid.*")
    named = config.copy()
    named.experiment_name = f"{config.experiment_name}-{next(_RUNNERS)}"
    with contextlib.redirect_stdout(io.StringIO()):
        return Runner.from_cfg(named)


def opened(
    folder: str | Path, *, data_root: str | Path | None = None
) -> tuple[Experiment, Source, Path, dict[str, Any]]:
    """The experiment, data, path and parameters of a run folder; UserError where it is none."""
    experiment, folder, params = recorded(folder)
    root = Path(data_root or params["data_root"])
    # The data is there already, at the root that was recorded; nothing is drawn again.
    there = replace(experiment, data="coco", scenes=()) if experiment.data == "demo" else experiment
    source = open_source(there, root, classes=params["classes"], need_train=False)
    return experiment, source, folder, params


def recorded(folder: str | Path) -> tuple[Experiment, Path, dict[str, Any]]:
    """The experiment, path and parameters of a run folder, without its data; UserError where it is none."""
    folder = Path(folder).expanduser().resolve()
    params = read_params(folder)
    try:
        return Experiment.from_values(params["experiment"]), folder, params
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'params.json'} is not this version's ({error}); train the row again.") from error
