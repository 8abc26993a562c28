"""DiscoBox's object bank (Lan et al. 2021): objects of earlier steps to match with those of the current one.

Axes: m object · k object of the bank · c channel · s side of the feature grid · u side of a mask. Boxes are in cells of
the masks' map.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.ops import roi_align

from misa.ops.boxes import extents


class Objects(NamedTuple):
    """Features and masks of objects, cropped to their boxes.

    features: 0 or more, of norm 1 in each cell. masks: probabilities. aspect: width / height; 0 in an empty slot.
    """

    features: Float[Tensor, "m c s s"]
    masks: Float[Tensor, "m u u"]
    aspect: Float[Tensor, " m"]


def objects_in(
    finest: Float[Tensor, "b c H W"],
    masks: Float[Tensor, "m h w"],
    box_masks: Bool[Tensor, "m h w"],
    image: Int[Tensor, " m"],
    *,
    grid: int = 7,
    side: int = 28,
) -> Objects:
    """Crop features and masks to the boxes by RoIAlign (He et al. 2017), to `grid` and `side` cells a side.

    `finest`, the features, covers the same area as the masks, at any stride. Features pass a ReLU and are divided by
    sqrt(Σ f² + 1e-6) + 1e-6. The gradient flows into both maps.
    Raises ValueError: shapes do not fit.
    """
    if masks.dim() != 3 or masks.shape != box_masks.shape or image.shape != masks.shape[:1] or finest.dim() != 4:
        raise ValueError(
            "objects_in needs finest (b, c, H, W), masks and box_masks (m, h, w) and the image of each: they are "
            f"{tuple(finest.shape)}, {tuple(masks.shape)}, {tuple(box_masks.shape)} and {tuple(image.shape)}."
        )
    boxes = extents(box_masks.to(masks.dtype))
    place = image.to(masks.device, non_blocking=True).to(masks.dtype)
    own = torch.arange(len(masks), device=masks.device, dtype=masks.dtype)
    rows = [torch.cat([which[:, None], boxes], dim=1) for which in (place, own)]
    scale = finest.shape[-1] / masks.shape[-1]
    features = roi_align(finest, rows[0], grid, spatial_scale=scale, sampling_ratio=0, aligned=True).relu()
    cut = roi_align(masks[:, None], rows[1], side, sampling_ratio=0, aligned=True)[:, 0]
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    norm = (features.square().sum(dim=1, keepdim=True) + 1e-6).sqrt() + 1e-6
    return Objects(features / norm, cut, (x2 - x1) / (y2 - y1))


@torch.no_grad()
def alike(one: Objects, bank: Objects) -> Bool[Tensor, " k"]:
    """Return which objects of the bank match one object (without the axis m), by DiscoBox's four rules.

    The masks, and their complements, overlap: Σ a b / |a + b >= 1| > 0.7. Features inside both masks agree:
    Σ f_a f_b m_a m_b / Σ m_a m_b > 0.7, with the masks resized to the features. The ratio of the aspects, one / bank,
    is in [0.9, 1.2]. An empty slot never matches.
    """
    grid = bank.features.shape[-2:]

    def overlap(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=(1, 2)) / ((a + b) >= 1).sum(dim=(1, 2)).clamp(min=1)

    def small(masks: Tensor) -> Tensor:
        return F.interpolate(masks[:, None], size=grid, mode="bilinear", align_corners=False)[:, 0]

    both = small(one.masks[None]) * small(bank.masks)
    appearance = ((one.features * bank.features).sum(dim=1) * both).sum(dim=(1, 2)) / (both.sum(dim=(1, 2)) + 1e-6)
    aspect = one.aspect / bank.aspect
    return (
        (overlap(one.masks[None], bank.masks) > 0.7)
        & (overlap(1 - one.masks[None], 1 - bank.masks) > 0.7)
        & (appearance > 0.7)
        & (aspect >= 0.9)
        & (aspect <= 1.2)
    )


def first(hits: Bool[Tensor, " k"], count: int) -> tuple[Int[Tensor, " {count}"], Bool[Tensor, ""]]:
    """Return the first `count` indices of hits, padded with indices of non-hits, and whether there are enough hits."""
    if not 1 <= count <= len(hits):
        raise ValueError(f"first needs a count of 1 to {len(hits)}, the number of places: it is {count}.")
    order = torch.arange(len(hits), device=hits.device)
    found = torch.where(hits, order, order + len(hits)).topk(count, largest=False).values
    return found % len(hits), hits.sum() >= count


def ring_slots(
    labels: Int[Tensor, " m"], keep: Bool[Tensor, " m"], filled: Int[Tensor, " classes"], size: int
) -> tuple[Int[Tensor, " m"], Int[Tensor, " classes"]]:
    """Return each object's slot in a ring buffer of `size` slots per class, and the updated counts per class.

    Slots are label · size + position. Objects not in `keep`, and those that later ones of the same call overwrite, get
    the spare slot after the last. `filled` counts the objects of each class so far.
    """
    chosen = (labels[:, None] == torch.arange(len(filled), device=labels.device)) & keep[:, None]
    turn = chosen.long().cumsum(dim=0).gather(1, labels[:, None])[:, 0] - 1
    total = chosen.sum(dim=0)
    stays = keep & (turn >= total[labels] - size)
    slot = labels * size + (filled[labels] + turn) % size
    return torch.where(stays, slot, len(filled) * size), filled + total


def put_back(values: Float[Tensor, "m d u u"], box_masks: Bool[Tensor, "m h w"]) -> Float[Tensor, "m d h w"]:
    """Resize values (u u) bilinearly into their boxes on the full map; 0 outside the boxes. Inverts the crop."""
    h, w = box_masks.shape[1:]
    x1, y1, x2, y2 = extents(box_masks.to(values.dtype)).unbind(dim=1)
    x = (torch.arange(w, device=values.device) + 0.5 - x1[:, None]) / (x2 - x1)[:, None] * 2 - 1
    y = (torch.arange(h, device=values.device) + 0.5 - y1[:, None]) / (y2 - y1)[:, None] * 2 - 1
    where = torch.stack([x[:, None].expand(-1, h, w), y[:, :, None].expand(-1, h, w)], dim=3)
    stretched = F.grid_sample(values, where, mode="bilinear", padding_mode="border", align_corners=False)
    return stretched * box_masks[:, None]
