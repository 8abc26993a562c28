"""Depth-first order of many trees at once: an Euler tour, ranked by pointer jumping in place.

Every pixel has four arcs – right, down, left, up. Those in the tree form the tour: after arriving by an arc, leave by
the next one around the pixel. (steps skipped, next arc) packed in one integer is consistent whenever it is read, so no
second buffer is needed and every launch makes several jumps.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from misa.ops.backends.cuda.works import block

LOW = tl.constexpr(2**32 - 1)
JUMPS = 8


@triton.jit
def _arc(pixel, k, h, w):
    """Return the grid edge of a pixel's arc right, down, left or up (k = 0 … 3), −1 for none, and its end pixel."""
    y, x = pixel // w, pixel % w
    vertical = (h - 1) * w
    side = vertical + y * (w - 1) + x
    e = tl.where(k == 0, side, tl.where(k == 1, pixel, tl.where(k == 2, side - 1, pixel - w)))
    ok = tl.where(k == 0, x < w - 1, tl.where(k == 1, y < h - 1, tl.where(k == 2, x > 0, y > 0)))
    return tl.where(ok, e, -1), pixel + tl.where(k == 0, 1, tl.where(k == 1, w, tl.where(k == 2, -1, -w)))


@triton.jit
def _has(chosen, e, ok):
    there = ok & (e >= 0)
    return there & (tl.load(chosen + e, mask=there, other=0) != 0)


@triton.jit
def _follow(chosen, packed, h, w, m, BLOCK: tl.constexpr):
    """Write the next arc of the tour; the tour's last arc, and arcs outside the tree, point to themselves."""
    g = tl.program_id(1).to(tl.int64)
    p = h * w
    arc = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = arc < 4 * p
    q, k = arc // 4, arc % 4
    chosen += g * m
    e, target = _arc(q, k, h, w)
    has = _has(chosen, e, ok)
    back = (k + 2) % 4
    leave = back
    for j in tl.static_range(3):
        turn = (back + 3 - j) % 4  # the nearest is tested last and wins
        f, _ = _arc(target, turn, h, w)
        leave = tl.where(_has(chosen, f, has), turn, leave)
    right, _ = _arc(q * 0, k * 0, h, w)
    start = tl.where(_has(chosen, right, ok), 0, 1)  # pixel 0 has arcs to the right and down only
    follow = target * 4 + leave
    last = (has == 0) | (follow == start)
    one = tl.full((BLOCK,), 1, tl.int64) << 32
    tl.store(packed + g * 4 * p + arc, tl.where(last, arc.to(tl.int64), one | follow.to(tl.int64)), mask=ok)


@triton.jit
def _jump(packed, n, JUMPS: tl.constexpr, BLOCK: tl.constexpr):
    g = tl.program_id(1).to(tl.int64)
    arc = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    packed += g * n
    mine = tl.load(packed + arc, mask=arc < n, other=0)
    for _ in tl.static_range(JUMPS):
        go = (arc < n) & ((mine & LOW) != arc.to(tl.int64))
        there = tl.load(packed + (mine & LOW), mask=go, other=0, volatile=True)
        mine = tl.where(go, (((mine >> 32) + (there >> 32)) << 32) | (there & LOW), mine)
        tl.store(packed + arc, mine, mask=go)


@triton.jit
def _places(chosen, packed, q, k, ok, h, w):
    """Return whether an arc is in the tree, its position in the tour and that of the opposite arc."""
    e, target = _arc(q, k, h, w)
    has = _has(chosen, e, ok)
    last = 2 * h * w - 3
    here = last - (tl.load(packed + q * 4 + k, mask=has, other=0) >> 32)
    there = last - (tl.load(packed + target * 4 + (k + 2) % 4, mask=has, other=0) >> 32)
    return has, here, there


@triton.jit
def _mark(chosen, packed, marks, h, w, m, BLOCK: tl.constexpr):
    """Write 1 at the position of every arc that goes down the tree, which precedes its opposite."""
    g = tl.program_id(1).to(tl.int64)
    p = h * w
    arc = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    has, here, there = _places(chosen + g * m, packed + g * 4 * p, arc // 4, arc % 4, arc < 4 * p, h, w)
    tl.store(marks + g * 2 * (p - 1) + here, (here < there).to(tl.int32), mask=has)


@triton.jit
def _number(chosen, packed, count, order, above, h, w, m, BLOCK: tl.constexpr):
    """Write the depth-first number of every pixel, from counts that run over all trees, and the arc to its parent."""
    g = tl.program_id(1).to(tl.int64)
    p = h * w
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = q < p
    number, up = q * 0, q * 0 - 1
    for k in tl.static_range(4):
        has, here, there = _places(chosen + g * m, packed + g * 4 * p, q, q * 0 + k, ok, h, w)
        rises = has & (there < here)
        counted = tl.load(count + g * 2 * (p - 1) + there, mask=rises, other=0)
        number = tl.where(rises, counted - (g * (p - 1)).to(tl.int32), number)
        up = tl.where(rises, k, up)
    tl.store(order + g * p + q, number, mask=ok)
    tl.store(above + g * p + q, up, mask=ok)


@triton.jit
def _write(order, above, pixel, parent, edge, h, w, BLOCK: tl.constexpr):
    g = tl.program_id(1).to(tl.int64)
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = q < h * w
    order += g * h * w
    start = g * h * w
    up = tl.load(above + start + q, mask=ok, other=-1)
    root = up < 0
    e, target = _arc(q, tl.where(root, 0, up), h, w)
    at = start + tl.load(order + q, mask=ok, other=0)
    tl.store(pixel + at, q, mask=ok)
    tl.store(parent + at, tl.load(order + target, mask=ok & (root == 0), other=0), mask=ok)
    tl.store(edge + at, tl.where(root, -1, e), mask=ok)


def depth_first(chosen: Int[Tensor, "g m"], h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixel, parent and edge (g p) of trees on two pixels or more, numbered depth first from pixel 0."""
    (g, m), p, device = chosen.shape, h * w, chosen.device
    size = block(128, p)
    arcs, vertices = (triton.cdiv(4 * p, size), g), (triton.cdiv(p, size), g)
    packed = torch.empty(g, 4 * p, dtype=torch.int64, device=device)
    _follow[arcs](chosen, packed, h, w, m, BLOCK=size)
    reached = 1
    while reached < 2 * p:  # every jump adds at least the distance reached before the launch
        _jump[arcs](packed, 4 * p, JUMPS=JUMPS, BLOCK=size)
        reached *= 1 + JUMPS
    marks = torch.empty(g, 2 * (p - 1), dtype=torch.int32, device=device)
    _mark[arcs](chosen, packed, marks, h, w, m, BLOCK=size)
    count = marks.flatten().cumsum(0, dtype=torch.int32)
    order, above, pixel, parent, edge = torch.empty(5, g, p, dtype=torch.int32, device=device)
    _number[vertices](chosen, packed, count, order, above, h, w, m, BLOCK=size)
    _write[vertices](order, above, pixel, parent, edge, h, w, BLOCK=size)
    return pixel, parent, edge
