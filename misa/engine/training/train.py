"""Train and evaluate a row, and write its run folder (§4.3)."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.dist import get_world_size
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from misa.data.digest import data_digests
from misa.data.source import Source, open_source
from misa.engine.runs.checkpoints import read_checkpoint, tensors_only, weights_digest
from misa.engine.runs.folder import (
    Run,
    earlier_work,
    lock_folder,
    require_own_stage,
    require_same_teacher,
    require_there,
    write_record,
)
from misa.engine.runs.places import named_student, student_place, student_row, teacher_place
from misa.engine.runs.record import run_params
from misa.engine.runs.scores import measured, write_scores
from misa.engine.runs.start import Start, find_start, start_file, warn_changed_start
from misa.engine.runs.teacher import load_teacher, ready_teacher, teacher_line
from misa.engine.training.config import run_config
from misa.engine.training.cost import measured_step
from misa.engine.training.labels import prepare_labels
from misa.engine.training.optimizer import schedule_faults
from misa.engine.training.parallel import on_main_process, report_lost_peer
from misa.engine.training.preemption import restored_signal
from misa.engine.training.runner import choose_device, close_loggers, quiet_runner
from misa.engine.training.watch import FollowingRun, NaNGuard, Progress
from misa.errors import Diverged, UserError, counted, option_name
from misa.experiment import Experiment
from misa.files import shorter
from misa.machine import BatchSplit, Machine, is_main_process, split_batch
from misa.models.backbones import backbone_row, require_weights
from misa.models.students.table import model_config, skeleton
from misa.models.teacher.contract import TeacherNetwork
from misa.objectives.misa import objective_of
from misa.ops.guides import require_kernels
from misa.rows import teacher_row


def train(
    experiment: Experiment,
    *,
    data_root: str | Path,
    work_dir: str | Path,
    row: str = "custom",
    seed: int = 0,
    resume: bool = True,
    machine: Machine | None = None,
    later: Sequence[FollowingRun] = (),
    part: tuple[int, int] | None = None,
) -> Run:
    """Train and evaluate; the same call again resumes an interrupted run or returns the finished one.

    A teacher or student that the row depends on is trained first, on the same data with the same seed, in a folder
    beside this one. In each of several processes started by torchrun or SLURM, the call trains on its part of every
    batch; the main process writes the files.

    Args:
        experiment: what to train.
        data_root: a folder in COCO layout; for data="demo" the folder that the embedded data is written to.
        work_dir: the run folder, which must be new or hold this run.
        row: the row's name in the experiments folder, for the record.
        seed: of weights, order and augmentation.
        resume: resume from the last checkpoint; if False, a folder with checkpoints is an error.
        machine: devices, micro-batch, workers, threads and loggers; by default a GPU if there is one.
        later: trainings that follow this one, included in the log's remaining time.
        part: of a training that another one needs, its number and that of all, from 1, for the log.

    Raises UserError: invalid input, before any long work and with nothing overwritten; Diverged: a loss is NaN or
    infinite; Stopped: by SIGTERM, or because another process has ended; the same call resumes.
    """
    machine = machine or Machine()
    require_buildable(experiment)  # a misspelled name is found before a teacher is trained
    device = _device(experiment, machine)
    split = split_batch(experiment.schedule.batch, get_world_size(), machine.per_gpu)
    folder = Path(work_dir).expanduser().resolve()
    head = f"{row}{' (smoke)' if experiment.limit is not None else ''}, seed {seed}, on {device}, in {shorter(folder)}"
    with report_lost_peer(), restored_signal(), contextlib.ExitStack() as stack:
        on_main_process(lambda: _lock(experiment, folder, seed, stack))
        plan = on_main_process(lambda: prepare(experiment, data_root, folder, row=row, seed=seed, resume=resume))
        if plan.metrics is not None:
            _say(*([f"{part[0]} of {part[1]}: {head}"] if part else []))
            _say(f"{folder.name} is finished; nothing to train. Another {option_name('work_dir')} trains it again.")
            return Run(experiment, folder, plan.source, plan.metrics)
        if plan.checkpoint is None and not experiment.start:
            on_main_process(lambda: require_weights(experiment.network))
        part = part or (parts(experiment),) * 2
        said = _before(plan, data_root, machine, later, part)
        said += _say(f"{part[0]} of {part[1]}: {head}" if part[1] > 1 else head, *_about(plan))
        teacher, lines = _teacher(plan)
        runner = build(plan, machine, split, device, teacher, stack)
        progress = next(hook for hook in runner.hooks if isinstance(hook, Progress))
        progress.later, progress.said = later, said + lines
        learn(runner)
        metrics = on_main_process(lambda: write_scores(experiment, plan.source, folder, plan.params))
        log_scores(runner, metrics)
    return Run(experiment, folder, plan.source, metrics)


def _about(plan: "Plan") -> list[str]:
    """The images to learn from, and what of the schedule they are too few for."""
    schedule, images = plan.experiment.schedule, plan.source.images
    faults = schedule_faults(schedule, max(1, images // schedule.batch))
    return [f"{counted(images, 'image')} of {shorter(plan.source.root)}", *(f"warning: {one}." for one in faults)]


def _lock(experiment: Experiment, folder: Path, seed: int, stack: contextlib.ExitStack) -> None:
    """Lock the run folder; a new one is not made for a run whose start is missing."""
    if experiment.start and not folder.exists():
        start_file(experiment.start, seed)
    lock_folder(folder, stack)


def _before(
    plan: "Plan", data_root: str | Path, machine: Machine, later: Sequence[FollowingRun], part: tuple[int, int]
) -> list[str]:
    """Train the run that `plan` learns from, if it names a row; returns the lines printed here."""
    said, (number, total), stage, row = [], part, plan.first, plan.params["row"]
    if stage is None:
        return []
    if number == total:
        said += _say(
            f"{row} learns in {total} parts; the time left is that of all, about (~) until the last has begun."
        )
    own = FollowingRun(
        steps_of(plan.experiment, plan.source.images), measured_step(plan.experiment, plan.folder.parent)
    )
    before = train(
        stage.experiment,
        data_root=data_root,
        work_dir=stage.folder,
        row=stage.row,
        seed=plan.params["seed"],
        machine=machine,
        later=(own, *later),
        part=(number - 1, total),
    )
    return said + _say(f"{stage.row}: {main_score(before)}")


def require_buildable(experiment: Experiment, row: str = "the row") -> None:
    """Raise UserError, before any work, if the network of a row, or of one that it learns from, cannot be built."""
    backbone_row(experiment.network.backbone)
    if experiment.affinity is not None and experiment.affinity.kernels:
        require_kernels(experiment.affinity.kernels)
    if experiment.trains_teacher:
        require_buildable(teacher_row(experiment), experiment.teacher)
    elif (named := student_row(experiment)) is not None:
        require_buildable(named[1], named[0])
    try:
        skeleton(model_config(experiment.but(network={"pretrained": False}), ("one", "two")))
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        if "meta tensor" in str(error) or "meta device" in str(error):
            return  # a network that reads its numbers when it is built, which it has not yet
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{row}'s network cannot be built ({reason}); change its network.") from error


def parts(experiment: Experiment) -> int:
    """The number of trainings of a row, with those of the rows that it learns from, one from another."""
    if experiment.trains_teacher:
        return 1 + parts(teacher_row(experiment))
    named = student_row(experiment)
    return 1 if named is None else 1 + parts(named[1])


def _device(experiment: Experiment, machine: Machine) -> str:
    device = choose_device(machine)
    require_precision(experiment, device)
    return device


def require_precision(experiment: Experiment, device: str) -> None:
    """Raise UserError if a row cannot be trained in its precision on a device."""
    if experiment.schedule.precision == "float16" and device == "cpu":
        raise UserError("float16 needs a GPU, its gradients vanish or overflow on a CPU; choose bfloat16 or float32.")


def require_apart(folder: Path, source: Source) -> None:
    """Raise UserError if a run folder is a folder of the data, whose files would be mixed with the run's."""
    own = {
        source.root,
        *(place for part in (source.train, source.val) for place in (part.images, part.annotations.parent)),
    }
    if folder in {place.resolve() for place in own}:
        name = option_name("work_dir")
        raise UserError(f"{name} {folder} holds the data, which is only read; choose another {name}.")


