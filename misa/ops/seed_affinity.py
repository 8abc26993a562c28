"""Affinity from one pixel, the seed, to all others (§3.3, Eq. 8 and 10–14): direct, along the tree, and as a mask.

Axes: d channel · h row · w column. A seed is (row, column). Four kernels: "color" A (Eq. 8), "feature" A^f (Eq. 10),
"saliency" A^c (Eq. 12) and "enhanced" Â^c. In the form "sum" it is A + balance · A^c (Eq. 13), divided by 1 + balance
here so that all four are in [0, 1]; in the form "product" A · (A^c)^balance, high only where both are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from misa.ops.affinity import TINY, reweight, spread
from misa.ops.backends.torch_ops import merge_tree
from misa.ops.propagation import SemanticGuide, propagate_global, propagate_local
from misa.ops.tree import Tree, minimum_spanning_tree

Seed = tuple[int, int]
Kernel = Literal["color", "feature", "saliency", "enhanced"]
Form = Literal["sum", "product"]
KERNELS: tuple[Kernel, ...] = ("color", "feature", "saliency", "enhanced")


@dataclass(frozen=True)
class AffinitySettings:
    """Parameters that §3.3 leaves open. The bandwidths of color are APro's ζ_s and ζ_gl for SOLOv2.

    local_bandwidth: of A, in units of the normalized colors.
    tree_bandwidth: of A along the tree.
    semantic_scale: bandwidth of A^f and A^c, as a factor on σ of S or S^c.
    balance: weight of A^c against A.
    window: side of the propagation's window, odd.
    steps: iterations of the propagation in windows.
    form: "sum" is Eq. 13; "product" is A · (A^c)^balance.

    Raises ValueError: a bandwidth or scale that is not positive and finite, a balance that is negative or infinite,
    steps or a window that are no integers, negative steps, a window that is not odd and positive, or another form.
    """

    local_bandwidth: float = 0.15
    tree_bandwidth: float = 0.01
    semantic_scale: float = 1.0
    balance: float = 0.7
    window: int = 5
    steps: int = 20
    form: Form = "sum"

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"SEPA has the forms {' and '.join(get_args(Form))}, not {self.form!r}.")
        for name in ("local_bandwidth", "tree_bandwidth", "semantic_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {getattr(self, name)}.")
        for name in ("steps", "window"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"{name} must be a whole number, not {value!r}.")
        for name in ("balance", "steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more and finite, not {getattr(self, name)}.")
        if self.window < 1 or self.window % 2 != 1:
            raise ValueError(f"window must be odd and positive, so that it has a center, not {self.window}.")


def seed_affinity(
    values: Float[Tensor, "d h w"], seed: Seed, *, sigma: float, norms: Float[Tensor, "h w"] | None = None
) -> Float[Tensor, "h w"]:
    """Return exp(−(|V(seed) − V(j)| / σ)²) for every pixel j: a row of Eq. 8, 10 or 12 with all pixels as neighbors.

    With precomputed `norms` |V(j)|², distances take one product with the seed's vector; center the values then, or
    small distances cancel in float32.

    >>> seed_affinity(torch.tensor([[[0.0, 1.0]]]), (0, 0), sigma=1.0)
    tensor([[1.0000, 0.3679]])
    """
    row, column = _inside(seed, values.shape[-2], values.shape[-1])
    vector = values[:, row, column]
    if norms is None:
        distances = (values - vector[:, None, None]).square().sum(dim=0)
    else:
        product = torch.mv(values.flatten(1).T, vector).view_as(norms)
        distances = (norms + norms[row, column] - 2 * product).clamp(min=0)
    return torch.exp(-distances / max(sigma**2, TINY))


@dataclass(frozen=True)
class TreePaths:
    """The paths of a tree, laid out so that the longest edge to a seed is a running maximum.

    The pixels are ordered as leaves of the merge tree: pixels joined by shorter edges are adjacent. `place` is a
    pixel's position, and gap[i] the edge (a squared distance) that joins positions up to i − 1 to those from i on.
    """

    place: Int[Tensor, "h w"]
    gap: Float[Tensor, " p"]

    @classmethod
    def of(cls, tree: Tree) -> "TreePaths":
        """Build the layout of a tree, in a few gathers over all pixels."""
        leaf = merge_tree(tree.parent.long(), tree.length).leaf[0]
        place = torch.empty_like(leaf).scatter(0, tree.pixel[0].long(), leaf)
        gap = torch.empty_like(tree.length[0]).scatter(0, leaf, tree.length[0])  # gap[0], the root's, is not read
        return cls(place.view(tree.h, tree.w), gap)

    def longest(self, seed: Seed) -> Float[Tensor, "h w"]:
        """Return the longest edge on the path from the seed to every pixel, 0 at the seed itself."""
        here = int(self.place[_inside(seed, *self.place.shape)])
        before = self.gap[1 : here + 1].flip(0).cummax(0).values.flip(0)
        after = self.gap[here + 1 :].cummax(0).values
        return torch.cat([before, self.gap.new_zeros(1), after])[self.place]


def longest_edges(tree: Tree, seed: Seed) -> Float[Tensor, "h w"]:
    """Return the longest edge (a squared distance) on the tree's path from the seed to every pixel, 0 at the seed."""
    return TreePaths.of(tree).longest(seed)


