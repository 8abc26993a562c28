"""Sums over the trees of Eq. 14 in fixed-point arithmetic, so that results do not depend on the order of atomics.

With the vertices c whose t(c) is t ("children" of t) in ascending s, M(x) the mass below x, itself included, and
e(x) = exp(−s(x)):
    B(c) = own(t) + Σ M over the earlier children of t        the cluster that c merges with
    L(c) = Σ e M over the later children of t                 the clusters that later merge with that of t and c
    out(x) = own(x) + Σ e M over x's children + Σ over the chain y = x, t(x), … below the root of e(y) B(y) + L(y)
All terms are at least 0. Values are shifted and scaled to [0, 1] per mask, and masses are fixed-point integers with up
to 26 fractional bits: sums are exact, results accurate to 4e-8 of a mask's range and reproducible bit for bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from misa.ops.backends import torch_ops
from misa.ops.backends.cuda.merges import Merges
from misa.ops.backends.cuda.works import block, say_once, table
from misa.ops.backends.torch_ops import Index, Part

CELLS = 1 << 24  # vertices of all rows processed at once, 36 bytes each
LARGEST = 1 << 20  # vertices of a tree: beyond, masses would have fewer than 22 bits, less precise than float32
MOST = 1 << 31  # vertices of all trees, the range of the sort keys
FINER = tl.constexpr(1024.0)  # ten more fractional bits for e M


def split(p: int) -> tuple[int, int]:
    """Return the fractional bits of a mass and the bits of a sum of p masses; higher bits hold a count of up to p."""
    count = p.bit_length()
    bits = min(26, 62 - 2 * count)
    return bits, bits + count


@triton.jit
def _fixed(values, low, high, mask, tree, pixel, of, own, acc, p, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Write (v − low) / (high − low) of a row's mask in vertex order, in fixed point; 1 everywhere for mask −1."""
    r = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = x < p
    n = tl.load(mask + r).to(tl.int64)
    real = n >= 0
    first = tl.load(low + n, mask=real, other=0.0).to(tl.float64)
    range_ = tl.load(high + n, mask=real, other=1.0).to(tl.float64) - first
    at = tl.load(pixel + tl.load(of + tl.load(tree + r)).to(tl.int64) * p + x, mask=ok, other=0)
    v = tl.load(values + n * p + at, mask=ok & real, other=1.0).to(tl.float64)
    sound = (range_ > 0) & (range_ < float("inf"))
    share = tl.where(sound, (v - first) / tl.where(sound, range_, 1.0), 0.0)
    tl.store(own + r * p + x, (tl.minimum(share, 1.0) * (1 << BITS) + 0.5).to(tl.int32), mask=ok)
    tl.store(acc + r * p + x, tl.zeros((BLOCK,), dtype=tl.int64), mask=ok)


