"""Decode SOLOv2's dense outputs to instances, with memory independent of image size and number of candidates.

mmdet's head upsamples all masks to the whole image at once; here masks stay at the size of the dense feature and are
upsampled one by one, each within its extent. The result is the same.

Axes: p grid cell, all levels concatenated · c category · d channel · n instance · h row · w column.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from mmdet.models.layers import mask_matrix_nms
from torch import Tensor

from misa.data.rle import Part, trimmed

# Only this many top-scoring cells are decoded: in an untrained network nearly all may exceed the score threshold.
_MOST_CELLS = 2000
_ROWS_AT_ONCE = 1024


class Dense(NamedTuple):
    """Network outputs of one image: a kernel per cell (p d), class probabilities (p c), the feature I (d h w)."""

    kernels: Tensor
    scores: Tensor
    features: Tensor


class Found(NamedTuple):
    """Instances of an image: scores (n), labels (n), mask probabilities at the feature's size (n h w)."""

    scores: Tensor
    labels: Tensor
    masks: Tensor


def dense_outputs(outputs: tuple[Sequence[Tensor], Sequence[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate levels of the head's outputs: kernels (b p d), class probabilities (b p c), feature (b d h w).

    The outputs are kernels per level (b d g g), class logits per level (b c g g) and the feature.
    """
    kernels, scores, features = outputs
    return (
        torch.cat([level.flatten(2) for level in kernels], dim=2).transpose(1, 2),
        torch.cat([level.sigmoid().flatten(2) for level in scores], dim=2).transpose(1, 2),
        features,
    )


def each_image(dense: tuple[Tensor, Tensor, Tensor]) -> list[Dense]:
    """Split a batch's dense outputs into images."""
    return [Dense(*image) for image in zip(*dense, strict=True)]


def peaks(scores: Float[Tensor, "p c"], grids: Sequence[int]) -> Float[Tensor, "p c"]:
    """Set scores to 0 in cells that are below a neighbor to the left or above (SOLOv2's points NMS)."""
    kept = []
    for level, grid in zip(scores.split([grid * grid for grid in grids]), grids, strict=True):
        square = level.T.reshape(1, -1, grid, grid)
        best = F.max_pool2d(square, 2, stride=1, padding=1)[:, :, :-1, :-1]
        kept.append((square * (best == square)).flatten(2)[0].T)
    return torch.cat(kept)


def decode(
    dense: Dense, *, grids: Sequence[int], strides: Sequence[int], score: float, keep: float, mask: float,
    candidates: int, per_image: int,
) -> Found:  # fmt: skip
    """Return the instances of an image, as mmdet's SOLOV2Head: matrix NMS with a Gaussian of sigma 2.

    score: threshold of a cell's class probability; keep: of the score after NMS; mask: of the foreground probability;
    candidates, per_image: maximum number of instances before and after NMS.
    """
    cells, labels = (peaks(dense.scores, grids) > score).nonzero(as_tuple=True)
    scores = dense.scores[cells, labels]
    if len(scores) > _MOST_CELLS:
        chosen = scores.topk(_MOST_CELLS).indices.sort().values
        cells, labels, scores = cells[chosen], labels[chosen], scores[chosen]
    masks = cell_masks(dense, cells)
    strided = torch.cat([masks.new_full((grid * grid,), float(s)) for grid, s in zip(grids, strides, strict=True)])
    shapes = masks > mask
    areas = shapes.sum(dim=(1, 2)).float()
    large = areas > strided[cells]  # fewer pixels than the level's stride are noise
    masks, shapes, areas, scores, labels = (x[large] for x in (masks, shapes, areas, scores, labels))
    if len(scores) == 0:
        return Found(scores, labels, masks)
    scores = scores * (masks * shapes).sum(dim=(1, 2)) / areas  # mean foreground probability of the mask
    scores, labels, _, chosen = mask_matrix_nms(
        shapes, labels, scores, mask_area=areas, nms_pre=candidates, max_num=per_image, sigma=2.0, filter_thr=keep
    )
    return Found(scores, labels, masks[chosen])


def cell_masks(dense: Dense, cells: Int[Tensor, " n"]) -> Float[Tensor, "n h w"]:
    """The mask probabilities of some cells (Eq. 2)."""
    h, w = dense.features.shape[-2:]
    return (dense.kernels[cells] @ dense.features.flatten(1)).view(-1, h, w).sigmoid()


class Enlargement(NamedTuple):
    """Resizing of a map (h w) from the feature's size to the image's: `rows` (H h) @ map @ `columns` (W w).T."""

    rows: Tensor
    columns: Tensor


def enlargement(
    feature: tuple[int, int], *, stride: int, resized: tuple[int, int], original: tuple[int, int], like: Tensor
) -> Enlargement:
    """mmdet's two bilinear steps: to the padded input, whose padding is cut off, then to the original size.

    Bilinear interpolation is separable into rows and columns, so that a part of the result can be computed alone.
    """
    return Enlargement(
        *(
            _weights(low, low * stride, inside, whole, like)
            for low, inside, whole in zip(feature, resized, original, strict=True)
        )
    )


def _weights(low: int, padded: int, inside: int, whole: int, like: Tensor) -> Tensor:
    identity = torch.eye(low, dtype=like.dtype, device=like.device)[None]
    fine = F.interpolate(identity, size=padded, mode="linear", align_corners=False)[:, :, :inside]
    return F.interpolate(fine, size=whole, mode="linear", align_corners=False)[0].T


def enlarge(masks: Iterable[Float[Tensor, "h w"]], by: Enlargement, threshold: float) -> Iterable[Part]:
    """Upsample masks to the image's size and binarize them at `threshold`; an empty mask gives an empty part."""
    for mask in masks:
        sure = mask > threshold
        # An interpolated value exceeds the threshold only if one of its pixels does.
        rows, columns = _reached(by.rows, sure.any(dim=1)), _reached(by.columns, sure.any(dim=0))
        low = mask @ by.columns[columns].T
        chunks = [(weights @ low > threshold).cpu() for weights in by.rows[rows].split(_ROWS_AT_ONCE)]
        yield trimmed(rows.start, columns.start, torch.cat(chunks).numpy())


def _reached(weights: Tensor, sure: Tensor) -> slice:
    """The span of output pixels that depend on an input pixel above the threshold."""
    touched = (weights @ sure.to(weights.dtype) > 0).nonzero()
    return slice(0, 0) if len(touched) == 0 else slice(int(touched[0]), int(touched[-1]) + 1)
