"""The ops of `mmcv._ext` that our models use, in PyTorch and torchvision, for CPU and CUDA.

This file is loaded under the name `mmcv._ext` (see `misa.mmcv_ext`), so it imports nothing of misa. Names and
signatures are those with which the wrappers in `mmcv.ops` call the compiled module; results are written in place into
the wrappers' tensors, which are initialized with zeros. The wrappers are `autograd.Function`s, so nothing here records
gradients and each backward is a separate function.

Half precision is computed in float32 and rounded once, at the end. Device and dtype of the results are those of the
inputs, and nothing synchronizes with the GPU unless stated.

Axes: n anchor or box · c class or channel · b image · q query · m head · d channel of a head · l level · p point
· k key (the pixels of all levels, concatenated).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

HOST_SHAPES = True
"""Deformable attention also accepts the levels' sizes on the host, which avoids a synchronization."""

_NO_COMPILER = "none (PyTorch equivalents of misa.mmcv_ext)"


def common_dtype(*tensors: Tensor) -> list[Tensor]:
    """Cast tensors to their common floating dtype, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


@torch.no_grad()
def nms(boxes: Tensor, scores: Tensor, *, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression by `torchvision.ops.nms`.

    Synchronizes with the GPU, as the number of kept boxes is the shape of the result.

    boxes: (n 4) x1 y1 x2 y2. scores: (n,). iou_threshold: a box is suppressed if its IoU with a kept one is larger than
    this. offset: 0, or 1 for the old convention in which width is x2 - x1 + 1. Returns (kept,) int64 indices, by
    descending score.
    """
    boxes, scores = common_dtype(boxes, scores)
    if offset:
        # x2 + 1 and y2 + 1 give the same widths, areas and intersections as the old convention.
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torchvision.ops.nms(boxes, scores, float(iou_threshold))


def _focal_parts(logits: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the terms (n c) that the loss and its derivative share, in float32 or better.

    The logits, negated off the target: the loss of a negative is that of a positive for -logit. The signs, 1 on the
    target and -1 off it. The factors, alpha or 1 - alpha times the weight of the row.
    """
    (logits,) = common_dtype(logits)
    # A comparison, not one_hot: labels outside 0..c-1 (the background is c) then match no class, and no range check
    # synchronizes with the GPU.
    positive = (target[:, None] == torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)
    sign = 2 * positive - 1
    factor = positive * alpha + (1 - positive) * (1 - alpha)
    if weight.numel() > 0:
        # The background has no entry in `weight`; its weight is 1.
        known = (target >= 0) & (target < weight.numel())
        row = weight.to(logits.dtype)[target.clamp(0, weight.numel() - 1)]
        factor = factor * torch.where(known, row, 1.0)[:, None]
    return logits * sign, sign, factor


@torch.no_grad()
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Focal loss of each anchor and class: -alpha (1-p)^gamma log p, or -(1-alpha) p^gamma log(1-p) off the target.

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017, Eq. 5.

    input: (n c) logits. target: (n,) int64 labels in 0..c, c is the background. weight: (c,) a factor for the anchors
    of each label, or empty for none. output: (n c), receives the loss. gamma: focusing exponent. alpha: weight of
    positives, in [0, 1].
    """
    logits, _, factor = _focal_parts(input, target, weight, alpha)
    output.copy_(-factor * torch.sigmoid(-logits) ** gamma * F.logsigmoid(logits))


@torch.no_grad()
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Write the gradient of `sigmoid_focal_loss_forward` in the logits into `grad_input` (n c)."""
    logits, sign, factor = _focal_parts(input, target, weight, alpha)
    p, rest = torch.sigmoid(logits), torch.sigmoid(-logits)  # 1 - p would round to 0 for large logits
    slope = rest**gamma * (gamma * p * F.logsigmoid(logits) - rest)
    grad_input.copy_(factor * sign * slope)


def _sample_level(value: Tensor, locations: Tensor, attention: Tensor, h: int, w: int) -> Tensor:
    """Compute one level's contribution (b q m*d) to deformable attention; the level has h rows and w columns.

    value: (b h*w m d). locations: (b q m p 2) x y, 0..1 from edge to edge of the image. attention: (b q m p).
    """
    b, _, m, d = value.shape
    q = locations.shape[1]
    maps = value.permute(0, 2, 3, 1).reshape(b * m, d, h, w)
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    mixed = (sampled * attention.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return mixed.view(b, m * d, q).transpose(1, 2)


def _levels(shapes: Tensor) -> list[tuple[int, slice, int, int]]:
    """Return (level, its keys, rows, columns) for each row of `shapes` (l 2).

    Synchronizes if `shapes` is on the GPU, as the host needs the sizes of the maps.
    """
    levels, start = [], 0
    for level, (h, w) in enumerate(shapes.tolist()):
        levels.append((level, slice(start, start + h * w), h, w))
        start += h * w
    return levels


@torch.no_grad()
def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (b q m*d): a weighted sum of bilinear samples, zero outside the map.

    Source: Zhu et al., Deformable DETR, 2021, Eq. 3. Levels are processed in turn, to store the samples of one only.

    value: (b k m d). value_spatial_shapes: (l 2) int64 rows and columns of each level. value_level_start_index: (l,)
    unused, implied by the shapes. sampling_locations: (b q m l p 2) x y, 0..1 from edge to edge of the image.
    attention_weights: (b q m l p). im2col_step: unused, the compiled op's number of images per call.
    """
    keys, locations, attention = common_dtype(value, sampling_locations, attention_weights)
    b, q = locations.shape[:2]
    output = keys.new_zeros(b, q, keys.shape[2] * keys.shape[3])
    for level, span, h, w in _levels(value_spatial_shapes):
        output += _sample_level(keys[:, span], locations[:, :, :, level], attention[:, :, :, level], h, w)
    return output.to(value.dtype)


@torch.no_grad()
def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    *,
    im2col_step: int,
) -> None:
    """Write the gradients of `ms_deform_attn_forward` into `grad_value`, `grad_sampling_loc`, `grad_attn_weight`.

    Each level is recomputed with gradients, which saves memory at the cost of time.
    """
    keys, locations, attention, grad = common_dtype(value, sampling_locations, attention_weights, grad_output)
    for level, span, h, w in _levels(value_spatial_shapes):
        level_keys = keys[:, span].detach().requires_grad_()
        level_locations = locations[:, :, :, level].detach().requires_grad_()
        level_attention = attention[:, :, :, level].detach().requires_grad_()
        with torch.enable_grad():
            output = _sample_level(level_keys, level_locations, level_attention, h, w)
        by_value, by_location, by_attention = torch.autograd.grad(
            output, [level_keys, level_locations, level_attention], grad
        )
        grad_value[:, span] = by_value.to(grad_value.dtype)
        grad_sampling_loc[:, :, :, level] = by_location.to(grad_sampling_loc.dtype)
        grad_attn_weight[:, :, :, level] = by_attention.to(grad_attn_weight.dtype)


