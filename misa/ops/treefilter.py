"""The differentiable tree filter: a mean over all pixels, weighted by products along the paths of a spanning tree.

Axes: g tree · n mask · d channel · p vertex of the tree · h row · w column.
BoxLevelSet and Box2Mask train through it; APro and MISA propagate with another kernel, without gradient
(`Guides.along_trees`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from misa.ops.affinity import check_finite
from misa.ops.axes import check_shapes
from misa.ops.backends.choice import backend
from misa.ops.backends.torch_ops import rounds
from misa.ops.tree import Trees


def tree_filter(
    values: Float[Tensor, "n h w"], trees: Trees, weights: Float[Tensor, "g p"], index: Sequence[int]
) -> Float[Tensor, "n h w"]:
    """Return Σ_j K_ij x_j / Σ_j K_ij, K_ij the product of the edge weights on the tree path from i to j, K_ii = 1.

    `weights` in [0, 1] are those of the edges to the parents, in vertex order (the root's is not read); `index` is the
    tree of each map. Differentiable once, in values and weights. An edge of weight 0, as into padding, cuts the tree
    there, and an isolated pixel keeps its value.

    After Song et al. 2019 ("Learnable tree filter"), as BoxLevelSet (Li et al. 2022) uses it: sums up the tree,
    S(v) = x(v) + Σ_children w S, then down, A(v) = S(v)(1 − w²) + w A(parent). In compiled loops on the CPU;
    elsewhere by pointer doubling, in a logarithmic number of rounds.
    Raises ValueError: shapes do not fit, or a map has no tree; on the CPU also for weights outside [0, 1]; NotFinite:
    NaN or Inf, on the CPU only.
    """
    _check(values, trees, weights, index)
    dtype = torch.promote_types(torch.promote_types(values.dtype, weights.dtype), torch.float32)
    which = torch.tensor(list(index), dtype=torch.long).to(values.device, non_blocking=True)
    pixel, parent = trees.pixel.long(), trees.parent.long()
    weights = weights.to(dtype).masked_fill(trees.edge < 0, 0)  # the root is stored as its own parent
    place = pixel[which]
    ordered = values.flatten(1).to(dtype).gather(1, place)
    every = torch.arange(len(weights), device=values.device)
    filtered = _TreeFilter.apply(ordered, weights, parent, which, every)
    result: Tensor = torch.zeros_like(ordered).scatter(1, place, filtered)
    return result.view_as(values)


def edge_weights(trees: Trees, guides: Float[Tensor, "g d h w"], scale: float) -> Float[Tensor, "g p"]:
    """Return exp(−|G_u − G_v|² / scale) of every edge to the parent, differentiable in the guides; 0 at the roots.

    Edges of infinite length, into padding, weigh 0 too.
    """
    if guides.shape[0] != trees.pixel.shape[0] or guides.shape[-2:] != (trees.h, trees.w) or not scale > 0:
        raise ValueError(
            f"edge_weights needs a guide (d, {trees.h}, {trees.w}) for each of the {len(trees.pixel)} trees and a "
            f"positive scale: they are {tuple(guides.shape)} and {scale}."
        )
    pixel = trees.pixel.long()
    ordered = guides.flatten(2).gather(2, pixel[:, None].expand(-1, guides.shape[1], -1))
    above = ordered.gather(2, trees.parent.long()[:, None].expand_as(ordered))
    squared = (ordered - above).square().sum(dim=1)
    return (-squared / scale).exp().masked_fill(torch.isinf(trees.length) | (trees.edge < 0), 0)


class _TreeFilter(torch.autograd.Function):
    """The filter in vertex order. The kernel is symmetric, so the gradient in the values is the same filter."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, parent: Tensor, which: Tensor, every: Tensor) -> Tensor:
        up, full = tree_sums(values, parent, weights, which)
        up_one, norm = tree_sums(torch.ones_like(weights), parent, weights, every)
        out = full / norm[which]
        ctx.save_for_backward(weights, parent, which, every, up, full, up_one, norm, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, parent, which, every, up, full, up_one, norm, out = ctx.saved_tensors
        grad = grad / norm[which]
        up_grad, full_grad = tree_sums(grad, parent, weights, which)
        if not ctx.needs_input_grad[1]:
            return full_grad, None, None, None, None
        own = _edge_gradient(up, full, up_grad, full_grad, parent[which], weights[which])
        by_norm = torch.zeros_like(weights).index_add(0, which, grad * out)
        up_by, full_by = tree_sums(by_norm, parent, weights, every)
        shared = _edge_gradient(up_one, norm, up_by, full_by, parent, weights)
        return full_grad, torch.zeros_like(weights).index_add(0, which, own) - shared, None, None, None


def _edge_gradient(
    up_x: Tensor, full_x: Tensor, up_y: Tensor, full_y: Tensor, parent: Tensor, weight: Tensor
) -> Float[Tensor, "n p"]:
    """Return ∂(yᵀ K x) / ∂w of every edge: sum of y below the edge times that of x beyond it, and the reverse."""
    beyond_x = full_x.gather(1, parent) - weight * up_x
    beyond_y = full_y.gather(1, parent) - weight * up_y
    return up_y * beyond_x + up_x * beyond_y


def tree_sums(
    values: Float[Tensor, "n p"], parent: Int[Tensor, "g p"], weight: Float[Tensor, "g p"], which: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n p"], Float[Tensor, "n p"]]:
    """Return Σ K x over the subtree of each vertex, and over the whole tree; the root's weight must be 0.

    In compiled loops on the CPU, elsewhere in torch operations.
    """
    if backend(values).__name__.endswith("cpu"):
        return _looped(values.contiguous(), parent.int(), weight.contiguous(), which)
    return _doubled(values, parent[which], weight[which])


def _looped(values: Tensor, parent: Tensor, weight: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    from misa.ops.backends.loops import products as compiled

    run = compiled.double if values.dtype == torch.float64 else compiled.single
    up, full = torch.empty_like(values), torch.empty_like(values)
    parents, weights = parent.numpy().view(np.uint32), weight.numpy()
    for x, i, u, f in zip(values.numpy(), which.tolist(), up.numpy(), full.numpy(), strict=True):
        run(x, parents[i], weights[i], u, f)
    return up, full


def _doubled(
    values: Float[Tensor, "n p"], parent: Int[Tensor, "n p"], weight: Float[Tensor, "n p"]
) -> tuple[Tensor, Tensor]:
    n, p = values.shape
    start = torch.arange(n, device=values.device)[:, None] * p
    steps = []
    above, along = (parent + start).flatten(), weight.flatten()
    for _ in range(rounds(p)):
        steps.append((above, along))
        along = along * along[above]
        above = above[above]
    up = values.flatten()
    for above, along in steps:
        up = up.index_add(0, above, along * up)
    full = up * (1 - weight.flatten().square())
    for above, along in steps:
        full = full + along * full[above]
    return up.view(n, p), full.view(n, p)


def _check(values: Tensor, trees: Trees, weights: Tensor, index: Sequence[int]) -> None:
    g = len(trees.pixel)
    check_shapes(
        "tree_filter", values=(values, f"n {trees.h} {trees.w}"), trees=(trees.pixel, "g p"), weights=(weights, "g p")
    )
    if len(index) != len(values) or any(not 0 <= i < g for i in index):
        raise ValueError(f"tree_filter needs an index of 0 … {g - 1} for each of {len(values)} maps: it is {index}.")
    check_finite("tree_filter: values", values)
    check_finite("tree_filter: weights", weights)
    if weights.device.type == "cpu" and weights.numel():
        low, high = weights.detach().aminmax()
        if low < 0 or high > 1:
            raise ValueError(f"tree_filter needs weights in [0, 1]: they are {low:.3g} to {high:.3g}.")
