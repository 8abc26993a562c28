"""The CPU path: calls the kernels of `_kernels` on tensors, one thread per tree, mask or strip of rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from misa.ops import _kernels as kernels
from misa.ops._run import run, scratch, spread_out
from misa.ops._windows import feature_lengths, plan_windows, propagate_window

__all__ = [
    "at_edges", "feature_lengths", "plan_windows", "propagate", "propagate_along", "propagate_window", "spanning_trees",
]  # fmt: skip

# ---- trees ----


def spanning_trees(lengths: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """pixel, parent and edge (g p) of the minimum spanning trees of g grids with edge lengths (g m)."""
    lengths = lengths.contiguous()
    pixel, parent, edge = (torch.empty(len(lengths), h * w, dtype=torch.int32) for _ in range(3))

    def one(*rows: Tensor) -> None:
        _spanning_tree(h, w, *rows)

    spread_out(one, lengths, pixel, parent, edge)
    return pixel, parent, edge


def _spanning_tree(h: int, w: int, lengths: Tensor, pixel: Tensor, parent: Tensor, edge: Tensor) -> None:
    p, m = h * w, len(lengths)
    needs = [("keys", m), ("left", m + 1), ("best", p)]
    longs = [scratch(name, size, torch.int64) for name, size in needs]
    needs = [("link", p), ("label", p), ("ends", 2 * m + 2), ("chosen", m + 1), ("stack", 3 * p)]
    shorts = [scratch(name, size, torch.int32) for name, size in needs]
    run(kernels.spanning_tree, lengths, h, w, m, *longs, *shorts, pixel, parent, edge)


def at_edges(values: Tensor, edge: Tensor, length: Tensor) -> Tensor:
    """Values of grid edges (g m) at the upward edges (g p) of trees; infinite at the roots and where `length` is."""
    values, length, result = values.contiguous(), length.contiguous(), torch.empty(edge.shape)

    def one(*rows: Tensor) -> None:
        run(kernels.at_edges, *rows, edge.shape[1])

    spread_out(one, values, edge.contiguous(), length, result)
    return result


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

    def sums(self, values: Tensor, pixel: Tensor, name: str = "out") -> Tensor:
        """Numerators and denominators side by side, per flat zone, in the scratch memory of this name."""
        own, below, gain, out = (scratch(x, 2 * self.k, torch.float64) for x in ("own", "below", "gain", name))
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
    """Eq. 14 over whole trees: values (n p), per kernel (pixel, parent, s (g p), tree of each mask, its share).

    One kernel or two.
    """
    n, p = values.shape
    values, result = values.contiguous(), torch.empty(n, p)
    plans = [spread_out(_plan, pixel, parent, s.contiguous()) for pixel, parent, s, _, _ in parts]

    def one(i: int, mask: Tensor, target: Tensor) -> None:
        merges, pixel, _ = plans[0][parts[0][3][i]]
        run(kernels.write_ratio, merges.sums(mask, pixel), pixel, merges.group, p, target)

    def one_of_two(i: int, mask: Tensor, target: Tensor) -> None:
        sums: list[Tensor | float] = []
        for plan, (_, _, _, index, share), name in zip(plans, parts, ("out", "other"), strict=True):
            merges, pixel, zone = plan[index[i]]
            sums += [merges.sums(mask, pixel, name), zone, share]
        run(kernels.write_ratio_of_two, *sums, p, target)

    spread_out(one if len(parts) == 1 else one_of_two, range(n), values, result)
    return result


def _plan(pixel: Tensor, parent: Tensor, s: Tensor) -> tuple[Merges, Tensor, Tensor]:
    """The merges of one tree, its pixels, and the flat zone of every pixel."""
    merges, zone = Merges(len(pixel), keep=True).build(parent, s), torch.empty_like(pixel)
    run(kernels.zones, pixel, merges.group, len(pixel), zone)
    return merges, pixel, zone


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
    trees = list(zip(pixel, parent, length, strict=True))

    def one(i: int, mask: Tensor, guide: Tensor, target: Tensor) -> None:
        pixel, parent, length = trees[index[i]]
        s, at = scratch("s", p, torch.float32), scratch("at", p, torch.float32)
        run(kernels.tree_lengths, guide, len(guide), p, pixel, parent, length, factor, at, s)
        merges = Merges(p, keep=False).build(parent, s)
        run(kernels.write_ratio, merges.sums(mask, pixel), pixel, merges.group, p, target)

    spread_out(one, range(n), values, guides, result)
    return result
