"""Propagation of masks along affinities (§3.3, Eq. 7, 9 and 14): local, global and PAMR.

Axes: n instance · c category · d channel · k neighbor · h row · w column. All instances and categories of an image
are propagated together. With a `SemanticGuide` the kernel is Â^c = A + balance · A^c (SEPA): the numerators and the
denominators of both kernels are added before the one division. Results carry no gradient: they are pseudo masks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Literal, ParamSpec

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from misa.ops.axes import check_shapes, images, single
from misa.ops.guides import SUM, GlobalForm, Guides, Join, LocalForm, check_inputs
from misa.ops.neighbors import Offset, window_offsets
from misa.ops.tree import TieRule, Tree, Trees

P = ParamSpec("P")


def constant(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Run a function without gradient and without the caller's autocast: its result is a pseudo mask, a target."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        masks = args[0]
        assert isinstance(masks, Tensor)
        with torch.no_grad(), torch.autocast(masks.device.type, enabled=False):
            return function(*args, **kwargs)

    return inner


@dataclass(frozen=True)
class SemanticGuide:
    """The dense feature S and the saliency factors K of a semantic network (Eq. 1), for Eq. 11–14."""

    features: Float[Tensor, "d h w"]
    saliency_factors: Float[Tensor, "c d"]

    def __post_init__(self) -> None:
        check_shapes(
            "SemanticGuide", features=(self.features, "d h w"), saliency_factors=(self.saliency_factors, "c d")
        )


def numbers(labels: Int[Tensor, " n"]) -> list[int]:
    """Return labels as integers. For labels on CUDA this is the one synchronization; keep labels on the CPU."""
    return [int(label) for label in labels.tolist()]


def _check(
    name: str,
    masks: Tensor,
    guide: Tensor,
    semantic: SemanticGuide | None,
    labels: Tensor | None,
    box_masks: Tensor | None = None,
) -> None:
    features, factors = (None, None) if semantic is None else (semantic.features, semantic.saliency_factors)
    check_inputs(name, masks, guide, features, factors, labels, box_masks)


def _guides(
    masks: Tensor,
    guide: Tensor,
    semantic: SemanticGuide | None,
    labels: Tensor | None,
    saliency: bool,
    valid: Tensor | None,
    window: int = 1,
) -> Guides:
    """Return the guides of one image: its colors, and S^c or S."""
    image, present = [0] * len(masks), None if valid is None else valid[None]
    if semantic is None:
        return Guides(guide[None].float(), image, valid=present, window=window)
    assert labels is not None
    return Guides(
        guide[None].float(),
        image,
        semantic.features[None].float(),
        semantic.saliency_factors.float(),
        numbers(labels),
        ("color", "saliency" if saliency else "feature"),
        present,
        window,
    )


@images(masks=3, guide=3, tree=0, semantic=0, labels=1, valid=2)
@single(masks=3, labels=1)
@constant
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
    """Return Σ_j k(i, j) m(j) / Σ_j k(i, j) over all pixels j, k = exp(−longest edge on the tree path / bandwidth²).

    The edge lengths are squared distances of `guide`; the tree is the guide's own minimum spanning tree, or the
    topology of the given `tree`. With one guide per mask (n d h w), edge lengths differ between masks.

    `semantic` adds the kernel of S^c, exp(−longest edge / (semantic_scale · σ)²) (Eq. 13–14). `global_form` "sum"
    adds balance times its numerators and denominators on the tree of S^c; "embedding" measures the edges of the
    image's tree by S^c instead of the guide; "product" uses one tree of the sum of both squared distances.
    """
    _check("propagate_global", masks, guide, semantic, labels)
    join = Join(balance, global_form, semantic_sigma, semantic_scale)
    if not bandwidth > 0:
        raise ValueError(f"propagate_global needs a positive bandwidth: it is {bandwidth}.")
    if guide.dim() == 4 and len(guide) != len(masks):
        raise ValueError(f"propagate_global needs one guide per mask: {len(guide)} guides for {len(masks)} masks.")
    if guide.dim() == 4 and semantic is not None:
        raise ValueError("propagate_global takes a semantic guide with one guide (d, h, w) for all masks only.")
    if tree is not None and (tree.h, tree.w) != masks.shape[-2:]:
        h, w = masks.shape[-2:]
        raise ValueError(f"propagate_global: the tree spans {tree.h} x {tree.w} pixels, masks are {h} x {w}.")
    if len(masks) == 0:
        return masks.clone()
    values = masks.float()
    if guide.dim() == 3:
        guides = _guides(masks, guide, semantic, labels, saliency, valid)
        trees: Trees = tree if tree is not None else guides.trees(tie_rule)
        result = guides.along_trees(values, trees, bandwidth, join, tie_rule=tie_rule)
    elif tree is not None:
        guides = Guides(guide[:1].float(), [0] * len(masks), valid=None if valid is None else valid[None])
        result = guides.along_masks(values, guide.float(), guides.cut(tree), bandwidth)
    else:
        every = None if valid is None else valid.expand(len(masks), *valid.shape)
        guides = Guides(guide.float(), range(len(masks)), valid=every)
        result = guides.along_trees(values, guides.trees(tie_rule), bandwidth)
    return result.to(masks.dtype)


@images(masks=3, guide=3, box_masks=3, semantic=0, labels=1, valid=2)
@single(masks=3, box_masks=3, labels=1)
@constant
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
    local_form: LocalForm = "sum",
    semantic_sigma: Literal["image", "window"] | float = "image",
    semantic_scale: float = 1.0,
    valid: Bool[Tensor, "h w"] | None = None,
) -> Float[Tensor, "n h w"]:
    """Take `steps` weighted means over the window, weights exp(−|guide(i) − guide(k)|² / bandwidth²) (Eq. 7–9, 14).

    Masks are multiplied by `box_masks` before the first and after each step; the weights are normalized over every
    pixel of the window that is in the image, inside the box or not. Weights below 1e-20 are 0.

    With `semantic`, `local_form` "sum" is Eq. 13, A + balance · A^c: it joins pixels that color separates and cannot
    separate pixels that color joins. "product" is A · (A^c)^balance, which separates wherever either of them does.
    """
    _check("propagate_local", masks, guide, semantic, labels, box_masks)
    join = Join(balance, local_form, semantic_sigma, semantic_scale)
    if guide.dim() != 3:
        raise ValueError(f"propagate_local needs one guide (d, h, w) for all masks: it is {tuple(guide.shape)}.")
    if not bandwidth > 0 or steps < 0:
        raise ValueError(f"propagate_local needs bandwidth > 0 and steps ≥ 0: they are {bandwidth} and {steps}.")
    if len(masks) == 0 or (steps == 0 and box_masks is None):
        return masks.clone()
    guides = _guides(masks, guide, semantic, labels, saliency, valid, window)
    result = guides.along_window(masks.float(), box_masks, window=window, bandwidth=bandwidth, steps=steps, join=join)
    return result.to(masks.dtype)


@constant
def stretched(masks: Float[Tensor, "n h w"], box_masks: Tensor, middle: float = 0.5) -> Float[Tensor, "n h w"]:
    """Map each mask's values in its box to [0, 1]; outside, and where the box has one value, they stay.

    `middle`: the share of the range, above 0 and below 1, that becomes one half; the map is linear on both sides of it.

    A propagated mask is an average of the mask (Eq. 14): an object that a network is not sure of has values on one
    side of one half, as its surroundings do, however well the affinity separates them. CAMs are divided by their
    maximum for the same reason (Zhou et al. 2016); here the box is known, which holds both object and background.
    """
    if not 0 < middle < 1:
        raise ValueError(f"stretched: middle is {middle}; it must be above 0 and below 1.")
    check_shapes("stretched", masks=(masks, "n h w"), box_masks=(box_masks, "n h w"))
    inside = box_masks.bool()
    low = masks.masked_fill(~inside, torch.inf).amin(dim=(1, 2), keepdim=True)
    spread = masks.masked_fill(~inside, -torch.inf).amax(dim=(1, 2), keepdim=True) - low
    known = inside & (spread > torch.finfo(torch.float16).eps)
    share = (masks - low) / torch.where(known, spread, 1)
    share = torch.where(share < middle, 0.5 * share / middle, 0.5 + 0.5 * (share - middle) / (1 - middle))
    return torch.where(known, share, masks)


@images(masks=3, guide=3, box_masks=3, semantic=0, labels=1, valid=2)
@single(masks=3, box_masks=3, labels=1)
@constant
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
    form: LocalForm = "sum",
    semantic_scale: float = 1.0,
    valid: Bool[Tensor, "h w"] | None = None,
) -> Float[Tensor, "n h w"]:
    """PAMR mode of Table 5: a(i, k) = softmax_k mean_d(−|V_d(i) − V_d(k)| / (1e-8 + sharpness · σ_d(i))).

    The neighbors are those of 3x3 windows with several dilations, without the center and with a replicated border;
    σ_d(i) is their standard deviation with the center counted once per dilation. A^c has the same form with one σ
    for all channels: |S^c(i) − S^c(k)| and σ are root mean squares over channels, so that K does not cancel, and
    `semantic_scale` multiplies this σ. `form` "sum" adds balance · A^c to A before the division (Eq. 13), "product"
    is A · (A^c)^balance, as in `propagate_local`.

    Pixels that are not `valid` are no neighbors, do not enter σ and are 0 in the result.
    """
    _check("propagate_pamr", masks, guide, semantic, labels, box_masks)
    join = Join(balance, form, factor=semantic_scale)
    if guide.dim() != 3:
        raise ValueError(f"propagate_pamr needs one guide (d, h, w) for all masks: it is {tuple(guide.shape)}.")
    if not sharpness > 0 or steps < 0:
        raise ValueError(f"propagate_pamr needs sharpness > 0 and steps ≥ 0: they are {sharpness} and {steps}.")
    if len(masks) == 0:
        return masks.clone()
    guides = _guides(masks, guide, semantic, labels, saliency, valid)
    return along_pamr(masks, guides, box_masks, dilations=dilations, steps=steps, sharpness=sharpness, join=join)


@constant
def along_pamr(
    masks: Float[Tensor, "n h w"],
    guides: Guides,
    box_masks: Tensor | None,
    *,
    dilations: Sequence[int],
    steps: int,
    sharpness: float = 0.1,
    join: Join = SUM,
) -> Float[Tensor, "n h w"]:
    """Run `propagate_pamr` on the guides of several images; PAMR measures its own spreads and ignores `join.sigma`."""
    if join.form not in ("sum", "product"):
        raise ValueError(f"propagate_pamr knows the forms 'sum' and 'product', not {join.form!r}.")
    offsets, result = window_offsets(3, dilations), torch.zeros_like(masks)
    for image in sorted(set(guides.image)):
        weights = _pamr_weights(guides, image, offsets, len(dilations), sharpness, join)
        members = [n for n, where in enumerate(guides.image) if where == image]
        first = guides.pairs.index((image, 0))
        rows = [guides.pair[n] - first if len(weights) > 1 else 0 for n in members]
        mine, index = (torch.tensor(x).to(masks.device, non_blocking=True) for x in (members, rows))
        values = masks[mine].float()
        boxes = None if box_masks is None else box_masks[mine].float()
        if boxes is not None:
            values = values * boxes
        weights = weights[index] if len(weights) > 1 else weights
        for _ in range(steps):
            mean = torch.zeros_like(values)
            for k, neighbor in enumerate(_replicated(values, offsets)):
                mean.addcmul_(weights[:, k], neighbor)
            values = mean if boxes is None else mean * boxes
        result[mine] = values.to(masks.dtype)
    return result


def _pamr_weights(
    guides: Guides, image: int, offsets: Sequence[Offset], centres: int, sharpness: float, join: Join
) -> Float[Tensor, "q k h w"]:
    """Return the weight of every neighbor of an image's pixels, for every row of factors."""
    valid = None if guides.valid is None else guides.valid[image]
    present = None if valid is None else torch.stack(list(_replicated(valid[None].float(), offsets)), dim=1)[0] * valid
    logits = _pamr_logits(guides.first[image].values, offsets, sharpness, centres, present)[None]
    if guides.second and join.balance > 0:
        values, factors, _ = guides.second[image]
        planes = _pamr_saliency(values, factors, offsets, sharpness * join.factor, centres, present)
        balance = join.balance
        summed = join.form == "sum"
        logits = torch.logaddexp(logits, planes + math.log(balance)) if summed else logits + balance * planes
    if present is None:
        return logits.softmax(dim=1)
    absent = present == 0
    return logits.masked_fill(absent, -math.inf).softmax(dim=1).masked_fill(absent, 0.0)


