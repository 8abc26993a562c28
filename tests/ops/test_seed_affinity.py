"""Affinity from a seed: brute force over all paths, the neighbors' affinity, and the losses' own propagation."""

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree as scipy_tree
from torch.testing import assert_close

from misa.ops.affinity import pairwise_affinity, saliency_affinity, spread
from misa.ops.neighbors import window_offsets
from misa.ops.propagation import SemanticGuide, propagate_global, propagate_local
from misa.ops.seed_affinity import AffinitySettings, SeedField, longest_edges, seed_affinity, seed_mask
from misa.ops.tree import grid_lengths, minimum_spanning_tree


@pytest.mark.parametrize(
    ("name", "wrong", "least"),
    [
        ("local_bandwidth", (0, -0.1, float("nan"), float("inf")), 1e-3),
        ("tree_bandwidth", (0, -0.1, float("inf")), 1e-3),
        ("semantic_scale", (0, -1.5, float("inf")), 1e-3),
        ("balance", (-0.1, float("nan"), float("inf")), 0),
        ("steps", (-1, 1.5, float("inf"), True, "a"), 0),
        ("steps", (np.float64(2),), np.int64(2)),
        ("window", (0, 4, -3, 3.0, True), 1),
    ],
)
def test_settings_out_of_range_are_refused(name, wrong, least):
    """A negative scale is squared, and a negative balance would give an affinity that is none."""
    assert getattr(AffinitySettings(**{name: least}), name) == least
    for value in wrong:
        with pytest.raises(ValueError, match=f"{name} must be"):
            AffinitySettings(**{name: value})


def all_ways(guide):
    """Returns the minimax path costs between all pixels, by Floyd-Warshall with max instead of sum."""
    h, w = guide.shape[-2:]
    ways = torch.full((h * w, h * w), torch.inf, dtype=torch.float64).fill_diagonal_(0)
    for i in range(h):
        for j in range(w):
            for y, x in ((i + 1, j), (i, j + 1)):
                if y < h and x < w:
                    length = (guide[:, i, j].double() - guide[:, y, x].double()).square().sum()
                    ways[i * w + j, y * w + x] = ways[y * w + x, i * w + j] = length
    for k in range(h * w):
        ways = torch.minimum(ways, torch.maximum(ways[:, k, None], ways[None, k]))
    return ways


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1), (5, 7)])
def test_longest_edges_are_those_of_the_best_ways(rng, size):
    guide = torch.randn(3, *size, generator=rng)
    tree, ways = minimum_spanning_tree(guide), all_ways(guide)
    for place in range(size[0] * size[1]):
        seed = divmod(place, size[1])
        found = longest_edges(tree, seed)
        assert_close(found.flatten().double(), ways[place], atol=1e-6, rtol=1e-6)


def test_longest_edges_where_many_are_equal(rng):
    guide = torch.randint(0, 3, (1, 6, 7), generator=rng).float()
    tree, ways = minimum_spanning_tree(guide), all_ways(guide)
    found = torch.stack([longest_edges(tree, divmod(place, 7)).flatten() for place in range(42)])
    assert_close(found.double(), ways)


def test_longest_edge_from_a_corner_is_the_trees_heaviest(rng):
    """Against SciPy: the largest minimax cost over all seeds is the heaviest edge of the tree."""
    guide = torch.randn(2, 6, 6, generator=rng)
    tree = minimum_spanning_tree(guide)
    graph = np.zeros((36, 36))
    ends = tree.edges.numpy()
    graph[ends[:, 0], ends[:, 1]] = tree.lengths.numpy()
    heaviest = scipy_tree(graph).max()
    seen = max(float(longest_edges(tree, divmod(p, 6)).max()) for p in range(36))
    assert seen == pytest.approx(float(heaviest))
    assert seen <= float(grid_lengths(guide).max())


@pytest.mark.parametrize("with_norms", [False, True])
def test_seed_affinity_is_that_of_the_neighbors(rng, with_norms):
    values = torch.randn(5, 7, 6, generator=rng)
    everything = pairwise_affinity(values[None], window=3, sigma=1.7)[0]
    norms = values.square().sum(dim=0) if with_norms else None
    found = seed_affinity(values, (3, 2), sigma=1.7, norms=norms)
    for k, (dy, dx) in enumerate(window_offsets(3)):
        assert_close(found[3 + dy, 2 + dx], everything[k, 3, 2])


@pytest.fixture
def field(rng):
    colors = torch.randn(3, 8, 9, generator=rng)
    semantic = SemanticGuide(4 + torch.randn(6, 8, 9, generator=rng), torch.randn(3, 6, generator=rng))
    return SeedField(colors, semantic, label=2)


