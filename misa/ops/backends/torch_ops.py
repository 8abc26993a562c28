"""Backend in torch operations: any device, a fixed number of rounds, no synchronization with the device.

The same functions as `cpu` and `cuda.operations`.

Sums along a tree: k(i, j) = exp(−s(i, j)) with s(i, j) the largest edge on the tree path from i to j. Merging clusters
along the edges in ascending order (Kruskal) gives a merge tree. On a rooted tree it follows without sorting all edges:
when the edge above vertex x is processed, all vertices below x connected by shorter edges are one cluster with top x.
It merges with the cluster whose top is t(x), the nearest ancestor whose own upward edge is longer. So the t's form a
tree: x merges with t(x) at s(x), when the cluster of t(x) holds t(x) and the clusters of its children with smaller s.

In depth-first order, with the children of each vertex in ascending s, every cluster is a contiguous range of leaves: x
merges [left, split), the cluster of t(x), with [split, right), its own, and sums become differences of prefix sums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.ops.affinity import variance
from misa.ops.neighbors import inside, shift

NONE = torch.iinfo(torch.int64).max
LOW = 0xFFFFFFFF
MOST = 1 << 22  # pixels of all masks processed at once if every mask has its own merge tree

Index = Sequence[int]
# pixel, parent and s (g p) of the trees of one kernel, the tree of each mask, the kernel's weight
Part = tuple[Tensor, Tensor, Tensor, Index, float]
# values (d h w), their squared factors over σ² (d), the kernel's weight, 1/σ² (h w) if σ varies over the image
Layer = tuple[Tensor, Tensor, float, Tensor | None]
Map = tuple[Tensor, Tensor, Tensor | None]  # values (d h w), rows of factors (q d), False at padding (h w)


class Near(NamedTuple):
    """Squared distances to half of a window, a row per group of masks, and the optional divisors σ²."""

    distances: Float[Tensor, "g k h w"]
    scale: Float[Tensor, " g"] | None


def on_device(index: Index, like: Tensor) -> Int[Tensor, " n"]:
    """Copy indices from the host to a device asynchronously."""
    return torch.tensor(list(index), dtype=torch.long).to(like.device, non_blocking=True)


# ---- trees ----


def grid_edges(h: int, w: int, *, device: torch.device | str | None = None) -> Int[Tensor, "m 2"]:
    """Return all edges of the 4-connected grid, vertical ones first, row by row."""
    index = torch.arange(h * w, device=device).view(h, w)
    vertical = torch.stack([index[:-1], index[1:]], dim=-1).view(-1, 2)
    horizontal = torch.stack([index[:, :-1], index[:, 1:]], dim=-1).view(-1, 2)
    return torch.cat([vertical, horizontal])


def boruvka(lengths: Float[Tensor, "g m"], h: int, w: int) -> Bool[Tensor, "g m"]:
    """Return which grid edges are in the minimum spanning tree under the total order (length, edge number).

    Borůvka: every cluster links to the neighbor across its shortest edge; of two linked by the same edge the one with
    the smaller number stays a root. Clusters at least halve per round, and links are followed by pointer doubling.
    """
    g, m = lengths.shape
    p, device = h * w, lengths.device
    numbers = torch.arange(m, device=device)
    keys = ((lengths + 0.0).view(torch.int32).long() << 32) | numbers  # + 0.0 turns −0 into 0
    a, b = grid_edges(h, w, device=device).T
    label = torch.arange(p, device=device).expand(g, p)
    vertex = torch.arange(p, device=device).expand(g, p)
    aside = (numbers % p).expand(g, m)  # targets of edges inside a cluster, spread against contention
    chosen = torch.zeros(g, m + 1, dtype=torch.bool, device=device)
    for done in range(rounds(p)):
        from_a, from_b = label[:, a], label[:, b]
        within = from_a == from_b
        key = torch.where(within, NONE, keys)
        best = torch.full((g, p), NONE, device=device)
        best.scatter_reduce_(1, torch.where(within, aside, from_a), key, "amin")
        best.scatter_reduce_(1, torch.where(within, aside, from_b), key, "amin")
        found = best != NONE
        number = torch.where(found, best & LOW, 0)
        chosen.scatter_(1, torch.where(found, number, m), True)
        across = from_a.gather(1, number) + from_b.gather(1, number) - vertex
        across = torch.where(found, across, vertex)
        stays = (best.gather(1, across) == best) & (vertex < across)
        link = torch.where(stays, vertex, across)
        for _ in range(rounds(p) - done):
            link = link.gather(1, link)
        label = link.gather(1, label)
    return chosen[:, :m]


def root(chosen: Bool[Tensor, "g m"], h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number the vertices of the trees depth first: return pixel, parent and edge of each, from an Euler tour.

    Every pixel has four arcs – right, down, left, up. Those in the tree form the tour: after arriving by an arc, leave
    by the next one around the pixel. Positions in the tour come from list ranking by pointer doubling.
    """
    g = len(chosen)
    p, vertical, device = h * w, (h - 1) * w, chosen.device
    ids = torch.full((h, w, 4), -1, device=device)
    ids[:-1, :, 1] = torch.arange(vertical, device=device).view(h - 1, w)
    ids[1:, :, 3] = ids[:-1, :, 1]
    ids[:, :-1, 0] = vertical + torch.arange(h * (w - 1), device=device).view(h, w - 1)
    ids[:, 1:, 2] = ids[:, :-1, 0]
    ids = ids.view(p, 4)
    has = chosen[:, ids.clamp(min=0)] & (ids >= 0)

    arc = torch.arange(4 * p, device=device).view(p, 4)
    step = torch.tensor([1, w, -1, -w], dtype=torch.long).to(device, non_blocking=True)
    target = torch.where(ids >= 0, torch.arange(p, device=device)[:, None] + step, 0)
    around = torch.tensor([2, 3, 0, 1], dtype=torch.long).to(device, non_blocking=True)
    back = target * 4 + around

    # The next arc of the tree around the same pixel, itself if it is the only one.
    turn = arc.expand(g, p, 4)
    for k in (3, 2, 1):
        turn = torch.where(has.roll(-k, dims=2), arc.roll(-k, dims=1), turn)
    follow = turn.reshape(g, 4 * p)[:, back.view(-1)]
    start = torch.where(has[:, 0, 0], 0, 1)[:, None]  # pixel 0 has arcs to the right and down only
    here = arc.view(1, -1).expand(g, -1)
    last = (follow == start) | ~has.view(g, -1)
    follow = torch.where(last, here, follow)
    ahead = torch.where(last, 0, 1)
    for _ in range(rounds(2 * p) + 1):
        ahead = ahead + ahead.gather(1, follow)
        follow = follow.gather(1, follow)

    length = 2 * (p - 1)
    position = torch.where(has.view(g, -1), length - 1 - ahead, length)
    returning = position[:, back.view(-1)]
    down = (position < returning) & has.view(g, -1)
    marks = torch.zeros(g, length + 1, dtype=torch.long, device=device).scatter(1, position, down.long())
    marks[:, length] = 0
    count = marks.cumsum(dim=1)
    upward = (has & ~down.view(g, p, 4)).byte().argmax(dim=2, keepdim=True)  # the arc to the parent
    order = count.gather(1, returning.view(g, p, 4).gather(2, upward)[..., 0])
    order[:, 0] = 0
    above = target.expand(g, p, 4).gather(2, upward)[..., 0]
    above[:, 0] = 0
    edge = ids.expand(g, p, 4).gather(2, upward)[..., 0]
    edge[:, 0] = -1
    pixels = torch.arange(p, device=device).expand(g, p)
    parent = torch.empty_like(order).scatter(1, order, order.gather(1, above))
    return torch.empty_like(order).scatter(1, order, pixels), parent, torch.empty_like(order).scatter(1, order, edge)


