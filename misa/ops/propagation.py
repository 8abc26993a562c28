"""Propagation of masks along affinities (§3.3, Eq. 7, 9 and 14): local, global and PAMR.

Axes: n instance · c category · d channel · k neighbor · h row · w column. All instances and categories of an image
go through together. With a `SemanticGuide` the kernel is Â^c = A + balance · A^c (SEPA): the numerators and the
denominators of both kernels are added before the one division. Results carry no gradient: they are pseudo masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.ops._merge import merge_tree, sweep
from misa.ops.affinity import TINY, check_finite, promote, spread, squared_distances, window_spread
from misa.ops.neighbors import inside, shift, window_offsets
from misa.ops.tree import TieRule, Tree, grid_edges, grid_lengths, minimum_spanning_tree, spanning_tree

GlobalForm = Literal["sum", "embedding", "product"]


@dataclass(frozen=True)
class SemanticGuide:
    """The dense feature S and the saliency factors K of a semantic network (Eq. 1), for Eq. 11–14."""

    features: Float[Tensor, "d h w"]
    saliency_factors: Float[Tensor, "c d"]

    def __post_init__(self) -> None:
        s, k = self.features, self.saliency_factors
        if s.dim() != 3 or k.dim() != 2 or s.shape[0] != k.shape[1]:
            raise ValueError(
                "SemanticGuide needs features (d, h, w) and saliency_factors (c, d) with the same d: "
                f"they are {tuple(s.shape)} and {tuple(k.shape)}."
            )

    def rows(self, labels: Int[Tensor, " n"], *, saliency: bool) -> tuple[Float[Tensor, "c d"], Int[Tensor, " n"]]:
        """K of the categories present, and which of its rows each instance uses; all ones for A^f (Eq. 10)."""
        k = promote(self.saliency_factors)
        if not saliency:
            return k.new_ones(1, k.shape[1]), torch.zeros_like(labels)
        present, index = labels.unique(return_inverse=True)
        return k[present], index


def check_masks(name: str, masks: Tensor, guide: Tensor, semantic: SemanticGuide | None, labels: Tensor | None) -> None:
    """Shapes and values that every propagation needs."""
    if masks.dim() != 3 or guide.dim() not in (3, 4) or masks.shape[-2:] != guide.shape[-2:] or 0 in guide.shape[-3:]:
        raise ValueError(
            f"{name} needs masks (n, h, w) and a guide (d, h, w) of one size: "
            f"they are {tuple(masks.shape)} and {tuple(guide.shape)}."
        )
    check_finite(f"{name}: masks", masks)
    check_finite(f"{name}: guide", guide)
    if semantic is None:
        return
    if semantic.features.shape[-2:] != masks.shape[-2:]:
        raise ValueError(
            f"{name} needs semantic features at the size of the masks {tuple(masks.shape[-2:])}: "
            f"they are {tuple(semantic.features.shape)}."
        )
    check_finite(f"{name}: semantic features", semantic.features)
    check_finite(f"{name}: saliency factors", semantic.saliency_factors)
    if labels is None or labels.shape != masks.shape[:1]:
        raise ValueError(f"{name} needs labels (n,) with the category of each mask to use the semantic guide.")
    categories = semantic.saliency_factors.shape[0]
    if labels.device.type == "cpu" and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < categories:
        raise ValueError(f"{name}: labels must lie in 0 … {categories - 1}, one row of saliency_factors each.")


def _tree_lengths(tree: Tree, guide: Float[Tensor, "*g d h w"]) -> Float[Tensor, "g p"]:
    """Squared distance of the guide between each vertex and its parent."""
    values = guide.flatten(-2)[..., tree.pixel]
    squares = (values - values[..., tree.parent]).square().sum(dim=-2)
    return squares if squares.dim() == 2 else squares[None]


def _tree_sums(masks: Tensor, tree: Tree, s: Float[Tensor, "g p"]) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of Eq. 14 with N = all pixels."""
    order = merge_tree(tree.parent[None], s)
    numerator = masks.new_empty(masks.shape, dtype=torch.float64).flatten(1)
    denominator = numerator.new_empty(s.shape)
    numerator[:, tree.pixel] = sweep(order, masks.flatten(1)[:, tree.pixel])
    denominator[:, tree.pixel] = sweep(order, torch.ones_like(s))
    return numerator, denominator


