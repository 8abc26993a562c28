"""The published baselines of Tables 1 and 2 that mmdet has, as mmengine values.

SOLO, CondInst and Mask R-CNN learn from masks, BoxInst from boxes by losses of its own. Whatever an `Experiment` does
not name is mmdet's: solo_r50_fpn_1x, condinst_r50_fpn_ms-poly-90k, boxinst_r50_fpn_ms-90k and mask-rcnn_r50_fpn.
"""

from typing import Any

from mmdet.models.data_preprocessors import BoxInstDataPreprocessor
from mmdet.models.dense_heads import (
    BoxInstBboxHead,
    BoxInstMaskHead,
    CondInstBboxHead,
    CondInstMaskHead,
    RPNHead,
    SOLOHead,
)
from mmdet.models.detectors import SOLO, BoxInst, CondInst, MaskRCNN
from mmdet.models.losses import CrossEntropyLoss, DiceLoss, FocalLoss, GIoULoss, L1Loss
from mmdet.models.necks import FPN
from mmdet.models.roi_heads import FCNMaskHead, Shared2FCBBoxHead, SingleRoIExtractor, StandardRoIHead
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, RandomSampler

from misa.engine.solov2_config import GROUP_NORM, matrix_nms
from misa.engine.student_config import backbone_of, preprocessor, stage_widths
from misa.experiment import Experiment

