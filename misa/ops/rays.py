"""PolarMask's shapes: a location and its distances to the contour along 36 rays.

Axes: t contour point · n location · k ray. Points are (x, y) in pixels. Ray k is at 10k degrees counterclockwise from
straight down: ray 0 down (+y), ray 9 to the right (+x).
"""

import math
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.ops.axes import check_shapes

RAYS = 36
SHORTEST = 1e-6  # length of a ray that meets no contour
BINS = (0, 1, -1, 2, -2, 3, -3)  # degrees off the ray, in the published code's order of search


def contour(mask: Bool[Tensor, "h w"]) -> Int[Tensor, "t 2"]:
    """Return the border pixels, in order, of the connected component with the largest outer contour; on the CPU.

    Other components and holes are ignored, as in PolarMask (Xie et al. 2020). An empty mask has no points.
    """
    if mask.dim() != 2:
        raise ValueError(f"contour needs a mask of shape (h, w): it is {tuple(mask.shape)}.")
    pixels = np.ascontiguousarray(mask.cpu().numpy().astype(np.uint8))
    outlines, _ = cv2.findContours(pixels, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return torch.zeros(0, 2, dtype=torch.long)
    largest = max(outlines, key=cv2.contourArea)
    return torch.from_numpy(largest[:, 0].astype(np.int64))


def centre(points: Int[Tensor, "t 2"]) -> Float[Tensor, " 2"]:
    """Return the centroid of a contour's polygon, or of its points if the area is 0, truncated to whole pixels.

    Raises ValueError: no points.
    """
    if points.dim() != 2 or points.shape[1] != 2 or len(points) == 0:
        raise ValueError(f"centre needs a contour of shape (t, 2) with a point or more: it is {tuple(points.shape)}.")
    here = points.double()
    x, y = here.unbind(dim=1)
    after_x, after_y = here.roll(-1, dims=0).unbind(dim=1)
    cross = x * after_y - after_x * y
    if cross.sum() == 0:
        return here.mean(dim=0).trunc().float()
    both = torch.stack([((x + after_x) * cross).sum(), ((y + after_y) * cross).sum()]) / (3 * cross.sum())
    return both.trunc().float()


def ray_lengths(
    points: Int[Tensor, "t 2"], centres: Float[Tensor, "n 2"], *, rule: Literal["official", "cast"] = "official"
) -> Float[Tensor, "n 36"]:
    """Return the distance from each center to the contour along each ray, in pixels; 1e-6 where it meets none.

    "official" is PolarMask's published rule, which casts no rays: the farthest contour pixel whose direction, in whole
    degrees, is the ray's, else that of the first non-empty bin 1, −1, 2, −2, 3 or −3 degrees off. Ray 0 does not use
    359 … 357. Small objects leave rays without a pixel: 24 of 36 for a disc of radius 5. "cast" is the farthest
    intersection of the ray with the contour's polygon.
    """
    check_shapes("ray_lengths", points=(points, "t 2"), centres=(centres, "n 2"))
    if rule not in ("official", "cast"):
        raise ValueError(f"ray_lengths knows the rules 'official' and 'cast', not {rule!r}.")
    if len(points) == 0 or len(centres) == 0:
        return torch.full((len(centres), RAYS), SHORTEST)
    away = points.double()[None] - centres.double()[:, None]
    return (_binned(away) if rule == "official" else _cast(away)).float().clamp(min=SHORTEST)


def _binned(away: Float[Tensor, "n t 2"]) -> Float[Tensor, "n 36"]:
    """Return the farthest point of every ray's first non-empty bin of one degree; −1 if all seven are empty."""
    angle = torch.rad2deg(torch.atan2(away[..., 0], away[..., 1])) % 360
    degree = angle.long().clamp(max=359)
    farthest = torch.full((len(away), 360 + 6), -1.0, dtype=away.dtype)  # three empty bins before 0 and after 359
    farthest.scatter_reduce_(1, degree + 3, away.norm(dim=2), "amax")
    lengths = torch.full((len(away), RAYS), -1.0, dtype=away.dtype)
    for offset in reversed(BINS):
        found = farthest[:, 3 + offset : 3 + offset + 360 : 360 // RAYS]
        lengths = torch.where(found >= 0, found, lengths)
    return lengths


def _cast(away: Float[Tensor, "n t 2"]) -> Float[Tensor, "n 36"]:
    """Return the farthest intersection of each ray with the closed polygon; −1 if there is none."""
    direction = _directions(away.dtype)
    along = torch.einsum("ntc,kc->nkt", away, direction)
    across = torch.einsum("ntc,kc->nkt", away, torch.stack([direction[:, 1], -direction[:, 0]], dim=1))
    across = torch.where(across.abs() < SHORTEST, 0, across)
    along_next, across_next = along.roll(-1, dims=2), across.roll(-1, dims=2)
    crosses = across * across_next < 0
    part = across / torch.where(crosses, across - across_next, 1)
    distance = torch.where(crosses, along + part * (along_next - along), -1)
    distance = torch.where(across == 0, distance.maximum(along), distance)  # a corner, or a side along the ray
    return distance.amax(dim=2)


def polygons(centres: Float[Tensor, "n 2"], lengths: Float[Tensor, "n 36"]) -> Float[Tensor, "n 36 2"]:
    """Return the ends of the rays, (x + d sin 10k°, y + d cos 10k°): the mask's polygon."""
    check_shapes("polygons", centres=(centres, "n 2"), lengths=(lengths, f"n {RAYS}"))
    return centres[:, None] + lengths[..., None] * _directions(lengths.dtype).to(lengths.device)


def _directions(dtype: torch.dtype) -> Float[Tensor, "36 2"]:
    angle = torch.arange(RAYS, dtype=torch.float64) * (2 * math.pi / RAYS)
    return torch.stack([angle.sin(), angle.cos()], dim=1).to(dtype)
