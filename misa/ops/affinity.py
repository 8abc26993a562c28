"""Pairwise affinity between a pixel and its neighbors (§3.3, Eq. 8 and 10–13).

Axes: b image · c category · q row of factors · d channel · k neighbor · h row · w column. Colors (A, Eq. 8), features
(A^f, Eq. 10) and reweighted features (A^c, Eq. 12) differ only in the vectors compared, so they share one function.
`KERNELS` names the affinities and selects these vectors; `misa.ops.guides` uses it, in training and elsewhere.

The spread σ is one number for all channels. With a spread per channel a constant factor on a channel would cancel,
and with it the saliency factors K of Eq. 11: A^c would equal A^f for every category.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.errors import NotFinite
from misa.ops.axes import check_shapes, images, single
from misa.ops.neighbors import Offset, inside, shift, window_offsets

Sigma = Literal["image", "window"] | float
TINY = 1e-12  # keeps a constant image, whose spread is 0, at affinity 1


class AffinityInputs(NamedTuple):
    """The maps of one image that an affinity may compare, all of one size.

    colors (d h w): V, the normalized image. features (e h w): S, or None without a teacher. factors (c e): K of the
    categories that are present in the image, in ascending order; None without a teacher.
    """

    colors: Float[Tensor, "d h w"]
    features: Float[Tensor, "e h w"] | None = None
    factors: Float[Tensor, "c e"] | None = None


class Compared(NamedTuple):
    """Terms of the affinity exp(−Σ_d (factors_qd (values_d(i) − values_d(k)))² / σ_q²).

    values (d h w). factors (q d): one row for all masks, or one per category of the inputs. sigma: a number, or None to
    leave σ to the caller: a bandwidth ζ for colors, the spread of factors · values for the others.
    """

    values: Float[Tensor, "d h w"]
    factors: Float[Tensor, "q d"]
    sigma: float | None = None


def color(inputs: AffinityInputs) -> Compared:
    """Return the terms of A (Eq. 8): the colors, with factors of 1."""
    return Compared(inputs.colors, torch.ones_like(inputs.colors[None, :, 0, 0]))


def feature(inputs: AffinityInputs) -> Compared:
    """Return the terms of A^f (Eq. 10): the dense feature S, with factors of 1."""
    features = _of_teacher("feature", inputs)
    return Compared(features, torch.ones_like(features[None, :, 0, 0]))


def saliency(inputs: AffinityInputs) -> Compared:
    """Return the terms of A^c (Eq. 11–12): S^c = K^c · S, with a row of factors for every category."""
    features = _of_teacher("saliency", inputs)
    assert inputs.factors is not None
    return Compared(features, inputs.factors)


def _of_teacher(name: str, inputs: AffinityInputs) -> Tensor:
    if inputs.features is None:
        raise ValueError(f"the affinity {name!r} compares the features of a semantic teacher, and there are none.")
    return inputs.features


KERNELS: dict[str, Callable[[AffinityInputs], Compared]] = {"color": color, "feature": feature, "saliency": saliency}
SEMANTIC = ("feature", "saliency")  # these come second, beside another one


def check_finite(name: str, values: Tensor) -> None:
    """Raise NotFinite on NaN or Inf; on the CPU only, because elsewhere the check would synchronize with the device."""
    # A finite sum rules out NaN and Inf, thirty times as fast; the full test is for sums that overflow.
    if values.device.type == "cpu" and not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        raise NotFinite(f"{name} has NaN or Inf in it: propagation would spread them over the whole map.")


def check_probabilities(name: str, values: Tensor) -> None:
    """Raise NotFinite on NaN, ValueError on values outside [0, 1]; on the CPU only, as `check_finite`."""
    check_finite(name, values)
    if values.device.type != "cpu" or values.numel() == 0:
        return
    low, high = values.detach().aminmax()
    if low < 0 or high > 1:
        raise ValueError(f"{name} must be probabilities in [0, 1]: they are {low:.3g} to {high:.3g}. Logits?")


def promote(values: Tensor) -> Tensor:
    """Cast half precision and integers to float32; keep float32 and float64."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def reweight(features: Float[Tensor, "d h w"], saliency_factors: Float[Tensor, "c d"]) -> Float[Tensor, "c d h w"]:
    """Return S^c = K^c · S, channel by channel (Eq. 11). Raises ValueError if their channels differ."""
    check_shapes("reweight", features=(features, "d h w"), saliency_factors=(saliency_factors, "c d"))
    return saliency_factors[:, :, None, None] * features


