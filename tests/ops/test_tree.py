"""The spanning tree against SciPy, recorded trees and its definition, on every code path."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.csgraph import minimum_spanning_tree as scipy_tree
from torch.testing import assert_close

from misa.ops.backends.choice import use
from misa.ops.tree import grid_lengths, minimum_spanning_tree, spanning_trees

SIZES = [(1, 1), (1, 2), (2, 1), (1, 7), (6, 1), (2, 2), (5, 8), (17, 23), (40, 31)]


@pytest.fixture(params=["cpu", "torch"])
def path(request):
    with use(request.param):
        yield


def all_edges(h: int, w: int) -> np.ndarray:
    """Returns all edges: vertical ones first, row by row, then horizontal ones."""
    vertical = [(y * w + x, (y + 1) * w + x) for y in range(h - 1) for x in range(w)]
    horizontal = [(y * w + x, y * w + x + 1) for y in range(h) for x in range(w - 1)]
    return np.array(vertical + horizontal, dtype=np.int64).reshape(-1, 2)


def scipy_weight(guide: torch.Tensor) -> float:
    """Returns the total length of SciPy's tree; lengths are offset by one because SciPy treats 0 as no edge."""
    _, h, w = guide.shape
    edges, flat = all_edges(h, w), guide.flatten(1).double().numpy()
    lengths = ((flat[:, edges[:, 0]] - flat[:, edges[:, 1]]) ** 2).sum(axis=0)
    tree = scipy_tree(csr_array((lengths + 1, (edges[:, 0], edges[:, 1])), shape=(h * w, h * w)))
    return float(tree.sum() - (h * w - 1))


def total_order_tree(keys: np.ndarray, h: int, w: int) -> set[tuple[int, int]]:
    """Returns SciPy's tree on the ranks of (key, edge number), which has no ties."""
    edges = all_edges(h, w)
    ranks = np.empty(len(keys))
    ranks[np.argsort(keys, kind="stable")] = np.arange(1, len(keys) + 1)
    tree = scipy_tree(csr_array((ranks, (edges[:, 0], edges[:, 1])), shape=(h * w, h * w))).tocoo()
    return {(min(a, b), max(a, b)) for a, b in zip(tree.row.tolist(), tree.col.tolist(), strict=True)}


def as_set(edges) -> set[tuple[int, int]]:
    return {(min(a, b), max(a, b)) for a, b in edges.tolist()}


@pytest.mark.parametrize(("h", "w"), SIZES)
@pytest.mark.parametrize("step", [None, 0.25, 1.0])
def test_weight_edges_and_order_are_scipys(rng, device, path, h, w, step):
    guide = torch.rand(3, h, w, generator=rng)
    if step is not None:  # many ties; with 1.0 a constant image
        guide = (guide / step).floor() * step
    tree = minimum_spanning_tree(guide.to(device))
    edges, lengths = tree.edges.cpu(), tree.lengths.cpu()
    assert edges.shape == (h * w - 1, 2)
    assert edges.dtype == torch.int64
    assert lengths.shape == (h * w - 1,)
    assert lengths.double().sum().item() == pytest.approx(scipy_weight(guide), rel=1e-5, abs=1e-6)
    flat = guide.flatten(1)
    assert_close(lengths, (flat[:, edges[:, 0]] - flat[:, edges[:, 1]]).square().sum(dim=0))
    for rule, add in (("exact", 0.0), ("official", 1.0)):
        keys = grid_lengths(guide) + torch.tensor(add)
        mine = minimum_spanning_tree(guide.to(device), tie_rule=rule).edges
        assert as_set(mine) == total_order_tree(keys.numpy(), h, w)


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_numbering_is_depth_first(rng, device, path, h, w):
    tree = minimum_spanning_tree(torch.rand(2, h, w, generator=rng).to(device))
    pixel, parent = tree.pixel[0].cpu(), tree.parent[0].cpu()
    assert sorted(pixel.tolist()) == list(range(h * w))
    assert parent[0] == 0
    assert (parent[1:] < torch.arange(1, h * w)).all()
    assert as_set(torch.stack([pixel[1:], pixel[parent[1:].long()]], dim=1)) == as_set(tree.edges)
    # Depth first: the parent of a vertex is the vertex before it or one of that vertex's ancestors.
    for v in range(1, h * w):
        at = v - 1
        while at != parent[v]:
            assert at != 0
            at = int(parent[at])


