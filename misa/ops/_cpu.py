"""The CPU path: calls the kernels of `_kernels` on tensors, one thread per tree, mask or strip of rows.

Threads follow `torch.get_num_threads()`. Scratch memory belongs to a thread and is kept between calls.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from misa.ops import _device
from misa.ops import _kernels as kernels
from misa.ops._compile import Kernel

T = TypeVar("T")
_scratch = threading.local()
STRIP = 16  # rows of a window's affinities at a time
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def run(kernel: Kernel, *arguments: Any) -> Any:
    """Call a kernel with tensors, which must be contiguous, and numbers."""
    return kernel.compiled(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


def spread_out(task: Callable[..., T], *items: Any) -> list[T]:
    """`map` over threads; the kernels let go of the interpreter's lock."""
    workers = min(torch.get_num_threads(), len(items[0]))
    if workers <= 1:
        return [task(*item) for item in zip(*items, strict=True)]
    key = (os.getpid(), workers)  # a forked process needs threads of its own
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(workers, thread_name_prefix="misa")
    return list(_pools[key].map(task, *items))


def scratch(name: str, size: int, dtype: torch.dtype) -> Tensor:
    """Memory of this thread under a name, at least `size` long, with whatever was in it."""
    have: dict[str, Tensor] = _scratch.__dict__
    if name not in have or have[name].numel() < size:
        have[name] = torch.empty(size, dtype=dtype)
    return have[name]


