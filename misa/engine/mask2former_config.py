"""Mask2Former of an `Experiment` as mmengine values: the box-supervised student, or mmdet's own taught by masks."""

from mmdet.models.detectors import Mask2Former
from mmengine.config import ConfigDict

from misa.engine.student_config import backbone_of, mmdet_model, objectives, preprocessor, stage_widths
from misa.experiment import Experiment, Network
from misa.models.mask2former import NO_OBJECT, BoxMask2FormerHead
from misa.models.misa import MISAMask2Former


def mask2former_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """The detector."""
    network = experiment.network
    model = mmdet_model("mask2former/mask2former_r50_8xb2-lsj-50e_coco.py")
    model.type = Mask2Former
    model.data_preprocessor = preprocessor(experiment)
    model.backbone = backbone_of(network)
    if network.norm_eval and "norm_cfg" in model.backbone:
        model.backbone.norm_cfg.requires_grad = False
    _set_head(model.panoptic_head, network, len(classes))
    model.panoptic_fusion_head.num_things_classes = len(classes)
    model.train_cfg.num_points = network.points
    model.test_cfg.max_per_image = min(experiment.inference.per_image, network.queries * len(classes))
    if experiment.supervision == "box":
        model.type, model.panoptic_head.type = MISAMask2Former, BoxMask2FormerHead
        del model.train_cfg  # of the match to masks
        model.update(objectives(experiment))
    return model


def _set_head(head: ConfigDict, network: Network, classes: int) -> None:
    """Set the sizes of the pixel decoder, the queries and the decoder."""
    d = network.feature_channels
    head.update(
        in_channels=stage_widths(network),
        feat_channels=d,
        out_channels=d,
        num_queries=network.queries,
        num_things_classes=classes,
    )
    head.loss_cls.class_weight = [1.0] * classes + [NO_OBJECT]
    head.positional_encoding.num_feats = head.pixel_decoder.positional_encoding.num_feats = d // 2
    encoder, decoder = head.pixel_decoder.encoder, head.transformer_decoder
    encoder.num_layers, decoder.num_layers = network.encoder_layers, network.decoder_layers
    encoder.layer_cfg.self_attn_cfg.embed_dims = d
    encoder.layer_cfg.ffn_cfg.update(embed_dims=d, feedforward_channels=4 * d)
    decoder.layer_cfg.ffn_cfg.update(embed_dims=d, feedforward_channels=8 * d)
    for attention in (decoder.layer_cfg.self_attn_cfg, decoder.layer_cfg.cross_attn_cfg):
        attention.embed_dims = d
        del attention.dropout  # 0.0 as by default; mmcv warns of the name
