"""The tree filter against products along paths, a sparse solve, and properties of a mean."""

import numpy as np
import pytest
import torch
from scipy.sparse import coo_array
from scipy.sparse.linalg import spsolve
from torch.testing import assert_close

from misa.ops.backends.choice import use
from misa.ops.tree import cut_padding, grid_lengths, spanning_trees
from misa.ops.treefilter import edge_weights, tree_filter


@pytest.fixture(params=["cpu", "torch"], autouse=True)
def path(request):
    """Compiled loops and torch operations, on the CPU."""
    with use(request.param):
        yield


SIZES = [(1, 1), (1, 6), (6, 1), (2, 2), (5, 6), (9, 7)]


def trees_of(rng, g, h, w, valid=None):
    return spanning_trees(cut_padding(grid_lengths(torch.rand(g, 3, h, w, generator=rng)), valid, h, w), h, w)


def slow_kernel(trees, weights, i):
    """Returns K of tree i in tree order: for every pair the product of the weights up to their common ancestor."""
    parent, weight = trees.parent[i].tolist(), weights[i].tolist()

    def way_up(v):
        way, product = {v: 1.0}, 1.0
        while v != 0:
            product *= weight[v]
            v = parent[v]
            way[v] = product
        return way

    ways = [way_up(v) for v in range(len(parent))]
    meet = [[max(set(a) & set(b)) for b in ways] for a in ways]  # ancestors have smaller numbers
    return torch.tensor(
        [[a[meet[u][v]] * b[meet[u][v]] for v, b in enumerate(ways)] for u, a in enumerate(ways)], dtype=torch.float64
    )


def slow_filter(values, trees, weights, index):
    out = []
    for x, i in zip(values, index, strict=True):
        kernel, pixel = slow_kernel(trees, weights, i), trees.pixel[i].long()
        flat = torch.empty(x.numel(), dtype=torch.float64)
        flat[pixel] = kernel @ x.flatten().double()[pixel] / kernel.sum(dim=1)
        out.append(flat.view_as(x))
    return torch.stack(out)


