"""mmengine config of an `Experiment`, with classes instead of strings, so that a typo is an ImportError here."""

from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.device import get_device
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import TestLoop

from misa.data.dataset import CocoImages
from misa.data.pipeline import test_pipeline, train_pipeline
from misa.data.source import Source
from misa.engine.runs.scores import DETECTIONS, LABEL_MAPS
from misa.engine.runs.teacher import TeacherCard
from misa.engine.training.cost import Cost
from misa.engine.training.optimizer import learning_rates, optimizer_config
from misa.engine.training.preemption import Preemption, begin_worker
from misa.engine.training.resume import (
    EpochSeed,
    ResumableLoop,
    ResumableState,
    RuntimeInfo,
    StepClock,
    StepSchedulers,
    WholeBatches,
)
from misa.engine.training.runner import visualizer_config
from misa.engine.training.watch import Health, LossRecord, NaNGuard, Progress
from misa.evaluation.metric import Detections, LabelMaps
from misa.experiment import FRAMEWORKS, Experiment
from misa.machine import BatchSplit, Machine, split_batch
from misa.models.students.table import model_config
from misa.models.teacher.config import label_folder

HEALTH_EVERY = 50  # steps


def run_config(
    experiment: Experiment,
    source: Source,
    *,
    folder: Path,
    seed: int,
    machine: Machine | None = None,
    split: BatchSplit | None = None,
    checkpoint: Path | None = None,
    log: bool = False,
) -> Config:
    """Config of mmengine's Runner for one training and its final evaluation.

    seed: of weights, order and augmentation. split: of a batch over processes and micro-batches; None: the whole batch
    at once in this process. checkpoint: to resume from. log: write losses and scores to TensorBoard and the machine's
    loggers.
    """
    machine, schedule = machine or Machine(), experiment.schedule
    split, loader = split or split_batch(schedule.batch, 1), _loader(machine)
    return Config(
        {
            "default_scope": "mmdet",
            "work_dir": str(folder / "checkpoints"),
            "experiment_name": f"misa-{experiment.digest()}-{seed}",
            "model": model_config(experiment, source.classes),
            "train_dataloader": {
                **loader,
                "dataset": _train_data(experiment, source, folder, seed),
                "batch_size": split.images,
                "sampler": {"type": WholeBatches, "batch": schedule.batch, "seed": seed},
                "drop_last": True,
            },
            "test_dataloader": {
                **loader,
                "dataset": _test_data(experiment, source),
                "batch_size": 1,
                "sampler": {"type": DefaultSampler, "shuffle": False},
            },
            "test_evaluator": _evaluator(experiment, folder, split),
            "train_cfg": {"type": ResumableLoop, "max_epochs": schedule.epochs},
            "test_cfg": {"type": TestLoop},
            "optim_wrapper": optimizer_config(experiment, accumulate=split.accumulate),
            "param_scheduler": learning_rates(schedule, max(1, source.images // schedule.batch)),
            "default_hooks": _default_hooks(split),
            "custom_hooks": _custom_hooks(experiment, folder, seed, split, interactive=machine.interactive),
            "visualizer": visualizer_config(folder, machine.loggers if log else None),
            **(distributed(experiment) if split.processes > 1 else {}),
            "randomness": {"seed": seed},
            "load_from": None if checkpoint is None else str(checkpoint),
            "resume": checkpoint is not None,
            "log_level": "ERROR",
        },
        format_python_code=False,  # yapf would lay it out at every checkpoint and six times more
    )


def _loader(machine: Machine) -> dict[str, Any]:
    """Settings of both data loaders; memory is pinned for CUDA, which asynchronous copies require."""
    functions = {"collate_fn": {"type": "pseudo_collate"}, "worker_init_fn": {"type": begin_worker}}
    pinned = get_device() == "cuda"
    return {"num_workers": machine.workers, "pin_memory": pinned, "persistent_workers": False, **functions}


def _train_data(experiment: Experiment, source: Source, folder: Path, seed: int) -> dict[str, Any]:
    """The training split, with ground-truth masks for supervision="mask" and label maps for a teacher."""
    masks = experiment.supervision == "mask" and experiment.semantic is None  # a teacher has label maps instead
    labels = label_folder(experiment, folder)
    return {
        "type": CocoImages,
        "ann_file": str(source.train.annotations),
        "data_prefix": {"img": str(source.train.images), **({"seg": str(labels)} if labels else {})},
        "filter_cfg": {"filter_empty_gt": False, "min_size": 0},
        "pipeline": train_pipeline(experiment.augmentation, masks=masks, label_maps=labels is not None),
        "masks": masks,
        "seed": seed,
        "metainfo": {"classes": source.classes},
        "indices": experiment.limit,
    }


def _test_data(experiment: Experiment, source: Source) -> dict[str, Any]:
    return {
        "type": CocoImages,
        "ann_file": str(source.val.annotations),
        "data_prefix": {"img": str(source.val.images)},
        "test_mode": True,
        "pipeline": test_pipeline(experiment.augmentation),
        "masks": False,
        "metainfo": {"classes": source.classes},
        "indices": experiment.limit,
    }


def _evaluator(experiment: Experiment, folder: Path, split: BatchSplit) -> dict[str, Any]:
    """The evaluator that writes predictions into the run folder, through which several processes also gather theirs."""
    kind, path = (Detections, DETECTIONS) if experiment.semantic is None else (LabelMaps, LABEL_MAPS)
    together = {"collect_dir": str(folder / "predictions" / "parts")} if split.processes > 1 else {}
    return {"type": kind, "path": str(folder / path), **together}


def _default_hooks(split: BatchSplit) -> dict[str, Any]:
    return {
        "runtime_info": {"type": RuntimeInfo},
        "timer": {"type": IterTimerHook},
        "sampler_seed": {"type": DistSamplerSeedHook},
        "logger": None,
        "param_scheduler": {"type": StepSchedulers, "accumulate": split.accumulate},
        "checkpoint": {"type": CheckpointHook, "interval": 1, "max_keep_ckpts": 2},
    }


def _custom_hooks(
    experiment: Experiment, folder: Path, seed: int, split: BatchSplit, *, interactive: bool
) -> list[dict[str, Any]]:
    schedule, semantic = experiment.schedule, experiment.semantic is not None
    about = f"{split}, learning rate {schedule.lr:g}"
    if schedule.precision != "float32":
        about += f", networks in {schedule.precision}"
    return [
        {"type": EpochSeed},
        {"type": ResumableState},
        {"type": NaNGuard, "folder": str(folder)},
        *_student_hooks(experiment, seed, split),
        {"type": LossRecord, "path": str(folder / "losses.jsonl")},
        {"type": Cost, "folder": str(folder), "accumulate": split.accumulate},
        {"type": Progress, "path": str(folder / "log.txt"), "interactive": interactive, "about": about}
        | {"accumulate": split.accumulate},
        {"type": Preemption, "accumulate": split.accumulate},
        *([{"type": TeacherCard, "experiment": experiment.values()}] if semantic else []),
    ]


def _student_hooks(experiment: Experiment, seed: int, split: BatchSplit) -> list[dict[str, Any]]:
    """The additional hooks of a student trained from boxes."""
    if experiment.semantic is not None or experiment.supervision == "mask":
        return []
    health = {"type": Health, "every": HEALTH_EVERY}
    if experiment.objective is None:
        return [health]
    return [health, {"type": StepClock, "seed": seed, "accumulate": split.accumulate}]


def distributed(experiment: Experiment) -> dict[str, Any]:
    """mmengine's settings for several processes whose process group is already initialized."""
    cuda = get_device() == "cuda"
    wrapper: dict[str, Any] = {"type": MMDistributedDataParallel, "broadcast_buffers": False}
    if not cuda:
        wrapper["device_ids"] = None
    wrapper["find_unused_parameters"] = FRAMEWORKS[experiment.student].branches
    config = {"launcher": "pytorch", "model_wrapper_cfg": wrapper}
    # BatchNorm statistics of the whole batch, unless they are fixed; torch supports this on GPUs only.
    return config | ({"sync_bn": "torch"} if cuda and not experiment.network.norm_eval else {})