FOCAL = {"type": FocalLoss, "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0}


def solo_config(experiment: Experiment, classes: tuple[str, ...]) -> dict[str, Any]:
    """SOLO (Wang et al. 2020a): seven convolutions a tower, one mask a grid cell."""
    network = experiment.network
    return {
        "type": SOLO,
        "data_preprocessor": preprocessor(experiment),
        "backbone": backbone_of(network),
        "neck": {
            "type": FPN,
            "in_channels": stage_widths(network),
            "out_channels": network.neck_channels,
            "start_level": 0,
            "num_outs": len(network.strides),
        },
        "mask_head": {
            "type": SOLOHead,
            "num_classes": len(classes),
            "in_channels": network.neck_channels,
            "stacked_convs": network.stacked_convs,
            "feat_channels": network.head_channels,
            "strides": list(network.strides),
            "scale_ranges": network.scale_ranges,
            "pos_scale": 0.2,
            "num_grids": list(network.grids),
            "cls_down_index": 0,
            "loss_mask": {"type": DiceLoss, "use_sigmoid": True, "loss_weight": 3.0},
            "loss_cls": FOCAL,
            "norm_cfg": GROUP_NORM,
        },
        "test_cfg": matrix_nms(experiment.inference),
    }


def condinst_config(experiment: Experiment, classes: tuple[str, ...]) -> dict[str, Any]:
    """CondInst (Tian et al. 2020) taught by masks, or BoxInst (Tian et al. 2021), the same network taught by boxes."""
    network, inference, box = experiment.network, experiment.inference, experiment.student == "boxinst"
    mask_channels = 16 if box else 8
    prepared = preprocessor(experiment)
    if box:
        # Neighbors in LAB color: 3 x 3, two cells apart, alike above 0.3; COCO's lowest rows are often mislabeled.
        prepared |= {"type": BoxInstDataPreprocessor, "mask_stride": 4, "pairwise_size": 3, "pairwise_dilation": 2}
        prepared |= {"pairwise_color_thresh": 0.3, "bottom_pixels_removed": 10}
        del prepared["pad_mask"]
    return {
        "type": BoxInst if box else CondInst,
        "data_preprocessor": prepared,
        "backbone": backbone_of(network),
        "neck": {
            "type": FPN,
            "in_channels": stage_widths(network),
            "out_channels": network.neck_channels,
            "start_level": 1,
            "add_extra_convs": "on_output",
            "num_outs": 5,
            "relu_before_extra_convs": True,
        },
        "bbox_head": {
            "type": BoxInstBboxHead if box else CondInstBboxHead,
            "num_params": _dynamic_parameters(mask_channels),
            "num_classes": len(classes),
            "in_channels": network.neck_channels,
            "stacked_convs": network.stacked_convs,
            "feat_channels": network.head_channels,
            "strides": [8, 16, 32, 64, 128],
            "norm_on_bbox": True,
            "centerness_on_reg": True,
            "dcn_on_last_conv": False,
            "center_sampling": True,
            "conv_bias": True,
            "loss_cls": FOCAL,
            "loss_bbox": {"type": GIoULoss, "loss_weight": 1.0},
            "loss_centerness": {"type": CrossEntropyLoss, "use_sigmoid": True, "loss_weight": 1.0},
        },
        "mask_head": {
            "type": BoxInstMaskHead if box else CondInstMaskHead,
            "num_layers": 3,
            "feat_channels": mask_channels,
            "size_of_interest": 8,
            "mask_out_stride": 4,
            **({"topk_masks_per_img": 64} if box else {"max_masks_to_train": 300}),
            "mask_feature_head": {
                "in_channels": network.neck_channels,
                "feat_channels": network.mask_channels,
                "start_level": 0,
                "end_level": 2,
                "out_channels": mask_channels,
                "mask_stride": 8,
                "num_stacked_convs": 4,
                "norm_cfg": {"type": "BN", "requires_grad": True},
            },
            "loss_mask": {"type": DiceLoss, "use_sigmoid": True, "activate": True, "eps": 5e-6, "loss_weight": 1.0},
        },
        "test_cfg": {
            "nms_pre": 1000,
            "min_bbox_size": 0,
            "score_thr": inference.score,
            "nms": {"type": "nms", "iou_threshold": 0.6},
            "max_per_img": inference.per_image,
            "mask_thr": inference.mask,
        },
    }


def _dynamic_parameters(channels: int) -> int:
    """Weights and biases of CondInst's three dynamic 1x1 layers; the first also sees two coordinates."""
    return (channels + 2) * channels + channels * channels + channels + 2 * channels + 1


def mask_rcnn_config(experiment: Experiment, classes: tuple[str, ...]) -> dict[str, Any]:
    """Mask R-CNN (He et al. 2017)."""
    network, inference = experiment.network, experiment.inference
    channels = network.neck_channels

    def coder(*stds: float) -> dict[str, Any]:
        return {"type": DeltaXYWHBBoxCoder, "target_means": [0.0] * 4, "target_stds": list(stds)}

    def extractor(size: int) -> dict[str, Any]:
        layer = {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0}
        return {
            "type": SingleRoIExtractor,
            "roi_layer": layer,
            "out_channels": channels,
            "featmap_strides": [4, 8, 16, 32],
        }

    def assigner(positive: float, negative: float, least: float, low_quality: bool) -> dict[str, Any]:
        return {
            "type": MaxIoUAssigner,
            "pos_iou_thr": positive,
            "neg_iou_thr": negative,
            "min_pos_iou": least,
            "match_low_quality": low_quality,
            "ignore_iof_thr": -1,
        }

    def sampler(number: int, share: float, truth: bool) -> dict[str, Any]:
        counts = {"num": number, "pos_fraction": share, "neg_pos_ub": -1}
        return {"type": RandomSampler, **counts, "add_gt_as_proposals": truth}

    nms = {"type": "nms", "iou_threshold": 0.7}
    return {
        "type": MaskRCNN,
        "data_preprocessor": preprocessor(experiment),
        "backbone": backbone_of(network),
        "neck": {"type": FPN, "in_channels": stage_widths(network), "out_channels": channels, "num_outs": 5},
        "rpn_head": {
            "type": RPNHead,
            "in_channels": channels,
            "feat_channels": channels,
            "anchor_generator": {
                "type": AnchorGenerator,
                "scales": [8],
                "ratios": [0.5, 1.0, 2.0],
                "strides": [4, 8, 16, 32, 64],
            },
            "bbox_coder": coder(1.0, 1.0, 1.0, 1.0),
            "loss_cls": {"type": CrossEntropyLoss, "use_sigmoid": True, "loss_weight": 1.0},
            "loss_bbox": {"type": L1Loss, "loss_weight": 1.0},
        },
        "roi_head": {
            "type": StandardRoIHead,
            "bbox_roi_extractor": extractor(7),
            "bbox_head": {
                "type": Shared2FCBBoxHead,
                "in_channels": channels,
                "fc_out_channels": 4 * channels,
                "roi_feat_size": 7,
                "num_classes": len(classes),
                "bbox_coder": coder(0.1, 0.1, 0.2, 0.2),
                "reg_class_agnostic": False,
                "loss_cls": {"type": CrossEntropyLoss, "use_sigmoid": False, "loss_weight": 1.0},
                "loss_bbox": {"type": L1Loss, "loss_weight": 1.0},
            },
            "mask_roi_extractor": extractor(14),
            "mask_head": {
                "type": FCNMaskHead,
                "num_convs": 4,
                "in_channels": channels,
                "conv_out_channels": channels,
                "num_classes": len(classes),
                "loss_mask": {"type": CrossEntropyLoss, "use_mask": True, "loss_weight": 1.0},
            },
        },
        "train_cfg": {
            "rpn": {
                "assigner": assigner(0.7, 0.3, 0.3, True),
                "sampler": sampler(256, 0.5, False),
                "allowed_border": -1,
                "pos_weight": -1,
                "debug": False,
            },
            "rpn_proposal": {"nms_pre": 2000, "max_per_img": 1000, "nms": nms, "min_bbox_size": 0},
            "rcnn": {
                "assigner": assigner(0.5, 0.5, 0.5, False),
                "sampler": sampler(512, 0.25, True),
                "mask_size": 28,
                "pos_weight": -1,
                "debug": False,
            },
        },
        "test_cfg": {
            "rpn": {"nms_pre": 1000, "max_per_img": 1000, "nms": nms, "min_bbox_size": 0},
            "rcnn": {
                "score_thr": inference.score,
                "nms": {"type": "nms", "iou_threshold": 0.5},
                "max_per_img": inference.per_image,
                "mask_thr_binary": inference.mask,
            },
        },
    }