@pytest.mark.parametrize(("h", "w"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_products_along_paths(rng, device, h, w, dtype):
    trees = trees_of(rng, 2, h, w)
    weights = torch.rand(2, h * w, generator=rng, dtype=dtype)  # the root's is not read
    values = torch.rand(5, h, w, generator=rng, dtype=dtype)
    index = [1, 0, 0, 1, 0]
    moved = type(trees)(h, w, *(x.to(device) for x in trees.tensors()))
    got = tree_filter(values.to(device), moved, weights.to(device), index)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(got.cpu().double(), slow_filter(values, trees, weights, index), atol=tolerance, rtol=tolerance)


def test_the_kernel_inverts_a_matrix_that_has_tree_edges_only(rng):
    """K is the covariance of a Gauss-Markov field on the tree, whose precision is known in closed form."""
    h, w = 8, 9
    p, trees = h * w, trees_of(rng, 1, 8, 9)
    weights = 0.1 + 0.8 * torch.rand(1, p, generator=rng, dtype=torch.float64)
    parent, weight = trees.parent[0, 1:].numpy().astype(int), weights[0, 1:].numpy()
    child = np.arange(1, p)
    diagonal = np.ones(p)
    np.add.at(diagonal, child, weight**2 / (1 - weight**2))
    np.add.at(diagonal, parent, weight**2 / (1 - weight**2))
    off = -weight / (1 - weight**2)
    rows, columns = np.r_[np.arange(p), child, parent], np.r_[np.arange(p), parent, child]
    precision = coo_array((np.r_[diagonal, off, off], (rows, columns)), shape=(p, p)).tocsc()
    pixel = trees.pixel[0].long()
    values = torch.rand(1, h, w, generator=rng, dtype=torch.float64)
    both = np.stack([values.flatten()[pixel].numpy(), np.ones(p)], axis=1)
    sums = spsolve(precision, both)
    expected = torch.empty(p, dtype=torch.float64)
    expected[pixel] = torch.from_numpy(sums[:, 0] / sums[:, 1])
    assert_close(tree_filter(values, trees, weights, [0])[0].flatten(), expected)


def test_gradcheck_in_values_and_weights(rng):
    trees = trees_of(rng, 2, 4, 5)
    values = torch.rand(3, 4, 5, generator=rng, dtype=torch.float64).requires_grad_()
    weights = (0.05 + 0.9 * torch.rand(2, 20, generator=rng, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, k: tree_filter(x, trees, k, [1, 0, 1]), (values, weights))
    guides = torch.rand(2, 3, 4, 5, generator=rng, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, f: tree_filter(x, trees, edge_weights(trees, f, 0.7), [1, 0, 1]), (values, guides)
    )


def test_weights_alone_or_values_alone(rng):
    trees = trees_of(rng, 1, 4, 4)
    weights, values = torch.rand(1, 16, generator=rng), torch.rand(2, 4, 4, generator=rng)
    for x, k in ((values.clone().requires_grad_(), weights), (values, weights.clone().requires_grad_())):
        tree_filter(x, trees, k, [0, 0]).square().sum().backward()
        assert (x if x.requires_grad else k).grad.abs().sum() > 0


def test_weight_one_is_the_mean_and_weight_zero_the_identity(rng):
    trees = trees_of(rng, 1, 6, 7)
    values = torch.rand(2, 6, 7, generator=rng)
    mean = values.mean(dim=(1, 2), keepdim=True).expand_as(values)
    assert_close(tree_filter(values, trees, torch.ones(1, 42), [0, 0]), mean)
    assert torch.equal(tree_filter(values, trees, torch.zeros(1, 42), [0, 0]), values)


def test_constants_stay_and_the_filter_is_linear(rng):
    trees, weights = trees_of(rng, 1, 6, 7), torch.rand(1, 42, generator=rng, dtype=torch.float64)
    a, b = torch.rand(2, 1, 6, 7, generator=rng, dtype=torch.float64)
    assert_close(tree_filter(torch.full_like(a, 0.3), trees, weights, [0]), torch.full_like(a, 0.3))
    both = tree_filter(2 * a - 3 * b, trees, weights, [0])
    assert_close(both, 2 * tree_filter(a, trees, weights, [0]) - 3 * tree_filter(b, trees, weights, [0]))


def test_a_mirrored_image_gives_the_mirrored_result(rng):
    guide, values = torch.rand(1, 3, 9, 8, generator=rng), torch.rand(1, 9, 8, generator=rng)

    def filtered(image, masks):
        trees = spanning_trees(grid_lengths(image), 9, 8)
        return tree_filter(masks, trees, edge_weights(trees, image, 0.5), [0])

    assert_close(filtered(guide.flip(-1), values.flip(-1)).flip(-1), filtered(guide, values))


def test_padding_is_as_if_cropped(rng):
    guide, values = torch.rand(1, 3, 6, 8, generator=rng), torch.rand(1, 6, 8, generator=rng)
    valid = torch.zeros(1, 6, 8, dtype=torch.bool)
    valid[:, :5, :6] = True
    trees = spanning_trees(cut_padding(grid_lengths(guide), valid, 6, 8), 6, 8)
    padded = tree_filter(values, trees, (-trees.length / 0.3).exp(), [0])
    assert torch.equal((-trees.length / 0.3).exp(), edge_weights(trees, guide, 0.3))
    small = guide[..., :5, :6].contiguous()
    cropped = spanning_trees(grid_lengths(small), 5, 6)
    assert_close(padded[:, :5, :6], tree_filter(values[:, :5, :6], cropped, (-cropped.length / 0.3).exp(), [0]))
    assert torch.equal(padded[~valid], values[~valid])


def test_a_deep_tree_of_light_edges(rng):
    """A path through all pixels with weights near 1: single precision must keep the distant ones."""
    trees = spanning_trees(torch.zeros(1, 4095), 1, 4096)
    values, weights = torch.rand(1, 1, 4096, generator=rng), torch.full((1, 4096), 0.999)
    distance = (torch.arange(4096)[:, None] - torch.arange(4096)).abs()
    kernel = torch.tensor(0.999).double() ** distance
    expected = values[0].double() @ kernel / kernel.sum(dim=0)
    assert_close(tree_filter(values, trees, weights, [0])[0].double(), expected, atol=2e-5, rtol=1e-4)


def test_no_maps(rng):
    trees = trees_of(rng, 1, 3, 4)
    values, weights = torch.zeros(0, 3, 4, requires_grad=True), torch.rand(1, 12, requires_grad=True)
    tree_filter(values, trees, weights, []).sum().backward()
    assert weights.grad.abs().sum() == 0


def test_says_what_it_needs(rng):
    trees, x = trees_of(rng, 1, 3, 4), torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match="tree_filter needs values"):
        tree_filter(x, trees, torch.zeros(1, 11), [0])
    with pytest.raises(ValueError, match="index of 0"):
        tree_filter(x, trees, torch.zeros(1, 12), [1])
    with pytest.raises(ValueError, match=r"weights in \[0, 1\]"):
        tree_filter(x, trees, torch.full((1, 12), 1.5), [0])
    with pytest.raises(ValueError, match="positive scale"):
        edge_weights(trees, torch.zeros(1, 3, 3, 4), 0.0)
