"""Squared distances between neighbors of a map for many rows of factors, in one pass over the map (Eq. 8, 12)."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.ops.backends.cuda.works import block, table
from misa.ops.backends.torch_ops import Map
from misa.ops.neighbors import Offset

EDGES = ((1, 0), (0, 1))  # offsets of the grid edges, in the order of their numbers


@triton.jit
def _moments(values, mine, i, first, channels, p, out, D: tl.constexpr):
    """Write the sums of v_d and v_d² over the pixels of a program, for D channels from `first` on."""
    d = first + tl.arange(0, D)
    there = (d < channels)[:, None] & mine[None, :]
    v = tl.load(values + d.to(tl.int64)[:, None] * p + i[None, :], mask=there, other=0.0).to(tl.float64)
    tl.store(out + d, tl.sum(v, axis=1), mask=d < channels)
    tl.store(out + channels + d, tl.sum(v * v, axis=1), mask=d < channels)


@triton.jit
def _distances(
    values,
    valid,
    squares,
    offsets,
    out,
    moments,
    PADDED: tl.constexpr,
    MOMENTS: tl.constexpr,
    rows,
    channels,
    many,
    h,
    w,
    C: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write Σ_d squares_qd (v_d(i) − v_d(i + offset_k))² for C rows q, K offsets, BLOCK pixels i; v is 0 at padding.

    Programs of the same pixels are adjacent, so that further rows and offsets find the map in the cache. The first of
    them also sums v and v², D channels at a time just before their distances, and counts the valid pixels.
    """
    p = h * w
    groups = (rows + C - 1) // C
    each = groups * ((many + K - 1) // K)  # programs per block of pixels
    part, number = tl.program_id(0) // each, tl.program_id(0) % each
    i = part * BLOCK + tl.arange(0, BLOCK)
    q = number % groups * C + tl.arange(0, C)
    k = number // groups * K + tl.arange(0, K)
    dy = tl.load(offsets + 2 * k, mask=k < many, other=0)[:, None]
    dx = tl.load(offsets + 2 * k + 1, mask=k < many, other=0)[:, None]
    y, x = (i // w)[None, :] + dy, (i % w)[None, :] + dx
    there = (i < p)[None, :] & (k < many)[:, None] & (y >= 0) & (y < h) & (x >= 0) & (x < w)
    j = i[None, :] + dy * w + dx  # in this form the compiler sees contiguous rows
    mine, its = i < p, there
    if PADDED:
        mine = mine & (tl.load(valid + i, mask=mine, other=0) != 0)
        its = its & (tl.load(valid + j, mask=its, other=0) != 0)
    total = tl.zeros((C, K, BLOCK), dtype=tl.float32)
    row = values
    for first in range(0, channels, D):
        if MOMENTS:
            at = moments + part.to(tl.int64) * (2 * channels + 1)
            if number == 0:
                _moments(values, mine, i, first, channels, p, at, D)
                tl.store(at + 2 * channels, tl.sum(mine.to(tl.float64), axis=0))
        for d in range(first, tl.minimum(first + D, channels)):
            here = tl.load(row + i, mask=mine, other=0.0)
            difference = tl.load(row + j, mask=its, other=0.0) - here[None, :]
            square = tl.load(squares + q * channels + d, mask=q < rows, other=0.0)
            total += square[:, None, None] * (difference * difference)[None, :, :]
            row += p
    at = (q.to(tl.int64)[:, None, None] * many + k[None, :, None]) * p + i[None, None, :]
    tl.store(out + at, total, mask=(q < rows)[:, None, None] & there[None, :, :])


def distances(
    values: Float[Tensor, "d h w"],
    squares: Float[Tensor, "q d"],
    offsets: Int[Tensor, "k 2"],
    out: Float[Tensor, "q k h w"],
    valid: Bool[Tensor, "h w"] | None = None,
    *,
    moments: bool = False,
) -> Float[Tensor, "parts s"] | None:
    """Write the squared distance of every pixel to its neighbor at each offset to `out`, if the neighbor exists.

    With `moments` return the sums of v_d and v_d² and the number of valid pixels (2 d + 1) of each part of the map.
    """
    d, h, w = values.shape
    q, k = len(squares), len(offsets)
    if q * k * h * w == 0:
        return None
    few, some = min(8, triton.next_power_of_2(q)), min(16, triton.next_power_of_2(k))
    size, channels = block(32, h * w), min(16, triton.next_power_of_2(d))
    parts = triton.cdiv(h * w, size)
    there = out if valid is None else valid.contiguous().view(torch.int8)
    sums = torch.empty(parts, 2 * d + 1, dtype=torch.float64, device=out.device) if moments else None
    _distances[(parts * triton.cdiv(q, few) * triton.cdiv(k, some),)](
        values.contiguous(), there, squares.contiguous(), offsets, out, out if sums is None else sums,
        valid is not None, moments, q, d, k, h, w, C=few, K=some, D=channels, BLOCK=size, num_warps=8 if few > 4 else 4,
    )  # fmt: skip
    return sums


@triton.jit
def _variance(sums, factors, out, channels, BLOCK: tl.constexpr):
    """Write E (K S)² − (E K S)² over channels and pixels, for one row of factors."""
    c = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    ok = d < channels
    count = tl.maximum(tl.load(sums + 2 * channels), 1.0)
    first = tl.load(sums + d, mask=ok, other=0.0)
    second = tl.load(sums + channels + d, mask=ok, other=0.0)
    k = tl.load(factors + c * channels + d, mask=ok, other=0.0).to(tl.float64)
    mean = tl.sum(k * first / count, axis=0) / channels
    square = tl.sum(k * k * second / count, axis=0) / channels
    difference = square - mean * mean
    tl.store(out + c, tl.where(difference < 0, 0.0, difference).to(tl.float32))  # NaN stays


def lengths_and_variance(
    maps: Sequence[Map], offsets: Sequence[Offset] = ()
) -> tuple[Float[Tensor, "q m"], list[Tensor], Float[Tensor, "q k h w"] | None]:
    """Return for several maps the squared distances of K^c · S along the grid edges, σ² of K^c · S, and all distances.

    All distances are those to the neighbors at `offsets`, half of a window; None if the grid edges are not among them.
    """
    like = maps[0][0]
    h, w = like.shape[-2:]
    every = [*offsets, *(edge for edge in EDGES if edge not in offsets)]
    where = table(every, like)
    near = torch.empty(sum(len(factors) for _, factors, _ in maps), len(every), h, w, device=like.device)
    first, variances = 0, []
    for values, factors, valid in maps:
        q, d = factors.shape
        factors = factors.float().contiguous()
        out = near[first : first + q]
        parts = distances(values.float(), factors.square(), where, out, valid, moments=True)
        assert parts is not None
        variances.append(torch.empty(q, device=like.device))
        _variance[(q,)](parts.sum(dim=0), factors, variances[-1], d, BLOCK=triton.next_power_of_2(d))
        first += q
    down, right = (near[:, every.index(edge)] for edge in EDGES)
    lengths = torch.cat([down[:, :-1].flatten(1), right[:, :, :-1].flatten(1)], dim=1)
    return lengths, variances, near if len(every) == len(offsets) else None
