"""Minimum spanning trees of many grids at once: Borůvka's algorithm with atomic minima.

Every cluster links across its shortest edge under the total order (length, edge number). Real images need seven or
eight rounds. The first rounds are three launches each over all edges or pixels; a tree that needs more is finished by
one program, so that the number of launches is fixed and the host never synchronizes with the device.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from misa.ops.backends.cuda.tour import depth_first
from misa.ops.backends.cuda.works import block
from misa.ops.backends.torch_ops import rounds

NONE = tl.constexpr(2**63 - 1)
LOW = tl.constexpr(2**32 - 1)
WIDE = 9  # rounds with all programs, one more than any real image needed so far


@triton.jit
def _begin(label, best, chosen, active, turns, p, m, BLOCK: tl.constexpr):
    """Initialize: every pixel is a cluster, no edge is chosen, the first round is active."""
    g = tl.program_id(1).to(tl.int64)
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(label + g * p + v, v, mask=v < p)
    tl.store(best + g * p + v, tl.full((BLOCK,), NONE, tl.int64), mask=v < p)
    tl.store(chosen + g * m + v, 0, mask=v < m)
    tl.store(active + g * turns + v, (v == 0).to(tl.int32), mask=v < turns)


@triton.jit
def _ends(e, h, w):
    """Return the two pixels of a grid edge, vertical edges first."""
    vertical = (h - 1) * w
    wide = tl.maximum(w - 1, 1)
    f = e - vertical
    a = tl.where(e < vertical, e, (f // wide) * w + f % wide)
    return a, tl.where(e < vertical, a + w, a + 1)


@triton.jit
def _offer(length, label, best, e, h, w, m):
    """Update both clusters' shortest edge with an edge between them; a plain load first saves most of the atomics."""
    ok = e < m
    a, b = _ends(e, h, w)
    la = tl.load(label + a, mask=ok, other=0)
    lb = tl.load(label + b, mask=ok, other=0)
    ok = ok & (la != lb)
    bits = (tl.load(length + e, mask=ok, other=0.0) + 0.0).to(tl.int32, bitcast=True)  # + 0.0 turns −0 into 0
    key = (bits.to(tl.int64) << 32) | e.to(tl.int64)
    late = tl.load(best + la, mask=ok, other=0, volatile=True) <= key
    tl.atomic_min(best + la, key, mask=ok & (late == 0), sem="relaxed")
    late = tl.load(best + lb, mask=ok, other=0, volatile=True) <= key
    tl.atomic_min(best + lb, key, mask=ok & (late == 0), sem="relaxed")


@triton.jit
def _join(label, best, link, chosen, v, h, w):
    """Link clusters across their shortest edge; of two linked by the same edge the smaller number stays a root."""
    ok = v < h * w
    key = tl.load(best + v, mask=ok, other=NONE, volatile=True)
    found = ok & (key != NONE)
    e = (key & LOW).to(tl.int32)
    a, b = _ends(e, h, w)
    across = tl.load(label + a, mask=found, other=0) + tl.load(label + b, mask=found, other=0) - v
    tl.store(chosen + e, 1, mask=found)
    stays = (tl.load(best + across, mask=found, other=0, volatile=True) == key) & (v < across)
    tl.store(link + v, tl.where(found & (stays == 0), across, v), mask=ok)
    return found


@triton.jit
def _relabel(label, best, link, v, p):
    """Set labels to the roots of their links; reset `best` for the next round."""
    ok = v < p
    y = tl.load(label + v, mask=ok, other=0)
    z = tl.load(link + y, mask=ok, other=0)
    todo = ok & (y != z)
    while tl.max(todo.to(tl.int32), axis=0) > 0:
        y = tl.where(todo, z, y)
        z = tl.load(link + y, mask=ok, other=0)
        todo = ok & (y != z)
    tl.store(label + v, y, mask=ok)
    tl.store(best + v, tl.full(v.shape, NONE, tl.int64), mask=ok)


@triton.jit
def _offer_all(length, label, best, active, turn, turns, h, w, m, BLOCK: tl.constexpr):
    g = tl.program_id(1).to(tl.int64)
    if tl.load(active + g * turns + turn) > 0:
        e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        _offer(length + g * m, label + g * h * w, best + g * h * w, e, h, w, m)


