"""The minimum spanning tree of the pixel grid: the global neighborhood 𝒩 of §3.3.

Pixels are numbered row * w + column; the grid is 4-connected, its edges numbered vertical ones first, row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.ops.affinity import check_finite, promote
from misa.ops.axes import images
from misa.ops.backends.choice import backend
from misa.ops.backends.torch_ops import grid_edges

TieRule = Literal["exact", "official"]


@dataclass(frozen=True)
class Trees:
    """Spanning trees of g grids of one size; vertices are numbered depth first, from the root 0.

    `edge` is the grid edge to the parent (−1 at the root), `length` its squared distance, `pixel` the vertex's pixel.
    """

    h: int
    w: int
    pixel: Int[Tensor, "g p"]
    parent: Int[Tensor, "g p"]
    edge: Int[Tensor, "g p"]
    length: Float[Tensor, "g p"]

    def __getitem__(self, i: int) -> "Tree":
        return Tree(self.h, self.w, *(x[i : i + 1] for x in self.tensors()))

    def rows(self, index: Sequence[int]) -> "Trees":
        """Return the trees at the given indices, in that order."""
        return Trees(self.h, self.w, *(torch.stack([x[i] for i in index]) for x in self.tensors()))

    def cut(self, first: int | None, last: int | None) -> "Trees":
        """Return the trees `first` to `last` (exclusive), as views."""
        return Trees(self.h, self.w, *(x[first:last] for x in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return pixel, parent, edge and length (g p)."""
        return self.pixel, self.parent, self.edge, self.length


class Tree(Trees):
    """One spanning tree."""

    @cached_property
    def _order(self) -> Int[Tensor, " m"]:
        return self.edge[0, 1:].long().argsort()

    @property
    def edges(self) -> Int[Tensor, "m 2"]:
        """The two pixels of every edge, in ascending order of the grid's edge numbers."""
        return grid_edges(self.h, self.w, device=self.edge.device)[self.edge[0, 1:].long()[self._order]]

    @property
    def lengths(self) -> Float[Tensor, " m"]:
        """The squared distance of the guide along every edge, in the order of `edges`."""
        return self.length[0, 1:][self._order]


def grid_lengths(guide: Float[Tensor, "*b d h w"]) -> Float[Tensor, "*b m"]:
    """Return the squared L2 distance of the guide along every grid edge."""
    vertical = (guide[..., 1:, :] - guide[..., :-1, :]).square().sum(dim=-3)
    horizontal = (guide[..., :, 1:] - guide[..., :, :-1]).square().sum(dim=-3)
    return torch.cat([vertical.flatten(-2), horizontal.flatten(-2)], dim=-1)


def cut_padding(
    lengths: Float[Tensor, "g m"], valid: Bool[Tensor, "#g h w"] | None, h: int, w: int
) -> Float[Tensor, "g m"]:
    """Set the lengths of edges that touch padding to infinity, so that nothing propagates across."""
    return lengths if valid is None else lengths.masked_fill(edges_into_padding(valid), torch.inf)


def edges_into_padding(valid: Bool[Tensor, "g h w"]) -> Bool[Tensor, "g m"]:
    """Return which grid edges have an end that is not valid."""
    down, right = valid[:, 1:] & valid[:, :-1], valid[:, :, 1:] & valid[:, :, :-1]
    return ~torch.cat([down.flatten(1), right.flatten(1)], dim=1)


def spanning_trees(lengths: Float[Tensor, "g m"], h: int, w: int, *, tie_rule: TieRule = "exact") -> Trees:
    """Return the minimum spanning trees under the total order (length, edge number)."""
    if tie_rule not in ("exact", "official"):
        raise ValueError(f"a spanning tree knows the tie rules 'exact' and 'official', not {tie_rule!r}.")
    lengths = lengths.detach().float().contiguous()
    keys = lengths + 1.0 if tie_rule == "official" else lengths
    pixel, parent, edge = backend(lengths).spanning_trees(keys, h, w)
    nowhere = torch.zeros_like(edge, dtype=torch.float32)
    return Trees(h, w, pixel, parent, edge, backend(lengths).at_edges(lengths, edge, nowhere))


@images(list, guide=3, valid=2)
def minimum_spanning_tree(
    guide: Float[Tensor, "d h w"], *, tie_rule: TieRule = "exact", valid: Bool[Tensor, "h w"] | None = None
) -> Tree:
    """Return the minimum spanning tree of the 4-connected grid under squared L2 distances of the guide.

    Ties of length are broken by the edge number, so the tree is unique. `tie_rule="official"` compares
    float32(length + 1) instead, which gives the trees of the official APro. The two differ only for a later pass that
    keeps the tree but changes the lengths. `valid` is False at padding.
    """
    if guide.dim() != 3 or 0 in guide.shape:
        raise ValueError(f"minimum_spanning_tree needs a guide of shape (d, h, w): it is {tuple(guide.shape)}.")
    check_finite("minimum_spanning_tree: guide", guide)
    h, w = guide.shape[-2:]
    lengths = grid_lengths(promote(guide.detach()))[None]
    return spanning_trees(cut_padding(lengths, None if valid is None else valid[None], h, w), h, w, tie_rule=tie_rule)[
        0
    ]
