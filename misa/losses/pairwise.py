"""The pairwise loss between masks and the pseudo masks propagated from them (§3.3, Eq. 15).

Axes: b image · n instance · c category · d channel · h row · w column.
"""

from dataclasses import replace
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.experiment import Affinity
from misa.losses.inputs import SemanticPrior
from misa.ops.affinity import promote
from misa.ops.axes import check_shapes
from misa.ops.guides import Guides, Join, check_inputs
from misa.ops.propagation import along_pamr, constant, numbers, stretched
from misa.ops.readings import Reading, window_of
from misa.ops.resize import resized

Reduction = Literal["box_mean", "box_ratio", "sum"]
Prior = SemanticPrior | Reading | tuple[Tensor, Tensor]
COLOR = Affinity()


def propagation_error(
    masks: Float[Tensor, "n h w"],
    pseudo_masks: Float[Tensor, "n h w"],
    box_masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"],
    *,
    reduction: Reduction = "box_mean",
) -> Float[Tensor, ""]:
    """Return Σ |M̂ − M| inside the boxes, or the plain sum over the map of Eq. 15 ("sum").

    "box_mean", as APro's SOLOv2: per instance over its box area, mean over instances. "box_ratio", as APro's
    Mask2Former: over the area of all boxes, so that every pixel weighs the same and large boxes weigh more. Half
    precision is computed in float32: it cannot count the pixels of a large box.
    """
    error = (promote(pseudo_masks.detach()) - promote(masks)).abs()
    if reduction == "sum":
        return error.sum()
    if reduction not in ("box_mean", "box_ratio"):
        raise ValueError(f"pairwise_loss knows the reductions 'box_mean', 'box_ratio' and 'sum', not {reduction!r}.")
    boxes = box_masks.to(error.dtype)
    if reduction == "box_ratio":
        return (error * boxes).sum() / boxes.sum().clamp(min=1)
    share = (error * boxes).sum(dim=(1, 2)) / boxes.sum(dim=(1, 2)).clamp(min=1)
    return share.sum() / max(len(masks), 1)


