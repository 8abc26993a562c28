"""What the masks of one or several images are propagated along, and which of it they share.

A tree or an affinity is needed once per image, and once per image and category present, never per mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from misa.ops.affinity import TINY, window_spread
from misa.ops.backends.choice import backend
from misa.ops.backends.torch_ops import Layer
from misa.ops.neighbors import Offset, window_offsets
from misa.ops.tree import TieRule, Trees, cut_padding, grid_lengths, spanning_trees

GlobalForm = Literal["sum", "embedding", "product"]
LocalForm = Literal["sum", "product"]


@dataclass
class Scene:
    """Guides (b d h w) with the image of every mask; for SEPA features (b e h w), factors (c e) and labels too."""

    guides: Float[Tensor, "b d h w"]
    image: Sequence[int]
    features: Float[Tensor, "b e h w"] | None = None
    factors: Float[Tensor, "c e"] | None = None
    labels: Sequence[int] | None = None
    saliency: bool = True
    valid: Bool[Tensor, "b h w"] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.guides.shape[-2], self.guides.shape[-1]

    def colors_only(self) -> "Scene":
        """The same without S."""
        return Scene(self.guides, self.image, valid=self.valid)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """The (image, category) pairs present, image by image; without saliency the one category is 'any'."""
        labels = self.labels if self.labels is not None and self.saliency else [0] * len(self.image)
        return sorted(set(zip(self.image, labels, strict=True)))

    @cached_property
    def pair(self) -> list[int]:
        """Which pair every mask belongs to."""
        labels = self.labels if self.labels is not None and self.saliency else [0] * len(self.image)
        place = {pair: i for i, pair in enumerate(self.pairs)}
        return [place[pair] for pair in zip(self.image, labels, strict=True)]

    @cached_property
    def members(self) -> list[list[int]]:
        """The masks of every pair; of every image without S."""
        key = self.pair if self.features is not None else self.image
        return [[n for n, k in enumerate(key) if k == one] for one in sorted(set(key))]

    def rows(self, image: int) -> Float[Tensor, "c e"]:
        """K of the categories present in an image (Eq. 11); ones for A^f (Eq. 10)."""
        assert self.factors is not None
        if not self.saliency:
            return torch.ones_like(self.factors[:1])
        return torch.stack([self.factors[c] for i, c in self.pairs if i == image])

    @cached_property
    def edges_of_features(self) -> tuple[Tensor, Tensor]:
        """Squared distances of S^c along the grid edges (pairs, m), and its variance without padding (pairs,)."""
        assert self.features is not None
        lengths, variances = [], []
        for image in sorted(set(self.image)):
            k, features = self.rows(image), self.features[image]
            count: Tensor | int = features[0].numel()
            if self.valid is not None:  # edges into the padding are cut anyway
                features, count = features * self.valid[image], self.valid[image].sum().clamp(min=1)
            length, moments = backend(features).feature_lengths(features, k)
            first, second = (moments / count).unbind(dim=1)
            k = k.double()
            mean = (k * first).mean(dim=1)
            lengths.append(length)
            variances.append(((k.square() * second).mean(dim=1) - mean.square()).clamp(min=0).float())
        return lengths[0] if len(lengths) == 1 else torch.cat(lengths), torch.cat(variances)

    def semantic_scale(self, sigma: Literal["image"] | float, factor: float) -> Float[Tensor, " q"]:
        """(factor · σ_{S^c})² for every pair."""
        if sigma == "image":
            squared = self.edges_of_features[1]
        else:
            squared = torch.full((len(self.pairs),), float(sigma) ** 2, device=self.guides.device)
        return (squared * factor**2).clamp(min=TINY)

    def semantic_lengths(self) -> Float[Tensor, "q m"]:
        """Squared distances of S^c along the grid edges for every pair, infinite where padding begins."""
        of_image = None if self.valid is None else torch.stack([self.valid[i] for i, _ in self.pairs])
        return cut_padding(self.edges_of_features[0], of_image, *self.size)

    @cached_property
    def lengths(self) -> Float[Tensor, "b m"]:
        """Squared distances of the guides along the grid edges, infinite where padding begins."""
        return cut_padding(grid_lengths(self.guides), self.valid, *self.size)

    def trees(self, tie_rule: TieRule = "exact") -> Trees:
        """One minimum spanning tree per image."""
        return spanning_trees(self.lengths, *self.size, tie_rule=tie_rule)

    def cut(self, trees: Trees) -> Trees:
        """The same trees with the guides' lengths, and none of their edges into the padding."""
        return trees if self.valid is None else replace(trees, length=on_edges(trees, self.lengths))

    def along_trees(
        self,
        masks: Float[Tensor, "n h w"],
        trees: Trees,
        bandwidth: float,
        *,
        balance: float = 0.7,
        form: GlobalForm = "sum",
        sigma: Literal["image"] | float = "image",
        factor: float = 1.0,
        tie_rule: TieRule = "exact",
    ) -> Float[Tensor, "n h w"]:
        """Eq. 14 with N = all pixels, along the images' trees and, for SEPA, along the kernel of S^c."""
        s = self.lengths / bandwidth**2
        parts = [(trees.pixel, trees.parent, on_edges(trees, s), list(self.image), 1.0)]
        if self.features is not None:
            images = [image for image, _ in self.pairs]
            semantic = self.semantic_lengths() / self.semantic_scale(sigma, factor)[:, None]
            if form == "sum":  # Eq. 13 on two trees: numerators and denominators add up
                own = spanning_trees(semantic, *self.size, tie_rule=tie_rule)
                parts.append((own.pixel, own.parent, own.length, self.pair, balance))
            elif form == "embedding":  # S^c measures the edges of the image's tree
                its = trees.rows(images)
                parts = [(its.pixel, its.parent, on_edges(its, semantic), self.pair, 1.0)]
            elif form == "product":  # one tree for both: the kernels multiply
                of_pair = torch.stack([s[i] for i in images])  # a list as an index would wait for the device
                joined = of_pair + balance * semantic if balance > 0 else of_pair  # 0 · ∞, at padding, is no number
                own = spanning_trees(joined, *self.size, tie_rule=tie_rule)
                parts = [(own.pixel, own.parent, own.length, self.pair, 1.0)]
            else:
                raise ValueError(f"propagate_global knows 'sum', 'embedding' and 'product', not {form!r}.")
        return backend(masks).propagate(masks.flatten(1), parts).view_as(masks)

    def along_masks(
        self, masks: Float[Tensor, "n h w"], guides: Float[Tensor, "n d h w"], trees: Trees, bandwidth: float
    ) -> Float[Tensor, "n h w"]:
        """Eq. 14 on the images' trees with edge lengths from a guide per mask."""
        flat, along = masks.flatten(1), guides.flatten(2)
        where = (trees.pixel, trees.parent, trees.length, list(self.image))
        return backend(masks).propagate_along(flat, along, *where, 1 / bandwidth**2).view_as(masks)

    def along_window(
        self,
        masks: Float[Tensor, "n h w"],
        boxes: Tensor | None,
        *,
        window: int,
        bandwidth: float,
        steps: int,
        balance: float,
        sigma: Literal["image", "window"] | float,
        factor: float,
        form: LocalForm = "sum",
    ) -> Float[Tensor, "n h w"]:
        """Eq. 14 over a window, several times."""
        if form not in ("sum", "product") or (form == "product" and sigma == "window"):
            raise ValueError(
                f"propagate_local knows the forms 'sum' and, with one spread an image, 'product': it is {form!r} "
                f"with sigma {sigma!r}."
            )
        offsets = half_window(window)
        d = self.guides.shape[1]
        flat = self.guides.new_full((d,), bandwidth**-2)
        colours: dict[int, Layer] = {i: (self.guides[i], flat, 1.0, None) for i in sorted(set(self.image))}
        images = list(colours) if self.features is None else [i for i, _ in self.pairs]
        layers = [[colours[i]] for i in images]
        padding = {i: None if self.valid is None else self.valid[i] for i in colours}
        if self.features is not None:
            maps = {i: self.features[i] for i in colours}
            rows = torch.cat([self.rows(i) for i in colours])
            precision: list[Tensor | None] = [None] * len(rows)
            if sigma == "window":
                every = window_offsets(window)
                spreads = torch.cat(
                    [
                        window_spread(maps[i][None], every, channel_weights=self.rows(i), valid=padding[i])[0]
                        for i in colours
                    ]
                )
                precision = list(1 / (spreads * factor).square().clamp(min=TINY))
                squares = rows.square()
            else:
                squares = rows.square() / self.semantic_scale(sigma, factor)[:, None]
            if form == "product":  # exp(−a) · exp(−b): one layer whose distances add up
                joined = {i: torch.cat([self.guides[i], maps[i]]) for i in colours}
                layers = [
                    [(joined[i], torch.cat([flat, balance * squares[q]]), 1.0, None)] for q, i in enumerate(images)
                ]
            else:
                for q, i in enumerate(images):
                    layers[q].append((maps[i], squares[q], balance, precision[q]))
        groups = list(zip(self.members, layers, strict=True))
        valid = [padding[i] for i in images]
        return backend(masks).propagate_window(masks, boxes, valid, offsets, groups, steps)


def on_edges(trees: Trees, values: Float[Tensor, "g m"]) -> Float[Tensor, "g p"]:
    """Values of grid edges at the upward edges of the trees; infinite where the tree's own edge is."""
    return backend(values).at_edges(values, trees.edge, trees.length)


def half_window(window: int) -> list[Offset]:
    """One of each two opposite neighbors."""
    return [offset for offset in window_offsets(window) if offset > (0, 0)]
