"""Merge trees of many trees at once: t(x) of `torch_ops`, by pointer chasing.

t(x), the nearest ancestor whose upward edge is longer, forms a tree of 20-40 levels on real images. Its chains are
followed by loops inside few kernels instead of pointer doubling over all levels; long chains are only slower.
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
    """Find t(x) by chasing pointers that other programs shorten concurrently; count children, write the sort keys."""
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
    bits = mine.to(tl.int32, bitcast=True).to(tl.int64) + (x == 0).to(tl.int64)  # the root sorts last in its group
    tl.store(key + r * p + x, ((r * p + y) << 32) | bits, mask=ok)
    tl.store(broken + r + x * 0, 1, mask=ok & (mine != mine))


@triton.jit
def _starts(key, start, total, BLOCK: tl.constexpr):
    """Write where the children of every vertex begin in sorted order."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = k < total
    mine = tl.load(key + k, mask=ok, other=0) >> 32
    before = tl.load(key + k - 1, mask=ok & (k > 0), other=-1) >> 32
    tl.store(start + mine, k, mask=ok & (mine != before))


@dataclass(frozen=True)
class Merges:
    """Merge trees of r trees with upward edges s: t(x), the number of children of each t, and their order.

    `order` sorts vertices by t, then s; `start` is where each t's children begin; both index all rows concatenated.
    `pixel` (g p) is each vertex's pixel, `of` each tree's row of it. `broken` is 1 for a tree with NaN among its edges.
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
        """Build the merge trees; `meet` holds the parents and is overwritten."""
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
