"""Affinity guides of a batch of images: the trees and window weights with which masks are propagated.

Trees and affinities are built once per image, or per image and category present, and shared by its masks.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from misa.errors import UserError
from misa.ops.affinity import KERNELS, SEMANTIC, TINY, AffinityInputs, Compared, check_finite, window_spread
from misa.ops.axes import check_shapes
from misa.ops.backends.choice import backend
from misa.ops.backends.torch_ops import Layer, Near
from misa.ops.neighbors import Offset, window_offsets
from misa.ops.resize import resized, resized_within
from misa.ops.tree import TieRule, Trees, edges_into_padding, grid_lengths, spanning_trees

GlobalForm = Literal["sum", "embedding", "product"]
LocalForm = Literal["sum", "product"]


@dataclass(frozen=True)
class Join:
    """How the second affinity is combined with the first (Eq. 13).

    balance: weight of the second against the first. form: "sum" is Eq. 13; each method that takes a `Join` documents
    the others. sigma: σ of the second affinity: "image" for its spread over the image, "window" for that around each
    pixel, or a number; factor multiplies it. Raises ValueError on values out of range.
    """

    balance: float = 0.7
    form: GlobalForm = "sum"
    sigma: Literal["image", "window"] | float = "image"
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.balance < math.inf:
            raise ValueError(f"an affinity needs a balance of 0 or more: it is {self.balance}.")
        if not 0 < self.factor < math.inf:
            raise ValueError(f"an affinity needs a positive semantic_scale: it is {self.factor}.")
        known = self.sigma in ("image", "window") if isinstance(self.sigma, str) else 0 < self.sigma < math.inf
        if not known:
            raise ValueError(f"an affinity needs a semantic_sigma by name or positive: it is {self.sigma!r}.")


SUM = Join()


def check_inputs(
    name: str,
    masks: Tensor,
    images: Tensor,
    features: Tensor | None,
    factors: Tensor | None,
    labels: Tensor | None,
    boxes: Tensor | None = None,
) -> None:
    """Check masks and boxes (n h w), labels (n), images and features (… d h w), factors (c d) before propagation.

    `name` is the public function that was called. Raises ValueError on shapes, NotFinite on NaN or Inf.
    """
    shape, size = tuple(masks.shape), tuple(masks.shape[-2:])
    if len(shape) != 3 or images.dim() not in (3, 4) or images.shape[-2:] != size or 0 in images.shape[-3:]:
        raise ValueError(
            f"{name} needs masks (n, h, w) and an image or guide (…, d, h, w) of one size: they are {shape} and "
            f"{tuple(images.shape)}. Resize the image first (bilinear, no antialias)."
        )
    if boxes is not None and boxes.shape != shape:
        raise ValueError(f"{name} needs one box mask per mask: masks are {shape}, box_masks {tuple(boxes.shape)}.")
    check_finite(f"{name}: masks", masks)
    check_finite(f"{name}: the image or guide", images)
    if features is None or factors is None:
        return
    if features.shape[-2:] != size:
        raise ValueError(
            f"{name} needs semantic features at the size of the masks {size}: they are {tuple(features.shape)}."
        )
    check_finite(f"{name}: semantic features", features)
    check_finite(f"{name}: saliency factors", factors)
    if labels is None or labels.shape != shape[:1]:
        raise ValueError(f"{name} needs labels (n,) with the category of each mask to use the semantic features.")


def require_kernels(kernels: Sequence[str]) -> None:
    """Raise UserError if these are no affinities that `Guides` combines."""
    unknown = [name for name in kernels if name not in KERNELS]
    if unknown:
        raise UserError(f"there is no affinity {unknown[0]!r}; there are {', '.join(KERNELS)}.")
    if not 1 <= len(kernels) <= 2:
        raise UserError(f"masks are propagated along one affinity or two, not {len(kernels)}.")
    if kernels[0] in SEMANTIC:
        raise UserError(
            f"the affinity {kernels[0]!r} can only be the second one: its σ is its spread in the image, and "
            f"saliency has a row for each category; name a first one, such as ('color', {kernels[0]!r})."
        )


@dataclass
class Guides:
    """Images (b d h w), the image of every mask, and the affinities of `KERNELS` to combine: colors, then one more.

    A semantic affinity also needs the teacher's features (b e h w), factors (c e) and the masks' labels. `valid`
    (b h w) is False at padding. `window` is that of a later `along_window`: CUDA computes its distances together with
    the second affinity's edges. Raises ValueError on inputs that do not fit, UserError on unknown affinities.
    """

    images: Float[Tensor, "b d h w"]
    image: Sequence[int]
    features: Float[Tensor, "b e h w"] | None = None
    factors: Float[Tensor, "c e"] | None = None
    labels: Sequence[int] | None = None
    kernels: Sequence[str] = ("color",)
    valid: Bool[Tensor, "b h w"] | None = None
    window: int = 1

    def __post_init__(self) -> None:
        require_kernels(self.kernels)
        check_shapes(
            "Guides",
            images=(self.images, "b d h w"),
            features=(self.features, "b e h w"),
            factors=(self.factors, "c e"),
            valid=(self.valid, "b h w"),
        )
        if len(self.image) and not 0 <= min(self.image) <= max(self.image) < len(self.images):
            raise ValueError(f"the image of a mask must lie in 0 … {len(self.images) - 1}, it is one of the images.")
        if (
            self.factors is not None
            and self.labels
            and not 0 <= min(self.labels) <= max(self.labels) < len(self.factors)
        ):
            raise ValueError(f"labels must lie in 0 … {len(self.factors) - 1}, one row of K each.")
        self.backend = backend(self.images)
        self.built_ahead: dict[tuple[Join, TieRule], Trees] = {}  # the second affinity's trees, built by `trees`
        self._near: Tensor | None = None  # the second affinity's distances in half of `window`, once computed

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.images.shape[-2], self.images.shape[-1]

    def first_only(self) -> "Guides":
        """Return the same guides without the second affinity."""
        return replace(self, kernels=self.kernels[:1])

    def at_size(self, size: tuple[int, int]) -> "Guides":
        """Return the guides resized (bilinear, without padding), window 1; a cell over half in padding is padding."""
        if self.size == size:
            return self
        if self.valid is None:
            features = None if self.features is None else resized(self.features, size)
            return replace(self, images=resized(self.images, size), features=features, window=1)
        features = None if self.features is None else resized_within(self.features, self.valid, size)[0]
        images, valid = resized_within(self.images, self.valid, size)
        return replace(self, images=images, features=features, valid=valid, window=1)

    def _categories(self, image: int) -> list[int]:
        """Return the categories that are present in an image, in ascending order."""
        labels = self.labels if self.labels is not None else [0] * len(self.image)
        return sorted({label for where, label in zip(self.image, labels, strict=True) if where == image})

    def _compared(self, kernel: str, images: Iterable[int]) -> dict[int, Compared]:
        """Return the terms of an affinity, by image."""
        found = {}
        for i in images:
            present, factors = self._categories(i), None
            if self.factors is not None and present:
                factors = torch.stack([self.factors[c] for c in present])
            features = None if self.features is None else self.features[i]
            found[i] = KERNELS[kernel](AffinityInputs(self.images[i], features, factors))
        return found

    @cached_property
    def first(self) -> dict[int, Compared]:
        """Terms of the first affinity in every image; one row of factors each."""
        return self._compared(self.kernels[0], range(len(self.images)))

    @cached_property
    def second(self) -> dict[int, Compared]:
        """Terms of the second affinity in every image that has masks; empty without a second affinity."""
        return {} if len(self.kernels) == 1 else self._compared(self.kernels[1], sorted(set(self.image)))

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """All pairs (image, row of its factors), image by image; the masks of a pair share trees and weights."""
        rows = {i: len(self.second[i].factors) if self.second else 1 for i in sorted(set(self.image))}
        return [(i, row) for i, many in rows.items() for row in range(many)]

    @cached_property
    def pair(self) -> list[int]:
        """The index into `pairs` of every mask."""
        place = {pair: number for number, pair in enumerate(self.pairs)}
        labels = self.labels if self.labels is not None else [0] * len(self.image)
        rows = [
            self._categories(i).index(label) if (i, 1) in place else 0
            for i, label in zip(self.image, labels, strict=True)
        ]
        return [place[pair] for pair in zip(self.image, rows, strict=True)]

    @cached_property
    def members(self) -> list[list[int]]:
        """The indices of the masks of every pair."""
        return [[n for n, q in enumerate(self.pair) if q == number] for number in range(len(self.pairs))]

    @cached_property
    def second_on_edges(self) -> tuple[Tensor, Tensor]:
        """The second affinity's squared distances along the grid edges (pairs, m), and its σ² without padding."""
        maps = [  # edges into the padding are removed later
            (values, k, None if self.valid is None else self.valid[i]) for i, (values, k, _) in self.second.items()
        ]
        lengths, variances, self._near = self.backend.lengths_and_variance(maps, half_window(self.window))
        sigmas = [its.sigma for its in self.second.values()]
        every = [v if s is None else torch.full_like(v, s**2) for v, s in zip(variances, sigmas, strict=True)]
        return lengths, torch.cat(every)

    def second_scale(self, join: Join) -> Float[Tensor, " q"]:
        """Return (factor · σ)² of the second affinity for every pair."""
        if join.sigma == "image":
            squared = self.second_on_edges[1]
        else:  # the σ of a reading of S; an affinity's own one stays
            own = [(its.sigma or float(join.sigma)) ** 2 for its in self.second.values() for _ in its.factors]
            squared = torch.tensor(own).to(self.images.device, non_blocking=True)
        return (squared * join.factor**2).clamp(min=TINY)

    def second_lengths(self) -> Float[Tensor, "q m"]:
        """Return the second affinity's squared distances along the grid edges for every pair, infinite into padding."""
        lengths = self.second_on_edges[0]
        if self._into_padding is None:
            return lengths
        return lengths.masked_fill(torch.stack([self._into_padding[i] for i, _ in self.pairs]), torch.inf)

    def _second_scaled(self, join: Join) -> Float[Tensor, "q m"]:
        return self.second_lengths() / self.second_scale(join)[:, None]

    @cached_property
    def _into_padding(self) -> Bool[Tensor, "b m"] | None:
        """The grid edges that touch padding, for every image."""
        return None if self.valid is None else edges_into_padding(self.valid)

    @cached_property
    def lengths(self) -> Float[Tensor, "b m"]:
        """The first affinity's squared distances along the grid edges, infinite into padding."""
        weighted = [its.factors[0, :, None, None] * its.values for its in self.first.values()]
        lengths = grid_lengths(torch.stack(weighted))
        return lengths if self._into_padding is None else lengths.masked_fill(self._into_padding, torch.inf)

    def trees(self, tie_rule: TieRule = "exact", *, ahead: Join | None = None) -> Trees:
        """Return one minimum spanning tree per image.

        With the `join` of the next `along_trees` as `ahead`, the second affinity's trees, if it needs any, are built in
        the same call and kept for it.
        """
        if ahead is None or ahead.form != "sum" or not self.second:
            return spanning_trees(self.lengths, *self.size, tie_rule=tie_rule)
        lengths = self._second_scaled(ahead)
        both = spanning_trees(torch.cat([self.lengths, lengths]), *self.size, tie_rule=tie_rule)
        self.built_ahead[ahead, tie_rule] = both.cut(len(self.images), None)
        return both.cut(None, len(self.images))

    def cut(self, trees: Trees) -> Trees:
        """Return the trees with the guides' edge lengths, infinite into padding."""
        return trees if self.valid is None else replace(trees, length=self.on_edges(trees, self.lengths))

    def along_trees(
        self,
        masks: Float[Tensor, "n h w"],
        trees: Trees,
        bandwidth: float,
        join: Join = SUM,
        *,
        tie_rule: TieRule = "exact",
    ) -> Float[Tensor, "n h w"]:
        """Apply Eq. 14 with 𝒩 = all pixels, along the images' trees and the second affinity's.

        `join.form` "sum": numerators and denominators of both affinities are added, each on its own trees. "embedding":
        the second affinity measures the edges of the images' trees. "product": the kernels multiply, on one joint tree.
        """
        if join.sigma == "window":
            raise ValueError("propagate_global knows semantic_sigma 'image' or a number: a tree has no window.")
        sigmas = [(its.sigma or bandwidth) ** 2 for its in self.first.values()]
        squared = torch.tensor(sigmas, dtype=self.lengths.dtype).to(self.lengths.device, non_blocking=True)
        s = self.lengths / squared[:, None]
        parts = [(trees.pixel, trees.parent, self.on_edges(trees, s), list(self.image), 1.0)]
        if self.second:
            images = [image for image, _ in self.pairs]
            if join.form == "sum":
                own = self.built_ahead.pop((join, tie_rule), None)
                if own is None:
                    own = spanning_trees(self._second_scaled(join), *self.size, tie_rule=tie_rule)
                parts.append((own.pixel, own.parent, own.length, self.pair, join.balance))
            elif join.form == "embedding":
                its, lengths = trees.rows(images), self._second_scaled(join)
                parts = [(its.pixel, its.parent, self.on_edges(its, lengths), self.pair, 1.0)]
            elif join.form == "product":
                joined = torch.stack([s[i] for i in images])  # indexing with a list would synchronize with the device
                if join.balance > 0:  # 0 · ∞, at padding, is NaN
                    joined = joined + join.balance * self._second_scaled(join)
                own = spanning_trees(joined, *self.size, tie_rule=tie_rule)
                parts = [(own.pixel, own.parent, own.length, self.pair, 1.0)]
            else:
                raise ValueError(f"propagate_global knows 'sum', 'embedding' and 'product', not {join.form!r}.")
        return self.backend.propagate(masks.flatten(1), parts).view_as(masks)

    def along_masks(
        self, masks: Float[Tensor, "n h w"], guides: Float[Tensor, "n d h w"], trees: Trees, bandwidth: float
    ) -> Float[Tensor, "n h w"]:
        """Apply Eq. 14 on the images' trees with edge lengths from one guide per mask."""
        flat, along = masks.flatten(1), guides.flatten(2)
        where = (trees.pixel, trees.parent, trees.length, list(self.image))
        return self.backend.propagate_along(flat, along, *where, 1 / bandwidth**2).view_as(masks)

    def along_window(
        self,
        masks: Float[Tensor, "n h w"],
        boxes: Tensor | None,
        *,
        window: int,
        bandwidth: float,
        steps: int,
        join: Join = SUM,
    ) -> Float[Tensor, "n h w"]:
        """Apply Eq. 14 over a window `steps` times; `join.form` is "sum" or, with one spread per image, "product"."""
        if join.form not in ("sum", "product") or (join.form == "product" and join.sigma == "window"):
            raise ValueError(
                f"propagate_local knows the forms 'sum' and, with one spread an image, 'product': it is {join.form!r} "
                f"with sigma {join.sigma!r}."
            )
        images = [image for image, _ in self.pairs]
        first = {i: self._first_layer(i, bandwidth) for i in dict.fromkeys(images)}
        layers, known = [[first[i]] for i in images], {}
        if self.second:
            seconds, near = self._second_layers(window, join)
            layers = [[*mine, layer] for mine, layer in zip(layers, seconds, strict=True)]
            known = {} if near is None else {"near": near}
        groups = list(zip(self.members, layers, strict=True))
        padding = {i: None if self.valid is None else self.valid[i] for i in images}
        valid, product = [padding[i] for i in images], join.form == "product" and bool(self.second)
        return self.backend.propagate_window(
            masks, boxes, valid, half_window(window), groups, steps, product=product, **known
        )

    def _first_layer(self, image: int, bandwidth: float) -> Layer:
        values, factors, sigma = self.first[image]
        return values, factors[0].square() * (bandwidth if sigma is None else sigma) ** -2, 1.0, None

    def _second_layers(self, window: int, join: Join) -> tuple[list[Layer], Near | None]:
        """Return one layer per pair with its weight in Eq. 13, and the distances if they are already computed."""
        rows = torch.cat([its.factors for its in self.second.values()]).square()
        maps = [self.second[i].values for i, _ in self.pairs]
        scale = None if join.sigma == "window" else self.second_scale(join)
        near = Near(self._near, scale) if self._near is not None and window == self.window else None
        if scale is not None:
            rows = rows if near else rows / scale[:, None]
            return [(its, row, join.balance, None) for its, row in zip(maps, rows, strict=True)], near
        every, spreads = window_offsets(window), []
        for i, (values, factors, sigma) in self.second.items():
            valid = None if self.valid is None else self.valid[i]
            spread = window_spread(values[None], every, channel_weights=factors, valid=valid)[0]
            spreads.append(spread if sigma is None else torch.full_like(spread, sigma))
        precision = 1 / (torch.cat(spreads) * join.factor).square().clamp(min=TINY)
        return [(its, row, join.balance, p) for its, row, p in zip(maps, rows, precision, strict=True)], near

    def on_edges(self, trees: Trees, values: Float[Tensor, "g m"]) -> Float[Tensor, "g p"]:
        """Gather values of grid edges at the trees' edges to the parents; infinite where the tree's own length is."""
        found: Tensor = self.backend.at_edges(values, trees.edge, trees.length)
        return found


def half_window(window: int) -> list[Offset]:
    """Return one offset of each pair of opposite neighbors."""
    return [offset for offset in window_offsets(window) if offset > (0, 0)]
