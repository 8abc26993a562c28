"""An `Experiment` as an mmengine config: classes, never strings, so that a typo is an ImportError here."""

import dataclasses
from pathlib import Path
from typing import Any

from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.dense_heads import SOLOV2Head
from mmdet.models.detectors import SOLOv2
from mmdet.models.losses import DiceLoss, FocalLoss
from mmdet.models.necks import FPN
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook, ParamSchedulerHook
from mmengine.optim import CosineAnnealingLR, LinearLR, MultiStepLR, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop
from torch.optim import AdamW

from misa.data.coco import CocoImages
from misa.data.pipeline import MEAN, STD, test_pipeline, train_pipeline
from misa.data.source import Source
from misa.engine.hooks import EpochSeed, LossRecord, Progress, ResumableState, RuntimeInfo
from misa.engine.rows import teacher_row
from misa.engine.teacher import LABEL_MAPS, TeacherCard
from misa.engine.teacher_config import label_folder, pairwise_arguments, teacher_config
from misa.evaluation.metric import Detections, LabelMaps
from misa.experiment import Experiment, Network
from misa.models.backbones import RESNETS, SWINS, backbone_config
from misa.models.misa import MISA
from misa.models.solov2 import BoxSOLOv2Head

DETECTIONS = "predictions/val.json"


def loadable(config: Config) -> Config:
    """The config with dotted names in place of classes, so that its file can be loaded back by `Config.fromfile`."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(named(item) for item in value)
        return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else value

    return Config(named(config.to_dict()))


def model_config(experiment: Experiment, classes: tuple[str, ...]) -> dict[str, Any]:
    """The detector of an experiment for the classes of the data, or the semantic teacher."""
    if experiment.semantic is not None:
        return teacher_config(experiment, classes)
    network, supervised = experiment.network, experiment.supervision == "mask"
    head = {
        "type": SOLOV2Head if supervised else BoxSOLOv2Head,
        "num_classes": len(classes),
        "in_channels": network.neck_channels,
        "feat_channels": network.head_channels,
        "stacked_convs": network.stacked_convs,
        "strides": list(network.strides),
        "scale_ranges": network.scale_ranges,
        "pos_scale": 0.2,
        "num_grids": list(network.grids),
        "cls_down_index": 0,
        "mask_feature_head": {
            "feat_channels": network.mask_channels,
            "start_level": 0,
            "end_level": 3,
            "out_channels": network.feature_channels,
            "mask_stride": 4,
            "norm_cfg": {"type": "GN", "num_groups": 32, "requires_grad": True},
        },
        "norm_cfg": {"type": "GN", "num_groups": 32, "requires_grad": True},
        "loss_mask": {"type": DiceLoss, "use_sigmoid": True, "loss_weight": 3.0},
        "loss_cls": {"type": FocalLoss, "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0},
    }
    inference = experiment.inference
    model: dict[str, Any] = {
        "type": SOLOv2 if supervised else MISA,
        "data_preprocessor": {
            "type": DetDataPreprocessor,
            "mean": MEAN,
            "std": STD,
            "bgr_to_rgb": True,
            "pad_mask": supervised,
            "pad_size_divisor": 32,
        },
        "backbone": backbone_config(
            network.backbone,
            base_channels=network.base_channels,
            pretrained=network.pretrained,
            frozen_stages=network.frozen_stages,
            norm_eval=network.norm_eval,
        ),
        "neck": {
            "type": FPN,
            "in_channels": _widths(network),
            "out_channels": network.neck_channels,
            "start_level": 0,
            "num_outs": len(network.strides),
        },
        "mask_head": head,
        "test_cfg": {
            "nms_pre": inference.candidates,
            "score_thr": inference.score,
            "mask_thr": inference.mask,
            "filter_thr": inference.keep,
            "kernel": "gaussian",
            "sigma": 2.0,
            "max_per_img": inference.per_image,
        },
    }
    if not supervised:
        model["projection_weight"] = experiment.projection_weight
        affinity = experiment.affinity
        model["affinity"] = None if affinity is None else pairwise_arguments(affinity)
        if experiment.teacher:
            model["semantic"] = affinity is not None and (affinity.feature or affinity.saliency)
            model["teacher_channels"] = teacher_row(experiment).network.feature_channels
        if experiment.distillation is not None:
            model["distillation"] = dataclasses.asdict(experiment.distillation)
    return model


def _widths(network: Network) -> list[int]:
    """The channels of the backbone's four stages."""
    if network.backbone in SWINS:
        return [SWINS[network.backbone][0] * 2**stage for stage in range(4)]
    expansion = 1 if RESNETS[network.backbone] < 50 else 4
    return [network.base_channels * expansion * 2**stage for stage in range(4)]


def run_config(
    experiment: Experiment,
    source: Source,
    *,
    folder: Path,
    seed: int,
    workers: int,
    checkpoint: Path | None = None,
    interactive: bool = False,
) -> Config:
    """Everything mmengine's Runner needs for one training and its final evaluation."""
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
    if schedule.decay == "cosine":
        decay = {
            "type": CosineAnnealingLR,
            "T_max": schedule.epochs,
            "end": schedule.epochs,
            "by_epoch": True,
            "convert_to_iter_based": True,
        }
    else:
        decay = {"type": MultiStepLR, "milestones": list(schedule.milestones), "gamma": 0.1, "by_epoch": True}
    warmup = {"type": LinearLR, "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": schedule.warmup}
    return Config(
        {
            "default_scope": "mmdet",
            "work_dir": str(folder / "checkpoints"),
            "experiment_name": f"misa-{experiment.digest()}-{seed}",
            "model": model_config(experiment, source.classes),
            "train_dataloader": {
                **loader,
                "dataset": train,
                "batch_size": schedule.batch,
                "sampler": {"type": DefaultSampler, "shuffle": True, "seed": seed},
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
            },
            "train_cfg": {"type": EpochBasedTrainLoop, "max_epochs": schedule.epochs},
            "test_cfg": {"type": TestLoop},
            "optim_wrapper": {
                "type": OptimWrapper,
                "optimizer": {"type": AdamW, "lr": schedule.lr, "weight_decay": schedule.weight_decay},
                "clip_grad": {"max_norm": schedule.clip, "norm_type": 2},
                "paramwise_cfg": {"norm_decay_mult": 0.0},
            },
            "param_scheduler": [
                *([warmup] if schedule.warmup > 1 else []),
                decay,
            ],
            "default_hooks": {
                "runtime_info": {"type": RuntimeInfo},
                "timer": {"type": IterTimerHook},
                "sampler_seed": {"type": DistSamplerSeedHook},
                "logger": None,
                "param_scheduler": {"type": ParamSchedulerHook},
                "checkpoint": {"type": CheckpointHook, "interval": 1, "max_keep_ckpts": 2},
            },
            "custom_hooks": [
                {"type": EpochSeed},
                {"type": ResumableState},
                {"type": LossRecord, "path": str(folder / "losses.jsonl")},
                {"type": Progress, "path": str(folder / "log.txt"), "interactive": interactive},
                *([{"type": TeacherCard, "experiment": experiment.values()}] if semantic else []),
            ],
            "randomness": {"seed": seed},
            "load_from": None if checkpoint is None else str(checkpoint),
            "resume": checkpoint is not None,
            "log_level": "ERROR",
        }
    )