@torch.no_grad()
def propagate_global(
    masks: Float[Tensor, "n h w"],
    guide: Float[Tensor, "d h w"] | Float[Tensor, "n d h w"],
    *,
    bandwidth: float,
    tree: Tree | None = None,
    semantic: SemanticGuide | None = None,
    labels: Int[Tensor, " n"] | None = None,
    balance: float = 0.7,
    saliency: bool = True,
    global_form: GlobalForm = "sum",
    semantic_sigma: Literal["image"] | float = "image",
    semantic_scale: float = 1.0,
    tie_rule: TieRule = "exact",
    valid: Bool[Tensor, "h w"] | None = None,
) -> Float[Tensor, "n h w"]:
    """Σ_j k(i, j) m(j) / Σ_j k(i, j) over all pixels j, k = exp(−longest edge on the tree path / bandwidth²).

    The edge lengths are squared distances of `guide`; the tree is the guide's own minimum spanning tree, or the
    topology of the given `tree`. With one guide per instance and no tree each instance has its own.
    """
    check_masks("propagate_global", masks, guide, semantic, labels)
    if not bandwidth > 0:
        raise ValueError(f"propagate_global needs a positive bandwidth: it is {bandwidth}.")
    n, h, w = masks.shape
    if n == 0:
        return masks.clone()
    values, guide = promote(masks), promote(guide)
    if guide.dim() == 4 and tree is None:
        parts = [
            propagate_global(values[i : i + 1], guide[i], bandwidth=bandwidth, tie_rule=tie_rule, valid=valid)
            for i in range(n)
        ]
        return torch.cat(parts).to(masks.dtype)
    own = tree if tree is not None else minimum_spanning_tree(guide, tie_rule=tie_rule, valid=valid)
    s = _tree_lengths(own, guide) / bandwidth**2
    if semantic is None:
        top, bottom = _tree_sums(values, own, s)
        return (top / bottom).view(n, h, w).to(masks.dtype)

    assert labels is not None
    k, index = semantic.rows(labels, saliency=saliency)
    features = promote(semantic.features)
    sigma = spread(features[None], channel_weights=k)[0] if semantic_sigma == "image" else k.new_tensor(semantic_sigma)
    scale = (semantic_scale * sigma).square().clamp(min=TINY).expand(len(k))
    top = torch.zeros(n, h * w, dtype=torch.float64, device=masks.device)
    bottom = torch.zeros_like(top)
    if global_form == "sum":
        numerator, denominator = _tree_sums(values, own, s)
        top, bottom = top + numerator, bottom + denominator
    lengths = grid_lengths(features, channel_weights=k)
    if valid is not None:
        ends = grid_edges(h, w, device=masks.device)
        lengths = lengths.masked_fill(~valid.flatten()[ends].all(dim=1), torch.inf)
    for c in range(len(k)):
        chosen = index == c
        feature = k[c, :, None, None] * features
        if global_form == "sum":
            its_tree = spanning_tree(lengths[c], h, w, tie_rule=tie_rule)
            its_s = _tree_lengths(its_tree, feature) / scale[c]
        elif global_form == "embedding":
            its_tree, its_s = own, _tree_lengths(own, feature) / scale[c]
        elif global_form == "product":
            joint = torch.cat([guide / bandwidth, feature * (balance**0.5 / scale[c].sqrt())])
            its_tree = minimum_spanning_tree(joint, tie_rule=tie_rule, valid=valid)
            its_s = _tree_lengths(its_tree, joint)
        else:
            raise ValueError(f"propagate_global knows 'sum', 'embedding' and 'product', not {global_form!r}.")
        numerator, denominator = _tree_sums(values[chosen], its_tree, its_s)
        factor = balance if global_form == "sum" else 1.0
        top[chosen] += factor * numerator
        bottom[chosen] += factor * denominator
    return (top / bottom).view(n, h, w).to(masks.dtype)


def _iterate(
    masks: Float[Tensor, "n h w"],
    offsets: Sequence[tuple[int, int]],
    affinity: Float[Tensor, "g k h w"],
    index: Int[Tensor, " n"],
    box_masks: Tensor | None,
    steps: int,
) -> Float[Tensor, "n h w"]:
    """Eq. 14 `steps` times over a window: a weighted mean of the neighbors, inside the box where there is one."""
    weights = (affinity / affinity.sum(dim=1, keepdim=True).clamp(min=torch.finfo(affinity.dtype).tiny))[index]
    if box_masks is not None:
        masks = masks * box_masks
    for _ in range(steps):
        mean = torch.zeros_like(masks)
        for k, offset in enumerate(offsets):
            mean += weights[:, k] * shift(masks, offset)
        masks = mean if box_masks is None else mean * box_masks
    return masks


