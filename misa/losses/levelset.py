"""The level-set energy of BoxLevelSet and Box2Mask: inside a box, mask and background should each be uniform.

Axes: b image · n instance · c channel of the features · h row · w column.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from misa.ops.affinity import check_finite, check_probabilities, promote
from misa.ops.axes import check_shapes
from misa.ops.tree import cut_padding, grid_lengths, spanning_trees
from misa.ops.treefilter import edge_weights, tree_filter


def region_energy(
    masks: Float[Tensor, "n h w"],
    features: Float[Tensor, "n c h w"],
    box_masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"],
) -> Float[Tensor, " n"]:
    """Return Chan and Vese's region energy (2001) of each mask p in its box B, per channel and box pixel; 0 or more:

        E = 1 / (C |B|) Σ_c Σ_x B (p (F_c − u_c)² + (1 − p)(F_c − v_c)²)

    u and v are the means of F weighted by p and 1 − p inside the box. BoxLevelSet (Li et al. 2022) with weight 0.05
    on the image and 5 on two structure maps. It equals the mean over channels of Var_B(F) − a (1 − a)(u − v)², a the
    mean of p in the box: a soft Otsu threshold. E(p) = E(1 − p), so only other losses tell object from background. Box
    masks between 0 and 1 multiply p and F, as in the published Box2Mask.

    Differentiable in masks and features. An empty box costs 0. float32 inside.
    Raises ValueError: shapes do not fit; on the CPU also for masks outside [0, 1]; NotFinite: NaN or Inf, on the CPU
    only.
    """
    check_shapes(
        "region_energy", masks=(masks, "n h w"), box_masks=(box_masks, "n h w"), features=(features, "n c h w")
    )
    check_probabilities("region_energy: masks", masks)
    check_finite("region_energy: features", features)
    p, boxes = promote(masks), box_masks.to(promote(masks).dtype)
    seen = promote(features) * boxes[:, None]
    energy = p.new_zeros(len(p))
    for region in (p * boxes, (1 - p) * boxes):
        # E is stationary in the means: they add no gradient.
        with torch.no_grad(), torch.autocast(p.device.type, enabled=False):
            mean = torch.einsum("nhw,nchw->nc", region, seen) / region.sum(dim=(1, 2)).clamp(min=1e-5)[:, None]
        spread = (seen - mean[:, :, None, None]).square().mean(dim=1)
        energy = energy + (region * spread).sum(dim=(1, 2))
    return energy / boxes.sum(dim=(1, 2)).clamp(min=1)


def border_length(
    masks: Float[Tensor, "n h w"], box_masks: Float[Tensor, "n h w"] | Bool[Tensor, "n h w"]
) -> Float[Tensor, " n"]:
    """Return the anisotropic total variation of p B and of (1 − p) B, per box pixel; 0 or more.

    It includes the jump at the box's border. The published BoxLevelSet adds it with weight 1e-5 since 2023; its
    paper's results were obtained without it.
    """
    check_shapes("border_length", masks=(masks, "n h w"), box_masks=(box_masks, "n h w"))
    check_probabilities("border_length: masks", masks)
    p, boxes = promote(masks), box_masks.to(promote(masks).dtype)
    length = p.new_zeros(len(p))
    for region in (p * boxes, (1 - p) * boxes):
        length = length + region.diff(dim=1).abs().sum(dim=(1, 2)) + region.diff(dim=2).abs().sum(dim=(1, 2))
    return length / boxes.sum(dim=(1, 2)).clamp(min=1)


def structure_masks(
    masks: Float[Tensor, "n h w"],
    images: Float[Tensor, "b 3 h w"],
    structure: Float[Tensor, "b c h w"],
    image: Sequence[int],
    *,
    valid: Bool[Tensor, "b h w"] | None = None,
    color_scale: float = 0.02,
) -> Float[Tensor, "n 2 h w"]:
    """Return the maps h1 and h2 of BoxLevelSet's deep energy: each mask filtered along its image's trees.

    h1 is the mask filtered along the image's tree with edge weights exp(−|ΔI|² / color_scale), h2 is h1 filtered along
    the tree of a learned `structure` with exp(−|ΔG|²) (Li et al. 2022). The gradient flows through the masks, and
    through h2's edge weights to the structure, its only gradient. The masks of an image share its trees; `image` is
    each mask's image. Images are normalized, masks in [0, 1].
    Raises ValueError: shapes do not fit; NotFinite: NaN or Inf, on the CPU only.
    """
    h, w = masks.shape[-2:]
    check_shapes(
        "structure_masks", masks=(masks, "n h w"), images=(images, "b d h w"), structure=(structure, "b c h w")
    )
    check_finite("structure_masks: structure", structure)
    first = spanning_trees(cut_padding(grid_lengths(images.detach()), valid, h, w), h, w)
    second = spanning_trees(cut_padding(grid_lengths(structure.detach()), valid, h, w), h, w)
    along_image = tree_filter(masks, first, (-first.length / color_scale).exp(), image)
    return torch.stack(
        [along_image, tree_filter(along_image, second, edge_weights(second, structure, 1.0), image)], dim=1
    )
