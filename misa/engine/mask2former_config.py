"""Mask2Former of an `Experiment` as mmengine values: the box-supervised student, or mmdet's own taught by masks.

Sizes and weights that an `Experiment` does not name are mmdet's (mask2former_r50_8xb2-lsj-50e_coco).
"""

from typing import Any

from mmdet.models.dense_heads import Mask2FormerHead
from mmdet.models.detectors import Mask2Former
from mmdet.models.layers import MSDeformAttnPixelDecoder
from mmdet.models.losses import CrossEntropyLoss, DiceLoss
from mmdet.models.seg_heads import MaskFormerFusionHead
from mmdet.models.task_modules import (
    ClassificationCost,
    CrossEntropyLossCost,
    DiceCost,
    HungarianAssigner,
    MaskPseudoSampler,
)

from misa.engine.student_config import backbone_of, objectives, preprocessor, stage_widths
from misa.experiment import Experiment, Network
from misa.models.mask2former import CLASS_WEIGHT, NO_OBJECT, BoxMask2FormerHead
from misa.models.misa import MISAMask2Former

HEADS, LEVELS, POINTS = 8, 3, 4


def mask2former_config(experiment: Experiment, classes: tuple[str, ...]) -> dict[str, Any]:
    """The detector."""
    network, supervised = experiment.network, experiment.supervision == "mask"
    backbone = backbone_of(network)
    if network.norm_eval and "norm_cfg" in backbone:
        backbone["norm_cfg"]["requires_grad"] = False
    things = {"num_things_classes": len(classes), "num_stuff_classes": 0}
    config = {
        "type": Mask2Former if supervised else MISAMask2Former,
        "data_preprocessor": preprocessor(experiment),
        "backbone": backbone,
        "panoptic_head": {
            "type": Mask2FormerHead if supervised else BoxMask2FormerHead,
            "in_channels": stage_widths(network),
            "strides": [4, 8, 16, 32],
            **things,
            **_head(network, len(classes)),
        },
        "panoptic_fusion_head": {"type": MaskFormerFusionHead, **things, "loss_panoptic": None, "init_cfg": None},
        "test_cfg": {
            "panoptic_on": False,
            "semantic_on": False,
            "instance_on": True,
            "max_per_image": min(experiment.inference.per_image, network.queries * len(classes)),
        },
    }
    if not supervised:
        config |= objectives(experiment)
    else:
        config["train_cfg"] = {
            "num_points": network.points,
            "oversample_ratio": 3.0,
            "importance_sample_ratio": 0.75,
            "assigner": {
                "type": HungarianAssigner,
                "match_costs": [
                    {"type": ClassificationCost, "weight": 2.0},
                    {"type": CrossEntropyLossCost, "weight": 5.0, "use_sigmoid": True},
                    {"type": DiceCost, "weight": 5.0, "pred_act": True, "eps": 1.0},
                ],
            },
            "sampler": {"type": MaskPseudoSampler},
        }
    return config


def _head(network: Network, classes: int) -> dict[str, Any]:
    """The pixel decoder, the queries and the decoder; the last two losses serve supervision="mask" alone."""
    d = network.feature_channels
    position = {"num_feats": d // 2, "normalize": True}
    attention = {"embed_dims": d, "num_heads": HEADS, "attn_drop": 0.0, "proj_drop": 0.0, "batch_first": True}
    deformable = {"num_levels": LEVELS, "num_points": POINTS, "dropout": 0.0, "batch_first": True}

    def forward(times: int) -> dict[str, Any]:
        activation = {"type": "ReLU", "inplace": True}
        width = {"embed_dims": d, "feedforward_channels": times * d}
        return {**width, "num_fcs": 2, "ffn_drop": 0.0, "act_cfg": activation}

    return {
        "feat_channels": d,
        "out_channels": d,
        "num_queries": network.queries,
        "num_transformer_feat_level": LEVELS,
        "pixel_decoder": {
            "type": MSDeformAttnPixelDecoder,
            "num_outs": LEVELS,
            "norm_cfg": {"type": "GN", "num_groups": 32},
            "act_cfg": {"type": "ReLU"},
            "encoder": {
                "num_layers": network.encoder_layers,
                "layer_cfg": {
                    "self_attn_cfg": {"embed_dims": d, "num_heads": HEADS, **deformable},
                    "ffn_cfg": forward(4),
                },
            },
            "positional_encoding": position,
        },
        "enforce_decoder_input_project": False,
        "positional_encoding": position,
        "transformer_decoder": {
            "return_intermediate": True,
            "num_layers": network.decoder_layers,
            "layer_cfg": {"self_attn_cfg": attention, "cross_attn_cfg": attention, "ffn_cfg": forward(8)},
            "init_cfg": None,
        },
        "loss_cls": {
            "type": CrossEntropyLoss,
            "use_sigmoid": False,
            "loss_weight": CLASS_WEIGHT,
            "reduction": "mean",
            "class_weight": [1.0] * classes + [NO_OBJECT],
        },
        "loss_mask": {"type": CrossEntropyLoss, "use_sigmoid": True, "reduction": "mean", "loss_weight": 5.0},
        "loss_dice": {
            "type": DiceLoss,
            "use_sigmoid": True,
            "activate": True,
            "reduction": "mean",
            "naive_dice": True,
            "eps": 1.0,
            "loss_weight": 5.0,
        },
    }
