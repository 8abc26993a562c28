"""Boxes as masks on a feature map (Eq. 5), and their assignment to grid cells (SOLOv2).

Axes: n instance · h row · w column. Boxes are (x1, y1, x2, y2) in pixels of the network input.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def box_masks(boxes: Float[Tensor, "n 4"], h: int, w: int, *, stride: int = 1) -> Bool[Tensor, "n {h} {w}"]:
    """Return each box as a mask on `h` x `w` cells of `stride` pixels: a cell is inside if its center is.

    A box that contains no cell's center gets the cell that contains its own center, so no box vanishes.
    """
    x1, y1, x2, y2 = (boxes / stride).unbind(-1)
    columns = _span(x1, x2, w)
    rows = _span(y1, y2, h)
    return rows[:, :, None] & columns[:, None, :]


def centers_within(length: float, stride: float) -> int:
    """Number of the cells of `stride` pixels whose center is within `length` pixels, as `box_masks` decides it.

    >>> centers_within(22, 4), centers_within(23, 4)
    (5, 6)
    """
    return max(math.ceil(length / stride - 0.5), 0)


def _span(low: Float[Tensor, " n"], high: Float[Tensor, " n"], size: int) -> Bool[Tensor, "n {size}"]:
    center = torch.arange(size, device=low.device) + 0.5
    inside = (center >= low[:, None]) & (center < high[:, None])
    middle = ((low + high) / 2).floor().clamp(0, size - 1)
    nearest = (center - 0.5) == middle[:, None]
    return torch.where(inside.any(-1, keepdim=True), inside, nearest)


def extents(masks: Float[Tensor, "n h w"]) -> Float[Tensor, "n 4"]:
    """Return the bounding boxes of the pixels above 0.5, in cells; all 0 for an empty mask."""
    sure, bounds = masks > 0.5, []
    for axis in (1, 2):  # columns, then rows
        there = sure.any(dim=axis)
        place = torch.arange(there.shape[1], device=masks.device)
        last = torch.where(there, place + 1, 0).amax(dim=1)
        bounds.append((torch.where(there, place, there.shape[1]).amin(dim=1).minimum(last), last))
    (x1, x2), (y1, y2) = bounds
    return torch.stack([x1, y1, x2, y2], dim=1).to(masks.dtype)


def positive_cells(
    boxes: Float[Tensor, "n 4"],
    size: tuple[int, int],
    grid: int,
    scale_range: tuple[float, float],
    *,
    shrink: float = 0.2,
) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """Return the positive cells of each box on one level's `grid` x `grid`, as (instance, cell) pairs.

    SOLOv2 (Wang et al. 2020): a box whose sqrt(area) lies in `scale_range` is assigned to the cells that its
    center region (the box scaled by `shrink`) touches, at most 3 x 3 around the center's cell. `size` is
    the (height, width) of the padded network input. Cells are row * grid + column.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    area = ((x2 - x1) * (y2 - y1)).sqrt()
    chosen = (area >= scale_range[0]) & (area <= scale_range[1])
    rows = _near(y1, y2, size[0], grid, shrink)
    columns = _near(x1, x2, size[1], grid, shrink)
    fires = chosen[:, None, None] & rows[:, :, None] & columns[:, None, :]
    instance, row, column = fires.nonzero(as_tuple=True)
    return instance, row * grid + column


def centre_cells(
    boxes: Float[Tensor, "n 4"],
    size: tuple[int, int],
    grids: Sequence[int],
    scale_ranges: Sequence[tuple[float, float]],
) -> Int[Tensor, " n"]:
    """Return one cell per box, as an index into all levels' cells concatenated.

    DiscoBox (Lan et al. 2021): the cell of the box's center, on the level whose range has its geometric mean closest
    in ratio to sqrt(area). It need not be among the `positive_cells`.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    scale = ((x2 - x1) * (y2 - y1)).clamp(min=1e-6).sqrt().log()
    middle = boxes.new_tensor([(low * high) ** 0.5 for low, high in scale_ranges]).log()
    level = (scale[:, None] - middle).abs().argmin(dim=1)
    grid = torch.tensor(grids, device=boxes.device)
    start = (grid * grid).cumsum(0) - grid * grid
    row, column = (
        ((low + high) / 2 / side * grid[level]).floor().long().clamp(min=0).minimum(grid[level] - 1)
        for low, high, side in ((y1, y2, size[0]), (x1, x2, size[1]))
    )
    return start[level] + row * grid[level] + column


def _near(
    low: Float[Tensor, " n"], high: Float[Tensor, " n"], size: int, grid: int, shrink: float
) -> Bool[Tensor, "n {grid}"]:
    center, half = (low + high) / 2, (high - low) / 2 * shrink
    cell = torch.arange(grid, device=low.device)
    first, middle, last = ((c / size * grid).floor()[:, None] for c in (center - half, center, center + half))
    return (cell >= torch.maximum(first, middle - 1)) & (cell <= torch.minimum(last, middle + 1))
