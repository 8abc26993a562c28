"""SOLOv2 of an `Experiment` as mmengine values: the box-supervised student, or mmdet's own taught by masks."""

from typing import Any

from mmdet.models.dense_heads import SOLOV2Head
from mmdet.models.detectors import SOLOv2
from mmdet.models.losses import DiceLoss, FocalLoss
from mmdet.models.necks import FPN

from misa.engine.student_config import backbone_of, objectives, preprocessor, stage_widths
from misa.experiment import Experiment, Inference
from misa.models.misa import MISA
from misa.models.solov2 import BoxSOLOv2Head

GROUP_NORM = {"type": "GN", "num_groups": 32, "requires_grad": True}


def solov2_config(experiment: Experiment, classes: tuple[str, ...]) -> dict[str, Any]:
    """The detector."""
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
            "norm_cfg": GROUP_NORM,
        },
        "norm_cfg": GROUP_NORM,
        "loss_mask": {"type": DiceLoss, "use_sigmoid": True, "loss_weight": 3.0},
        "loss_cls": {"type": FocalLoss, "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0},
    }
    return {
        "type": SOLOv2 if supervised else MISA,
        "data_preprocessor": preprocessor(experiment),
        "backbone": backbone_of(network),
        "neck": {
            "type": FPN,
            "in_channels": stage_widths(network),
            "out_channels": network.neck_channels,
            "start_level": 0,
            "num_outs": len(network.strides),
        },
        "mask_head": head,
        "test_cfg": matrix_nms(experiment.inference),
        **({} if supervised else objectives(experiment)),
    }


def matrix_nms(inference: Inference) -> dict[str, Any]:
    """SOLO's and SOLOv2's way from candidates to detections."""
    return {
        "nms_pre": inference.candidates,
        "score_thr": inference.score,
        "mask_thr": inference.mask,
        "filter_thr": inference.keep,
        "kernel": "gaussian",
        "sigma": 2.0,
        "max_per_img": inference.per_image,
    }