def require_batch(experiment: Experiment, source: Source) -> None:
    """Raise UserError if a row's batch takes more images than there are."""
    if source.images < experiment.schedule.batch:
        taken = "" if experiment.limit is None else f" within the row's limit of {experiment.limit}, as of a smoke run"
        raise UserError(
            f"a batch takes {counted(experiment.schedule.batch, 'image')} and the train split of {source.root} has "
            f"{source.images}{taken}; set {option_name('batch')} to {source.images} or less."
        )


def require_shadow(experiment: Experiment, steps: int) -> None:
    """Raise UserError if a row predicts with an EMA model that its objective does not begin in so many steps."""
    if not experiment.inference.from_shadow or experiment.limit is not None:
        return
    objective = objective_of(experiment)
    if objective.shadow_momentum(steps - 1, steps) == 1:
        raise UserError(
            f"Inference.from_shadow: the EMA model of {type(objective).__name__} does not begin in the "
            f"{counted(steps, 'step')} of this training, and has the initial weights until then; start it earlier, or "
            "set from_shadow to False."
        )


def steps_of(experiment: Experiment, images: int) -> int:
    """Optimizer steps of a whole training on so many images."""
    return experiment.schedule.epochs * (images // experiment.schedule.batch)


def _say(*lines: str) -> list[str]:
    """Print on the main process only; returns the lines, for the log."""
    if lines and is_main_process():
        print(*lines, sep="\n", flush=True)
    return list(lines)


def main_score(run: Run) -> str:
    """The run's main score as text, or why it has none."""
    kind, (name, value) = next(iter(run.scores())), next(iter(run.leading().items()))
    if value is not None:
        return f"{kind} {name} {value:.1f}"
    lacks = "objects" if run.source.masks or kind == "boxes" else "true masks"
    return f"{kind} {name} not measured, since the validation data has no {lacks}"


class Stage(NamedTuple):
    """A run that must be trained before another one."""

    row: str
    experiment: Experiment
    folder: Path


@dataclass(frozen=True)
class Plan:
    """A checked training before its first step; made by the main process and broadcast to all.

    metrics: of a finished run, else None.
    checkpoint: to resume from.
    first: the run that must be trained before: a student's teacher, or the student whose masks train a teacher.
    start: the weights that it begins with, in place of ImageNet's.
    """

    experiment: Experiment
    source: Source
    folder: Path
    params: dict[str, Any]
    metrics: dict[str, Any] | None
    checkpoint: Path | None
    first: Stage | None
    start: Start | None = None


def prepare(experiment: Experiment, data_root: str | Path, folder: Path, *, row: str, seed: int, resume: bool) -> Plan:
    """Check everything that can be checked before the first step: data, record, checkpoint and the previous stage.

    Writes nothing but embedded data. UserError for any inconsistency.
    """
    ready = experiment.teacher and not experiment.trains_teacher
    if ready and not (folder / "metrics.json").exists():
        ready_teacher(experiment)  # downloads its weights if needed, before reading the data, which may take minutes
    source = open_source(experiment, data_root)
    require_apart(folder, source)
    require_batch(experiment, source)
    data = data_digests(source.train, source.val)
    params = run_params(experiment, row=row, seed=seed, data_root=source.root, data=data, classes=source.classes)
    metrics, checkpoint = earlier_work(folder, params, resume)
    if metrics is not None:
        warn_changed_start(experiment, folder, seed)
        return Plan(experiment, source, folder, params, metrics, checkpoint, None)
    require_shadow(experiment, steps_of(experiment, source.images))
    if checkpoint is not None:
        read_checkpoint(checkpoint)  # raises for a damaged or foreign file
    start = find_start(experiment, source.classes, seed) if experiment.start and checkpoint is None else None
    first = None
    if experiment.trains_teacher:
        place = teacher_place(experiment, seed, folder.parent, student=params)
        require_own_stage(place, params, "teacher")
        if checkpoint is not None:
            require_there(folder, place)
        first = Stage(experiment.teacher, teacher_row(experiment), place)
    elif (named := student_row(experiment)) is not None:
        place = student_place(*named, seed, folder.parent, teacher=params)
        require_own_stage(place, params, "student")
        first = Stage(*named, place)
    return Plan(experiment, source, folder, params, None, checkpoint, first, start)


def _teacher(plan: Plan) -> tuple[TeacherNetwork | None, list[str]]:
    """The trained or torchvision's teacher of the plan's row, if it has one, and the lines on it and on the start."""
    said = [] if plan.start is None else _say(str(plan.start), *(f"warning: {remark}" for remark in plan.start.remarks))
    if not plan.experiment.teacher:
        return None, said
    if plan.first is not None:
        trained = load_teacher(plan.first.folder, classes=plan.source.classes)
        if plan.checkpoint is not None:
            require_same_teacher(plan.folder, plan.first.folder, weights_digest(trained.state_dict()))
        return trained, said
    teacher = ready_teacher(plan.experiment, plan.source.classes)
    return teacher, said + _say(teacher_line(plan.experiment, teacher))


def build(
    plan: Plan,
    machine: Machine,
    split: BatchSplit,
    device: str,
    teacher: TeacherNetwork | None,
    stack: contextlib.ExitStack,
) -> Runner:
    """Build the runner with its network, and attach the teacher; write label maps and the run's record.

    Its loggers are closed with `stack`, also on failure: TensorBoard's thread writes the last events then.
    """
    experiment, source, folder = plan.experiment, plan.source, plan.folder
    labelled_by = named_student(experiment)
    if plan.first is not None and not experiment.teacher:
        labelled_by = plan.first.folder
    labels = partial(prepare_labels, experiment, source, folder, student=labelled_by, workers=machine.workers)
    on_main_process(labels)
    config = run_config(
        experiment.but(network={"pretrained": False}) if experiment.start else experiment,
        source,
        folder=folder,
        seed=plan.params["seed"],
        machine=machine,
        split=split,
        checkpoint=plan.checkpoint,
        log=True,
    )
    runner = quiet_runner(config)
    stack.callback(close_loggers, runner)
    runner.start = plan.start
    if teacher is not None:
        student = runner.model.module if is_model_wrapper(runner.model) else runner.model
        student.attach(teacher)
    # Last, once nothing can fail any more.
    weights = {
        "start": None if plan.start is None else plan.start.digest,
        "teacher": weights_digest(teacher.state_dict()) if teacher is not None and plan.first is not None else None,
    }
    resumed = plan.checkpoint is not None
    write = partial(write_record, device=device, resumed=resumed, weights=weights, micro_batch=split.images)
    on_main_process(lambda: write(folder, plan.params, config))
    return runner


def learn(runner: Runner) -> None:
    """Train, then predict the validation data; Diverged, with step and batch, if a loss is NaN or infinite."""
    try:
        with tensors_only():
            runner.train()
        runner.test()
    except Diverged as error:
        guard = next(hook for hook in runner.hooks if isinstance(hook, NaNGuard))
        raise guard.explain(error) from error
    except UserError as error:  # of a loader's process: torch puts its traceback before the sentence
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error


def log_scores(runner: Runner, metrics: dict[str, Any]) -> None:
    """Write the scores to the loggers."""
    scores = {f"{name}/{key}": value for name, key, value in measured(metrics)}
    runner.visualizer.add_scalars(scores, step=runner.max_iters)
