"""The minimum spanning tree of the pixel grid: the global neighborhood 𝒩 of §3.3.

Pixels are numbered row * w + column; the grid is 4-connected, its edges numbered vertical ones first, row by row.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order
from scipy.sparse.csgraph import minimum_spanning_tree as scipy_tree
from torch import Tensor

from misa.ops.affinity import check_finite, promote

TieRule = Literal["exact", "official"]


@dataclass(frozen=True)
class Tree:
    """A spanning tree of an (h, w) grid; vertices are also numbered so that a parent comes before its children."""

    h: int
    w: int
    edges: Int[Tensor, "m 2"]
    lengths: Float[Tensor, " m"]
    pixel: Int[Tensor, " p"]  # the pixel of each vertex; vertex 0 is the root
    parent: Int[Tensor, " p"]  # the parent of each vertex, as a vertex; the root is its own parent


def grid_edges(h: int, w: int, *, device: torch.device | str | None = None) -> Int[Tensor, "m 2"]:
    """All edges of the 4-connected grid, vertical ones first."""
    index = torch.arange(h * w, device=device).view(h, w)
    vertical = torch.stack([index[:-1], index[1:]], dim=-1).view(-1, 2)
    horizontal = torch.stack([index[:, :-1], index[:, 1:]], dim=-1).view(-1, 2)
    return torch.cat([vertical, horizontal])


def grid_lengths(
    guide: Float[Tensor, "d h w"], *, channel_weights: Float[Tensor, "c d"] | None = None
) -> Float[Tensor, " m"] | Float[Tensor, "c m"]:
    """Squared L2 distance of the guide along every grid edge; with weights K, of K^c · guide for all c at once."""
    vertical = (guide[:, 1:] - guide[:, :-1]).square().flatten(1)
    horizontal = (guide[:, :, 1:] - guide[:, :, :-1]).square().flatten(1)
    squares = torch.cat([vertical, horizontal], dim=1)
    return squares.sum(dim=0) if channel_weights is None else channel_weights.square() @ squares


def spanning_tree(lengths: Float[Tensor, " m"], h: int, w: int, *, tie_rule: TieRule = "exact") -> Tree:
    """The tree of least total length under the total order (length, edge number)."""
    device = lengths.device
    edges = grid_edges(h, w, device="cpu").numpy()
    values = lengths.detach().float().cpu().numpy()
    keys = values + np.float32(1) if tie_rule == "official" else values
    rank = np.empty(len(keys), dtype=np.float64)
    rank[np.argsort(keys, kind="stable")] = np.arange(1, len(keys) + 1)
    graph = csr_array((rank, (edges[:, 0], edges[:, 1])), shape=(h * w, h * w))
    chosen = scipy_tree(graph).tocoo()
    number = np.sort(np.argsort(rank)[chosen.data.astype(np.int64) - 1])
    order, before = breadth_first_order(chosen, 0, directed=False)
    vertex = np.empty(h * w, dtype=np.int64)
    vertex[order] = np.arange(h * w)
    parent = vertex[np.maximum(before, 0)[order]]
    parent[0] = 0
    on = lengths.new_tensor
    return Tree(
        h,
        w,
        edges=on(edges[number], dtype=torch.long),
        lengths=on(values[number], dtype=torch.float32),
        pixel=torch.as_tensor(order.astype(np.int64), device=device),
        parent=torch.as_tensor(parent.astype(np.int64), device=device),
    )


def minimum_spanning_tree(
    guide: Float[Tensor, "d h w"], *, tie_rule: TieRule = "exact", valid: Bool[Tensor, "h w"] | None = None
) -> Tree:
    """The minimum spanning tree of the 4-connected grid under squared L2 distances of the guide.

    Equal lengths are decided by the edge number, so the tree is unique. `tie_rule="official"` compares
    float32(length + 1) instead, as the official APro does: its trees are those. Only a later pass that keeps the
    tree but not the lengths can tell the difference.
    """
    if guide.dim() != 3 or 0 in guide.shape:
        raise ValueError(f"minimum_spanning_tree needs a guide of shape (d, h, w): it is {tuple(guide.shape)}.")
    if tie_rule not in ("exact", "official"):
        raise ValueError(f"minimum_spanning_tree knows the tie rules 'exact' and 'official', not {tie_rule!r}.")
    check_finite("minimum_spanning_tree: guide", guide)
    h, w = guide.shape[-2:]
    lengths = grid_lengths(promote(guide.detach()))
    if valid is not None:
        ends = grid_edges(h, w, device=guide.device)
        lengths = lengths.masked_fill(~valid.flatten()[ends].all(dim=1), torch.inf)
    return spanning_tree(lengths, h, w, tie_rule=tie_rule)
