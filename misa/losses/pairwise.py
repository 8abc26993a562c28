"""The pairwise loss: masks against their own propagation (§3.3, Eq. 15).

Axes: b image · n instance · c category · d channel · h row · w column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.losses.inputs import SemanticPrior
from misa.ops.affinity import check_finite, check_kernel
from misa.ops.guides import Guides, LocalForm
from misa.ops.propagation import GlobalForm, SemanticGuide, along_pamr, constant
from misa.ops.readings import window_of

Reduction = Literal["box_mean", "box_ratio", "sum"]


def propagation_error(
    masks: Float[Tensor, "n h w"],
    pseudo_masks: Float[Tensor, "n h w"],
    box_masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"],
    *,
    reduction: Reduction = "box_mean",
) -> Float[Tensor, ""]:
    """Σ |M̂ − M| inside the boxes, or the plain sum over the map of Eq. 15 ("sum").

    "box_mean", as APro's SOLOv2: per instance over its box area, mean over instances. "box_ratio", as APro's
    Mask2Former: over the area of all boxes, so that every pixel counts alike and large boxes for more.
    """
    error = (pseudo_masks.detach() - masks).abs()
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
    reduction: Reduction = "box_mean",
    global_weight: float = 2.0,
    local_weight: float = 1.0,
    pamr_weight: float = 1.0,
    **propagation: Any,
) -> dict[str, Float[Tensor, ""]]:
    """L1 between mask probabilities and the pseudo masks propagated from them (Eq. 15), per term.

    `propagation` are the further arguments of `pseudo_masks`, which says what the terms are: "apro" gives `loss_global`
    and `loss_local`, "pamr" gives `loss_pamr`. Pseudo masks are constants: the gradient flows through M alone. Without
    instances every term is a zero that still depends on `masks`.
    """
    pairs = pseudo_masks(masks, box_masks, images, image_index, **propagation)
    weights = {"global": global_weight, "local": local_weight, "pamr": pamr_weight}
    return {
        f"loss_{name}": weights[name] * propagation_error(seen, target, box_masks, reduction=reduction)
        for name, (seen, target) in pairs.items()
    }


def pseudo_masks(
    masks: Float[Tensor, "n h w"],
    box_masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"],
    images: Float[Tensor, "b 3 h w"],
    image_index: Int[Tensor, " n"],
    *,
    labels: Int[Tensor, " n"] | None = None,
    prior: SemanticPrior | tuple[Tensor, Tensor] | None = None,
    valid: Bool[Tensor, "b h w"] | Bool[Tensor, "b 1 h w"] | None = None,
    mode: Literal["apro", "pamr"] = "apro",
    global_size: int | None = None,
    tree_bandwidth: float = 0.01,
    refine_bandwidth: float | None = 0.07,
    local_bandwidth: float = 0.15,
    window: int = 5,
    window_share: float | None = None,
    local_steps: int = 20,
    pamr_steps: int = 10,
    pamr_dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    balance: float = 0.7,
    saliency: bool = True,
    kernels: Sequence[str] | None = None,
    global_form: GlobalForm = "sum",
    local_form: LocalForm = "sum",
    semantic_sigma: Literal["image"] | float = "image",
    semantic_scale: float = 1.0,
) -> dict[str, tuple[Float[Tensor, "n h w"], Float[Tensor, "n h w"]]]:
    """Of each term of the pairwise loss the masks that it compares and the pseudo masks that it pulls them to (Eq. 14).

    "apro" gives "global" and "local", "pamr" gives "pamr". The global pseudo mask comes from two
    passes over the image's tree, the second along the first one's result (`refine_bandwidth=None` leaves it out;
    `global_form="embedding"` puts a pass along S^c in its place). `images` are normalised and have the size of the
    masks; `prior` holds S (b d h w) and K (c d) and turns A into Â^c = A + balance · A^c with the category in
    `labels`, or A^f without `saliency`; `kernels` names any two rows of `misa.ops.affinity.KERNELS` in their place.
    `valid` leaves padding out. `window_share` sizes the window by the map, see `misa.ops.readings.window_of`.

    `global_size` squeezes images, prior and masks to a square of that side for the global pseudo mask, as APro's
    Mask2Former (96) does, and compares at the masks' own size with the masks squeezed and stretched likewise.

    "pamr" joins A and A^c by `local_form` and `semantic_scale` too; `semantic_sigma` is of "apro" alone, since PAMR has
    spreads of its own.

    On CUDA, `image_index` and `labels` are read by the host; leave them on the CPU and nothing waits for the device.
    """
    _check(masks, box_masks, images, image_index, labels, prior)
    check_kernel("pairwise_loss", balance=balance, sigma=semantic_sigma, scale=semantic_scale)
    if mode not in ("apro", "pamr"):
        raise ValueError(f"pairwise_loss knows the modes 'apro' and 'pamr', not {mode!r}.")
    if kernels is None:
        kernels = ("color",) if prior is None else ("color", "saliency" if saliency else "feature")
    guides = _guides(images, image_index, labels, prior, kernels, valid)
    if window_share is not None:
        window = window_of(window_share, masks.shape[-2], masks.shape[-1])
    window_options = {
        "window": window,
        "bandwidth": local_bandwidth,
        "steps": local_steps,
        "balance": balance,
        "sigma": semantic_sigma,
        "factor": semantic_scale,
        "form": local_form,
    }
    tree_options = {"balance": balance, "form": global_form, "sigma": semantic_sigma, "factor": semantic_scale}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}  # of each term the masks and what they are pulled to
    fixed = masks.detach()
    if mode == "pamr":
        target = along_pamr(
            fixed,
            guides,
            box_masks,
            dilations=pamr_dilations,
            steps=pamr_steps,
            balance=balance,
            form=local_form,
            scale=semantic_scale,
        )
        pairs["pamr"] = masks, target
    else:
        size = (masks.shape[-2], masks.shape[-1])
        coarse = size if global_size is None else (global_size, global_size)
        seen = _resized(masks, coarse)
        target = _global_masks(seen.detach(), _squeezed(guides, coarse), tree_bandwidth, refine_bandwidth, tree_options)
        pairs["global"] = _resized(seen, size), _resized(target, size)
        pairs["local"] = masks, _local_masks(fixed, box_masks, guides, window_options)
    return pairs


def _resized(maps: Float[Tensor, "n h w"], size: tuple[int, int]) -> Float[Tensor, "n H W"]:
    """Bilinear without antialiasing, as APro; the maps themselves where they have that size."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _squeezed(guides: Guides, size: tuple[int, int]) -> Guides:
    """The guides at another size; a cell is padding where most of it is, and takes nothing from padding."""
    if guides.size == size:
        return guides

    def resized(maps: Tensor) -> Tensor:
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)

    if guides.valid is None:
        features = None if guides.features is None else resized(guides.features)
        return replace(guides, images=resized(guides.images), features=features)
    present = guides.valid[:, None].float()
    share = resized(present)

    def mean(maps: Tensor) -> Tensor:
        return resized(maps * present) / share.clamp(min=0.5)

    features = None if guides.features is None else mean(guides.features)
    return replace(guides, images=mean(guides.images), features=features, valid=share[:, 0] >= 0.5)


