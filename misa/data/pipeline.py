"""What happens to an image before the network sees it, as mmdet transforms."""

from typing import Any

from mmcv.transforms import LoadImageFromFile, RandomChoiceResize, RandomResize

from misa.data.mmdet_datasets import (
    FilterAnnotations,
    LoadAnnotations,
    PackDetInputs,
    RandomCrop,
    RandomFlip,
    Resize,
)
from misa.experiment import Augmentation

MEAN = (123.675, 116.28, 103.53)  # ImageNet, RGB, of 0..255
STD = (58.395, 57.12, 57.375)

_META = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")


def train_pipeline(augmentation: Augmentation, *, masks: bool, label_maps: bool = False) -> list[dict[str, Any]]:
    """Load, resize to a random short side, flip; masks or label maps only where the supervision has them.

    With `augmentation.jitter`: flip, resize by a random factor, cut a square (mmdet's large-scale jittering). Boxes are
    cut with the image; where there are masks, they shrink to what is left of these.
    """
    flip = {"type": RandomFlip, "prob": augmentation.flip}
    if augmentation.jitter:
        square = (augmentation.crop, augmentation.crop)
        jitter = {"ratio_range": augmentation.jitter, "resize_type": Resize, "keep_ratio": True}
        cut = {"crop_size": square, "crop_type": "absolute", "recompute_bbox": masks, "allow_negative_crop": True}
        changes: list[dict[str, Any]] = [
            flip,
            {"type": RandomResize, "scale": square, **jitter},
            {"type": RandomCrop, **cut},
            # An image of which no object is left stays: another in its place would be drawn without a seed.
            {"type": FilterAnnotations, "min_gt_bbox_wh": (1e-5, 1e-5), "by_mask": masks, "keep_empty": False},
        ]
    else:
        scales = [(augmentation.long_side, side) for side in augmentation.short_sides]
        changes = [{"type": RandomChoiceResize, "scales": scales, "resize_type": Resize, "keep_ratio": True}, flip]
    return [
        {"type": LoadImageFromFile},
        {"type": LoadAnnotations, "with_bbox": True, "with_mask": masks, "with_seg": label_maps},
        *changes,
        {"type": PackDetInputs, "meta_keys": _META},
    ]


def test_pipeline(augmentation: Augmentation) -> list[dict[str, Any]]:
    """Load and resize; no annotation is needed."""
    return [
        {"type": LoadImageFromFile},
        {"type": Resize, "scale": (augmentation.long_side, augmentation.test_short_side), "keep_ratio": True},
        {"type": PackDetInputs, "meta_keys": _META},
    ]
