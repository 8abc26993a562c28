"""Squared distances of a map to its neighbors for many rows of factors, at one reading of the map (Eq. 8, 12)."""

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.ops.backends.cuda.works import block, table


@triton.jit
def _distances(
    values,
    valid,
    squares,
    offsets,
    out,
    PADDED: tl.constexpr,
    rows,
    channels,
    many,
    h,
    w,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ_d squares_qd (v_d(i) − v_d(i + offset_k))² for C rows q, K offsets and BLOCK pixels i; v is 0 at padding."""
    p = h * w
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q = tl.program_id(1) * C + tl.arange(0, C)
    k = tl.program_id(2) * K + tl.arange(0, K)
    dy = tl.load(offsets + 2 * k, mask=k < many, other=0)[:, None]
    dx = tl.load(offsets + 2 * k + 1, mask=k < many, other=0)[:, None]
    y, x = (i // w)[None, :] + dy, (i % w)[None, :] + dx
    there = (i < p)[None, :] & (k < many)[:, None] & (y >= 0) & (y < h) & (x >= 0) & (x < w)
    j = y * w + x
    mine, its = i < p, there
    if PADDED:
        mine = mine & (tl.load(valid + i, mask=mine, other=0) != 0)
        its = its & (tl.load(valid + j, mask=its, other=0) != 0)
    total = tl.zeros((C, K, BLOCK), dtype=tl.float32)
    for d in range(channels):
        here = tl.load(values + i, mask=mine, other=0.0)
        difference = tl.load(values + j, mask=its, other=0.0) - here[None, :]
        square = tl.load(squares + q * channels + d, mask=q < rows, other=0.0)
        total += square[:, None, None] * (difference * difference)[None, :, :]
        values += p
    at = (q.to(tl.int64)[:, None, None] * many + k[None, :, None]) * p + i[None, None, :]
    tl.store(out + at, total, mask=(q < rows)[:, None, None] & there[None, :, :])


def distances(
    values: Float[Tensor, "d h w"],
    squares: Float[Tensor, "q d"],
    offsets: Int[Tensor, "k 2"],
    out: Float[Tensor, "q k h w"],
    valid: Bool[Tensor, "h w"] | None = None,
) -> None:
    """Squared distances of every pixel to its neighbor at each offset, written where there is one."""
    d, h, w = values.shape
    q, k = len(squares), len(offsets)
    if q * k * h * w > 0:
        few, some = min(4, triton.next_power_of_2(q)), min(16, triton.next_power_of_2(k))
        size = block(32, h * w)
        grid = (triton.cdiv(h * w, size), triton.cdiv(q, few), triton.cdiv(k, some))
        there = out if valid is None else valid.contiguous().view(torch.int8)
        _distances[grid](
            values.contiguous(), there, squares.contiguous(), offsets, out, valid is not None, q, d, k, h, w,
            C=few, K=some, BLOCK=size,
        )  # fmt: skip


@triton.jit
def _moments(values, valid, out, p, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of 1, v_d and v_d² over the valid pixels of a block."""
    d, part = tl.program_id(1), tl.program_id(0)
    i = part * BLOCK + tl.arange(0, BLOCK)
    ok = i < p
    if PADDED:
        ok = ok & (tl.load(valid + i, mask=ok, other=0) != 0)
    v = tl.load(values + d.to(tl.int64) * p + i, mask=ok, other=0.0).to(tl.float64)
    at = out + (part * tl.num_programs(1) + d) * 3
    tl.store(at, tl.sum(ok.to(tl.float64), axis=0))
    tl.store(at + 1, tl.sum(v, axis=0))
    tl.store(at + 2, tl.sum(v * v, axis=0))


@triton.jit
def _variance(parts, factors, out, many, channels, BLOCK: tl.constexpr):
    """E (K S)² − (E K S)² over channels and pixels, of one row of factors."""
    c = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    ok = d < channels
    count = tl.zeros((BLOCK,), dtype=tl.float64)
    first = tl.zeros((BLOCK,), dtype=tl.float64)
    second = tl.zeros((BLOCK,), dtype=tl.float64)
    for _ in range(many):
        count += tl.load(parts + 3 * d, mask=ok, other=0.0)
        first += tl.load(parts + 3 * d + 1, mask=ok, other=0.0)
        second += tl.load(parts + 3 * d + 2, mask=ok, other=0.0)
        parts += 3 * channels
    k = tl.load(factors + c * channels + d, mask=ok, other=0.0).to(tl.float64)
    count = tl.maximum(count, 1.0)
    mean = tl.sum(k * first / count, axis=0) / channels
    square = tl.sum(k * k * second / count, axis=0) / channels
    difference = square - mean * mean
    tl.store(out + c, tl.where(difference < 0, 0.0, difference).to(tl.float32))  # NaN stays


def lengths_and_variance(
    features: Float[Tensor, "d h w"], factors: Float[Tensor, "c d"], valid: Bool[Tensor, "h w"] | None
) -> tuple[Float[Tensor, "c m"], Float[Tensor, " c"]]:
    """Squared distances of K^c · S along the grid edges, and σ² of K^c · S over the channels of valid pixels."""
    (d, h, w), c = features.shape, len(factors)
    features, factors = features.float().contiguous(), factors.float().contiguous()
    size = block(4096, h * w)
    parts = torch.empty(triton.cdiv(h * w, size), d, 3, dtype=torch.float64, device=features.device)
    there = parts if valid is None else valid.contiguous().view(torch.int8)
    _moments[(len(parts), d)](features, there, parts, h * w, valid is not None, BLOCK=size)
    squared = torch.empty(c, device=features.device)
    _variance[(c,)](parts, factors, squared, len(parts), d, BLOCK=triton.next_power_of_2(d))
    near = torch.empty(c, 2, h, w, device=features.device)
    distances(features, factors.square(), table([(1, 0), (0, 1)], features), near, valid)
    down, right = near.unbind(dim=1)
    return torch.cat([down[:, :-1].flatten(1), right[:, :, :-1].flatten(1)], dim=1), squared