@triton.jit
def _collect(own, meet, kids, tree, acc, mass, p, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Compute M from the leaves up: the last of a vertex's children to arrive continues. One atomic per vertex."""
    r = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(tree + r).to(tl.int64) * p
    own += r * p
    acc += r * p
    mass += r * p
    one = tl.full((BLOCK,), 1, tl.int64) << SHIFT
    todo = (x < p) & (tl.load(kids + row + x, mask=x < p, other=1) == 0) & (x > 0)
    m, y = tl.load(own + x, mask=x < p, other=0).to(tl.int64), x
    tl.store(mass + x, m, mask=todo)
    while tl.max(todo.to(tl.int32), axis=0) > 0:
        y = tl.where(todo, tl.load(meet + row + y, mask=todo, other=0), y)
        need = tl.load(kids + row + y, mask=todo, other=0).to(tl.int64)
        more = tl.load(own + y, mask=todo, other=0).to(tl.int64)
        old = tl.atomic_add(acc + y, m + one, mask=todo, sem="relaxed")
        todo = todo & ((old >> SHIFT) + 1 == need)
        m = (old & (one - 1)) + m + more
        tl.store(mass + y, m, mask=todo)
        todo = todo & (y > 0)


@triton.jit
def _in_order(mass, order, s, tree, m_sorted, em_sorted, p, BLOCK: tl.constexpr):
    """Write M and e M in sorted order, the children of a vertex contiguous."""
    r = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = k < p
    row = tl.load(tree + r).to(tl.int64) * p
    x = tl.load(order + row + k, mask=ok, other=0) - row
    below = ok & (x > 0)
    m = tl.load(mass + r * p + x, mask=below, other=0)
    e = tl.exp(-tl.load(s + row + x, mask=below, other=float("inf")).to(tl.float64))
    tl.store(m_sorted + r * p + k, m, mask=ok)
    em = e * m.to(tl.float64) * FINER + 0.5
    tl.store(em_sorted + r * p + k, tl.where(em == em, em, 0.0).to(tl.int64), mask=ok)  # `broken` marks NaN


@triton.jit
def _between(sums, first, last, ok):
    """Return the sum from `first` to `last`, from prefix sums over all rows of M followed by all rows of e M."""
    return tl.load(sums + last, mask=ok, other=0) - tl.load(sums + first - 1, mask=ok & (first > 0), other=0)


@triton.jit
def _terms(own, sums, order, s, meet, kids, start, tree, d, p, BLOCK: tl.constexpr):
    """Write d(x) = e B + L, in the units of `own`."""
    r = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = k < p
    row, mine = tl.load(tree + r).to(tl.int64) * p, r * p
    x = tl.load(order + row + k, mask=ok, other=0) - row
    below = ok & (x > 0)
    t = tl.load(meet + row + x, mask=below, other=0)
    first = tl.load(start + row + t, mask=below, other=0) - row
    last = first + tl.load(kids + row + t, mask=below, other=0) - 1
    earlier = _between(sums, mine + first, mine + k - 1, below & (k > first))
    at = mine + tl.num_programs(1).to(tl.int64) * p  # e M
    later = _between(sums, at + k + 1, at + last, below & (k < last))
    e = tl.exp(-tl.load(s + row + x, mask=below, other=float("inf")).to(tl.float64))
    b = (tl.load(own + mine + t, mask=below, other=0).to(tl.int64) + earlier).to(tl.float64)
    tl.store(d + mine + x, tl.where(below, e * b + later.to(tl.float64) / FINER, 0.0), mask=ok)


@triton.jit
def _climb(own, sums, d, meet, kids, start, tree, broken, pixel, of, out, p, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Write out(x) at x's pixel; NaN for a tree with a NaN edge."""
    r = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = x < p
    g = tl.load(tree + r).to(tl.int64)
    row, mine = g * p, r * p
    count = tl.load(kids + row + x, mask=ok, other=0)
    first = tl.load(start + row + x, mask=ok & (count > 0), other=0) - row + mine
    first += tl.num_programs(1).to(tl.int64) * p  # e M
    below = _between(sums, first, first + count - 1, ok & (count > 0))
    total = tl.load(own + mine + x, mask=ok, other=0).to(tl.float64) + below.to(tl.float64) / FINER
    y = x
    todo = ok & (y != 0)
    while tl.max(todo.to(tl.int32), axis=0) > 0:
        total += tl.load(d + mine + y, mask=todo, other=0.0)
        y = tl.where(todo, tl.load(meet + row + y, mask=todo, other=0), y)
        todo = todo & (y != 0)
    total = tl.where(tl.load(broken + g) != 0, float("nan"), total / (1 << BITS))
    at = tl.load(pixel + tl.load(of + g).to(tl.int64) * p + x, mask=ok, other=0)
    tl.store(out + mine + at, total, mask=ok)


@triton.jit
def _means(sums, tree, shares, low, high, out, first, trees, p, Q: tl.constexpr, BLOCK: tl.constexpr):
    """Write Σ share · numerator / Σ share · denominator over Q kernels, scaled back to the mask's range.

    The first rows of `sums` are the denominators of all trees, followed by the numerators, mask by mask.
    """
    n = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = x < p
    over = tl.zeros((BLOCK,), dtype=tl.float64)
    under = tl.zeros((BLOCK,), dtype=tl.float64)
    for q in tl.static_range(Q):
        share = tl.load(shares + q)
        over += share * tl.load(sums + (trees + n * Q + q) * p + x, mask=ok, other=0.0)
        under += share * tl.load(sums + tl.load(tree + n * Q + q).to(tl.int64) * p + x, mask=ok, other=1.0)
    least = tl.load(low + first + n).to(tl.float64)
    mean = least + (tl.load(high + first + n).to(tl.float64) - least) * (over / under)
    tl.store(out + (first + n) * p + x, mean.to(tl.float32), mask=ok)


def _sums(
    values: Float[Tensor, "n p"], low: Tensor, high: Tensor, merges: Merges, mask: Tensor, tree: Tensor
) -> Float[Tensor, "r p"]:
    """Return out(x) of every row's mask, −1 for a mask of ones, along its tree."""
    r, p, like = len(mask), values.shape[1], values
    bits, shift = split(p)
    size = block(64, p)
    grid, options = (triton.cdiv(p, size), r), {"BLOCK": size, "num_warps": 1}
    own = torch.empty(r, p, dtype=torch.int32, device=like.device)
    terms = torch.empty(2, r, p, dtype=torch.int64, device=like.device)
    acc, em = terms.unbind()
    mass = torch.empty_like(acc)
    where = merges.pixel, merges.of
    _fixed[grid](values, low, high, mask, tree, *where, own, acc, p, BITS=bits, **options)
    _collect[grid](own, merges.meet, merges.kids, tree, acc, mass, p, SHIFT=shift, **options)
    _in_order[grid](mass, merges.order, merges.s, tree, acc, em, p, **options)
    prefix = torch.cumsum(terms.view(-1), 0, out=terms.view(-1))  # overflow cancels in differences
    d = mass.view(torch.float64)
    its = merges.meet, merges.kids, merges.start, tree
    _terms[grid](own, prefix, merges.order, merges.s, *its, d, p, **options)
    out = torch.empty_like(d)
    _climb[grid](own, prefix, d, *its, merges.broken, *where, out, p, BITS=bits, **options)
    return out


def _weighted(
    values: Float[Tensor, "n p"], merges: Merges, trees: Sequence[Sequence[int]], shares: Sequence[float]
) -> Float[Tensor, "n p"]:
    """Apply Eq. 14 to every mask along its tree of each kernel, in chunks of bounded memory."""
    n, p = values.shape
    q, g = len(trees), len(merges.s)
    low, high = values.aminmax(dim=1)
    result = torch.empty_like(values)
    weights = torch.tensor(list(shares), dtype=torch.float64).to(values.device, non_blocking=True)
    size = block(128, p)
    portion = max(1, (min(CELLS // p, 32768) - g) // q)
    for first in range(0, n, portion):
        mine = range(first, min(first + portion, n))
        mask = [-1] * g + [i for i in mine for _ in trees]
        tree = [*range(g), *(its[i] for i in mine for its in trees)]
        rows = table([mask, tree], values)
        sums = _sums(values, low, high, merges, *rows)
        _means[(triton.cdiv(p, size), len(mine))](
            sums, rows[1, g:], weights, low, high, result, first, g, p, Q=q, BLOCK=size
        )
    return result


def too_large(p: int, trees: int) -> bool:
    """Return whether trees of p vertices exceed the kernels' range; warns once."""
    slower = "fall back to torch operations on CUDA, which give the same results several times slower"
    if p > LARGEST:
        say_once(
            f"sums along the tree of a map of more than {LARGEST:,} pixels {slower}; resize images and masks, or set "
            "the affinity's global_size."
        )
    elif trees * p >= MOST:
        say_once(f"sums along trees of {MOST:,} pixels or more in all {slower}; take fewer images at once.")
    return p > LARGEST or trees * p >= MOST


def propagate(values: Float[Tensor, "n p"], parts: Sequence[Part]) -> Float[Tensor, "n p"]:
    """Apply Eq. 14 over whole trees: values (n p), per kernel (pixel, parent, s (g p), tree of each mask, weight)."""
    n, p = values.shape
    if n == 0:
        return values.clone()
    if too_large(p, sum(len(part[0]) for part in parts)):
        return torch_ops.propagate(values, parts)
    pixels, parents, lengths = zip(*(part[:3] for part in parts), strict=True)
    pixel, meet, s = torch.cat(pixels), torch.cat(parents), torch.cat(lengths)
    merges = Merges.make(s.float(), meet.int(), pixel.int(), torch.arange(len(s), dtype=torch.int32, device=s.device))
    trees, first = [], 0
    for its, _, _, index, _ in parts:
        trees.append([first + i for i in index])
        first += len(its)
    return _weighted(values.float().contiguous(), merges, trees, [share for *_, share in parts]).to(values.dtype)


@triton.jit
def _along(guides, pixel, parent, length, of, s, meet, factor, channels, p, BLOCK: tl.constexpr):
    """Write s(x) = factor · |g(x) − g(parent)|², infinite where the tree is cut; t starts at the parent."""
    r = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = x < p
    row = tl.load(of + r).to(tl.int64) * p
    up = tl.load(parent + row + x, mask=ok, other=0)
    a = tl.load(pixel + row + x, mask=ok, other=0)
    b = tl.load(pixel + row + up, mask=ok, other=0)
    guides += r * channels * p
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(channels):
        d = tl.load(guides + a, mask=ok, other=0.0) - tl.load(guides + b, mask=ok, other=0.0)
        total += d * d
        guides += p
    cut = (x == 0) | (tl.load(length + row + x, mask=ok, other=0.0) == float("inf"))
    tl.store(s + r * p + x, tl.where(cut, float("inf"), total * factor), mask=ok)
    tl.store(meet + r * p + x, up, mask=ok)


def propagate_along(
    values: Float[Tensor, "n p"],
    guides: Float[Tensor, "n d p"],
    pixel: Int[Tensor, "g p"],
    parent: Int[Tensor, "g p"],
    length: Float[Tensor, "g p"],
    index: Index,
    factor: float,
) -> Float[Tensor, "n p"]:
    """Apply Eq. 14 with one guide per mask (n d p): masks share the tree but not edge lengths and merge trees."""
    n, p = values.shape
    tree = (pixel, parent, length)
    if n == 0:
        return values.clone()
    if too_large(p, 1):
        return torch_ops.propagate_along(values, guides, *tree, index, factor)
    portion = max(1, min(CELLS // p, 32768) // 2)
    if n > portion:
        cuts = [slice(start, start + portion) for start in range(0, n, portion)]
        return torch.cat([propagate_along(values[c], guides[c], *tree, index[c], factor) for c in cuts])
    of = table(index, values)
    s = torch.empty(n, p, device=values.device)
    meet = torch.empty(n, p, dtype=torch.int32, device=values.device)
    pixel, parent, length = pixel.int().contiguous(), parent.int().contiguous(), length.contiguous()
    size = block(64, p)
    _along[(triton.cdiv(p, size), n)](
        guides.float().contiguous(), pixel, parent, length, of, s, meet, factor, guides.shape[1], p,
        BLOCK=size, num_warps=1,
    )  # fmt: skip
    merges = Merges.make(s, meet, pixel, of)
    return _weighted(values.float().contiguous(), merges, [range(n)], [1.0]).to(values.dtype)
