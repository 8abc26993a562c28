"""Pairwise affinity between a pixel and its neighbors (§3.3, Eq. 8 and 10–13).

Axes: b image · c category · d channel · k neighbor · h row · w column. Colors (A, Eq. 8), features (A^f, Eq. 10)
and reweighted features (A^c, Eq. 12) differ in what goes in, so they share one function.

The spread σ is one number for all channels. With a spread per channel a constant factor on a channel would cancel,
and with it the saliency factors K of Eq. 11: A^c would equal A^f for every category.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.errors import NotFinite
from misa.ops.neighbors import Offset, inside, shift, window_offsets

Sigma = Literal["image", "window"] | float
TINY = 1e-12  # keeps a constant image, whose spread is 0, at affinity 1


def check_finite(name: str, values: Tensor) -> None:
    """NotFinite for NaN and Inf; on the CPU only, because elsewhere the answer would stall the device."""
    # The sum alone answers nearly always, thirty times as fast; only it may overflow.
    if values.device.type == "cpu" and not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        raise NotFinite(f"{name} has NaN or Inf in it: propagation would spread them over the whole map.")


def check_probabilities(name: str, values: Tensor) -> None:
    """NotFinite for NaN, ValueError for what is not in [0, 1]; on the CPU only, as `check_finite`."""
    check_finite(name, values)
    if values.device.type != "cpu" or values.numel() == 0:
        return
    low, high = values.detach().aminmax()
    if low < 0 or high > 1:
        raise ValueError(f"{name} must be probabilities in [0, 1]: they are {low:.3g} to {high:.3g}. Logits?")


def check_kernel(name: str, *, balance: float, sigma: float | str, scale: float) -> None:
    """ValueError where A^c would be no affinity (Eq. 8, 13)."""
    if not 0 <= balance < math.inf:
        raise ValueError(f"{name} needs a balance of 0 or more: it is {balance}.")
    if not 0 < scale < math.inf:
        raise ValueError(f"{name} needs a positive semantic_scale: it is {scale}.")
    if not isinstance(sigma, str) and not 0 < sigma < math.inf:
        raise ValueError(f"{name} needs a semantic_sigma by name or positive: it is {sigma}.")


def promote(values: Tensor) -> Tensor:
    """Half precision and integers become float32; float32 and float64 stay."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def reweight(features: Float[Tensor, "d h w"], saliency_factors: Float[Tensor, "c d"]) -> Float[Tensor, "c d h w"]:
    """S^c = K^c · S, channel by channel (Eq. 11)."""
    return saliency_factors[:, :, None, None] * features


def squared_distances(
    values: Float[Tensor, "b d h w"],
    offsets: Sequence[Offset],
    *,
    channel_weights: Float[Tensor, "c d"] | None = None,
) -> Float[Tensor, "b k h w"] | Float[Tensor, "b c k h w"]:
    """Squared L2 distance to each neighbor; with `channel_weights`, one distance per row of weights.

    |K^c S(i) − K^c S(k)|² = Σ_d (K^c_d)² (S_d(i) − S_d(k))²: one pass over the differences and one matrix product
    serve all categories of Eq. 12. Distances to pixels outside the image are meaningless; mask them with `inside`.
    """
    b, _, h, w = values.shape
    if not offsets:  # a window of one pixel
        return values.new_empty(b, *(() if channel_weights is None else channel_weights.shape[:1]), 0, h, w)
    planes = []
    for offset in offsets:
        difference = (shift(values, offset) - values).square()
        if channel_weights is None:
            planes.append(difference.sum(dim=1))
        else:
            planes.append(torch.einsum("cd,bdhw->bchw", channel_weights.square(), difference))
    return torch.stack(planes, dim=1 if channel_weights is None else 2)


def spread(
    values: Float[Tensor, "b d h w"], *, channel_weights: Float[Tensor, "c d"] | None = None
) -> Float[Tensor, " b"] | Float[Tensor, "b c"]:
    """σ: the standard deviation of all entries of an image, channels and pixels together.

    With `channel_weights` K, the spread of K^c · S for every c from the channels' first two moments (σ_{S^c}).
    """
    first = values.double().mean(dim=(2, 3))
    second = values.double().square().mean(dim=(2, 3))
    if channel_weights is None:
        variance = second.mean(dim=1) - first.mean(dim=1).square()
    else:
        k = channel_weights.double()
        variance = (second @ k.square().T) / k.shape[1] - ((first @ k.T) / k.shape[1]).square()
    return variance.clamp(min=0).sqrt().to(values.dtype)


