"""Preprocessing of images: mmdet transform pipelines, and the same for an image in memory."""

from typing import Any

import cv2
import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from mmcv.transforms import LoadImageFromFile, RandomChoiceResize, RandomResize
from numpy.typing import NDArray
from torch import Tensor

from misa.data.mmdet_datasets import (
    BitmapMasks,
    FilterAnnotations,
    LoadAnnotations,
    MMDetResize,
    PackDetInputs,
    RandomCrop,
    RandomFlip,
)
from misa.errors import UserError
from misa.experiment import Augmentation

MEAN = (123.675, 116.28, 103.53)  # ImageNet, RGB, values 0..255
STD = (58.395, 57.12, 57.375)

_THIN = 0.9  # a resized mask with less of its area in pixels that it covers by half loses parts
_META = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")


class Load(LoadImageFromFile):
    """mmcv's, which fails with an AssertionError: a PNG may be damaged inside, where the check of its end sees nothing.

    Raises UserError: the file cannot be decoded, or has been removed since it was checked.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Read and decode the image of a sample."""
        try:
            return super().transform(results)
        except (AssertionError, OSError, cv2.error) as error:
            raise UserError(
                f"the image {results['img_path']} cannot be read, or not to its end; replace it, or take it out of the "
                "data."
            ) from error


class LoadTruth(LoadAnnotations):
    """mmdet's, which makes a label map of one row a map without rows."""

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        super()._load_seg_map(results)
        if (labels := results.get("gt_seg_map")) is not None and labels.ndim < 2:
            results["gt_seg_map"] = labels.reshape(results["ori_shape"])


class Resize(MMDetResize):
    """mmdet's, with masks and label maps where the image has their objects, and to at least one pixel.

    mmdet takes the nearest pixels without the half pixel between a pixel's corner and its center, up to half a pixel
    of the resized image to the lower right. An image of 1 x 4000 pixels would have no height.
    """

    keep_ratio: bool

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Resize image, boxes, masks and label map."""
        keep = self.keep_ratio
        try:
            return super().transform(results)
        finally:
            self.keep_ratio = keep

    def _resize_img(self, results: dict[str, Any]) -> None:
        width, height = mmcv.rescale_size(results["img"].shape[1::-1], results["scale"])
        if not (width and height):
            results["scale"], self.keep_ratio = (max(width, 1), max(height, 1)), False
        super()._resize_img(results)

    def _resize_masks(self, results: dict[str, Any]) -> None:
        if (masks := results.get("gt_masks")) is not None:
            size = results["img_shape"]
            resized = [_resize_mask(mask, size) for mask in masks.masks]
            results["gt_masks"] = BitmapMasks(np.stack(resized) if resized else np.empty((0, *size), np.uint8), *size)

    def _resize_seg(self, results: dict[str, Any]) -> None:
        if (labels := results.get("gt_seg_map")) is not None:
            size = results["img_shape"][::-1]
            results["gt_seg_map"] = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT)


def _resize_mask(mask: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The pixels (h w) that a mask (h' w') covers by half; of a thin one those it covers most, to keep its area."""
    if mask.shape == size:
        return mask
    smaller = size[0] < mask.shape[0] or size[1] < mask.shape[1]
    how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    covered = cv2.resize(mask.astype(np.float32), size[::-1], interpolation=how)
    threshold, some = 0.5, covered[covered > 0]
    area = float(some.sum(dtype=float))
    if len(some) and np.count_nonzero(some >= threshold) < _THIN * area:
        place = len(some) - max(round(area), 1)
        threshold = float(np.partition(some, place)[place]) * (1 - 1e-5)  # with all that are covered as much
    return (covered >= threshold).astype(np.uint8)


def train_pipeline(augmentation: Augmentation, *, masks: bool, label_maps: bool = False) -> list[dict[str, Any]]:
    """Load, resize to a random short side, flip; masks or label maps only if the supervision has them.

    With `augmentation.jitter`: flip, resize by a random factor, crop a square (mmdet's large-scale jittering). Boxes
    are clipped to the crop; with masks they become the boxes of the cropped masks.
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
            # Keep an image without objects: mmdet would replace it by another, drawn without our seed.
            {"type": FilterAnnotations, "min_gt_bbox_wh": (1e-5, 1e-5), "by_mask": masks, "keep_empty": False},
        ]
    else:
        scales = [(augmentation.long_side, side) for side in augmentation.short_sides]
        changes = [{"type": RandomChoiceResize, "scales": scales, "resize_type": Resize, "keep_ratio": True}, flip]
    return [
        {"type": Load},
        {"type": LoadTruth, "with_bbox": True, "with_mask": masks, "with_seg": label_maps},
        *changes,
        {"type": PackDetInputs, "meta_keys": _META},
    ]


def test_pipeline(augmentation: Augmentation) -> list[dict[str, Any]]:
    """Load and resize; no annotation is needed."""
    return [
        {"type": Load},
        {"type": Resize, "scale": (augmentation.long_side, augmentation.test_short_side), "keep_ratio": True},
        {"type": PackDetInputs, "meta_keys": _META},
    ]


def at_test_size(image: NDArray[np.uint8], sizes: Augmentation) -> NDArray[np.uint8]:
    """Resize an RGB image (h w 3) to the test size, like mmdet's Resize; at least one pixel wide.

    Raises UserError: it is not a uint8 image with three channels.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise UserError(f"an image must be RGB (h w 3) of 8 bits, not {image.shape} of {image.dtype}.")
    width, height = mmcv.rescale_size(image.shape[1::-1], (sizes.long_side, sizes.test_short_side))
    if (height, width) == image.shape[:2]:
        return image
    smaller: NDArray[np.uint8] = mmcv.imresize(image, (max(width, 1), max(height, 1)))
    return smaller


def network_input(image: NDArray[np.uint8], sizes: Augmentation, *, divisor: int = 1) -> Tensor:
    """Convert an RGB image (h w 3), 0..255, to a network input (1 3 h w): resized to the test size and normalized.

    divisor: both sides are zero-padded at the end to a multiple of it, as mmdet's preprocessor does with 32.
    Raises UserError as `at_test_size` does.
    """
    pixels = (at_test_size(image, sizes) - np.array(MEAN)) / np.array(STD)
    inputs = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    return F.pad(inputs, (0, -inputs.shape[-1] % divisor, 0, -inputs.shape[-2] % divisor))