def _replicated(values: Float[Tensor, "n h w"], offsets: Sequence[Offset]) -> Iterator[Float[Tensor, "n h w"]]:
    """Yield every pixel's neighbor at each offset; the border is replicated."""
    h, w = values.shape[-2:]
    reach = max(max(abs(dy), abs(dx)) for dy, dx in offsets)
    wide = pad(values[None], [reach] * 4, mode="replicate")[0]
    for dy, dx in offsets:
        yield wide[:, reach + dy : reach + dy + h, reach + dx : reach + dx + w]


def _pamr_variance(
    values: Float[Tensor, "d h w"], offsets: Sequence[Offset], centres: int, present: Float[Tensor, "k h w"] | None
) -> Float[Tensor, "d h w"]:
    """Return the unbiased variance per channel over the `present` neighbors and `centres` copies of the center."""
    count: Tensor | int = len(offsets) + centres if present is None else present.sum(dim=0) + centres
    total, squares = torch.zeros_like(values), torch.zeros_like(values)
    for k, neighbor in enumerate(_replicated(values, offsets)):
        difference = neighbor - values if present is None else (neighbor - values) * present[k]
        total += difference
        squares += difference.square()
    below = count - 1 if isinstance(count, int) else (count - 1).clamp(min=1)
    return ((squares - total.square() / count) / below).clamp(min=0)