def _require_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            "mmcv's roi_align with pool_mode='max' has no PyTorch equivalent in misa: use pool_mode='avg' (the "
            "default), or install mmcv with compiled ops."
        )


@torch.no_grad()
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average pooling of bilinear samples in the bins of each box, by `torchvision.ops.roi_align`.

    input: (b c h w). rois: (n 5) image index, x1 y1 x2 y2. output: (n c aligned_height aligned_width), receives the
    result. argmax_y, argmax_x: unused, for max pooling. spatial_scale: from the boxes' coordinates to those of `input`.
    sampling_ratio: samples per bin and axis, 0 for one per pixel. pool_mode: 1, average. aligned: whether pixel centers
    are at half-integers (True), or at integers as in the first version.
    Raises NotImplementedError: `pool_mode` is 0, max pooling.
    """
    _require_average(pool_mode)
    maps, boxes = common_dtype(input, rois)
    size = (aligned_height, aligned_width)
    output.copy_(torchvision.ops.roi_align(maps, boxes, size, float(spatial_scale), sampling_ratio, bool(aligned)))


@torch.no_grad()
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of `roi_align_forward` in the maps into `grad_input` (b c h w).

    Raises NotImplementedError: `pool_mode` is 0, max pooling.
    """
    _require_average(pool_mode)
    grad, boxes = common_dtype(grad_output, rois)
    # Pooling is linear in the maps, so the gradient does not depend on their values.
    maps = torch.zeros_like(grad_input, dtype=grad.dtype).requires_grad_()
    size = (aligned_height, aligned_width)
    with torch.enable_grad():
        pooled = torchvision.ops.roi_align(maps, boxes, size, float(spatial_scale), sampling_ratio, bool(aligned))
    grad_input.copy_(torch.autograd.grad(pooled, maps, grad)[0])


def get_compiler_version() -> str:
    """Return the text that mmcv reports as the compiler of its ops."""
    return _NO_COMPILER


def get_compiling_cuda_version() -> str:
    """Return the text that mmcv reports as the CUDA version of its ops."""
    return _NO_COMPILER


def __getattr__(name: str) -> Callable[..., Any]:
    """Return a function that raises, for each op not implemented here: `mmcv.ops` looks up all of them on import."""
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"mmcv's compiled op {name!r} has no PyTorch equivalent in misa (misa/mmcv_ext/ops.py): write one there, "
            "choose a model that does without it, or install mmcv with compiled ops."
        )

    missing.__name__ = missing.__qualname__ = name
    return missing
