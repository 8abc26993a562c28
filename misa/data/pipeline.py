"""What happens to an image before the network sees it, as mmdet transforms."""

from typing import Any

from mmcv.transforms import LoadImageFromFile, RandomChoiceResize
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, RandomFlip, Resize

from misa.experiment import Augmentation

MEAN = (123.675, 116.28, 103.53)  # ImageNet, RGB, of 0..255
STD = (58.395, 57.12, 57.375)

_META = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")


def train_pipeline(augmentation: Augmentation, *, masks: bool, label_maps: bool = False) -> list[dict[str, Any]]:
    """Load, resize to a random short side, flip; masks or label maps only where the supervision has them."""
    scales = [(augmentation.long_side, side) for side in augmentation.short_sides]
    return [
        {"type": LoadImageFromFile},
        {"type": LoadAnnotations, "with_bbox": True, "with_mask": masks, "with_seg": label_maps},
        {"type": RandomChoiceResize, "scales": scales, "resize_type": Resize, "keep_ratio": True},
        {"type": RandomFlip, "prob": augmentation.flip},
        {"type": PackDetInputs, "meta_keys": _META},
    ]


def test_pipeline(augmentation: Augmentation) -> list[dict[str, Any]]:
    """Load and resize; no annotation is needed."""
    return [
        {"type": LoadImageFromFile},
        {"type": Resize, "scale": (augmentation.long_side, augmentation.test_short_side), "keep_ratio": True},
        {"type": PackDetInputs, "meta_keys": _META},
    ]