def test_kernels_are_those_of_the_package(field):
    """Direct kernels in the window are Eq. 8, 10 and 12 with σ of the image, and Eq. 13 over 1 + balance."""
    settings = AffinitySettings(local_bandwidth=0.9, semantic_scale=1.0, balance=0.4)
    found = field.direct((4, 4), settings)
    features, factors = field.semantic.features, field.semantic.saliency_factors
    expected = {
        "color": pairwise_affinity(field.colors[None], sigma=0.9)[0],
        "feature": pairwise_affinity(features[None])[0],
        "saliency": saliency_affinity(features, factors)[2],
    }
    expected["enhanced"] = (expected["color"] + 0.4 * expected["saliency"]) / 1.4
    for k, (dy, dx) in enumerate(window_offsets(3)):
        for kernel, values in expected.items():
            assert_close(found[kernel][4 + dy, 4 + dx], values[k, 4, 4], atol=1e-5, rtol=1e-4)


def test_tree_kernels_follow_the_best_ways(field):
    settings = AffinitySettings(tree_bandwidth=0.8, semantic_scale=2.0)
    found = field.along_tree((1, 7), settings)
    place = 1 * 9 + 7
    assert_close(
        found["color"].flatten().double(), torch.exp(-all_ways(field.colors)[place] / 0.8**2), atol=1e-5, rtol=1e-4
    )
    weighted = field.semantic.features * field.semantic.saliency_factors[2][:, None, None]
    sigma = 2.0 * float(spread(weighted[None])[0])
    assert_close(
        found["saliency"].flatten().double(), torch.exp(-all_ways(weighted)[place] / sigma**2), atol=1e-5, rtol=1e-4
    )


def test_the_product_is_near_where_both_are(field):
    settings = AffinitySettings(
        local_bandwidth=0.9, tree_bandwidth=0.8, semantic_scale=2.0, balance=0.4, form="product"
    )
    found = field.direct((1, 7), settings)
    assert_close(found["enhanced"], found["color"] * found["saliency"] ** 0.4)
    weighted = field.semantic.features * field.semantic.saliency_factors[2][:, None, None]
    sigma = 2.0 * float(spread(weighted[None])[0])
    joined = torch.cat([field.colors / 0.8, weighted * 0.4**0.5 / sigma])  # |.|² adds A's exponent and 0.4 of A^c's
    ways = all_ways(joined)[1 * 9 + 7]
    enhanced = field.along_tree((1, 7), settings)["enhanced"].flatten().double()
    assert_close(enhanced, torch.exp(-ways), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["sum", "product"])
@pytest.mark.parametrize("reach", ["local", "global"])
def test_sepa_masks_are_the_losses(field, reach, form):
    """The mask of "enhanced" equals `propagate_*` with the semantic guide, that of "color" without it."""
    settings = AffinitySettings(steps=4, semantic_scale=1.5, form=form)
    start = seed_mask(8, 9, (4, 4), radius=2)
    found = field.masks(start, settings, reach=reach)
    own = {"semantic": field.semantic, "labels": torch.tensor([2]), "semantic_scale": 1.5}
    if reach == "local":
        plain = propagate_local(start[None], field.colors, steps=4)[0]
        enhanced = propagate_local(start[None], field.colors, steps=4, local_form=form, **own)[0]
    else:
        plain = propagate_global(start[None], field.colors, bandwidth=0.01)[0]
        enhanced = propagate_global(start[None], field.colors, bandwidth=0.01, global_form=form, **own)[0]
    assert_close(found["color"], plain)
    assert_close(found["enhanced"], enhanced)


def test_without_a_teacher_there_is_color_alone(rng):
    field = SeedField(torch.randn(3, 5, 5, generator=rng))
    assert (
        list(field.direct((0, 0), AffinitySettings()))
        == list(field.along_tree((0, 0), AffinitySettings()))
        == ["color"]
    )
    assert list(field.masks(seed_mask(5, 5, (2, 2)), AffinitySettings())) == ["color"]


def test_a_constant_image_is_one_region():
    field = SeedField(torch.zeros(3, 4, 4), SemanticGuide(torch.ones(2, 4, 4), torch.ones(1, 2)))
    for maps in (field.direct((0, 0), AffinitySettings()), field.along_tree((0, 0), AffinitySettings())):
        assert all(bool((values == 1).all()) for values in maps.values())


@pytest.mark.parametrize("seed", [(-1, 0), (0, 5), (4, 0)])
def test_a_seed_outside_the_map_is_named(seed):
    with pytest.raises(ValueError, match=r"the seed \(row, column\) must lie in a map of 4 x 5"):
        seed_affinity(torch.zeros(3, 4, 5), seed, sigma=1.0)
