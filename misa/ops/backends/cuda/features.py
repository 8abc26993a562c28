"""Squared distances of a map to its neighbors for many rows of factors, at one reading of the map (Eq. 8, 12)."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from misa.ops.backends.cuda.works import block, table
from misa.ops.neighbors import Offset


@triton.jit
def _distances(
    values, squares, offsets, out, rows, channels, many, h, w, C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Σ_d squares_qd (v_d(i) − v_d(i + offset_k))² for C rows q, K offsets and BLOCK pixels i."""
    p = h * w
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q = tl.program_id(1) * C + tl.arange(0, C)
    k = tl.program_id(2) * K + tl.arange(0, K)
    dy = tl.load(offsets + 2 * k, mask=k < many, other=0)[:, None]
    dx = tl.load(offsets + 2 * k + 1, mask=k < many, other=0)[:, None]
    y, x = (i // w)[None, :] + dy, (i % w)[None, :] + dx
    there = (i < p)[None, :] & (k < many)[:, None] & (y >= 0) & (y < h) & (x >= 0) & (x < w)
    j = y * w + x
    total = tl.zeros((C, K, BLOCK), dtype=tl.float32)
    for d in range(channels):
        here = tl.load(values + i, mask=i < p, other=0.0)
        difference = tl.load(values + j, mask=there, other=0.0) - here[None, :]
        square = tl.load(squares + q * channels + d, mask=q < rows, other=0.0)
        total += square[:, None, None] * (difference * difference)[None, :, :]
        values += p
    at = (q.to(tl.int64)[:, None, None] * many + k[None, :, None]) * p + i[None, None, :]
    tl.store(out + at, total, mask=(q < rows)[:, None, None] & there[None, :, :])


def distances(
    values: Float[Tensor, "d h w"],
    squares: Float[Tensor, "q d"],
    offsets: Sequence[Offset],
    out: Float[Tensor, "q k h w"] | None = None,
) -> Float[Tensor, "q k h w"]:
    """Squared distances of every pixel to its neighbor at each offset; 0, or what `out` holds, where there is none."""
    d, h, w = values.shape
    q, k = len(squares), len(offsets)
    if out is None:
        out = torch.zeros(q, k, h, w, device=values.device)
    if q * k * h * w > 0:
        few, some = min(4, triton.next_power_of_2(q)), min(16, triton.next_power_of_2(k))
        size = block(32, h * w)
        grid = (triton.cdiv(h * w, size), triton.cdiv(q, few), triton.cdiv(k, some))
        where = table(offsets, values)
        _distances[grid](
            values.contiguous(), squares.contiguous(), where, out, q, d, k, h, w, C=few, K=some, BLOCK=size
        )  # fmt: skip
    return out


@triton.jit
def _moments(values, out, channels, p, BLOCK: tl.constexpr):
    """The sums of v_d and v_d² over a block of pixels."""
    d = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(values + d.to(tl.int64) * p + i, mask=i < p, other=0.0).to(tl.float64)
    at = out + (tl.program_id(0) * channels + d) * 2
    tl.store(at, tl.sum(v, axis=0))
    tl.store(at + 1, tl.sum(v * v, axis=0))


def feature_lengths(features: Float[Tensor, "d h w"], factors: Float[Tensor, "c d"]) -> tuple[Tensor, Tensor]:
    """Squared distances of K^c · S along the grid edges (c m), and the sums of S_d and S_d² (d 2)."""
    d, h, w = features.shape
    features = features.contiguous()
    size = block(4096, h * w)
    parts = torch.empty(triton.cdiv(h * w, size), d, 2, dtype=torch.float64, device=features.device)
    _moments[(len(parts), d)](features, parts, d, h * w, BLOCK=size)
    down, right = distances(features, factors.square(), [(1, 0), (0, 1)]).unbind(dim=1)
    return torch.cat([down[:, :-1].flatten(1), right[:, :, :-1].flatten(1)], dim=1), parts.sum(dim=0)