@pytest.mark.shared
@pytest.mark.parametrize("case", ["synA", "synB_pad", "synC_frac", "realA", "realB"])
def test_official_order_gives_the_official_tree(shared, device, path, case):
    with np.load(shared / "data" / "golden" / "apro_propagation.npz") as file:
        image, edges = torch.tensor(file[f"{case}/img"]), torch.tensor(file[f"{case}/mst_edges"])
    assert as_set(minimum_spanning_tree(image.to(device), tie_rule="official").edges) == as_set(edges)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["000000000061", "000000000308"])
def test_weight_on_real_images(shared, device, path, name):
    picture = Image.open(shared / "data" / "coco_mini" / "train2017" / f"{name}.jpg").convert("RGB").resize((151, 99))
    guide = torch.tensor(np.asarray(picture)).permute(2, 0, 1).float() / 57
    tree = minimum_spanning_tree(guide.to(device))
    assert tree.lengths.double().sum().item() == pytest.approx(scipy_weight(guide), rel=1e-5)
    keys = grid_lengths(guide).numpy()
    assert as_set(tree.edges) == total_order_tree(keys, 99, 151)


def test_spans_every_pixel_even_across_padding(rng, device, path):
    valid = torch.zeros(6, 7, dtype=torch.bool)
    valid[:4, 2:6] = True
    tree = minimum_spanning_tree(torch.rand(3, 6, 7, generator=rng).to(device), valid=valid.to(device))
    edges = tree.edges.cpu().numpy()
    graph = csr_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(42, 42))
    assert connected_components(graph, directed=False)[0] == 1
    finite = torch.isfinite(tree.lengths.cpu()).numpy()
    inner = valid.flatten().numpy()[edges].all(axis=1)
    assert (finite == inner).all()
    assert finite.sum() == valid.sum() - 1


def test_many_grids_at_once_are_one_by_one(rng, device, path):
    guides = torch.rand(4, 2, 9, 11, generator=rng).to(device)
    together = spanning_trees(grid_lengths(guides), 9, 11)
    for i in range(4):
        assert as_set(together[i].edges) == as_set(minimum_spanning_tree(guides[i]).edges)


def test_longest_chain(device, path):
    """A snake through the grid is the deepest possible tree."""
    h, w = 12, 12
    guide = torch.full((1, h, w), 0.0)
    snake = [(y, x if y % 2 == 0 else w - 1 - x) for y in range(h) for x in range(w)]
    for i, (y, x) in enumerate(snake):
        guide[0, y, x] = 0.01 * i
    tree = minimum_spanning_tree(guide.to(device))
    expected = {tuple(sorted((a[0] * w + a[1], b[0] * w + b[1]))) for a, b in pairwise(snake)}
    assert as_set(tree.edges) == expected


def test_half_precision_is_promoted(rng, device, path):
    guide = torch.rand(3, 5, 6, generator=rng).half().to(device)
    assert as_set(minimum_spanning_tree(guide).edges) == as_set(minimum_spanning_tree(guide.float()).edges)


def test_wrong_input_is_named(rng):
    guide = torch.rand(3, 5, 6, generator=rng)
    with pytest.raises(ValueError, match="d, h, w"):
        minimum_spanning_tree(guide[0])
    with pytest.raises(ValueError, match="d, h, w"):
        minimum_spanning_tree(guide[:, :0])
    with pytest.raises(ValueError, match="tie rules"):
        minimum_spanning_tree(guide, tie_rule="first")
    for bad in (math.nan, math.inf):
        guide[1, 2, 3] = bad
        with pytest.raises(ValueError, match="NaN or Inf"):
            minimum_spanning_tree(guide)
