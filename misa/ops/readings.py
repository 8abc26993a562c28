"""Readings of Eq. 11: possible definitions of S^c from the dense feature S and the classifier K (Eq. 1).

Axes: b image · d channel · c category · h row · w column.

Eq. 11 prints S^c = K^c · S but leaves open whether channels are summed, whether S is normalized, and how the signs of K
enter. Every reading is returned as values and factors, so that one affinity (Eq. 12),
|factors^c · (values(i) − values(k))| / σ, serves all of them.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.ops.affinity import promote
from misa.ops.axes import check_shapes

Values = Literal["channels", "class", "probability"]
Norm = Literal["none", "channel", "pixel"]
Factors = Literal["signed", "absolute", "positive", "contrast"]
SMALL = 1e-6  # keeps a constant map, whose spread is 0, finite


class Vocabulary(NamedTuple):
    """All rows of a network whose categories are not the student's, and which of them each student's category is.

    A category that the network does not know has the background's row, and is where the background is not.
    """

    rows: Float[Tensor, "r d"]
    bias: Float[Tensor, " r"]
    own: Int[Tensor, " c"]
    background: int


class Classifier(NamedTuple):
    """The last layer of a semantic network: K and its bias, with the background's row separate.

    vocabulary: all of the network's rows, if there are others than the student's categories and the background.
    """

    factors: Float[Tensor, "c d"]
    background: Float[Tensor, " d"]
    bias: Float[Tensor, " c"]
    background_bias: Float[Tensor, ""]
    vocabulary: Vocabulary | None = None


class Reading(NamedTuple):
    """The terms of Eq. 12: values (b e h w), factors (c e), and σ, "image" for their spread over the image."""

    values: Tensor
    factors: Tensor
    sigma: Literal["image"] | float


def read(
    features: Float[Tensor, "b d h w"],
    classifier: Classifier,
    *,
    values: Values = "channels",
    norm: Norm = "none",
    factors: Factors = "signed",
    valid: Bool[Tensor, "b h w"] | None = None,
) -> Reading:
    """Return S^c of every category as values and factors.

    values: "channels" K^c · S channel by channel, as Eq. 11 prints it; "class" the sum over the channels, the class's
        logit map as in CAM; "probability" the class's softmax probability of Eq. 1, of S and K as they are: `norm` and
        `factors` must be the defaults.
    norm: "none" S itself; "channel" every channel in units of its standard deviation in the image; "pixel" every
        pixel's vector divided by its norm.
    factors: "signed" K itself; "absolute" |K|; "positive" max(K, 0); "contrast" K minus the background's row.
    valid: False at padding, which enters no spread.

    With values "class" and "probability" every map has mean 0 and standard deviation 1 in its image, and σ is 1.
    Computed in float32 for half precision and under autocast. Raises ValueError on shapes that do not fit and on
    unknown choices.
    """
    _check(features, classifier, values, norm, factors)
    features, classifier = promote(features), _promoted(classifier)
    here = torch.ones_like(features[:, 0]) if valid is None else valid.to(features.dtype)
    if norm == "channel":
        features = features / _moments(features, here)[1]
    elif norm == "pixel":
        features = features / features.norm(dim=1, keepdim=True).clamp(min=SMALL)
    if values == "probability":
        maps = class_probabilities(features, classifier)
        return _standard(maps, here)
    k = _rows(classifier, factors)
    if values == "class":
        with torch.autocast(features.device.type, enabled=False):
            return _standard(torch.einsum("cd,bdhw->bchw", k, features), here)
    return Reading(features, k, "image")


def class_probabilities(features: Float[Tensor, "b d h w"], classifier: Classifier) -> Float[Tensor, "b c h w"]:
    """Return softmax(K · S + bias) of Eq. 1 over the network's categories and its background, for those of the student.

    A category that the network does not know gets 1 minus the background's probability.
    """
    known = classifier.vocabulary
    rows = torch.cat([classifier.factors, classifier.background[None]]) if known is None else known.rows
    bias = torch.cat([classifier.bias, classifier.background_bias[None]]) if known is None else known.bias
    with torch.autocast(features.device.type, enabled=False):
        shares = (torch.einsum("cd,bdhw->bchw", rows, features) + bias[:, None, None]).softmax(dim=1)
    if known is None:
        return shares[:, :-1]
    foreground = 1 - shares[:, known.background, None]
    return torch.where((known.own == known.background)[:, None, None], foreground, shares[:, known.own])


def _promoted(classifier: Classifier) -> Classifier:
    factors, background, bias, background_bias, known = classifier
    if known is not None:
        known = known._replace(rows=promote(known.rows), bias=promote(known.bias))
    return Classifier(promote(factors), promote(background), promote(bias), promote(background_bias), known)


def _rows(classifier: Classifier, factors: Factors) -> Float[Tensor, "c d"]:
    k = classifier.factors
    if factors == "absolute":
        return k.abs()
    if factors == "positive":
        return k.clamp(min=0)
    return k - classifier.background if factors == "contrast" else k


def _standard(maps: Float[Tensor, "b c h w"], here: Float[Tensor, "b h w"]) -> Reading:
    mean, spread = _moments(maps, here)
    return Reading((maps - mean) / spread, torch.eye(maps.shape[1], dtype=maps.dtype, device=maps.device), 1.0)


def _moments(maps: Float[Tensor, "b c h w"], here: Float[Tensor, "b h w"]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every map over the valid pixels (b c 1 1)."""
    here = here[:, None]
    count = here.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    mean = (maps * here).sum(dim=(2, 3), keepdim=True) / count
    variance = ((maps - mean).square() * here).sum(dim=(2, 3), keepdim=True) / count
    return mean, variance.sqrt().clamp(min=SMALL)


def window_of(share: float, h: int, w: int) -> int:
    """Return the window size whose half width is this share of a map's shorter side, one cell at least.

    APro's 5 x 5 on maps of 200 x 336 is a share of 0.01.
    """
    if not 0 < share < math.inf:
        raise ValueError(f"window_share must be positive: it is {share}.")
    return 2 * max(1, round(share * min(h, w))) + 1


def _check(features: Tensor, classifier: Classifier, values: str, norm: str, factors: str) -> None:
    check_shapes("read", features=(features, "b d h w"), factors=(classifier.factors, "c d"))
    for name, value, choices in (
        ("values", values, ("channels", "class", "probability")),
        ("norm", norm, ("none", "channel", "pixel")),
        ("factors", factors, ("signed", "absolute", "positive", "contrast")),
    ):
        if value not in choices:
            raise ValueError(f"read knows {name} {', '.join(choices)}, not {value!r}.")
    if values == "probability" and (norm, factors) != ("none", "signed"):
        raise ValueError(
            f"read: probabilities are of S and K as they are, not with norm {norm!r} and factors {factors!r}."
        )
