"""Which clusters the edges of many trees join, in ascending order: t(x) of `torch_ops`, by chasing pointers.

t(x), the nearest ancestor whose upward edge is longer, makes a tree of 20-40 levels on real images. Its chains are
followed in loops within few kernels instead of by doubling over all levels; long chains are only slower.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from misa.ops.backends.cuda.works import block


@triton.jit
def _meet(s, meet, kids, key, broken, p, BLOCK: tl.constexpr):
    """t(x) by chasing pointers that others shorten meanwhile; counts children and makes the keys of the sort."""
    r = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = x < p
    s += r * p
    meet += r * p
    mine = tl.load(s + x, mask=ok, other=0.0) + 0.0  # + 0.0 turns −0 into 0, whose bits are in order
    mine = tl.where(x == 0, float("inf"), mine)
    y = tl.load(meet + x, mask=ok, other=0)
    todo = ok & (y != 0) & (tl.load(s + y, mask=ok, other=0.0) <= mine)
    while tl.max(todo.to(tl.int32), axis=0) > 0:
        y = tl.where(todo, tl.load(meet + y, mask=todo, other=0, volatile=True), y)
        tl.store(meet + x, y, mask=todo)
        todo = todo & (y != 0) & (tl.load(s + y, mask=todo, other=0.0) <= mine)
    tl.atomic_add(kids + r * p + y, 1, mask=ok & (x > 0), sem="relaxed")
    bits = mine.to(tl.int32, bitcast=True).to(tl.int64) + (x == 0).to(tl.int64)  # the root comes last in its own group
    tl.store(key + r * p + x, ((r * p + y) << 32) | bits, mask=ok)
    tl.store(broken + r + x * 0, 1, mask=ok & (mine != mine))


@triton.jit
def _starts(key, start, total, BLOCK: tl.constexpr):
    """Where the children of every vertex begin in sorted order."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = k < total
    mine = tl.load(key + k, mask=ok, other=0) >> 32
    before = tl.load(key + k - 1, mask=ok & (k > 0), other=-1) >> 32
    tl.store(start + mine, k, mask=ok & (mine != before))


@dataclass(frozen=True)
class Merges:
    """Of r trees with upward edges s: t(x); how many x share a t; these in ascending s, and where they begin.

    `order` and `start` count through all rows. `pixel` (g p) says where a vertex is in the image, `of` which row of
    it belongs to a tree. `broken` is 1 for a tree with NaN among its edges.
    """

    s: Float[Tensor, "r p"]
    meet: Int[Tensor, "r p"]
    kids: Int[Tensor, "r p"]
    order: Int[Tensor, " rp"]
    start: Int[Tensor, "r p"]
    broken: Int[Tensor, " r"]
    pixel: Int[Tensor, "g p"]
    of: Int[Tensor, " r"]

    @classmethod
    def make(cls, s: Float[Tensor, "r p"], meet: Int[Tensor, "r p"], pixel: Tensor, of: Tensor) -> "Merges":
        """`meet` holds the parents and is overwritten."""
        r, p = s.shape
        zeros = torch.zeros(r * (p + 1), dtype=torch.int32, device=s.device)
        kids, broken = zeros[: r * p].view(r, p), zeros[r * p :]
        key = torch.empty(r * p, dtype=torch.int64, device=s.device)
        size = block(64, p)
        _meet[(triton.cdiv(p, size), r)](s, meet, kids, key, broken, p, BLOCK=size, num_warps=1)
        key, order = torch.sort(key, stable=True)
        start = torch.empty(r, p, dtype=torch.int64, device=s.device)
        _starts[(triton.cdiv(r * p, size),)](key, start, r * p, BLOCK=size, num_warps=1)
        return cls(s, meet, kids, order, start, broken, pixel, of)
