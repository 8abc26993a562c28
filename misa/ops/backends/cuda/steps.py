"""The window propagation on CUDA as one Triton kernel per step; everything else there is torch operations."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor


@triton.jit
def _step(now, then, weights, box, group, offsets, h, w, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr):
    n = tl.program_id(2).to(tl.int64)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    p = h * w
    at = y * w + x
    present = (y < h) & (x < w)
    inside = tl.load(box + n * p + at, mask=present, other=0.0)
    if tl.max(tl.abs(inside)) > 0:  # outside the box both buffers hold 0 for good
        plane = weights + tl.load(group + n) * K * p
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in tl.static_range(K):
            dy = tl.load(offsets + 2 * k)
            dx = tl.load(offsets + 2 * k + 1)
            there = present & (y + dy >= 0) & (y + dy < h) & (x + dx >= 0) & (x + dx < w)
            weight = tl.load(plane + k * p + at, mask=there, other=0.0)
            total += weight * tl.load(now + n * p + at + dy * w + dx, mask=there, other=0.0)
        tl.store(then + n * p + at, total * inside, mask=present)


def propagate_window(
    masks: Float[Tensor, "n h w"],
    boxes: Float[Tensor, "n h w"] | None,
    weights: Float[Tensor, "g k h w"],
    group: Int[Tensor, " n"],
    offsets: Sequence[tuple[int, int]],
    steps: int,
) -> Float[Tensor, "n h w"]:
    """Eq. 14 `steps` times: a weighted mean of the neighbors, then the box."""
    n, h, w = masks.shape
    box = torch.ones_like(masks) if boxes is None else boxes.contiguous()
    now = (masks * box).contiguous()
    then = torch.zeros_like(now)
    table = torch.tensor(list(offsets), dtype=torch.int32).to(masks.device, non_blocking=True)
    rows, columns = 4, 64
    grid = (-(-w // columns), -(-h // rows), n)
    for _ in range(steps):
        _step[grid](
            now, then, weights, box, group, table, h, w, ROWS=rows, COLUMNS=columns, K=len(offsets), num_warps=4
        )  # fmt: skip
        now, then = then, now
    return now
