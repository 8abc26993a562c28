"""Objects of earlier steps that look like one of this step: DiscoBox's object bank (Lan et al. 2021).

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
    """What is compared of objects, each within its box.

    features: of 0 or more, a cell's of length 1. masks: probabilities. aspect: width / height; 0 in an empty slot.
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
    """Features and masks in the boxes by RoIAlign (He et al. 2017), on grids of `grid` and `side` cells.

    `finest` covers the same area as the masks, at any stride. Features pass a ReLU and are divided by
    sqrt(Σ f² + 1e-6) + 1e-6. The gradient flows into both maps.

    Raises:
        ValueError: shapes do not fit.
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
    """Which objects of the bank look like this one (without the axis m), by DiscoBox's four rules.

    Masks overlap, as object and as background: Σ a b / |a + b >= 1| > 0.7. Where both masks are, features are alike:
    Σ f_a f_b m_a m_b / Σ m_a m_b > 0.7, masks at the size of the features. (w/h) of this one / that one is in
    [0.9, 1.2]. An empty slot is like nothing.
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
    """The first `count` places that are hit, and whether there are as many; places that are not fill up."""
    if not 1 <= count <= len(hits):
        raise ValueError(f"first needs a count of 1 to {len(hits)}, the number of places: it is {count}.")
    order = torch.arange(len(hits), device=hits.device)
    found = torch.where(hits, order, order + len(hits)).topk(count, largest=False).values
    return found % len(hits), hits.sum() >= count


def ring_slots(
    labels: Int[Tensor, " m"], keep: Bool[Tensor, " m"], filled: Int[Tensor, " classes"], size: int
) -> tuple[Int[Tensor, " m"], Int[Tensor, " classes"]]:
    """Where objects go in a ring of `size` slots a class, which holds the newest; and how many each class has had.

    Slots are label · size + turn; objects that are not kept, and those that later ones of the same call would replace,
    go to the slot after the last. `filled` is how many each class had before.
    """
    chosen = (labels[:, None] == torch.arange(len(filled), device=labels.device)) & keep[:, None]
    turn = chosen.long().cumsum(dim=0).gather(1, labels[:, None])[:, 0] - 1
    total = chosen.sum(dim=0)
    stays = keep & (turn >= total[labels] - size)
    slot = labels * size + (filled[labels] + turn) % size
    return torch.where(stays, slot, len(filled) * size), filled + total


def put_back(values: Float[Tensor, "m d u u"], box_masks: Bool[Tensor, "m h w"]) -> Float[Tensor, "m d h w"]:
    """Values that are stretched over a box, bilinearly, on the map that the boxes are on; 0 outside the boxes."""
    h, w = box_masks.shape[1:]
    x1, y1, x2, y2 = extents(box_masks.to(values.dtype)).unbind(dim=1)
    x = (torch.arange(w, device=values.device) + 0.5 - x1[:, None]) / (x2 - x1)[:, None] * 2 - 1
    y = (torch.arange(h, device=values.device) + 0.5 - y1[:, None]) / (y2 - y1)[:, None] * 2 - 1
    where = torch.stack([x[:, None].expand(-1, h, w), y[:, :, None].expand(-1, h, w)], dim=3)
    stretched = F.grid_sample(values, where, mode="bilinear", padding_mode="border", align_corners=False)
    return stretched * box_masks[:, None]
