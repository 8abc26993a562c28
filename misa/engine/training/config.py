"""An `Experiment` as an mmengine config: classes rather than strings, so that a typo is an ImportError here."""

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
from misa.engine.training.optimizer import learning_rates, optimizer_config
from misa.engine.training.preemption import Preemption
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
from misa.experiment import Experiment
from misa.machine import BatchSplit, split_batch
from misa.models.students.table import model_config
from misa.models.teacher.config import label_folder

HEALTH_EVERY = 50  # steps


def run_config(
    experiment: Experiment,
    source: Source,
    *,
    folder: Path,
    seed: int,
    workers: int,
    checkpoint: Path | None = None,
    interactive: bool = False,
    split: BatchSplit | None = None,
    loggers: tuple[str, ...] | None = None,
) -> Config:
    """Everything mmengine's Runner needs for one training and its final evaluation.

    split: of a batch between processes; None: this process takes all of it. loggers: beside TensorBoard; None for no
    logger at all.
    """
    schedule, semantic = experiment.schedule, experiment.semantic is not None
    masks = experiment.supervision == "mask" and not semantic  # a teacher's masks are in its label maps
    labels = label_folder(experiment, folder)
    common = {"metainfo": {"classes": source.classes}, "indices": experiment.limit}
    train = {
        "type": CocoImages,
        "ann_file": str(source.train.annotations),
        "data_prefix": {"img": str(source.train.images), **({"seg": str(labels)} if labels else {})},
        "filter_cfg": {"filter_empty_gt": False, "min_size": 0},
        "pipeline": train_pipeline(experiment.augmentation, masks=masks, label_maps=labels is not None),
        "masks": masks,
        "seed": seed,
        **common,
    }
    val = {
        "type": CocoImages,
        "ann_file": str(source.val.annotations),
        "data_prefix": {"img": str(source.val.images)},
        "test_mode": True,
        "pipeline": test_pipeline(experiment.augmentation),
        "masks": False,
        **common,
    }
    loader = {"num_workers": workers, "persistent_workers": False, "collate_fn": {"type": "pseudo_collate"}}
    split = split or split_batch(schedule.batch, 1)
    about = f"{split}, learning rate {schedule.lr:g}"
    if schedule.precision != "float32":
        about += f", networks in {schedule.precision}"
    return Config(
        {
            "default_scope": "mmdet",
            "work_dir": str(folder / "checkpoints"),
            "experiment_name": f"misa-{experiment.digest()}-{seed}",
            "model": model_config(experiment, source.classes),
            "train_dataloader": {
                **loader,
                "dataset": train,
                "batch_size": split.images,
                "sampler": {"type": WholeBatches, "batch": schedule.batch, "seed": seed},
                "drop_last": True,
            },
            "test_dataloader": {
                **loader,
                "dataset": val,
                "batch_size": 1,
                "sampler": {"type": DefaultSampler, "shuffle": False},
            },
            "test_evaluator": {
                "type": LabelMaps if semantic else Detections,
                "path": str(folder / (LABEL_MAPS if semantic else DETECTIONS)),
                **({"collect_dir": str(folder / "predictions" / "parts")} if split.processes > 1 else {}),
            },
            "train_cfg": {"type": ResumableLoop, "max_epochs": schedule.epochs},
            "test_cfg": {"type": TestLoop},
            "optim_wrapper": optimizer_config(experiment, accumulate=split.accumulate),
            "param_scheduler": learning_rates(schedule, max(1, source.images // schedule.batch)),
            "default_hooks": {
                "runtime_info": {"type": RuntimeInfo},
                "timer": {"type": IterTimerHook},
                "sampler_seed": {"type": DistSamplerSeedHook},
                "logger": None,
                "param_scheduler": {"type": StepSchedulers, "accumulate": split.accumulate},
                "checkpoint": {"type": CheckpointHook, "interval": 1, "max_keep_ckpts": 2},
            },
            "custom_hooks": [
                {"type": EpochSeed},
                {"type": ResumableState},
                {"type": NaNGuard, "folder": str(folder)},
                *_student_hooks(experiment, seed, split),
                {"type": LossRecord, "path": str(folder / "losses.jsonl")},
                {"type": Progress, "path": str(folder / "log.txt"), "interactive": interactive, "about": about},
                {"type": Preemption, "accumulate": split.accumulate},
                *([{"type": TeacherCard, "experiment": experiment.values()}] if semantic else []),
            ],
            "visualizer": visualizer_config(folder, loggers),
            **(_distributed(experiment) if split.processes > 1 else {}),
            "randomness": {"seed": seed},
            "load_from": None if checkpoint is None else str(checkpoint),
            "resume": checkpoint is not None,
            "log_level": "ERROR",
        }
    )


def _student_hooks(experiment: Experiment, seed: int, split: BatchSplit) -> list[dict[str, Any]]:
    """What a student that learns from boxes has besides."""
    if experiment.semantic is not None or experiment.supervision == "mask":
        return []
    health = {"type": Health, "every": HEALTH_EVERY}
    if experiment.objective is None:
        return [health]
    return [health, {"type": StepClock, "seed": seed, "accumulate": split.accumulate}]


def _distributed(experiment: Experiment) -> dict[str, Any]:
    """What mmengine needs to know of several processes, which have found each other already."""
    cuda = get_device() == "cuda"
    wrapper: dict[str, Any] = {"type": MMDistributedDataParallel, "broadcast_buffers": False}
    if not cuda:
        wrapper["device_ids"] = None
    # mmdet's own students leave a branch out where a batch has no object for it.
    wrapper["find_unused_parameters"] = experiment.student not in ("solov2", "mask2former")
    config = {"launcher": "pytorch", "model_wrapper_cfg": wrapper}
    # Statistics of the whole batch, where they are learned at all; torch has that for GPUs alone.
    return config | ({"sync_bn": "torch"} if cuda and not experiment.network.norm_eval else {})
