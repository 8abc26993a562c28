"""The CPU path: calls the kernels of `_kernels` on tensors, one thread per tree, mask or strip of rows."""

from collections.abc import Callable, Sequence

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
    with scratch() as new:
        chosen = new(m + 1, torch.int32)
        with scratch():
            keys, best = new(m + 1, torch.int64), new(p, torch.int64)
            link, label, ends = (new(size, torch.int32) for size in (p, p, 2 * m + 2))
            run(kernels.spanning_tree, lengths, h, w, m, keys, best, link, label, ends, chosen)
        run(kernels.preorder, chosen, h, w, pixel, parent, edge, new(3 * p, torch.int32))


def at_edges(values: Tensor, edge: Tensor, length: Tensor) -> Tensor:
    """Values of grid edges (g m) at the upward edges (g p) of trees; infinite at the roots and where `length` is."""
    values, length, result = values.contiguous(), length.contiguous(), torch.empty(edge.shape)

    def one(*rows: Tensor) -> None:
        run(kernels.at_edges, *rows, edge.shape[1])

    spread_out(one, values, edge.contiguous(), length, result)
    return result


# ---- sums over the tree ----


class Merges:
    """The merge tree of one tree with one set of lengths, as `kernels.meet` leaves it, in memory from `new`."""

    def __init__(self, parent: Tensor, s: Tensor | int, new: Callable[[int, torch.dtype], Tensor | int]) -> None:
        p = len(parent)
        self.group, self.meeting = new(p, torch.int32), new(p, torch.int32)
        self.children = new(p, torch.int64)
        self.start, self.decay = new(p + 1, torch.int32), new(p, torch.float32)
        with scratch() as short:
            length, jump, depth = short(p, torch.float32), short(p, torch.int32), short(max(p, 256), torch.int32)
            self.k = run(
                kernels.meet, parent, s, p, self.group, self.meeting, length, self.decay, jump, depth, self.start,
                self.children, short(p, torch.int64),
            )  # fmt: skip

    def sums(self, values: Tensor, pixel: Tensor, out: int) -> int:
        """Numerators and denominators side by side, per flat zone, at the address `out`."""
        with scratch() as room:
            own, below = room(2 * self.k, torch.float64), room(2 * self.k, torch.float64)
            run(
                kernels.sums, values, pixel, len(pixel), self.k, self.group, self.meeting, self.decay, self.start,
                self.children, own, below, out,
            )  # fmt: skip
        return out


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
    zones = [spread_out(_zones, *zip(*plan, strict=True)) for plan in plans] if len(parts) > 1 else []

    def one(i: int, mask: Tensor, target: Tensor) -> None:
        merges, pixel = plans[0][parts[0][3][i]]
        with scratch() as new:
            out = merges.sums(mask, pixel, new(2 * merges.k, torch.float64))
            run(kernels.write_ratio, out, pixel, merges.group, p, target)

    def one_of_two(i: int, mask: Tensor, target: Tensor) -> None:
        with scratch() as new:
            sums: list[Tensor | float] = []
            for plan, zone, (_, _, _, index, share) in zip(plans, zones, parts, strict=True):
                merges, pixel = plan[index[i]]
                sums += [merges.sums(mask, pixel, new(2 * merges.k, torch.float64)), zone[index[i]], share]
            run(kernels.write_ratio_of_two, *sums, p, target)

    spread_out(one if len(parts) == 1 else one_of_two, range(n), values, result)
    return result


def _plan(pixel: Tensor, parent: Tensor, s: Tensor) -> tuple[Merges, Tensor]:
    """The merges of one tree, in memory of their own, and its pixels."""
    return Merges(parent, s, lambda size, dtype: torch.empty(size, dtype=dtype)), pixel


def _zones(merges: Merges, pixel: Tensor) -> Tensor:
    """The flat zone of every pixel."""
    zone = torch.empty_like(pixel)
    run(kernels.zones, pixel, merges.group, len(pixel), zone)
    return zone


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
        with scratch() as new:
            s = new(p, torch.float32)
            with scratch():
                at = new(p, torch.float32)
                run(kernels.tree_lengths, guide, len(guide), p, pixel, parent, length, factor, at, s)
            merges = Merges(parent, s, new)
            out = merges.sums(mask, pixel, new(2 * merges.k, torch.float64))
            run(kernels.write_ratio, out, pixel, merges.group, p, target)

    spread_out(one, range(n), values, guides, result)
    return result
