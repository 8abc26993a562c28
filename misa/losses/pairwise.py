"""The pairwise loss: masks against their own propagation (§3.3, Eq. 15).

Axes: b image · n instance · c category · d channel · h row · w column.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.ops.propagation import (
    GlobalForm,
    SemanticGuide,
    propagate_global,
    propagate_local,
    propagate_pamr,
)

Prior = tuple[Float[Tensor, "b d h w"], Float[Tensor, "c d"]]


def propagation_error(
    masks: Float[Tensor, "n h w"],
    pseudo_masks: Float[Tensor, "n h w"],
    box_masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"],
    *,
    reduction: Literal["box_mean", "sum"] = "box_mean",
) -> Float[Tensor, ""]:
    """Σ |M̂ − M|: per instance over its box area, mean over instances; or the plain sum over the map of Eq. 15."""
    error = (pseudo_masks.detach() - masks).abs()
    if reduction == "sum":
        return error.sum()
    if reduction != "box_mean":
        raise ValueError(f"pairwise_loss knows the reductions 'box_mean' and 'sum', not {reduction!r}.")
    boxes = box_masks.to(error.dtype)
    share = (error * boxes).sum(dim=(1, 2)) / boxes.sum(dim=(1, 2)).clamp(min=1)
    return share.sum() / max(len(masks), 1)


def pairwise_loss(
    masks: Float[Tensor, "n h w"],
    box_masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"],
    images: Float[Tensor, "b 3 h w"],
    image_index: Int[Tensor, " n"],
    *,
    labels: Int[Tensor, " n"] | None = None,
    prior: Prior | None = None,
    valid: Bool[Tensor, "b h w"] | Bool[Tensor, "b 1 h w"] | None = None,
    mode: Literal["apro", "pamr"] = "apro",
    reduction: Literal["box_mean", "sum"] = "box_mean",
    global_weight: float = 2.0,
    local_weight: float = 1.0,
    pamr_weight: float = 1.0,
    tree_bandwidth: float = 0.01,
    refine_bandwidth: float | None = 0.07,
    local_bandwidth: float = 0.15,
    window: int = 5,
    local_steps: int = 20,
    pamr_steps: int = 10,
    balance: float = 0.7,
    saliency: bool = True,
    global_form: GlobalForm = "sum",
    semantic_sigma: Literal["image"] | float = "image",
    semantic_scale: float = 1.0,
) -> dict[str, Float[Tensor, ""]]:
    """L1 between mask probabilities and the pseudo masks propagated from them (Eq. 15), per term.

    "apro" gives `loss_global` and `loss_local`, "pamr" gives `loss_pamr`. The global pseudo mask comes from two
    passes over the image's tree, the second along the first one's result (`refine_bandwidth=None` leaves it out).
    `images` are normalised and have the size of the masks; `prior` holds S (b d h w) and K (c d) and turns A into
    Â^c = A + balance · A^c with the category in `labels`; `valid` leaves padding out. Pseudo masks are constants:
    the gradient flows through M alone. Without instances every term is a zero that still depends on `masks`.
    """
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
    if mode not in ("apro", "pamr"):
        raise ValueError(f"pairwise_loss knows the modes 'apro' and 'pamr', not {mode!r}.")
    if prior is not None and labels is None:
        raise ValueError("pairwise_loss needs labels (n,) with the category of each mask to use the prior.")
    fixed = masks.detach()
    pseudo: dict[str, list[Tensor]] = {"global": [], "local": [], "pamr": []}
    chosen: list[Tensor] = []
    for image in range(len(images)):
        here = (image_index == image).nonzero()[:, 0]
        if len(here) == 0:
            continue
        chosen.append(here)
        semantic = None if prior is None else SemanticGuide(prior[0][image].detach(), prior[1].detach())
        padding = None if valid is None else valid[image].reshape(masks.shape[-2:])
        mine, guide, boxes = fixed[here], images[image].detach(), box_masks[here]
        its_labels = None if labels is None else labels[here]
        if mode == "pamr":
            pseudo["pamr"].append(
                propagate_pamr(
                    mine,
                    guide,
                    box_masks=boxes,
                    steps=pamr_steps,
                    semantic=semantic,
                    labels=its_labels,
                    balance=balance,
                    saliency=saliency,
                )
            )
            continue
        from misa.ops.tree import minimum_spanning_tree

        tree = minimum_spanning_tree(guide, valid=padding)
        first = propagate_global(
            mine,
            guide,
            bandwidth=tree_bandwidth,
            tree=tree,
            semantic=semantic,
            labels=its_labels,
            balance=balance,
            saliency=saliency,
            global_form=global_form,
            semantic_sigma=semantic_sigma,
            semantic_scale=semantic_scale,
            valid=padding,
        )
        if refine_bandwidth is not None:
            first = propagate_global(first, first[:, None], bandwidth=refine_bandwidth, tree=tree)
        pseudo["global"].append(first)
        pseudo["local"].append(
            propagate_local(
                mine,
                guide,
                box_masks=boxes,
                window=window,
                bandwidth=local_bandwidth,
                steps=local_steps,
                semantic=semantic,
                labels=its_labels,
                balance=balance,
                saliency=saliency,
                semantic_sigma=semantic_sigma,
                semantic_scale=semantic_scale,
                valid=padding,
            )
        )
    weights = {"pamr": pamr_weight} if mode == "pamr" else {"global": global_weight, "local": local_weight}
    order = torch.cat(chosen) if chosen else image_index[:0].long()
    losses = {}
    for name, weight in weights.items():
        target = torch.cat(pseudo[name]) if chosen else fixed[:0]
        error = propagation_error(masks[order], target, box_masks[order], reduction=reduction)
        losses[f"loss_{name}"] = weight * error
    return losses
