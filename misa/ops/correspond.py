"""DiscoBox's dense correspondence between objects of one class in different images, and mask transfer along it.

Axes: m key object · c channel · s side of the feature grid (7) · i cell of the query, j cell of a key (both s * s) ·
u side of a mask (28).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from misa.ops.affinity import check_finite, promote
from misa.ops.axes import check_shapes
from misa.ops.neighbors import Offset, inside, window_offsets


def similarity(query: Float[Tensor, "c s s"], keys: Float[Tensor, "m c s s"]) -> Float[Tensor, "m i j"]:
    """Return the cosine between every cell of the query and of each key; in [0, 1] for features of 0 or more.

    Norms are sqrt(Σ f² + 1e-6) + 1e-6, as in DiscoBox, so cells of zero features match nothing. Differentiable.
    """
    check_shapes("similarity", query=(query, "c h w"), keys=(keys, "m c h w"))
    check_finite("similarity: query", query)
    check_finite("similarity: keys", keys)
    a, b = promote(query).flatten(1), promote(keys).flatten(2)
    a = a / ((a.square().sum(dim=0, keepdim=True) + 1e-6).sqrt() + 1e-6)
    b = b / ((b.square().sum(dim=1, keepdim=True) + 1e-6).sqrt() + 1e-6)
    return torch.einsum("ci,mcj->mij", a, b)


@torch.no_grad()
def match(cosines: Float[Tensor, "m i j"], *, reach: int = 4, steps: int = 10) -> Float[Tensor, "m i j"]:
    """Return a matching plan from the query's cells to a key's that maps neighbors to neighbors; rows sum to ≤ 1.

    DiscoBox (Lan et al. 2021): starting from the cosines of cells at most `reach` apart in rows and in columns, `steps`
    times V ← the mean of the plan over the nine joint shifts of both grids that stay inside, its rows divided by their
    sums; plan ← cosines + V, its rows divided by their sums. `reach` limits the start only. No gradient.
    Raises ValueError: the cells are not those of two square grids of one size.
    """
    side = _side(cosines)
    offsets = window_offsets(3, centre=True)
    rows = torch.arange(side * side, device=cosines.device) // side
    columns = torch.arange(side * side, device=cosines.device) % side
    apart = (rows[:, None] - rows).abs().maximum((columns[:, None] - columns).abs())
    plan = cosines * (apart <= reach)
    there = inside(side, side, offsets, device=cosines.device).flatten(1).to(cosines.dtype)
    count = torch.einsum("ki,kj->ij", there, there)
    for _ in range(steps):
        votes = torch.stack([_shifted(plan, side, offset) for offset in offsets]).sum(dim=0) / count
        plan = cosines + votes / (votes.sum(dim=2, keepdim=True) + 1e-4)
        plan = plan / (plan.sum(dim=2, keepdim=True) + 1e-4)
    return plan


@torch.no_grad()
def transfer(
    plan: Float[Tensor, "m i j"],
    cosines: Float[Tensor, "m i j"],
    own: Float[Tensor, "u u"],
    masks: Float[Tensor, "m u u"],
) -> Float[Tensor, "2 u u"]:
    """Return the mean over the keys of their masks transferred to the query: (background, object).

    DiscoBox: the plan times the softmax of the cosines, rows divided by their sums, resized to the masks' grid on
    both sides and scaled by cells / pixels. Between pixels in both masks (product over 0.5) it carries the key's
    probability, clamped to [0.1, 0.9]. The same for the background, with 1 − mask. No gradient.
    Raises ValueError: shapes do not fit.
    """
    side, u = _side(plan), own.shape[-1]
    shapes = {"plan": (plan, "m i j"), "cosines": (cosines, "m i j")}
    check_shapes("transfer", **shapes, own=(own, "u u"), masks=(masks, "m u u"))
    m, cells = len(plan), side * side
    plan = plan * cosines.softmax(dim=2)
    plan = plan / (plan.sum(dim=2, keepdim=True) + 1e-5)
    by_key = _stretched(plan.reshape(m * cells, 1, side, side), u).view(m, cells, u * u)
    both = _stretched(by_key.transpose(1, 2).reshape(m * u * u, 1, side, side), u).view(m, u * u, u * u)
    both = both.transpose(1, 2) * (cells / (u * u))
    said = []
    for a, b in ((1 - own, 1 - masks), (own, masks)):
        a, b = a.flatten(), b.flatten(1)
        linked = both * (a[:, None] * b[:, None] > 0.5)
        said.append(torch.einsum("mij,mj->mi", linked, b.clamp(0.1, 0.9)).mean(dim=0).view(u, u))
    return torch.stack(said)


def _side(plan: Tensor) -> int:
    side = round(plan.shape[-1] ** 0.5)
    if plan.dim() != 3 or plan.shape[1:] != (side * side, side * side):
        raise ValueError(f"matches need two square grids of one size, (m, s², s²): the shape is {tuple(plan.shape)}.")
    return side


def _shifted(plan: Float[Tensor, "m i j"], side: int, offset: Offset) -> Float[Tensor, "m i j"]:
    """Return the plan shifted by one offset in both grids; 0 where either neighbor is outside."""
    dy, dx = offset
    grid = plan.view(-1, side, side, side, side)
    padded = F.pad(grid, (1, 1, 1, 1, 1, 1, 1, 1))
    rows, columns = slice(1 + dy, 1 + dy + side), slice(1 + dx, 1 + dx + side)
    return padded[:, rows, columns, rows, columns].reshape(plan.shape)


def _stretched(maps: Tensor, u: int) -> Tensor:
    return F.interpolate(maps, size=(u, u), mode="bilinear", align_corners=False)
