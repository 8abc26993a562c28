"""The neighborhood 𝒩 of Eq. 7–14 on the pixel grid.

Axes: b image · d channel · k neighbor · h row · w column. A neighbor is an offset (row, column); pixels
outside the image are marked by a mask, never by a special color.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

Offset = tuple[int, int]


def window_offsets(window: int, dilation: int | Sequence[int] = 1, *, centre: bool = False) -> list[Offset]:
    """Return the offsets of a square window, row by row, once per dilation; with `centre`, (0, 0) comes first.

    >>> window_offsets(3)
    [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window_offsets needs an odd window so that it has a center: window is {window}.")
    dilations = [dilation] if isinstance(dilation, int) else list(dilation)
    if not dilations or min(dilations) < 1:
        raise ValueError(f"window_offsets needs dilations of one pixel or more: dilation is {dilation}.")
    reach = range(-(window // 2), window // 2 + 1)
    ring = [(dy * step, dx * step) for step in dilations for dy in reach for dx in reach if (dy, dx) != (0, 0)]
    return [(0, 0), *ring] if centre else ring


def shift(values: Shaped[Tensor, "... h w"], offset: Offset) -> Shaped[Tensor, "... h w"]:
    """Return at each pixel the value of its neighbor at `offset`; 0 where that neighbor is outside the image."""
    h, w = values.shape[-2:]
    dy, dx = offset
    shifted = torch.zeros_like(values)
    if abs(dy) < h and abs(dx) < w:
        rows, columns = slice(max(-dy, 0), h - max(dy, 0)), slice(max(-dx, 0), w - max(dx, 0))
        from_rows, from_columns = slice(max(dy, 0), h + min(dy, 0)), slice(max(dx, 0), w + min(dx, 0))
        shifted[..., rows, columns] = values[..., from_rows, from_columns]
    return shifted


def inside(
    h: int, w: int, offsets: Sequence[Offset], *, device: torch.device | str | None = None
) -> Bool[Tensor, "k {h} {w}"]:
    """Return whether the neighbor at each offset lies in the image."""
    rows, columns = torch.arange(h, device=device)[:, None], torch.arange(w, device=device)[None, :]
    every = [(rows + dy >= 0) & (rows + dy < h) & (columns + dx >= 0) & (columns + dx < w) for dy, dx in offsets]
    return torch.stack(every) if every else torch.empty(0, h, w, dtype=torch.bool, device=device)