@dataclass(frozen=True)
class SeedField:
    """One image and one category; trees and spreads, which do not depend on the seed, are computed once.

    colors: V, the normalized image at the size of the masks; semantic: S and K at that size, or None without a
    teacher, which leaves only the color kernel; label: the category c of A^c; saliency: values and factors of S^c,
    if other than S and K (`misa.ops.readings`).
    """

    colors: Float[Tensor, "3 h w"]
    semantic: SemanticGuide | None = None
    label: int = 0
    saliency: SemanticGuide | None = None

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The available kernels: only "color" without a teacher."""
        return KERNELS if self.semantic is not None else KERNELS[:1]

    def direct(self, seed: Seed, settings: AffinitySettings) -> dict[Kernel, Float[Tensor, "h w"]]:
        """Return every kernel between the seed and every pixel, from their two vectors alone."""
        found: dict[Kernel, Tensor] = {"color": seed_affinity(self.colors, seed, sigma=settings.local_bandwidth)}
        for kernel, (values, sigma) in self._semantic_maps.items():
            found[kernel] = seed_affinity(
                values, seed, sigma=sigma * settings.semantic_scale, norms=self._squared_norms[kernel]
            )
        return self._with_sum(found, settings) if settings.form == "sum" else self._with_product(found, settings)

    def along_tree(self, seed: Seed, settings: AffinitySettings) -> dict[Kernel, Float[Tensor, "h w"]]:
        """Return every kernel along its own minimum spanning tree, set by the path's longest edge (global 𝒩)."""
        sigmas = {"color": settings.tree_bandwidth}
        sigmas |= {kernel: sigma * settings.semantic_scale for kernel, (_, sigma) in self._semantic_maps.items()}
        found = {
            kernel: torch.exp(-ways.longest(seed) / max(sigmas[kernel] ** 2, TINY))
            for kernel, ways in self._paths.items()
        }
        if self.semantic is None or settings.form == "sum":
            return self._with_sum(found, settings)
        # Squared distances add up when vectors are concatenated.
        joined = torch.cat(
            [
                self.colors / settings.tree_bandwidth,
                self._semantic_maps["saliency"][0] * (settings.balance**0.5 / max(sigmas["saliency"], TINY**0.5)),
            ]
        )
        return {**found, "enhanced": torch.exp(-longest_edges(minimum_spanning_tree(joined), seed))}

    def masks(
        self,
        start: Float[Tensor, "h w"],
        settings: AffinitySettings,
        *,
        box: Bool[Tensor, "h w"] | None = None,
        reach: Literal["local", "global"] = "local",
    ) -> dict[Kernel, Float[Tensor, "h w"]]:
        """Propagate `start` with each kernel to M̂ (Eq. 7 and 14): `steps` window passes inside `box`, or the tree."""
        found: dict[Kernel, Tensor] = {}
        for kernel in self.kernels:
            propagate = self._local(kernel, settings, box) if reach == "local" else self._global(kernel, settings)
            found[kernel] = propagate(start[None])[0]
        return found

    def _local(self, kernel: Kernel, settings: AffinitySettings, box: Tensor | None) -> Callable[[Tensor], Tensor]:
        guide, bandwidth, semantic = self._guide(kernel, settings, settings.local_bandwidth)
        return lambda masks: propagate_local(
            masks,
            guide,
            box_masks=None if box is None else box[None],
            window=settings.window,
            bandwidth=bandwidth,
            steps=settings.steps,
            semantic=semantic,
            labels=torch.tensor([self.label]),
            balance=settings.balance,
            semantic_scale=settings.semantic_scale,
            local_form=settings.form if semantic is not None else "sum",
        )

    def _global(self, kernel: Kernel, settings: AffinitySettings) -> Callable[[Tensor], Tensor]:
        guide, bandwidth, semantic = self._guide(kernel, settings, settings.tree_bandwidth)
        return lambda masks: propagate_global(
            masks,
            guide,
            bandwidth=bandwidth,
            tree=self._trees["color" if kernel == "enhanced" else kernel],
            semantic=semantic,
            labels=torch.tensor([self.label]),
            balance=settings.balance,
            semantic_scale=settings.semantic_scale,
            global_form=settings.form if semantic is not None else "sum",
        )

    def _guide(
        self, kernel: Kernel, settings: AffinitySettings, bandwidth: float
    ) -> tuple[Tensor, float, SemanticGuide | None]:
        """Return guide, bandwidth and semantic guide with which `propagate_*` uses one kernel."""
        if kernel == "color":
            return self.colors, bandwidth, None
        if kernel == "enhanced":
            return self.colors, bandwidth, self.saliency or self.semantic
        values, sigma = self._semantic_maps[kernel]
        return values, max(sigma * settings.semantic_scale, TINY**0.5), None

    @cached_property
    def _semantic_maps(self) -> dict[Kernel, tuple[Tensor, float]]:
        """S and S^c minus their means, which cancel in distances, each with its spread σ."""
        if self.semantic is None:
            return {}
        whole = self.semantic.features.float()
        features = whole - whole.mean(dim=(1, 2), keepdim=True)  # σ below is that of the uncentered S
        read = self.saliency or self.semantic
        values, row = read.features.float(), read.saliency_factors[self.label : self.label + 1].float()
        salient = reweight(values - values.mean(dim=(1, 2), keepdim=True), row)[0]
        return {
            "feature": (features, float(spread(whole[None])[0])),
            "saliency": (salient, float(spread(values[None], channel_weights=row)[0, 0])),
        }

    @cached_property
    def _squared_norms(self) -> dict[Kernel, Tensor]:
        return {kernel: values.square().sum(dim=0) for kernel, (values, _) in self._semantic_maps.items()}

    @cached_property
    def _trees(self) -> dict[Kernel, Tree]:
        guides: dict[Kernel, Tensor] = {"color": self.colors}
        guides |= {kernel: values for kernel, (values, _) in self._semantic_maps.items()}
        return {kernel: minimum_spanning_tree(guide) for kernel, guide in guides.items()}

    @cached_property
    def _paths(self) -> dict[Kernel, TreePaths]:
        return {kernel: TreePaths.of(tree) for kernel, tree in self._trees.items()}

    def _with_product(self, found: dict[Kernel, Tensor], settings: AffinitySettings) -> dict[Kernel, Tensor]:
        if self.semantic is None:
            return found
        return {**found, "enhanced": found["color"] * found["saliency"] ** settings.balance}

    def _with_sum(self, found: dict[Kernel, Tensor], settings: AffinitySettings) -> dict[Kernel, Tensor]:
        if self.semantic is None:
            return found
        enhanced = (found["color"] + settings.balance * found["saliency"]) / (1 + settings.balance)
        return {**found, "enhanced": enhanced}


def seed_mask(h: int, w: int, seed: Seed, *, radius: float = 1.0) -> Float[Tensor, "{h} {w}"]:
    """Return a disc around the seed, as a mask to propagate."""
    row, column = _inside(seed, h, w)
    far = (torch.arange(h)[:, None] - row) ** 2 + (torch.arange(w) - column) ** 2
    return (far <= radius**2).float()


def _inside(seed: Sequence[int], h: int, w: int) -> Seed:
    row, column = seed
    if not (0 <= row < h and 0 <= column < w):
        raise ValueError(f"the seed (row, column) must lie in a map of {h} x {w}: it is ({row}, {column}).")
    return row, column