def squared_distances(
    values: Float[Tensor, "b d h w"], offsets: Sequence[Offset], *, channel_weights: Float[Tensor, "c d"] | None = None
) -> Float[Tensor, "b k h w"] | Float[Tensor, "b c k h w"]:
    """Return the squared L2 distance to each neighbor; with `channel_weights`, one distance per row of weights.

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
            planes.append(_weighted(channel_weights, difference))
    return torch.stack(planes, dim=1 if channel_weights is None else 2)


def spread(
    values: Float[Tensor, "b d h w"], *, channel_weights: Float[Tensor, "c d"] | None = None
) -> Float[Tensor, " b"] | Float[Tensor, "b c"]:
    """Return σ, the standard deviation of all entries of an image, channels and pixels together.

    With `channel_weights` K, that of K^c · S for every c (σ_{S^c}).
    """
    first, second = values.double().mean(dim=(2, 3)), values.double().square().mean(dim=(2, 3))
    k = torch.ones_like(first[:1]) if channel_weights is None else channel_weights.double()
    sigma = variance(first[:, None], second[:, None], k).sqrt().to(values.dtype)
    return sigma[:, 0] if channel_weights is None else sigma


def variance(
    first: Float[Tensor, "*b d"], second: Float[Tensor, "*b d"], factors: Float[Tensor, "c d"]
) -> Float[Tensor, "*b c"]:
    """Return σ² of K^c · S over channels and pixels, from each channel's mean and mean square over the pixels."""
    mean = (factors * first).mean(dim=-1)
    return ((factors.square() * second).mean(dim=-1) - mean.square()).clamp(min=0)


def window_spread(
    values: Float[Tensor, "b d h w"],
    offsets: Sequence[Offset],
    *,
    channel_weights: Float[Tensor, "c d"] | None = None,
    valid: Bool[Tensor, "h w"] | None = None,
) -> Float[Tensor, "b h w"] | Float[Tensor, "b c h w"]:
    """Return σ per pixel: the RMS distance of the window's `valid` vectors, center included, from their mean."""
    h, w = values.shape[-2:]
    present = inside(h, w, offsets, device=values.device).to(values.dtype)
    if valid is not None:
        present = present * torch.stack([shift(valid.to(values.dtype), o) for o in offsets])
    count = present.sum(dim=0) + 1
    # Differences to the center leave the spread as it is and avoid cancellation in float32.
    total, squares = torch.zeros_like(values), torch.zeros_like(values)
    for offset, there in zip(offsets, present, strict=True):
        difference = (shift(values, offset) - values) * there
        total, squares = total + difference, squares + difference.square()
    variance = (squares / count - (total / count).square()).clamp(min=0)
    if channel_weights is None:
        return variance.sum(dim=1).sqrt()
    return _weighted(channel_weights, variance).sqrt()


def _weighted(channel_weights: Float[Tensor, "c d"], squares: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c h w"]:
    """Σ_d (K^c_d)² · squares_d, in the tensors' own precision under autocast, too."""
    with torch.autocast(squares.device.type, enabled=False):
        return torch.einsum("cd,bdhw->bchw", channel_weights.square(), squares)


@single(values=4)
def pairwise_affinity(
    values: Float[Tensor, "b d h w"],
    *,
    window: int = 3,
    dilation: int | Sequence[int] = 1,
    sigma: Sigma = "image",
    channel_weights: Float[Tensor, "c d"] | None = None,
) -> Float[Tensor, "b k h w"] | Float[Tensor, "b c k h w"]:
    """Return A = exp(−(|V(i) − V(k)| / σ)²) to every neighbor k, 0 where k is outside the image (Eq. 8, 10, 12).

    `sigma`: "image" is one spread per image over all channels and pixels; "window" the local spread of the vectors;
    a float a fixed bandwidth. Neighbors are ordered row by row without the center, dilation by dilation. With
    `channel_weights` K the result is A^c of all categories, as for `values=reweight(S, K)` but in one pass over S.
    """
    if values.dim() != 4:
        raise ValueError(f"pairwise_affinity needs values of shape (b, d, h, w): they are {tuple(values.shape)}.")
    check_shapes("pairwise_affinity", values=(values, "b d h w"), channel_weights=(channel_weights, "c d"))
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
        scale = values.new_full((), float(sigma))
    else:
        raise ValueError(f"pairwise_affinity needs sigma 'image', 'window' or a positive number: sigma is {sigma!r}.")
    affinity = torch.exp(-distances / scale.square().clamp(min=TINY))
    h, w = values.shape[-2:]
    return affinity * inside(h, w, offsets, device=values.device)


@images(features=3, labels=1)
def saliency_affinity(
    features: Float[Tensor, "d h w"],
    saliency_factors: Float[Tensor, "c d"],
    labels: Int[Tensor, " n"] | None = None,
    **options: object,
) -> Float[Tensor, "n k h w"]:
    """Return A^c (Eq. 11–12) for every category, or with `labels` for the category of each instance.

    `options` are those of `pairwise_affinity`, and so are the errors.
    """
    shapes = {"features": (features, "d h w"), "saliency_factors": (saliency_factors, "c d"), "labels": (labels, "n")}
    check_shapes("saliency_affinity", **shapes)
    if labels is not None:
        saliency_factors = saliency_factors[labels]
    return pairwise_affinity(features[None], channel_weights=saliency_factors, **options)[0]  # type: ignore[arg-type]
