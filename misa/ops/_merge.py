"""Sums of the tree kernel of Eq. 14 in torch operations alone: any device, a fixed number of rounds, no copies.

k(i, j) = exp(−s(i, j)) with s(i, j) the largest edge on the tree path from i to j. Joining the edges in ascending
order (Kruskal) gives a merge tree. On a rooted tree it can be read off without sorting all edges: when the edge above
vertex x joins, everything below x that is connected by shorter edges is one cluster topped by x, and it meets the
cluster topped by t(x), the nearest ancestor whose own upward edge is longer. So the t's form a tree, x meets t(x)
at weight s(x), and what t(x) holds by then is itself and those of its children with smaller s.

Laid out depth first with the children of each vertex in ascending s, every cluster is a contiguous range of leaves:
x joins [left, split), the part of t(x), to [split, right), its own part, and sums turn into prefix sums.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class MergeTree:
    """For every vertex x the ranges of leaves that its upward edge joins, and exp(−s) of that edge (0 at the root)."""

    leaf: Int[Tensor, "g p"]
    left: Int[Tensor, "g p"]
    right: Int[Tensor, "g p"]
    kernel: Float[Tensor, "g p"]

    def rows(self, index: Int[Tensor, " n"]) -> "MergeTree":
        """One row per mask."""
        return MergeTree(self.leaf[index], self.left[index], self.right[index], self.kernel[index])


def rounds(p: int) -> int:
    """How many doublings reach every ancestor of a tree with p vertices."""
    return max(1, (p - 1).bit_length())


def meeting_points(parent: Int[Tensor, "g p"], s: Float[Tensor, "g p"]) -> Int[Tensor, "g p"]:
    """t(x): the nearest ancestor whose upward edge is longer than that of x. The root has an infinite edge."""
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
    """The merge tree of g rooted trees with upward edges s (float32, the root's is ignored)."""
    g, p = s.shape
    s = s.clone()
    s[:, 0] = torch.inf
    meeting = meeting_points(parent.expand(g, p), s)
    numbers = torch.arange(p, device=s.device).expand(g, p)

    # Children side by side, ascending in s; the root comes last in its own group, where it disturbs nobody.
    bits = s.view(torch.int32).long()
    bits[:, 0] += 1
    order = torch.argsort((meeting << 32) | bits, dim=1)

    # Leaves below every vertex, by doubling: what is 2^k steps below is added at step k.
    size = torch.ones_like(meeting)
    jump = torch.cat([meeting, torch.full((g, 1), p, device=s.device)], dim=1)
    jump[:, 0] = p
    for _ in range(rounds(p)):
        here = jump[:, :p]
        ended = here == p
        size = size.scatter_add(1, torch.where(ended, numbers, here), torch.where(ended, 0, size))
        jump = jump.gather(1, jump)

    # Where a vertex starts: one after its meeting point plus its earlier siblings, summed along the chain of t's.
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
    """Σ_j k(i, j) values(j) at every vertex; `tree` has one row for all values or one per row of values."""
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