def spanning_trees(lengths: Float[Tensor, "g m"], h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixel, parent and edge (g p) of the minimum spanning trees of g grids with edge lengths (g m)."""
    if h * w == 1:
        nothing = torch.zeros(len(lengths), 1, dtype=torch.int32, device=lengths.device)
        return nothing, nothing, nothing - 1
    pixel, parent, edge = root(boruvka(lengths, h, w), h, w)
    return pixel.int(), parent.int(), edge.int()


def at_edges(
    values: Float[Tensor, "g m"], edge: Int[Tensor, "g p"], length: Float[Tensor, "g p"]
) -> Float[Tensor, "g p"]:
    """Gather values of grid edges at the trees' edges to the parents; infinite at the roots and where `length` is."""
    if values.shape[1] == 0:
        return torch.full_like(length, torch.inf)
    return torch.where((edge < 0) | torch.isinf(length), torch.inf, values.gather(1, edge.long().clamp(min=0)))


# ---- sums over the tree ----


@dataclass(frozen=True)
class MergeTree:
    """For every vertex x the ranges of leaves that its upward edge merges, and exp(−s) of that edge (0 at the root)."""

    leaf: Int[Tensor, "g p"]
    left: Int[Tensor, "g p"]
    right: Int[Tensor, "g p"]
    kernel: Float[Tensor, "g p"]

    def rows(self, index: Int[Tensor, " n"]) -> "MergeTree":
        """Return one row per mask."""
        return MergeTree(self.leaf[index], self.left[index], self.right[index], self.kernel[index])


def rounds(p: int) -> int:
    """Return how many pointer doublings reach every ancestor in a tree of p vertices."""
    return max(1, (p - 1).bit_length())


def meeting_points(parent: Int[Tensor, "g p"], s: Float[Tensor, "g p"]) -> Int[Tensor, "g p"]:
    """Return t(x), the nearest ancestor whose upward edge is longer than that of x. The root has an infinite edge."""
    ancestors, longest = [parent], [s]
    for _ in range(rounds(parent.shape[1]) - 1):
        jump, top = ancestors[-1], longest[-1]
        longest.append(torch.maximum(top, top.gather(1, jump)))
        ancestors.append(jump.gather(1, jump))
    meeting = parent
    for jump, top in zip(reversed(ancestors), reversed(longest), strict=True):
        meeting = torch.where(top.gather(1, meeting) <= s, jump.gather(1, meeting), meeting)
    return meeting


def merge_tree(parent: Int[Tensor, "g p"], s: Float[Tensor, "g p"]) -> MergeTree:
    """Return the merge trees of g rooted trees with upward edges s (float32, the root's is ignored)."""
    g, p = s.shape
    s = s.clone()
    s[:, 0] = torch.inf
    meeting = meeting_points(parent.expand(g, p), s)
    numbers = torch.arange(p, device=s.device).expand(g, p)

    # Group children by parent, ascending in s; the root sorts last in its own group, where it has no effect.
    bits = s.view(torch.int32).long()
    bits[:, 0] += 1
    order = torch.argsort((meeting << 32) | bits, dim=1)

    # Leaves below every vertex, by pointer doubling: step k adds the vertices 2^k steps below.
    size = torch.ones_like(meeting)
    jump = torch.cat([meeting, torch.full((g, 1), p, device=s.device)], dim=1)
    jump[:, 0] = p
    for _ in range(rounds(p)):
        here = jump[:, :p]
        ended = here == p
        size = size.scatter_add(1, torch.where(ended, numbers, here), torch.where(ended, 0, size))
        jump = jump.gather(1, jump)

    # A vertex starts one after its meeting point plus its earlier siblings, summed along the chain of t's.
    in_order = size.gather(1, order)
    before = in_order.cumsum(dim=1) - in_order
    group = meeting.gather(1, order)
    first = torch.cat([torch.ones_like(group[:, :1], dtype=torch.bool), group[:, 1:] != group[:, :-1]], dim=1)
    base = torch.where(first, before, 0).cummax(dim=1).values
    leaf = torch.empty_like(size).scatter(1, order, before - base + 1)
    leaf[:, 0] = 0
    jump = meeting
    for _ in range(rounds(p)):
        leaf = leaf + leaf.gather(1, jump)
        jump = jump.gather(1, jump)

    kernel = torch.exp(-s.double())
    return MergeTree(leaf, left=leaf.gather(1, meeting), right=leaf + size, kernel=kernel)


def sweep(tree: MergeTree, values: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """Return Σ_j k(i, j) values(j) at every vertex; `tree` has one row for all values or one per row of values."""
    n, p = values.shape
    leaf, left, right = tree.leaf.expand(n, p), tree.left.expand(n, p), tree.right.expand(n, p)
    values = values.double()
    prefix = torch.zeros(n, p + 1, dtype=torch.float64, device=values.device)
    prefix[:, 1:] = torch.zeros_like(values).scatter(1, leaf, values).cumsum(dim=1)
    at_split = prefix.gather(1, leaf)
    to_left = tree.kernel * (prefix.gather(1, right) - at_split)
    to_right = tree.kernel * (at_split - prefix.gather(1, left))
    steps = torch.zeros_like(prefix)
    steps.scatter_add_(1, left, to_left)
    steps.scatter_add_(1, leaf, to_right - to_left)
    steps.scatter_add_(1, right, -to_right)
    return steps.cumsum(dim=1).gather(1, leaf) + values


def propagate(values: Float[Tensor, "n p"], parts: Sequence[Part]) -> Float[Tensor, "n p"]:
    """Apply Eq. 14 over whole trees: values (n p), per kernel (pixel, parent, s (g p), tree of each mask, weight)."""
    top: Tensor | None = None
    bottom: Tensor | None = None
    for pixel, parent, s, index, share in parts:
        merges = merge_tree(parent.long(), s)
        ones = sweep(merges, torch.ones_like(s))
        which = on_device(index, values)
        pixels = pixel.long()[which]
        numerator = sweep(merges.rows(which), values.gather(1, pixels))
        numerator = share * torch.empty_like(numerator).scatter(1, pixels, numerator)
        denominator = share * torch.empty_like(ones).scatter(1, pixel.long(), ones)[which]
        top = numerator if top is None else top + numerator
        bottom = denominator if bottom is None else bottom + denominator
    assert top is not None
    assert bottom is not None
    return (top / bottom).to(values.dtype)


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
    chunk = max(1, MOST // values.shape[1])
    if len(values) > chunk:
        starts = range(0, len(values), chunk)
        cuts = [slice(start, start + chunk) for start in starts]
        tree = (pixel, parent, length)
        return torch.cat([propagate_along(values[c], guides[c], *tree, index[c], factor) for c in cuts])
    which = on_device(index, values)
    pixels, parents = pixel.long()[which], parent.long()[which]
    s = torch.zeros_like(values, dtype=torch.float32)
    for channel in guides.unbind(1):
        at = channel.gather(1, pixels)
        s = s + (at - at.gather(1, parents)).square().float()
    s = torch.where(torch.isinf(length[which]), torch.inf, s * factor)
    merges = merge_tree(parents, s)
    ratio = sweep(merges, values.gather(1, pixels)) / sweep(merges, torch.ones_like(s))
    return torch.empty_like(ratio).scatter(1, pixels, ratio).to(values.dtype)


# ---- features ----


def feature_lengths(features: Float[Tensor, "d h w"], factors: Float[Tensor, "c d"]) -> tuple[Tensor, Tensor]:
    """Return squared distances of K^c · S along the grid edges (c m), and the sums of S_d and S_d² (d 2)."""
    vertical = (features[:, 1:] - features[:, :-1]).square().flatten(1)
    horizontal = (features[:, :, 1:] - features[:, :, :-1]).square().flatten(1)
    squares = factors.square()
    lengths = torch.cat([squares @ vertical, squares @ horizontal], dim=1)
    flat = features.double().flatten(1)
    return lengths, torch.stack([flat.sum(dim=1), flat.square().sum(dim=1)], dim=1)


def lengths_and_variance(
    maps: Sequence[Map], offsets: Sequence[tuple[int, int]] = ()
) -> tuple[Float[Tensor, "q m"], list[Tensor], None]:
    """Return for several maps the squared distances of K^c · S along the grid edges, and σ² of K^c · S (valid pixels).

    The CUDA backend also returns the distances to the neighbors at `offsets`.
    """
    return weigh(feature_lengths, maps)


def weigh(
    measure: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], maps: Sequence[Map]
) -> tuple[Tensor, list[Tensor], None]:
    """Compute `lengths_and_variance` with a backend's `feature_lengths`; S is set to 0 at padding."""
    lengths, variances = [], []
    for features, factors, valid in maps:
        count: Tensor | int = features[0].numel()
        if valid is not None:
            features, count = features * valid, valid.sum().clamp(min=1)
        length, moments = measure(features, factors)
        first, second = (moments / count).unbind(dim=1)
        lengths.append(length)
        variances.append(variance(first, second, factors.double()).float())
    return lengths[0] if len(lengths) == 1 else torch.cat(lengths), variances, None


# ---- windows ----


def joined(groups: Sequence[tuple[Index, Sequence[Layer]]]) -> list[tuple[Index, list[Layer]]]:
    """Merge layers exp(−a) and exp(−b)^weight, with one spread each, into one layer by adding their distances."""
    maps: dict[tuple[int, ...], Tensor] = {}
    result: list[tuple[Index, list[Layer]]] = []
    for members, layers in groups:
        key = tuple(id(values) for values, *_ in layers)
        if key not in maps:
            maps[key] = torch.cat([values for values, *_ in layers])
        row = torch.cat([share * squares for _, squares, share, _ in layers])
        result.append((members, [(maps[key], row, 1.0, None)]))
    return result


def window_affinity(
    h: int,
    w: int,
    valid: Sequence[Tensor | None],
    offsets: Sequence[tuple[int, int]],
    groups: Sequence[Sequence[Layer]],
) -> Float[Tensor, "g k h w"]:
    """Return Â of every group to the center, to `offsets` and to their opposites, in this order; 0 at padding.

    Layers of several groups with the same values, the categories of one image, share the squared differences: one
    matrix product per offset serves them all (Eq. 12).
    """
    values: dict[int, Tensor] = {}
    shared: dict[int, list[tuple[int, Layer]]] = {}
    for number, layers in enumerate(groups):
        for layer in layers:
            values[id(layer[0])] = layer[0]
            shared.setdefault(id(layer[0]), []).append((number, layer))
    like = groups[0][0][0]
    both = [*offsets, *((-dy, -dx) for dy, dx in offsets)]
    present = inside(h, w, both, device=like.device)
    half = len(offsets)
    planes = like.new_zeros(len(groups), 1 + 2 * half, h, w)
    for number, layers in enumerate(groups):
        planes[number, 0] = sum(layer[2] for layer in layers)
    for key, users in shared.items():
        squares = torch.stack([layer[1] for _, layer in users])
        for k, offset in enumerate(offsets):
            difference = (shift(values[key], offset) - values[key]).square()
            distance = (squares @ difference.flatten(1)).view(-1, h, w)
            for (number, (_, _, share, precision)), d in zip(users, distance, strict=True):
                for at, e in ((1 + k, d), (1 + half + k, shift(d, both[half + k]))):
                    e = e if precision is None else e * precision
                    affinity = torch.exp(-e)
                    planes[number, at] += share * torch.where(affinity < 1e-20, 0, affinity)
    planes[:, 1:] *= present
    for number, mine in enumerate(valid):
        if mine is not None:
            there = torch.stack([mine, *(shift(mine, offset) for offset in both)])
            planes[number] *= mine & there
    return planes


def propagate_window(
    masks: Float[Tensor, "n h w"],
    boxes: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"] | None,
    valid: Sequence[Tensor | None],
    offsets: Sequence[tuple[int, int]],
    groups: Sequence[tuple[Index, Sequence[Layer]]],
    steps: int,
    *,
    product: bool = False,
) -> Float[Tensor, "n h w"]:
    """Apply Eq. 14 over a window to groups of masks, each with its affinity layers; `offsets` is half of the window.

    A group's affinities are added with their weights; with `product` they multiply, with the weights as exponents.
    """
    n, h, w = masks.shape
    groups = joined(groups) if product else groups
    planes = window_affinity(h, w, valid, offsets, [layers for _, layers in groups])
    weights = planes / planes.sum(dim=1, keepdim=True).clamp(min=torch.finfo(planes.dtype).tiny)
    of_mask = [0] * n
    for number, (members, _) in enumerate(groups):
        for i in members:
            of_mask[i] = number
    index = on_device(of_mask, masks)
    boxes = None if boxes is None else boxes.to(masks.dtype)
    every = [(0, 0), *offsets, *((-dy, -dx) for dy, dx in offsets)]
    if boxes is not None:
        masks = masks * boxes
    weights = weights[index] if len(groups) > 1 else weights
    for _ in range(steps):
        mean = torch.zeros_like(masks)
        for k, offset in enumerate(every):
            mean.addcmul_(weights[:, k], shift(masks, offset))
        masks = mean if boxes is None else mean * boxes
    return masks
