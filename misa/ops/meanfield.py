"""DiscoBox's structured teacher: masks refined by mean-field iterations on the image's colors.

Axes: b image · d channel · n mask · h row · w column. The nine taps are those of `window_offsets(3, centre=True)`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from misa.ops.affinity import check_finite, check_probabilities, promote
from misa.ops.axes import check_shapes
from misa.ops.neighbors import inside, shift, window_offsets

TAPS = window_offsets(3, centre=True)
SURE = 0.9  # probability of the winning label after every iteration


def window_kernel(
    images: Float[Tensor, "b d h w"],
    *,
    valid: Bool[Tensor, "b h w"] | None = None,
    theta_color: float = 0.5,
    theta_space: float = 30.0,
    strength: float = 2.0,
) -> Float[Tensor, "b 9 h w"]:
    """Return strength · exp(−|I_i − I_k|² / 2θ_c² − |i − k|² / 2θ_s²) for a pixel's 3 x 3 window, itself included.

    DiscoBox (Lan et al. 2021) on the normalized image, with its code's constants. Taps outside the image weigh 0, and
    with `valid` so do those on padding (the published code lets padded cells vote). No gradient.
    Raises ValueError: shapes do not fit, or a constant that is not positive; NotFinite: NaN or Inf, on the CPU only.
    """
    check_shapes("window_kernel", images=(images, "b d h w"), valid=(valid, "b h w"))
    if not min(theta_color, theta_space, strength) > 0:
        raise ValueError(
            f"window_kernel needs positive constants: they are {theta_color}, {theta_space} and {strength}."
        )
    check_finite("window_kernel: images", images)
    images = promote(images.detach())
    there = inside(images.shape[-2], images.shape[-1], TAPS, device=images.device)
    planes = []
    for (dy, dx), present in zip(TAPS, there, strict=True):
        squared = (shift(images, (dy, dx)) - images).square().sum(dim=1) / (2 * theta_color**2)
        weight = strength * (-squared - (dy**2 + dx**2) / (2 * theta_space**2)).exp() * present
        planes.append(weight if valid is None else weight * shift(valid, (dy, dx)))
    return torch.stack(planes, dim=1)


@torch.no_grad()
def mean_field(
    masks: Float[Tensor, "n h w"],
    box_masks: Bool[Tensor, "n h w"],
    kernel: Float[Tensor, "b 9 h w"],
    image: Sequence[int],
    *,
    steps: int = 10,
    message: Float[Tensor, "n 2 h w"] | None = None,
    share: float = 0.01,
) -> Bool[Tensor, "n h w"]:
    """Return the pseudo masks after `steps` iterations, within their boxes: hard labels, no gradient.

    A mask starts as M > 0.5 in its box. In each iteration of DiscoBox (Lan et al. 2021) a label l scores
    exp(−Σ_k w_ik (−log q_kl)), with q = 0.9 or 0.1 from the previous label. Without a `message` that is a weighted
    majority vote, computed as [Σ_k w_ik (2 y_k − 1) > 0] with ties to the background. `message` (background, object)
    from other images is added with weight `share`; then the larger score wins, and pixels outside the box are cleared.

    `image` is the index of each mask's kernel.
    Raises ValueError: shapes do not fit; on the CPU also for masks outside [0, 1].
    """
    check_shapes("mean_field", masks=(masks, "n h w"), box_masks=(box_masks, "n h w"), kernel=(kernel, "b 9 h w"))
    if len(image) != len(masks):
        raise ValueError(f"mean_field needs the image of each of {len(masks)} masks: there are {len(image)}.")
    check_probabilities("mean_field: masks", masks)
    boxes = box_masks.bool()
    labels = (masks > 0.5) & boxes
    for b in sorted(set(image)):
        rows = torch.tensor([n for n, i in enumerate(image) if i == b]).to(masks.device, non_blocking=True)
        own, box = labels[rows], boxes[rows]
        term = None if message is None else share * message[rows].to(kernel.dtype)
        for _ in range(steps):
            own = box & (_votes(own, kernel[b]) > 0 if term is None else _posterior(own, kernel[b], term))
        labels[rows] = own
    return labels


def _votes(labels: Bool[Tensor, "m h w"], kernel: Float[Tensor, "9 h w"]) -> Float[Tensor, "m h w"]:
    """Return Σ_k w_ik (2 y_k − 1)."""
    sign = labels.to(kernel.dtype) * 2 - 1
    total = torch.zeros_like(sign)
    for offset, weight in zip(TAPS, kernel, strict=True):
        total += weight * shift(sign, offset)
    return total


def _posterior(
    labels: Bool[Tensor, "m h w"], kernel: Float[Tensor, "9 h w"], message: Float[Tensor, "m 2 h w"]
) -> Bool[Tensor, "m h w"]:
    """Return where the foreground's score, with the weighted `message`, exceeds the background's."""
    surely, hardly = torch.tensor([SURE, 1 - SURE], dtype=torch.float64).log().tolist()
    both = []
    for label in (~labels, labels):
        exponent = torch.zeros_like(label, dtype=kernel.dtype)
        for offset, weight in zip(TAPS, kernel, strict=True):
            # Taps outside the image have weight 0, whatever `shift` puts there.
            exponent += weight * torch.where(shift(label, offset), surely, hardly)
        both.append(exponent.exp())
    background, thing = both
    return thing + message[:, 1] > background + message[:, 0]
