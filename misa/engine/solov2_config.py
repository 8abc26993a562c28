"""SOLOv2 of an `Experiment` as mmengine values: the box-supervised student, or mmdet's own taught by masks."""

from typing import Any

from mmdet.models.detectors import SOLOv2
from mmengine.config import ConfigDict

from misa.engine.student_config import backbone_of, mmdet_model, objectives, preprocessor, stage_widths
from misa.experiment import Experiment, Inference, Network
from misa.models.misa import MISA
from misa.models.solov2 import BoxSOLOv2Head


def solov2_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """The detector."""
    network = experiment.network
    model = mmdet_model("solov2/solov2_r50_fpn_1x_coco.py")
    model.type = SOLOv2
    model.data_preprocessor = preprocessor(experiment)
    model.backbone = backbone_of(network)
    grid_neck_and_head(model, network, len(classes))
    model.mask_head.mask_feature_head.update(feat_channels=network.mask_channels, out_channels=network.feature_channels)
    model.test_cfg.update(matrix_nms(experiment.inference))
    if experiment.supervision == "box":
        model.type, model.mask_head.type = MISA, BoxSOLOv2Head
        model.update(objectives(experiment))
    return model


def grid_neck_and_head(model: ConfigDict, network: Network, classes: int) -> None:
    """Set what SOLO and SOLOv2 share: as many levels as there are strides, a grid on each."""
    model.neck.update(
        in_channels=stage_widths(network), out_channels=network.neck_channels, num_outs=len(network.strides)
    )
    model.mask_head.update(
        num_classes=classes,
        in_channels=network.neck_channels,
        feat_channels=network.head_channels,
        stacked_convs=network.stacked_convs,
        strides=list(network.strides),
        scale_ranges=network.scale_ranges,
        num_grids=list(network.grids),
    )


def matrix_nms(inference: Inference) -> dict[str, Any]:
    """SOLO's and SOLOv2's thresholds on the way from candidates to detections."""
    return {
        "nms_pre": inference.candidates,
        "score_thr": inference.score,
        "mask_thr": inference.mask,
        "filter_thr": inference.keep,
        "max_per_img": inference.per_image,
    }
