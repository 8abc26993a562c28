"""Models of mmdet: every value equals that of mmdet's own config file, except those listed here."""

import pytest
from mmengine.hub import get_config

from misa.models.students.table import model_config
from misa.rows import find_row

FILES = {
    "table1_coco:mask_rcnn_r101": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "table1_coco:boxinst_r101": "boxinst/boxinst_r50_fpn_ms-90k_coco.py",
    "table1_coco:condinst_r101": "condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py",
    "table1_coco:solo_r101": "solo/solo_r50_fpn_1x_coco.py",
    "table1_coco:solov2_r101": "solov2/solov2_r50_fpn_1x_coco.py",
    "table1_coco:mask2former_r101": "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
}
ANY = "any model"
ABSENT = "absent"
WIDTH = "a width of a smaller network; 64 is the default of mmdet's ResNet"
WRITTEN = "the default of mmdet's ResNet, written out"
DEFAULT = "left at the default of the class, which is the same"
SENT = "the same, sent without waiting for the device"
ATTENTION = "panoptic_head.transformer_decoder.layer_cfg."
# model or ANY, key -> mmdet's value, ours, and why they differ.
ON_PURPOSE = {
    (ANY, "backbone.base_channels"): (ABSENT, 64, WIDTH),
    (ANY, "backbone.stem_channels"): (ABSENT, 64, WIDTH),
    ("SOLO", "data_preprocessor.type"): ("DetDataPreprocessor", "Preprocessor", SENT),
    ("SOLOv2", "data_preprocessor.type"): ("DetDataPreprocessor", "Preprocessor", SENT),
    ("MaskRCNN", "data_preprocessor.type"): ("DetDataPreprocessor", "Preprocessor", SENT),
    ("CondInst", "data_preprocessor.type"): ("DetDataPreprocessor", "Preprocessor", SENT),
    ("Mask2Former", "data_preprocessor.type"): ("DetDataPreprocessor", "Preprocessor", SENT),
    ("Mask2Former", "panoptic_head.pixel_decoder.type"): ("MSDeformAttnPixelDecoder", "PixelDecoder", SENT),
    ("SOLO", "backbone.norm_eval"): (ABSENT, True, WRITTEN),
    ("SOLO", "backbone.norm_cfg.type"): (ABSENT, "BN", WRITTEN),
    ("SOLO", "backbone.norm_cfg.requires_grad"): (ABSENT, True, WRITTEN),
    ("SOLOv2", "backbone.norm_eval"): (ABSENT, True, WRITTEN),
    ("SOLOv2", "backbone.norm_cfg.type"): (ABSENT, "BN", WRITTEN),
    ("SOLOv2", "backbone.norm_cfg.requires_grad"): (ABSENT, True, WRITTEN),
    ("Mask2Former", "data_preprocessor.mask_pad_value"): (0, ABSENT, DEFAULT),
    ("Mask2Former", "data_preprocessor.pad_seg"): (False, ABSENT, DEFAULT),
    ("Mask2Former", "data_preprocessor.seg_pad_value"): (255, ABSENT, DEFAULT),
    ("Mask2Former", "data_preprocessor.batch_augments.0.img_pad_value"): (0, ABSENT, DEFAULT),
    ("Mask2Former", "data_preprocessor.batch_augments.0.mask_pad_value"): (0, ABSENT, DEFAULT),
    ("Mask2Former", "data_preprocessor.batch_augments.0.pad_seg"): (False, ABSENT, DEFAULT),
    ("Mask2Former", ATTENTION + "self_attn_cfg.dropout"): (0.0, ABSENT, "an old name that mmcv warns of; " + DEFAULT),
    ("Mask2Former", ATTENTION + "cross_attn_cfg.dropout"): (0.0, ABSENT, "an old name that mmcv warns of; " + DEFAULT),
}


def flat(value, key=""):
    """Returns dotted key -> value, with classes by their name and tuples as lists."""
    if isinstance(value, type):
        value = value.__name__
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        return {k: v for name, item in value.items() for k, v in flat(item, f"{key}.{name}").items()}
    return {key[1:]: _lists(value)}


def _lists(value):
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def differences(row):
    """Returns key -> mmdet's value and ours if they differ; for the published row with mmdet's backbone and classes."""
    theirs = get_config(f"mmdet::{FILES[row]}").model.to_dict()
    experiment = find_row(row).but(network={"backbone": "resnet50"})
    ours = flat(dict(model_config(experiment, tuple(f"class {k}" for k in range(80)))))
    theirs = flat(theirs)
    return theirs["type"], {
        key: (theirs.get(key, ABSENT), ours.get(key, ABSENT))
        for key in {*theirs, *ours}
        if theirs.get(key, ABSENT) != ours.get(key, ABSENT)
    }


@pytest.mark.parametrize("row", FILES)
def test_nothing_differs_from_mmdets_file_but_what_is_listed(row):
    """A listed entry that no longer differs fails as well."""
    model, found = differences(row)
    listed = {key: values for (name, key), (*values, _) in ON_PURPOSE.items() if name in (ANY, model)}
    assert found == {key: tuple(values) for key, values in listed.items()}


def test_a_difference_is_seen(monkeypatch):
    """Shows that the test above compares the keys."""
    from misa.models.students import baselines as config

    def drifted(*of):
        model = mmdet_model(*of)
        model.train_cfg.rcnn.assigner.match_low_quality = False
        return model

    mmdet_model = config.mmdet_model
    monkeypatch.setattr(config, "mmdet_model", drifted)
    assert differences("table1_coco:mask_rcnn_r101")[1]["train_cfg.rcnn.assigner.match_low_quality"] == (True, False)


@pytest.mark.parametrize("row", [row for row in FILES if "mask2former" not in row])  # that has the warm-up of APro
def test_warmup_and_decay_of_norms_are_those_of_mmdets_file(row):
    theirs = get_config(f"mmdet::{FILES[row]}")
    schedule = find_row(row).schedule
    assert schedule.warmup == next(s.end for s in theirs.param_scheduler if s.type == "LinearLR")
    if "inst" not in row:  # CondInst and BoxInst decay as detectron2 does
        assert schedule.norm_decay == ("paramwise_cfg" not in theirs.optim_wrapper)