def window_spread(
    values: Float[Tensor, "b d h w"],
    offsets: Sequence[Offset],
    *,
    channel_weights: Float[Tensor, "c d"] | None = None,
    valid: Bool[Tensor, "h w"] | None = None,
) -> Float[Tensor, "b h w"] | Float[Tensor, "b c h w"]:
    """σ per pixel: root mean squared distance of the window's `valid` vectors, centre included, from their mean."""
    h, w = values.shape[-2:]
    present = inside(h, w, offsets, device=values.device).to(values.dtype)
    if valid is not None:
        present = present * torch.stack([shift(valid.to(values.dtype), o) for o in offsets])
    count = present.sum(dim=0) + 1
    # Sums of differences to the centre: the spread does not change, and nothing cancels in float32.
    differences = [(shift(values, o) - values) * p for o, p in zip(offsets, present, strict=True)]
    mean: Tensor = sum(differences, torch.zeros_like(values)) / count
    variance = (
        sum((difference.square() for difference in differences), torch.zeros_like(values)) / count - mean.square()
    )
    variance = variance.clamp(min=0)
    if channel_weights is None:
        return variance.sum(dim=1).sqrt()
    return torch.einsum("cd,bdhw->bchw", channel_weights.square(), variance).sqrt()


def pairwise_affinity(
    values: Float[Tensor, "b d h w"],
    *,
    window: int = 3,
    dilation: int | Sequence[int] = 1,
    sigma: Sigma = "image",
    channel_weights: Float[Tensor, "c d"] | None = None,
) -> Float[Tensor, "b k h w"] | Float[Tensor, "b c k h w"]:
    """A = exp(−(|V(i) − V(k)| / σ)²) to every neighbor k, 0 where k is outside the image (Eq. 8, 10, 12).

    `sigma`: "image" is one number per image over all channels and pixels; "window" the local spread of the vectors;
    a float a fixed bandwidth. Neighbors come row by row without the centre, dilation by dilation. With
    `channel_weights` K the affinities A^c of all categories at once: as `values=reweight(S, K)`, at one pass over S.
    """
    if values.dim() != 4:
        raise ValueError(f"pairwise_affinity needs values of shape (b, d, h, w): they are {tuple(values.shape)}.")
    check_finite("pairwise_affinity: values", values)
    offsets = window_offsets(window, dilation)
    values = promote(values)
    weights = None if channel_weights is None else promote(channel_weights)
    distances = squared_distances(values, offsets, channel_weights=weights)
    if sigma == "image":
        scale = spread(values, channel_weights=weights)[..., None, None, None]
    elif sigma == "window":
        scale = window_spread(values, offsets, channel_weights=weights).unsqueeze(-3)
    elif isinstance(sigma, int | float) and sigma > 0:
        scale = values.new_tensor(float(sigma))
    else:
        raise ValueError(f"pairwise_affinity needs sigma 'image', 'window' or a positive number: sigma is {sigma!r}.")
    affinity = torch.exp(-distances / scale.square().clamp(min=TINY))
    h, w = values.shape[-2:]
    return affinity * inside(h, w, offsets, device=values.device)


def saliency_affinity(
    features: Float[Tensor, "d h w"],
    saliency_factors: Float[Tensor, "c d"],
    labels: Int[Tensor, " n"] | None = None,
    **options: object,
) -> Float[Tensor, "n k h w"]:
    """A^c (Eq. 11–12) for every category, or for the category of each instance where `labels` are given."""
    if labels is not None:
        saliency_factors = saliency_factors[labels]
    return pairwise_affinity(features[None], channel_weights=saliency_factors, **options)[0]  # type: ignore[arg-type]


def enhance(
    color: Float[Tensor, "#n k h w"], saliency: Float[Tensor, "n k h w"], *, balance: float = 0.7
) -> Float[Tensor, "n k h w"]:
    """Â^c = A + balance · A^c (Eq. 13; §4.3 gives the 0.7). Only the ratio matters, Eq. 14 divides by the sum."""
    return color + balance * saliency