def strips(rows: int) -> tuple[list[int], list[int]]:
    """First and last row of one strip per thread."""
    cuts = [rows * i // torch.get_num_threads() for i in range(torch.get_num_threads() + 1)]
    return cuts[:-1], cuts[1:]


# ---- trees ----


def spanning_trees(lengths: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """pixel, parent and edge (g p) of the minimum spanning trees of g grids with edge lengths (g m)."""
    g, m = lengths.shape
    lengths = lengths.contiguous()
    pixel, parent, edge = (torch.empty(g, h * w, dtype=torch.int32) for _ in range(3))

    def one(i: int) -> None:
        _spanning_tree(lengths[i], h, w, m, pixel[i], parent[i], edge[i])

    spread_out(one, range(g))
    return pixel, parent, edge


def _spanning_tree(lengths: Tensor, h: int, w: int, m: int, pixel: Tensor, parent: Tensor, edge: Tensor) -> None:
    p = h * w
    keys, left = scratch("keys", m, torch.int64), scratch("left", m + 1, torch.int64)
    best = scratch("best", p, torch.int64)
    link, label = scratch("link", p, torch.int32), scratch("label", p, torch.int32)
    ends, chosen = scratch("ends", 2 * m + 2, torch.int32), scratch("chosen", m + 1, torch.int32)
    chosen[:m].zero_()
    run(kernels.edge_keys, lengths, m, keys)
    run(kernels.shortest_on_grid, keys, h, w, best)
    run(kernels.join_pixels, best, h, w, link, chosen)
    clusters = run(kernels.number_clusters, link, p, label)
    m = run(kernels.edges_between, keys, h, w, label, ends, left)
    while clusters > 1:
        run(kernels.join_clusters, left, ends, m, clusters, best, link, chosen)
        clusters = run(kernels.number_clusters, link, clusters, label)
        m = run(kernels.keep_between, left, ends, m, label)
    run(kernels.preorder, chosen, h, w, pixel, parent, edge, scratch("stack", 3 * p, torch.int32))


# ---- sums over the tree ----


class Merges:
    """The merge tree of one tree with one set of lengths, as `kernels.meet` leaves it."""

    def __init__(self, p: int, *, keep: bool) -> None:
        def new(name: str, size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype) if keep else scratch("merges " + name, size, dtype)

        self.group, self.meeting = new("group", p, torch.int32), new("meeting", p, torch.int32)
        self.children = new("children", p, torch.int64)
        self.start, self.decay = new("start", p + 1, torch.int32), new("decay", p, torch.float32)
        self.k = 0

    def build(self, parent: Tensor, s: Tensor) -> "Merges":
        """Fill in the merge tree for upward edges `s`."""
        p = len(parent)
        length, jump, depth = (scratch(x, p, t) for x, t in _MEET_SCRATCH)
        self.k = run(
            kernels.meet, parent, s, p, self.group, self.meeting, length, self.decay, jump, depth, self.start,
            self.children,
        )  # fmt: skip
        return self

    def sums(self, values: Tensor, pixel: Tensor) -> Tensor:
        """Numerators and denominators side by side, per flat zone."""
        own, below, gain, out = (scratch(x, 2 * self.k, torch.float64) for x in ("own", "below", "gain", "out"))
        run(
            kernels.sums, values, pixel, len(pixel), self.k, self.group, self.meeting, self.decay, self.start,
            self.children, own, below, gain, out,
        )  # fmt: skip
        return out


_MEET_SCRATCH = (("length", torch.float32), ("jump", torch.int32), ("depth", torch.int32))


def propagate(
    values: Tensor,
    parts: Sequence[tuple[Tensor, Tensor, Tensor, Sequence[int], float]],
) -> Tensor:
    """Eq. 14 over whole trees: values (n p), per kernel (pixel, parent, s (g p), tree of each mask, its share)."""
    n, p = values.shape
    values, result = values.contiguous(), torch.empty(n, p)
    plans: list[list[Merges]] = []
    for _, parent, s, _, _ in parts:
        plans.append(spread_out(lambda a, b: Merges(p, keep=True).build(a, b), parent, s.contiguous()))

    def one(i: int) -> None:
        if len(parts) == 1:
            pixel, _, _, index, _ = parts[0]
            merges = plans[0][index[i]]
            out = merges.sums(values[i], pixel[index[i]])
            run(kernels.write_ratio, out, pixel[index[i]], merges.group, p, result[i])
            return
        both = scratch("both", 2 * p, torch.float64)
        both[: 2 * p].zero_()
        for (pixel, _, _, index, share), plan in zip(parts, plans, strict=True):
            merges = plan[index[i]]
            out = merges.sums(values[i], pixel[index[i]])
            run(kernels.add_sums, out, pixel[index[i]], merges.group, p, share, both)
        run(kernels.divide, both, p, result[i])

    spread_out(one, range(n))
    return result


def propagate_along(
    values: Tensor,
    guides: Tensor,
    pixel: Tensor,
    parent: Tensor,
    length: Tensor,
    index: Sequence[int],
    factor: float,
) -> Tensor:
    """Eq. 14 where every mask brings its own guide (n d p): the tree is shared, its lengths and merges are not."""
    n, p = values.shape
    values, guides, result = values.contiguous(), guides.contiguous(), torch.empty(n, p)

    def one(i: int) -> None:
        t = index[i]
        s, at = scratch("s", p, torch.float32), scratch("at", p, torch.float32)
        run(kernels.tree_lengths, guides[i], guides.shape[1], p, pixel[t], parent[t], length[t], factor, at, s)
        merges = Merges(p, keep=False).build(parent[t], s)
        out = merges.sums(values[i], pixel[t])
        run(kernels.write_ratio, out, pixel[t], merges.group, p, result[i])

    spread_out(one, range(n))
    return result


# ---- features ----


def feature_lengths(features: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of K^c · S along the grid edges (c m), and the sums of S_d and S_d² (d 2)."""
    d, h, w = features.shape
    c = len(factors)
    features, squares = features.contiguous(), factors.square().contiguous()
    lengths = torch.empty(c, (h - 1) * w + h * (w - 1))
    moments = torch.zeros(torch.get_num_threads(), d, 2, dtype=torch.float64)

    def strip(first: int, last: int, sums: Tensor) -> None:
        side = scratch("side", 32 * c * w, torch.float32)
        run(kernels.feature_edges, features, squares, c, d, h, w, first, last, side, lengths, sums)

    spread_out(strip, *strips(h), list(moments))
    return lengths, moments.sum(dim=0)


# ---- windows ----

Layer = tuple[Tensor, Tensor, float, Tensor | None]  # values (d h w), their squared factors (d), share, precision


Crop = tuple[int, int, int, int]  # first row and column, one past the last


class Field:
    """Â of one group of masks around the boxes of that group: planes for half of the window, and 1 / Σ Â."""

    def __init__(self, crops: Sequence[Crop], layers: Sequence[Layer], offsets: Sequence[tuple[int, int]]) -> None:
        self.reach = reach = max((max(abs(dy), abs(dx)) for dy, dx in offsets), default=0)
        self.top, self.left = min(c[0] for c in crops) - reach, min(c[1] for c in crops) - reach
        self.rows = max(c[2] for c in crops) + reach - self.top
        self.columns = max(c[3] for c in crops) + reach - self.left
        self.layers, self.offsets = layers, offsets
        self.table = torch.tensor(list(offsets), dtype=torch.int64).reshape(-1, 2)
        self.centre = float(sum(share for _, _, share, _ in layers))
        self.planes = torch.zeros(len(offsets), self.rows, self.columns)
        self.norm = torch.empty(self.rows, self.columns)
        self.needed = torch.zeros(self.rows, self.columns, dtype=torch.int32)
        for y0, x0, y1, x1 in crops:  # half of the window looks back from there, so the reach counts twice
            rows = slice(y0 - reach - self.top, y1 + reach - self.top)
            self.needed[rows, x0 - reach - self.left : x1 + reach - self.left] = 1

    def fill(self, first: int, last: int, present: Tensor) -> None:
        """The affinities of rows first … last."""
        h, w = present.shape
        half = len(self.offsets)
        distance = scratch("distance", 8 * half * (w + 15), torch.float32)
        packed = scratch("packed", 32 * (8 + self.reach) * (w + 47), torch.float32)
        for values, squares, share, _ in self.layers:
            run(
                kernels.add_affinity, values, squares.sqrt(), len(values), h, w, self.top, self.left, self.rows,
                self.columns, first, last, self.reach, half, self.table, share, present, self.needed, packed, distance,
                self.planes,
            )  # fmt: skip

    def normalise(self, present: Tensor) -> None:
        """1 / Σ Â of Eq. 9."""
        run(
            kernels.local_norm, self.planes, len(self.offsets), self.table, self.rows, self.columns, self.reach,
            *present.shape, self.top, self.left, self.centre, present, self.norm,
        )  # fmt: skip

    def step(self, mask: Tensor, box: Tensor, crop: Crop, steps: int, result: Tensor) -> None:
        """Eq. 14 for one mask, inside the crop of its box."""
        y0, x0, y1, x1 = crop
        w = mask.shape[1]
        size = (y1 - y0 + 2 * self.reach) * (x1 - x0 + 2 * self.reach)
        now, then = scratch("now", size, torch.float32), scratch("then", size, torch.float32)
        run(
            kernels.local_steps, self.planes, self.norm, len(self.offsets), self.table, self.rows, self.columns, w,
            self.top, self.left, self.reach, box, y0, x0, y1 - y0, x1 - x0, self.centre, steps, mask, now, then,
            scratch("sum", w, torch.float32), result,
        )  # fmt: skip


def propagate_window(
    masks: Tensor,
    boxes: Tensor | None,
    valid: Sequence[Tensor | None],
    offsets: Sequence[tuple[int, int]],
    groups: Sequence[tuple[Sequence[int], Sequence[Layer]]],
    steps: int,
) -> Tensor:
    """Eq. 14 over a window for groups of masks, each with its layers of affinity; `offsets` is half of the window.

    A spread that changes from pixel to pixel makes the affinity lopsided; such layers go the torch way.
    """
    if any(layer[3] is not None for _, layers in groups for layer in layers):
        return _device.propagate_window(masks, boxes, valid, offsets, groups, steps)
    n, h, w = masks.shape
    masks, result = masks.contiguous(), torch.zeros(n, h, w)
    boxes = torch.ones(1, h, w).expand(n, h, w) if boxes is None else boxes.float().contiguous()
    crops = spread_out(_bounds, boxes)
    fields: list[tuple[Field, Tensor]] = []
    tasks: list[tuple[int, Field]] = []
    for (members, layers), mine in zip(groups, valid, strict=True):
        inner = [crop for i in members if (crop := crops[i]) is not None]
        if inner:
            layers = [(v.contiguous(), s.contiguous(), share, None) for v, s, share, _ in layers]
            field = Field(inner, layers, offsets)
            fields.append((field, torch.ones(h, w) if mine is None else mine.float().contiguous()))
            tasks += [(i, field) for i in members if crops[i] is not None]
    if not tasks:
        return result
    # Strip by strip through all groups: the features of a strip are read from memory once and then from the cache.
    pieces = [
        (field, max(0, y - field.top), min(field.rows, y + STRIP - field.top), present)
        for y in range(0, h, STRIP)
        for field, present in fields
        if field.top < y + STRIP and y < field.top + field.rows
    ]
    spread_out(Field.fill, *zip(*pieces, strict=True))
    spread_out(Field.normalise, *zip(*fields, strict=True))

    def one(i: int, field: Field) -> None:
        crop = crops[i]
        assert crop is not None
        field.step(masks[i], boxes[i], crop, steps, result[i])

    spread_out(one, *zip(*tasks, strict=True))
    return result


def _bounds(box: Tensor) -> Crop | None:
    """First row and column where the box is not 0, and one past the last; None for an empty box."""
    h, w = box.shape
    found = torch.empty(4, dtype=torch.int64)
    run(kernels.bounds, box, h, w, scratch("columns", w, torch.float32), found)
    y0, x0, y1, x1 = found.tolist()
    return (y0, x0, y1, x1) if y1 > 0 else None