def pairwise_loss(
    masks: Float[Tensor, "n h w"],
    box_masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"],
    images: Float[Tensor, "b 3 h w"],
    image_index: Int[Tensor, " n"],
    *,
    affinity: Affinity = COLOR,
    labels: Int[Tensor, " n"] | None = None,
    prior: Prior | None = None,
    valid: Bool[Tensor, "b h w"] | Bool[Tensor, "b 1 h w"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Return the L1 distance between mask probabilities and the pseudo masks propagated from them (Eq. 15), per term.

    The terms are those of `pseudo_masks`, with the affinity's weights: "apro" gives `loss_global` and `loss_local`,
    "pamr" gives `loss_pamr`. Pseudo masks are constants: the gradient flows through M only. Without instances every
    term is 0, still attached to the graph of `masks`.
    """
    pairs = pseudo_masks(
        masks, box_masks, images, image_index, affinity=affinity, labels=labels, prior=prior, valid=valid
    )
    weights = {"global": affinity.global_weight, "local": affinity.local_weight, "pamr": 1.0}
    return {
        f"loss_{name}": weights[name] * propagation_error(seen, target, box_masks, reduction=affinity.reduction)
        for name, (seen, target) in pairs.items()
    }


def pseudo_masks(
    masks: Float[Tensor, "n h w"],
    box_masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"],
    images: Float[Tensor, "b 3 h w"],
    image_index: Int[Tensor, " n"],
    *,
    affinity: Affinity = COLOR,
    labels: Int[Tensor, " n"] | None = None,
    prior: Prior | None = None,
    valid: Bool[Tensor, "b h w"] | Bool[Tensor, "b 1 h w"] | None = None,
) -> dict[str, tuple[Float[Tensor, "n h w"], Float[Tensor, "n h w"]]]:
    """Return per term of the pairwise loss the masks to compare and their pseudo masks, the targets (Eq. 14).

    "apro" gives "global" and "local", "pamr" gives "pamr". The global pseudo mask comes from two passes over the
    image's tree, the second with the first one's result as guide (`refine_bandwidth=None` skips it; `global_form`
    "embedding" replaces it by a pass along S^c). `images` are normalized and have the size of the masks.

    prior: S (b d h w) and K (c d), or a `Reading` of them with its own σ: with `affinity.saliency` A becomes
        Â^c = A + balance · A^c of the category in `labels`, with `affinity.feature` A + balance · A^f. Without a prior
        only colors are compared.
    valid: False at padding, which is excluded.

    `global_size` resizes images, prior and masks to a square of that side for the global pseudo mask, as APro's
    Mask2Former (96) does; masks and pseudo masks are then resized back to the masks' size and compared there.
    `stretch` maps every pseudo mask to [0, 1] inside its box (`misa.ops.propagation.stretched`).
    "pamr" uses `local_form` and `semantic_scale` too, and measures its own spreads.

    The host reads `image_index` and `labels`: keep them on the CPU to avoid a synchronization with the device.
    """
    features, factors = (None, None) if prior is None else (prior[0], prior[1])
    check_inputs("pairwise_loss", masks, images, features, factors, labels, box_masks)
    check_shapes("pairwise_loss", masks=(masks, "n h w"), image_index=(image_index, "n"))
    guides = _guides(images, image_index, labels, prior, affinity, valid)
    sigma = prior.sigma if isinstance(prior, Reading) else "image"
    join = Join(affinity.balance, affinity.local_form, sigma, affinity.semantic_scale)
    fixed = masks.detach()
    if affinity.mode == "pamr":
        dilations, steps = affinity.pamr_dilations, affinity.pamr_steps
        pairs = {"pamr": (masks, along_pamr(fixed, guides, box_masks, dilations=dilations, steps=steps, join=join))}
    else:
        size = (masks.shape[-2], masks.shape[-1])
        coarse = size if affinity.global_size is None else (affinity.global_size, affinity.global_size)
        seen = resized(masks, coarse)
        target = global_masks(seen.detach(), guides.at_size(coarse), affinity, replace(join, form=affinity.global_form))
        local = local_masks(fixed, box_masks, guides, affinity, join)
        pairs = {"global": (resized(seen, size), resized(target, size)), "local": (masks, local)}
    if affinity.stretch:
        return {name: (own, stretched(pseudo, box_masks, affinity.stretch)) for name, (own, pseudo) in pairs.items()}
    return pairs


def _kernels(affinity: Affinity, prior: Prior | None) -> tuple[str, ...]:
    if affinity.kernels is not None:
        return affinity.kernels
    if prior is None or not (affinity.saliency or affinity.feature):
        return ("color",)
    return ("color", "saliency" if affinity.saliency else "feature")


def _guides(
    images: Tensor,
    image_index: Tensor,
    labels: Tensor | None,
    prior: Prior | None,
    affinity: Affinity,
    valid: Tensor | None,
) -> Guides:
    """Return the batch's guides: images, prior and padding, shared by the masks of an image."""
    if valid is not None:
        valid = valid.reshape(len(images), *images.shape[-2:])
    h, w = images.shape[-2:]
    window = affinity.window if affinity.window_share is None else window_of(affinity.window_share, h, w)
    kernels, where, colors = _kernels(affinity, prior), numbers(image_index), images.detach().float()
    if prior is None or labels is None:
        return Guides(colors, where, kernels=kernels, valid=valid, window=window)
    features, factors = (part.detach().float() for part in prior[:2])
    return Guides(colors, where, features, factors, numbers(labels), kernels, valid, window)


@constant
def global_masks(masks: Tensor, guides: Guides, affinity: Affinity, join: Join) -> Tensor:
    """Propagate as APro's cascade: a pass with the image (and S^c) as guide, then one with its result, on one tree."""
    if len(masks) == 0:
        return masks
    trees, bandwidth = guides.trees(ahead=join), affinity.tree_bandwidth
    if join.form == "embedding" and guides.second:
        first = guides.first_only().along_trees(masks.float(), trees, bandwidth)
        return guides.along_trees(first, trees, bandwidth, join).to(masks.dtype)
    first = guides.along_trees(masks.float(), trees, bandwidth, join)
    if affinity.refine_bandwidth is not None:
        first = guides.along_masks(first, first[:, None], trees, affinity.refine_bandwidth)
    return first.to(masks.dtype)


@constant
def local_masks(masks: Tensor, box_masks: Tensor, guides: Guides, affinity: Affinity, join: Join) -> Tensor:
    """Propagate over windows, the masks of all images in one call."""
    if len(masks) == 0:
        return masks
    reach, steps = affinity.local_bandwidth, affinity.local_steps
    found = guides.along_window(masks.float(), box_masks, window=guides.window, bandwidth=reach, steps=steps, join=join)
    return found.to(masks.dtype)