def _pamr_logits(
    guide: Float[Tensor, "d h w"],
    offsets: Sequence[Offset],
    sharpness: float,
    centres: int,
    present: Float[Tensor, "k h w"] | None,
) -> Float[Tensor, "k h w"]:
    """Return PAMR's logits for colors: one spread per channel, then the mean over channels."""
    scale = 1e-8 + sharpness * _pamr_variance(guide, offsets, centres, present).sqrt()
    return torch.stack([-((neighbor - guide).abs() / scale).mean(dim=0) for neighbor in _replicated(guide, offsets)])


def _pamr_saliency(
    features: Float[Tensor, "d h w"],
    factors: Float[Tensor, "c d"],
    offsets: Sequence[Offset],
    sharpness: float,
    centres: int,
    present: Float[Tensor, "k h w"] | None,
) -> Float[Tensor, "c k h w"]:
    """Return PAMR's logits for S^c of all categories, with one spread for all channels."""
    squares = factors.square() / factors.shape[1]
    variance = _pamr_variance(features, offsets, centres, present)
    spread = torch.einsum("cd,dhw->chw", squares, variance).sqrt()
    distances = [
        torch.einsum("cd,dhw->chw", squares, (neighbor - features).square()).sqrt()
        for neighbor in _replicated(features, offsets)
    ]
    return -torch.stack(distances, dim=1) / (1e-8 + sharpness * spread)[:, None]