@torch.no_grad()
def propagate_local(
    masks: Float[Tensor, "n h w"],
    guide: Float[Tensor, "d h w"],
    *,
    box_masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"] | None = None,
    window: int = 5,
    bandwidth: float = 0.15,
    steps: int = 20,
    semantic: SemanticGuide | None = None,
    labels: Int[Tensor, " n"] | None = None,
    balance: float = 0.7,
    saliency: bool = True,
    semantic_sigma: Literal["image", "window"] | float = "image",
    semantic_scale: float = 1.0,
    valid: Bool[Tensor, "h w"] | None = None,
) -> Float[Tensor, "n h w"]:
    """`steps` weighted means over the full window, weights exp(−|guide(i) − guide(k)|² / bandwidth²) (Eq. 7–9, 14).

    Masks are multiplied by `box_masks` before the first and after each step; the weights count every pixel of the
    window that is in the image, inside the box or not.
    """
    check_masks("propagate_local", masks, guide, semantic, labels)
    n, h, w = masks.shape
    if n == 0:
        return masks.clone()
    values, guide = promote(masks), promote(guide)
    offsets = window_offsets(window, centre=True)
    present = inside(h, w, offsets, device=masks.device)
    if valid is not None:
        present = present & valid & torch.stack([shift(valid, offset) for offset in offsets])
    affinity = torch.exp(-squared_distances(guide[None], offsets) / bandwidth**2) * present
    index = torch.zeros(n, dtype=torch.long, device=masks.device)
    if semantic is not None:
        assert labels is not None
        k, index = semantic.rows(labels, saliency=saliency)
        features = promote(semantic.features)[None]
        distances = squared_distances(features, offsets, channel_weights=k)[0]
        if semantic_sigma == "image":
            sigma = spread(features, channel_weights=k)[0, :, None, None, None]
        elif semantic_sigma == "window":
            sigma = window_spread(features, offsets[1:], channel_weights=k)[0, :, None]
        else:
            sigma = k.new_tensor(semantic_sigma)
        scale = (semantic_scale * sigma).square().clamp(min=TINY)
        affinity = affinity + balance * torch.exp(-distances / scale) * present
    return _iterate(values, offsets, affinity, index, box_masks, steps).to(masks.dtype)


@torch.no_grad()
def propagate_pamr(
    masks: Float[Tensor, "n h w"],
    guide: Float[Tensor, "d h w"],
    *,
    box_masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"] | None = None,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    steps: int = 10,
    sharpness: float = 0.1,
    semantic: SemanticGuide | None = None,
    labels: Int[Tensor, " n"] | None = None,
    balance: float = 0.7,
    saliency: bool = True,
) -> Float[Tensor, "n h w"]:
    """The PAMR mode of Table 5: a(i, k) = softmax_k mean_d(−|V_d(i) − V_d(k)| / (1e-8 + sharpness · σ_d(i))).

    The neighbors are those of 3x3 windows with several dilations, the centre left out and the border replicated;
    σ_d(i) is their standard deviation with the centre counted once per dilation. A^c has the same form with one σ
    for all channels: |S^c(i) − S^c(k)| and σ are root mean squares over channels, so that K does not cancel.
    """
    check_masks("propagate_pamr", masks, guide, semantic, labels)
    n, h, w = masks.shape
    if n == 0:
        return masks.clone()
    values, guide = promote(masks), promote(guide)
    offsets = window_offsets(3, dilations)
    rows = torch.arange(h, device=masks.device)
    columns = torch.arange(w, device=masks.device)

    def replicated(x: Tensor, offset: tuple[int, int]) -> Tensor:
        return x[..., (rows + offset[0]).clamp(0, h - 1)[:, None], (columns + offset[1]).clamp(0, w - 1)]

    def variance(x: Tensor) -> Tensor:
        count = len(offsets) + len(dilations)
        difference = [replicated(x, offset) - x for offset in offsets]
        mean = sum(difference, torch.zeros_like(x)) / count
        squares = sum((part.square() for part in difference), torch.zeros_like(x))
        return ((squares - count * mean.square()) / (count - 1)).clamp(min=0)

    sigma = variance(guide).sqrt()
    logits = torch.stack(
        [-((replicated(guide, o) - guide).abs() / (1e-8 + sharpness * sigma)).mean(dim=0) for o in offsets]
    )
    affinity = torch.exp(logits)[None]
    index = torch.zeros(n, dtype=torch.long, device=masks.device)
    if semantic is not None:
        assert labels is not None
        k, index = semantic.rows(labels, saliency=saliency)
        features = promote(semantic.features)
        squares = k.square() / k.shape[1]
        sigma = torch.einsum("cd,dhw->chw", squares, variance(features)).sqrt()
        planes = [
            torch.einsum("cd,dhw->chw", squares, (replicated(features, o) - features).square()).sqrt() for o in offsets
        ]
        affinity = affinity + balance * torch.exp(-torch.stack(planes, dim=1) / (1e-8 + sharpness * sigma)[:, None])
    weights = (affinity / affinity.sum(dim=1, keepdim=True))[index]
    if box_masks is not None:
        values = values * box_masks
    for _ in range(steps):
        mean = torch.zeros_like(values)
        for j, offset in enumerate(offsets):
            mean += weights[:, j] * replicated(values, offset)
        values = mean if box_masks is None else mean * box_masks
    return values.to(masks.dtype)