@triton.jit
def _join_all(label, best, link, chosen, active, turn, turns, h, w, m, BLOCK: tl.constexpr):
    g = tl.program_id(1).to(tl.int64)
    at = g * h * w
    if tl.load(active + g * turns + turn) > 0:
        v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        found = _join(label + at, best + at, link + at, chosen + g * m, v, h, w)
        tl.store(active + g * turns + turn + 1 + v * 0, 1, mask=found)


@triton.jit
def _relabel_all(label, best, link, active, turn, turns, p, BLOCK: tl.constexpr):
    g = tl.program_id(1).to(tl.int64)
    if tl.load(active + g * turns + turn) > 0:
        v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        _relabel(label + g * p, best + g * p, link + g * p, v, p)


@triton.jit
def _finish(length, label, best, link, chosen, active, turns, h, w, m, BLOCK: tl.constexpr):
    """Run all further rounds of a tree in one program; the barriers make its threads' writes visible to each other."""
    g = tl.program_id(0).to(tl.int64)
    p = h * w
    length += g * m
    chosen += g * m
    label += g * p
    best += g * p
    link += g * p
    going = tl.load(active + g * turns + turns - 1)
    while going > 0:
        for first in range(0, m, BLOCK):
            _offer(length, label, best, first + tl.arange(0, BLOCK), h, w, m)
        tl.debug_barrier()
        going = going * 0
        for first in range(0, p, BLOCK):
            found = _join(label, best, link, chosen, first + tl.arange(0, BLOCK), h, w)
            going = tl.maximum(going, tl.max(found.to(tl.int32), axis=0))
        tl.debug_barrier()
        for first in range(0, p, BLOCK):
            _relabel(label, best, link, first + tl.arange(0, BLOCK), p)
        tl.debug_barrier()


def boruvka(length: Float[Tensor, "g m"], h: int, w: int, wide: int = WIDE) -> Int[Tensor, "g m"]:
    """Return 1 for the grid edges in the minimum spanning tree; `wide` rounds use all programs."""
    g, m = length.shape
    p, device = h * w, length.device
    many = rounds(p)
    turns = min(many, wide) + 1
    length = length.contiguous()
    label, link = torch.empty(2, g, p, dtype=torch.int32, device=device)
    best = torch.empty(g, p, dtype=torch.int64, device=device)
    chosen = torch.empty(g, m, dtype=torch.int8, device=device)
    active = torch.empty(g, turns, dtype=torch.int32, device=device)
    size = block(128, p)
    edges, vertices = (triton.cdiv(m, size), g), (triton.cdiv(p, size), g)
    _begin[(triton.cdiv(max(m, p, turns), size), g)](label, best, chosen, active, turns, p, m, BLOCK=size)
    for turn in range(turns - 1):
        _offer_all[edges](length, label, best, active, turn, turns, h, w, m, BLOCK=size)
        _join_all[vertices](label, best, link, chosen, active, turn, turns, h, w, m, BLOCK=size)
        _relabel_all[vertices](label, best, link, active, turn, turns, p, BLOCK=size)
    if turns <= many:
        _finish[(g,)](length, label, best, link, chosen, active, turns, h, w, m, BLOCK=1024, num_warps=16)
    return chosen


def spanning_trees(lengths: Float[Tensor, "g m"], h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixel, parent and edge (g p) of the minimum spanning trees of g grids with edge lengths (g m)."""
    if h * w == 1 or len(lengths) == 0:
        nothing = torch.zeros(len(lengths), h * w, dtype=torch.int32, device=lengths.device)
        return nothing, nothing, nothing - 1
    return depth_first(boruvka(lengths, h, w), h, w)


@triton.jit
def _at_edges(values, edge, length, out, m, p, BLOCK: tl.constexpr):
    g = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = x < p
    e = tl.load(edge + g * p + x, mask=ok, other=-1)
    there = ok & (e >= 0) & (tl.load(length + g * p + x, mask=ok, other=0.0) != float("inf"))
    tl.store(out + g * p + x, tl.load(values + g * m + e, mask=there, other=float("inf")), mask=ok)


def at_edges(
    values: Float[Tensor, "g m"], edge: Int[Tensor, "g p"], length: Float[Tensor, "g p"]
) -> Float[Tensor, "g p"]:
    """Gather values of grid edges at the trees' edges to the parents; infinite at the roots and where `length` is."""
    g, p = edge.shape
    out = torch.empty(g, p, device=values.device)
    size = block(128, p)
    if g > 0:
        _at_edges[(triton.cdiv(p, size), g)](
            values.contiguous(), edge.contiguous(), length.contiguous(), out, values.shape[1], p, BLOCK=size
        )
    return out
