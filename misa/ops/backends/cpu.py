"""CPU backend: `loops` called on tensors, one thread per tree, mask or strip of rows.

Threads follow `torch.get_num_threads()`; the loops release the GIL.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from misa.ops.backends import torch_ops
from misa.ops.backends.loops import sums as tree_sums
from misa.ops.backends.loops import trees, windows
from misa.ops.backends.torch_ops import Index, Layer, Map, Part

T = TypeVar("T")
STRIP = 32  # rows per task of a thread
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def spread_out(task: Callable[..., T], *items: Any) -> list[T]:
    """Map a task over items in threads, in order."""
    workers = min(torch.get_num_threads(), len(items[0]))
    if workers <= 1:
        return [task(*item) for item in zip(*items, strict=True)]
    key = (os.getpid(), workers)  # a forked process needs threads of its own
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(workers, thread_name_prefix="misa")
    return list(_pools[key].map(task, *items))


def array(values: Tensor) -> np.ndarray:
    """Return the tensor's memory, or a contiguous copy; int32 viewed as uint32, for indices."""
    found = values.detach().contiguous().numpy()
    return found.view(np.uint32) if found.dtype == np.int32 else found


# ---- trees ----


def spanning_trees(lengths: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixel, parent and edge (g p) of the minimum spanning trees of g grids with edge lengths (g m)."""
    pixel, parent, edge = (torch.empty(len(lengths), h * w, dtype=torch.int32) for _ in range(3))

    def one(its: np.ndarray, pixel: np.ndarray, parent: np.ndarray, edge: np.ndarray) -> None:
        trees.spanning_tree(its, h, w, pixel, parent, edge)

    spread_out(one, array(lengths), array(pixel), array(parent), edge.numpy())
    return pixel, parent, edge


def at_edges(values: Tensor, edge: Tensor, length: Tensor) -> Tensor:
    """Gather values of grid edges at the trees' edges to the parents; infinite at the roots and where `length` is."""
    result = torch.empty(edge.shape)
    spread_out(trees.at_edges, array(values), edge.contiguous().numpy(), array(length), array(result))
    return result


# ---- sums over the tree ----


def propagate(values: Tensor, parts: Sequence[Part]) -> Tensor:
    """Apply Eq. 14 over whole trees: values (n p), per kernel (pixel, parent, s (g p), tree of each mask, weight).

    One kernel or two.
    """
    result = torch.empty(values.shape)
    pixels = [array(pixel) for pixel, *_ in parts]
    plans = [spread_out(tree_sums.meet, array(parent), array(s)) for _, parent, s, _, _ in parts]
    index = [index for *_, index, _ in parts]
    shares = [float(share) for *_, share in parts]

    def one(i: int, mask: np.ndarray, target: np.ndarray) -> None:
        pixel, merges = pixels[0][index[0][i]], plans[0][index[0][i]]
        tree_sums.write_ratio(tree_sums.sums(mask, pixel, merges), pixel, merges[0], target)

    def one_of_two(i: int, mask: np.ndarray, target: np.ndarray) -> None:
        sums: list[Any] = []
        for q in range(2):
            tree = index[q][i]
            sums += [tree_sums.sums(mask, pixels[q][tree], plans[q][tree]), zones[q][tree], shares[q]]
        tree_sums.write_ratio_of_two(*sums, target)

    if len(parts) > 1:
        zones = [[_zones(*tree) for tree in zip(*both, strict=True)] for both in zip(pixels, plans, strict=True)]
    spread_out(one if len(parts) == 1 else one_of_two, range(len(values)), array(values), array(result))
    return result


def _zones(pixel: np.ndarray, merges: tuple[Any, ...]) -> np.ndarray:
    """Return the flat zone of every pixel."""
    zone = np.empty_like(pixel)
    zone[pixel] = merges[0]
    return zone


def propagate_along(
    values: Tensor, guides: Tensor, pixel: Tensor, parent: Tensor, length: Tensor, index: Index, factor: float
) -> Tensor:
    """Apply Eq. 14 with one guide per mask (n d p): masks share the tree but not edge lengths and merge trees."""
    result = torch.empty(values.shape)
    trees = list(zip(array(pixel), array(parent), array(length), strict=True))

    def one(i: int, mask: np.ndarray, guide: np.ndarray, target: np.ndarray) -> None:
        pixel, parent, length = trees[index[i]]
        merges = tree_sums.meet(parent, tree_sums.tree_lengths(guide, pixel, parent, length, factor))
        tree_sums.write_ratio(tree_sums.sums(mask, pixel, merges), pixel, merges[0], target)

    spread_out(one, range(len(values)), array(values), array(guides), array(result))
    return result


# ---- features ----


def feature_lengths(features: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared distances of K^c · S along the grid edges (c m), and the sums of S_d and S_d² (d 2)."""
    d, h, w = features.shape
    c = len(factors)
    down, right = torch.zeros(c, h - 1, w), torch.zeros(c, h, w - 1)
    starts = range(0, h, STRIP)  # fixed, so that sums do not depend on the number of threads
    moments = torch.zeros(len(starts), d, 2, dtype=torch.float64)
    values, squares = array(features), array(factors.square())

    def strip(first: int, sums: np.ndarray) -> None:
        windows.feature_lengths(values, squares, first, min(first + STRIP, h), array(down), array(right), sums)

    spread_out(strip, starts, array(moments))
    return torch.cat([down.flatten(1), right.flatten(1)], dim=1), moments.sum(dim=0)


def lengths_and_variance(
    maps: Sequence[Map], offsets: Sequence[tuple[int, int]] = ()
) -> tuple[Tensor, list[Tensor], None]:
    """Return for several maps the squared distances of K^c · S along the grid edges (q m), and σ² (q) of each."""
    return torch_ops.weigh(feature_lengths, maps)


# ---- windows ----


def propagate_window(
    masks: Tensor,
    boxes: Tensor | None,
    valid: Sequence[Tensor | None],
    offsets: Sequence[tuple[int, int]],
    groups: Sequence[tuple[Index, Sequence[Layer]]],
    steps: int,
    *,
    product: bool = False,
) -> Tensor:
    """Apply Eq. 14 over a window to groups of masks, each with its affinity layers; `offsets` is half of the window.

    Affinities are computed only where a box of their group needs them. A spread that varies over the image makes the
    affinity asymmetric; such layers fall back to torch operations.
    """
    groups = torch_ops.joined(groups) if product else groups
    if any(layer[3] is not None for _, layers in groups for layer in layers):
        return torch_ops.propagate_window(masks, boxes, valid, offsets, groups, steps)
    n, h, w = masks.shape
    result = torch.zeros(n, h, w)
    frames = np.ones((1, h, w), np.float32).repeat(n, 0) if boxes is None else array(boxes.float())
    crops = spread_out(windows.bounds, frames)
    group = {i: g for g, (members, _) in enumerate(groups) for i in members if crops[i][2] > 0}
    if not group:
        return result
    table = np.array(list(offsets), dtype=np.int64).reshape(-1, 2)
    present = _present(valid, h, w)
    planes = _affinities([layers for _, layers in groups], [(g, *crops[i]) for i, g in group.items()], table, present)
    centres = [float(sum(layer[2] for layer in layers)) for _, layers in groups]
    reach = int(np.abs(table).max(initial=0))

    def one(i: int, g: int) -> None:
        windows.local_steps(
            planes[g], table, centres[g], reach, steps, values[i], frames[i], present[g], crops[i], targets[i]
        )

    values, targets = array(masks), array(result)
    spread_out(one, list(group), list(group.values()))
    return result


def _present(valid: Sequence[Tensor | None], h: int, w: int) -> list[np.ndarray]:
    """Return for every group a map that is 1 at valid pixels; groups of one image share it."""
    made = {id(mine): np.ones((h, w), np.float32) if mine is None else array(mine.float()) for mine in valid}
    return [made[id(mine)] for mine in valid]


def _affinities(
    layers: Sequence[Sequence[Layer]],
    crops: Sequence[tuple[int, ...]],
    offsets: np.ndarray,
    present: Sequence[np.ndarray],
) -> np.ndarray:
    """Return Â of all groups around their crops, a plane per offset; layers with the same values share a pass."""
    h, w = present[0].shape
    reach = int(np.abs(offsets).max(initial=0))
    runs = np.empty((h * len(crops), 4), np.int64)
    runs = runs[: windows.find_runs(np.array(crops, dtype=np.int64), len(layers), reach, h, w, runs)]
    planes = np.zeros((len(layers), len(offsets), h + reach, w + 2 * reach), np.float32)
    shared: dict[tuple[int, int], list[tuple[int, Layer]]] = {}
    for g, mine in enumerate(layers):
        for layer in mine:
            shared.setdefault((id(layer[0]), id(present[g])), []).append((g, layer))
    calls = []
    for users in shared.values():
        of_group = np.full(len(layers), -1)
        of_group[[g for g, _ in users]] = range(len(users))
        squares = array(torch.stack([layer[1] for _, layer in users]).float())
        shares = np.array([layer[2] for _, layer in users], dtype=np.float32)
        calls.append((array(users[0][1][0]), squares, shares, of_group, present[users[0][0]]))

    def strip(first: int) -> None:
        begin, end = np.searchsorted(runs[:, 0], (first, first + STRIP))
        for values, squares, shares, of_group, valid in calls:
            windows.add_affinities(values, squares, shares, of_group, runs[begin:end], offsets, valid, reach, planes)

    spread_out(strip, range(0, h, STRIP))
    return planes