def _check(
    masks: Tensor, box_masks: Tensor, images: Tensor, image_index: Tensor, labels: Tensor | None, prior: object
) -> None:
    if masks.dim() != 3 or masks.shape != box_masks.shape or image_index.shape != masks.shape[:1]:
        raise ValueError(
            "pairwise_loss needs masks and box_masks (n, h, w) and image_index (n,): "
            f"they are {tuple(masks.shape)}, {tuple(box_masks.shape)} and {tuple(image_index.shape)}."
        )
    if images.dim() != 4 or images.shape[-2:] != masks.shape[-2:]:
        raise ValueError(
            f"pairwise_loss needs images (b, 3, h, w) at the size of the masks {tuple(masks.shape[-2:])}: "
            f"they are {tuple(images.shape)}. Resize them first (bilinear, no antialias)."
        )
    check_finite("pairwise_loss: masks", masks)
    check_finite("pairwise_loss: images", images)
    if prior is not None and (labels is None or labels.shape != image_index.shape):
        raise ValueError("pairwise_loss needs labels (n,) with the category of each mask to use the prior.")


def _guides(
    images: Tensor,
    image_index: Tensor,
    labels: Tensor | None,
    prior: SemanticPrior | tuple[Tensor, Tensor] | None,
    kernels: Sequence[str],
    valid: Tensor | None,
) -> Guides:
    """The images of the batch with everything their masks share."""
    where = [int(i) for i in image_index.tolist()]
    if where and not 0 <= min(where) <= max(where) < len(images):
        raise ValueError(f"pairwise_loss: image_index must lie in 0 … {len(images) - 1}, one of the images.")
    if valid is not None:
        valid = valid.reshape(len(images), *images.shape[-2:])
    teacher: dict[str, Any] = {}
    if prior is not None:
        assert labels is not None
        features, factors = prior
        for image in sorted(set(where)):
            SemanticGuide(features[image], factors)  # says what is wrong with the shapes
        if features.shape[-2:] != images.shape[-2:]:
            raise ValueError(
                f"pairwise_loss needs prior features at the size of the masks {tuple(images.shape[-2:])}: "
                f"they are {tuple(features.shape)}."
            )
        check_finite("pairwise_loss: prior features", features)
        check_finite("pairwise_loss: prior factors", factors)
        numbers = [int(c) for c in labels.tolist()]
        teacher = {"features": features.detach().float(), "factors": factors.detach().float(), "labels": numbers}
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(factors):
            raise ValueError(f"pairwise_loss: labels must lie in 0 … {len(factors) - 1}, one row of K each.")
    return Guides(images.detach().float(), where, kernels=kernels, valid=valid, **teacher)


@constant
def _global_masks(
    masks: Tensor, guides: Guides, bandwidth: float, refine: float | None, options: Mapping[str, Any]
) -> Tensor:
    """APro's cascade: a pass along the image (and S^c), then one along the result, both on the image's tree."""
    if len(masks) == 0:
        return masks
    trees = guides.trees(ahead=options)
    if options["form"] == "embedding" and guides.second:
        first = guides.first_only().along_trees(masks.float(), trees, bandwidth)
        return guides.along_trees(first, trees, bandwidth, **options).to(masks.dtype)
    first = guides.along_trees(masks.float(), trees, bandwidth, **options)
    if refine is not None:
        first = guides.along_masks(first, first[:, None], trees, refine)
    return first.to(masks.dtype)


@constant
def _local_masks(masks: Tensor, box_masks: Tensor, guides: Guides, options: Mapping[str, Any]) -> Tensor:
    """The windows of all images at once."""
    if len(masks) == 0:
        return masks
    return guides.along_window(masks.float(), box_masks, **options).to(masks.dtype)
