"""Triton's kernels against brute force in float64, the compiled loops and torch operations, on small random scenes.

Without a GPU they run in Triton's interpreter on CPU tensors (see conftest.py), with one on the device: `-m gpu`.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from misa.experiment import Affinity
from misa.losses.pairwise import pairwise_loss
from misa.ops.affinity import window_spread
from misa.ops.backends import choice, cpu, torch_ops
from misa.ops.backends.choice import use
from misa.ops.backends.cuda import features, merges, operations, sums, tour, trees, windows, works
from misa.ops.guides import SUM, Guides, Join, half_window
from misa.ops.neighbors import window_offsets
from tests.ops.test_backends import Case

pytestmark = [
    # Triton's interpreter converts arrays to loop bounds.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
]
PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
few = settings(max_examples=6, deadline=None, derandomize=True)
sides, seeds = st.integers(1, 6), st.integers(0, 2**31 - 1)
QUICK = (0, 2, 25)  # of `Case`: a small scene of each form
CLOSE = {"atol": 2e-7, "rtol": 1e-6}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def edges(h: int, w: int) -> list[tuple[int, int]]:
    vertical = [(y * w + x, y * w + x + w) for y in range(h - 1) for x in range(w)]
    return vertical + [(y * w + x, y * w + x + 1) for y in range(h) for x in range(w - 1)]


def random_lengths(g: int, h: int, w: int, seed: int) -> Tensor:
    """Returns edge lengths with ties, zeros and infinities, as at padding."""
    rng = generator(seed)
    lengths = torch.rand(g, len(edges(h, w)), generator=rng)
    if seed % 2:
        lengths = (lengths * 4).round() / 4
    return torch.where(torch.rand(lengths.shape, generator=rng) < 0.1 * (seed % 3), torch.inf, lengths)


def kruskal(lengths: Tensor, h: int, w: int) -> set[int]:
    ends, top = edges(h, w), list(range(h * w))

    def find(v: int) -> int:
        while top[v] != v:
            v = top[v]
        return v

    kept = set()
    for e in sorted(range(len(ends)), key=lambda e: (float(lengths[e]), e)):
        a, b = (find(v) for v in ends[e])
        if a != b:
            top[a] = b
            kept.add(e)
    return kept


def kernel(s: Tensor, parent: Tensor, pixel: Tensor) -> np.ndarray:
    """Returns exp(−longest edge between two pixels) in float64, from the upward edges of one tree."""
    p = len(s)
    longest = np.full((p, p), math.inf)
    for x in range(p):  # in depth-first order the path to x is the path to its parent plus one edge
        up = int(parent[x])
        longest[x, :x] = longest[:x, x] = np.maximum(longest[up, :x], float(s[x])) if x else 0
        if x:
            longest[x, up] = longest[up, x] = float(s[x])
        longest[x, x] = 0
    result = np.empty((p, p))
    result[np.ix_(pixel, pixel)] = np.exp(-longest)
    return result


def test_trees_are_those_of_kruskal_in_the_order_of_the_torch_path():
    @few
    @given(sides, sides, st.integers(1, 3), seeds, st.sampled_from([1, trees.WIDE]))
    @example(1, 1, 2, 0, trees.WIDE)
    @example(1, 6, 2, 1, trees.WIDE)
    @example(5, 1, 2, 2, trees.WIDE)
    def check(h, w, g, seed, wide):
        lengths = random_lengths(g, h, w, seed).to(PLACE)
        if h * w > 1:
            chosen = trees.boruvka(lengths, h, w, wide).cpu()
            for its, mine in zip(chosen, lengths.cpu(), strict=True):
                assert set(its.nonzero()[:, 0].tolist()) == kruskal(mine, h, w)
        found = operations.spanning_trees(lengths, h, w)
        for mine, other in zip(found, torch_ops.spanning_trees(lengths, h, w), strict=True):
            assert torch.equal(mine, other)
        compiled = cpu.spanning_trees(lengths.cpu(), h, w)[2]
        assert torch.equal(found[2].cpu().sort(dim=1).values, compiled.sort(dim=1).values)
        nowhere = torch.zeros(found[2].shape, device=PLACE)
        nowhere[:, -1] = torch.inf
        at = operations.at_edges(lengths, found[2], nowhere)
        assert torch.equal(at, torch_ops.at_edges(lengths, found[2], nowhere))

    check()


def random_trees(g: int, h: int, w: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns pixel, parent, edge and length of g trees."""
    lengths = random_lengths(g, h, w, seed)
    pixel, parent, edge = torch_ops.spanning_trees(lengths, h, w)
    return pixel, parent, edge, torch_ops.at_edges(lengths, edge, torch.zeros(edge.shape))


@pytest.mark.parametrize("parts", [1, 2])
def test_means_along_trees_are_those_of_brute_force(parts):
    @few
    @given(sides, sides, st.integers(1, 3), st.integers(1, 4), seeds)
    @example(1, 1, 1, 2, 0)
    @example(1, 6, 2, 2, 1)
    @example(5, 1, 2, 2, 2)
    def check(h, w, g, n, seed):
        rng = generator(seed)
        values = (torch.rand(n, h * w, generator=rng) - 0.3) * 10.0 ** (seed % 4)
        every, top, bottom = [], np.zeros((n, h * w)), np.zeros((n, h * w))
        for q in range(parts):
            pixel, parent, _, length = random_trees(g, h, w, seed + q)
            s = length * (seed % 5 + 0.1)
            index, share = torch.randint(g, (n,), generator=rng).tolist(), [1.0, 0.7][q]
            every.append((pixel, parent, s, index, share))
            for i, tree in enumerate(index):
                k = share * kernel(s[tree], parent[tree], pixel[tree])
                top[i] += k @ values[i].double().numpy()
                bottom[i] += k.sum(axis=1)
        there = [(*(x.to(PLACE) for x in part[:3]), *part[3:]) for part in every]
        found = operations.propagate(values.to(PLACE), there)
        largest = float(values.abs().max())
        near = {"atol": 2e-7 * largest, "rtol": 1e-6}
        assert_close(found.cpu().double(), torch.from_numpy(top / bottom), **near)
        for path in (cpu, torch_ops):
            assert_close(found.cpu(), path.propagate(values, every), **near)

    check()


def test_means_along_masks_are_those_of_brute_force():
    @few
    @given(sides, sides, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), seeds)
    @example(1, 1, 1, 2, 1, 0)
    @example(1, 6, 2, 2, 2, 1)
    @example(5, 1, 2, 2, 2, 2)
    def check(h, w, g, n, d, seed):
        rng = generator(seed)
        values, guides = torch.rand(n, h * w, generator=rng), torch.rand(n, d, h * w, generator=rng)
        pixel, parent, _, length = random_trees(g, h, w, seed)
        index = torch.randint(g, (n,), generator=rng).tolist()
        arguments = values, guides, pixel, parent, length
        there = [x.to(PLACE) for x in arguments]
        found = operations.propagate_along(*there, index, 3.0)
        for i, tree in enumerate(index):
            along = guides[i].double()[:, pixel[tree].long()]
            s = 3 * (along - along[:, parent[tree].long()]).square().sum(dim=0)
            k = kernel(torch.where(length[tree].isinf(), torch.inf, s), parent[tree], pixel[tree])
            mean = k @ values[i].double().numpy() / k.sum(axis=1)
            assert_close(found[i].cpu().double(), torch.from_numpy(mean), **CLOSE)
        for path in (cpu, torch_ops):
            assert_close(found.cpu(), path.propagate_along(*arguments, index, 3.0), **CLOSE)

    check()


def test_lengths_and_variance_are_those_of_the_equation():
    @few
    @given(sides, sides, st.integers(1, 40), st.integers(1, 9), st.sampled_from([1, 3, 5]), seeds)
    def check(h, w, d, c, window, seed):
        rng = generator(seed)
        features = torch.randn(d, h, w, generator=rng) + 5 * (seed % 2)
        factors, valid = torch.randn(c, d, generator=rng), torch.rand(h, w, generator=rng) < 0.7
        valid = valid if seed % 3 else None
        there = tuple(x if x is None else x.to(PLACE) for x in (features, factors, valid))
        lengths, (variance,), near = operations.lengths_and_variance([there], half_window(window))
        lengths, variance = lengths.cpu(), variance.cpu()
        every = torch.ones(h, w, dtype=torch.bool) if valid is None else valid
        weighted = factors.double()[:, :, None] * (features * every).double().flatten(1)
        ends = torch.tensor(edges(h, w), dtype=torch.long).view(-1, 2)
        expected = (weighted[..., ends[:, 0]] - weighted[..., ends[:, 1]]).square().sum(dim=1)
        assert_close(lengths.double(), expected, atol=1e-5, rtol=1e-5)
        if every.any():
            its = weighted[..., every.flatten()].flatten(1)
            assert_close(variance.double(), its.var(dim=1, correction=0), atol=1e-5, rtol=1e-5)
        for path in (cpu, torch_ops):
            other, (its,), nothing = path.lengths_and_variance([(features, factors, valid)], half_window(window))
            assert nothing is None
            assert_close(lengths, other, atol=1e-5, rtol=1e-5)
            assert_close(variance, its, atol=1e-5, rtol=1e-5)
        assert (near is None) == (window == 1)
        for k, (dy, dx) in enumerate(half_window(window) if window > 1 else []):
            for y, x in [(y, x) for y in range(h) for x in range(w) if y + dy < h and 0 <= x + dx < w]:
                i, j = y * w + x, (y + dy) * w + x + dx
                expected = (weighted[..., i] - weighted[..., j]).square().sum(dim=1)
                assert_close(near[:, k, y, x].cpu().double(), expected, atol=1e-5, rtol=1e-5)

    check()


def brute_window(mask, box, valid, offsets, layers, steps):
    """Eq. 14 pixel by pixel in float64."""
    h, w = mask.shape
    every = [(0, 0), *offsets, *((-dy, -dx) for dy, dx in offsets)]
    weights = np.zeros((h, w, len(every)))
    for y in range(h):
        for x in range(w):
            for k, (dy, dx) in enumerate(every):
                v, u = y + dy, x + dx
                if 0 <= v < h and 0 <= u < w and valid[y, x] and valid[v, u]:
                    for values, squares, share, precision in layers:
                        e = float(squares.double() @ (values[:, y, x].double() - values[:, v, u].double()).square())
                        a = math.exp(-e * (1.0 if precision is None else float(precision[y, x])))
                        weights[y, x, k] += share * (a if a >= 1e-20 else 0.0)
    total = weights.sum(axis=2, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    now = mask.double().numpy() * box.double().numpy()
    for _ in range(steps):
        wide = np.pad(now, 8)
        near = [wide[8 + dy : 8 + dy + h, 8 + dx : 8 + dx + w] for dy, dx in every]
        now = (weights * np.stack(near, axis=2)).sum(axis=2) * box.double().numpy()
    return torch.from_numpy(now)


def test_windows_are_those_of_brute_force():
    @few
    @given(sides, sides, st.integers(1, 3), st.sampled_from([1, 3, 3, 5]), st.booleans(), st.integers(0, 2), seeds)
    def check(h, w, n, window, framed, steps, seed):
        rng = generator(seed)
        colors, features = torch.rand(2, 3, h, w, generator=rng), torch.rand(2, 5, h, w, generator=rng)
        masks, boxes = torch.rand(n, h, w, generator=rng), (torch.rand(n, h, w, generator=rng) < 0.7).float()
        boxes[0] *= 0.6
        padding = torch.rand(2, h, w, generator=rng) < 0.8
        spread = torch.rand(h, w, generator=rng) * 9
        flat = torch.full((3,), 2.0)
        groups, valid, of = [], [], torch.randint(4, (n,), generator=rng)
        for group in range(4):  # two images of two categories
            image = group // 2
            second = (features[image], torch.rand(5, generator=rng) * 4, 0.7, spread if group == 3 else None)
            members = (of == group).nonzero()[:, 0].tolist()
            groups.append((members, [(colors[image], flat, 1.0, None), second]))
            valid.append([None, padding[1]][image])
        offsets = half_window(window)
        box = boxes if framed else None
        found = run_window(masks, box, valid, offsets, groups, steps)
        for group, (members, layers) in enumerate(groups):
            there = torch.ones(h, w) if valid[group] is None else valid[group]
            for i in members:
                its = boxes[i] if framed else torch.ones(h, w)
                expected = brute_window(masks[i], its, there, offsets, layers, steps)
                assert_close(found[i].double(), expected, atol=1e-6, rtol=1e-5)
        for path in (cpu, torch_ops):
            assert_close(found, path.propagate_window(masks, box, valid, offsets, groups, steps), atol=1e-6, rtol=1e-5)

    check()


@pytest.mark.parametrize("known", [True, False], ids=["one reading", "anew"])
@pytest.mark.parametrize(
    ("h", "w", "form", "sigma"),
    [
        (1, 1, "sum", "image"),
        (1, 6, "product", "image"),
        (5, 1, "sum", "window"),
        (4, 5, "sum", "image"),
        (4, 5, "sum", 0.7),
        (4, 5, "sum", "window"),
        (4, 5, "product", 0.7),
    ],
)
def test_windows_of_guides_are_those_of_brute_force(rng, h, w, form, sigma, known):
    """Two images of two categories, one with padding, boxes as masks; S read once for tree and window, or twice."""
    images, s = torch.rand(2, 3, h, w, generator=rng), torch.randn(2, 5, h, w, generator=rng)
    factors, masks = torch.randn(2, 5, generator=rng), torch.rand(4, h, w, generator=rng)
    boxes = (torch.rand(4, h, w, generator=rng) < 0.8).float()
    valid = torch.ones(2, h, w, dtype=torch.bool)
    valid[1, h // 2 + 1 :], valid[1, :, w // 2 + 1 :] = False, False
    where, labels, join = [0, 0, 1, 1], [0, 1, 1, 0], Join(0.6, form, sigma, 0.8)
    options = {"window": 3, "bandwidth": 0.4, "steps": 2, "join": join}
    guides = Guides(images, where, s, factors, labels, ("color", "saliency"), valid, window=3 if known else 1)
    with use("triton"):
        there = moved(guides)
        if known:
            assert there.second_lengths().shape == (4, 2 * h * w - h - w)
        found = there.along_window(masks.to(PLACE), boxes.to(PLACE), **options).cpu()
    flat = torch.full((3,), 0.4**-2)
    for i, image, label in zip(range(4), where, labels, strict=True):
        k = factors[label].double()
        seen = (k[:, None, None] * s[image])[:, valid[image]]
        spread = float(seen.var(correction=0).sqrt()) if sigma == "image" else sigma
        precision = None
        if sigma == "window":
            spread, its = 1 / 0.8, {"channel_weights": factors[[label]], "valid": valid[image]}
            precision = (window_spread(s[image][None], window_offsets(3), **its)[0, 0] * 0.8) ** -2
        squares = k.square() / (0.8 * spread) ** 2
        layers = [(images[image], flat, 1.0, None), (s[image], squares, 0.6, precision)]
        if form == "product":
            layers = [(torch.cat([images[image], s[image]]), torch.cat([flat, 0.6 * squares]), 1.0, None)]
        expected = brute_window(masks[i], boxes[i], valid[image], half_window(3), layers, 2)
        assert_close(found[i].double(), expected, atol=1e-6, rtol=1e-5)


def test_steps_work_inside_boxes_alone(rng, monkeypatch):
    """A tile without pixels of its box is unchanged: NaN affinities there have no effect."""
    monkeypatch.setattr(windows, "block", lambda usual, needed: 4)
    h, w, half = 8, 12, 2
    planes = torch.full((1, 2 + 2 * half, h, w), math.nan)
    planes[..., :4, 4:8] = torch.rand(2 + 2 * half, 4, 4, generator=rng)
    box, masks = torch.zeros(2, h, w), torch.rand(2, h, w, generator=rng)
    box[0, 1:4, 5:7] = 1  # within the tile that has affinities; the second box is empty
    with monkeypatch.context() as patch:
        patch.setattr(windows, "window_planes", lambda *_: planes.to(PLACE))
        layers = [(masks[:1].to(PLACE), torch.ones(1, device=PLACE), 1.0, None)]
        arguments = masks.to(PLACE), box.to(PLACE), [None], [(0, 1), (1, 0)], [([0, 1], layers)], 3
        found = operations.propagate_window(*arguments).cpu()
    assert found.isfinite().all()
    assert found[0, 1:4, 5:7].count_nonzero() > 0
    assert found[box == 0].count_nonzero() == 0


def run_window(masks, boxes, valid, offsets, groups, steps):
    """Run the kernels with every tensor moved once, so that layers with shared values still share them."""
    moved: dict[int, Tensor] = {}

    def move(x: Tensor | None) -> Tensor | None:
        return None if x is None else moved.setdefault(id(x), x.to(PLACE))

    there = [(its, [(move(v), move(q), share, move(s)) for v, q, share, s in layers]) for its, layers in groups]
    return operations.propagate_window(move(masks), move(boxes), [move(x) for x in valid], offsets, there, steps).cpu()


def moved(guides: Guides) -> Guides:
    tensors = {name: getattr(guides, name) for name in ("images", "features", "factors", "valid")}
    there = {name: None if x is None else x.to(PLACE) for name, x in tensors.items()}
    return replace(guides, **there)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed in QUICK else [pytest.mark.slow]) for seed in range(40)]
)
def test_all_readings_of_the_guides_agree(seed):
    """Forms, spreads, padding, boxes, tie rules and windows, as drawn by the seed."""
    case, found = Case(seed), {}
    for name in ("cpu", "torch", "triton"):
        with use(name):
            if name == "triton":
                case.masks = case.masks.to(PLACE)
                case.boxes = None if case.boxes is None else case.boxes.to(PLACE)
                case.guides = moved(case.guides)
            found[name] = {key: value.cpu() for key, value in case.run().items()}
    for other in ("cpu", "torch"):
        for name, expected in found[other].items():
            loose = {"atol": 1e-4, "rtol": 1e-4} if name in ("lengths", "variance") else {"atol": 1e-5, "rtol": 1e-5}
            exact = {"atol": 0, "rtol": 0}
            mine = found["triton"][name]
            assert_close(mine, expected, **(loose if expected.is_floating_point() else exact), msg=f"{name}, {other}")


def test_more_pixels_than_a_program_takes(rng):
    """Grids of several programs for all kernels, above the interpreter's 1024 elements, and a mask of zeros."""
    h, w, n = 27, 38, 2
    image, features = torch.rand(1, 3, h, w, generator=rng), torch.rand(1, 3, h, w, generator=rng)
    masks = torch.rand(n, h, w, generator=rng)
    masks[1] = 0
    found = {}
    for name in ("cpu", "triton"):
        place = PLACE if name == "triton" else torch.device("cpu")
        with use(name):
            moved = [x.to(place) for x in (image, features, torch.eye(3)[:2], masks)]
            guides = Guides(moved[0], [0] * n, moved[1], moved[2], [0, 1], ("color", "saliency"))
            first = guides.along_trees(moved[3], guides.trees(), 0.1)
            second = guides.along_masks(first, first[:, None], guides.trees(), 0.1)
            options = {"window": 3, "bandwidth": 0.2, "steps": 2}
            found[name] = [x.cpu() for x in (first, second, guides.along_window(moved[3], None, **options))]
    for mine, other in zip(found["triton"], found["cpu"], strict=True):
        assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_the_order_of_programs_never_shows(rng, monkeypatch):
    """Equal bits from programs of 16 elements in the interpreter's order and in reverse, or run twice."""
    masks, image = torch.rand(2, 4, 5, generator=rng).to(PLACE), torch.rand(1, 3, 4, 5, generator=rng).to(PLACE)
    image = (image * 4).round() / 4  # with ties
    s, k = torch.randn(1, 4, 4, 5, generator=rng).to(PLACE), torch.randn(2, 4, generator=rng).to(PLACE)

    def results() -> list[Tensor]:
        guides = Guides(image, [0, 0], s, k, [0, 1], ("color", "saliency"), window=3)
        found = guides.trees(ahead=SUM)
        first = guides.along_trees(masks, found, 0.3)
        second = guides.along_masks(first, first[:, None], found, 0.3)
        options = {"window": 3, "bandwidth": 0.2, "steps": 2}
        local = guides.along_window(masks, None, **options)
        return [found.pixel, found.parent, found.edge, first, second, *guides.second_on_edges, local]

    with use("triton"):
        usual = results()
        if PLACE.type == "cpu":
            from triton.runtime.interpreter import interpreter_builder as builder

            for module in (features, merges, sums, tour, trees, windows):
                monkeypatch.setattr(module, "block", lambda usual, needed: 16)
            forward = builder.set_grid_idx

            def backward(*at: int) -> None:
                forward(*(size - 1 - i for size, i in zip(builder.grid_dim, at, strict=True)))

            monkeypatch.setattr(builder, "set_grid_idx", backward)
        for mine, other in zip(results(), usual, strict=True):
            assert torch.equal(mine, other)


def test_the_loss_and_its_gradient(rng):
    """Two images with padding through the whole pairwise loss: value and gradient of the compiled loops."""
    images, features = torch.rand(2, 3, 6, 7, generator=rng), torch.rand(2, 4, 6, 7, generator=rng)
    masks, boxes = torch.rand(3, 6, 7, generator=rng), torch.zeros(3, 6, 7)
    boxes[:, 1:5, 2:6] = 1
    valid = torch.ones(2, 6, 7, dtype=torch.bool)
    valid[1, :, 5:] = False
    factors, where, labels = torch.rand(2, 4, generator=rng), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    found = {}
    for name in ("cpu", "triton"):
        place = PLACE if name == "triton" else torch.device("cpu")
        there = [x.to(place) for x in (boxes, images)]
        prior = (features.to(place), factors.to(place))
        leaf = masks.to(place).requires_grad_()
        with use(name):
            affinity = Affinity(saliency=True, local_steps=3, window=3)
            terms = pairwise_loss(
                leaf, *there, where, affinity=affinity, labels=labels, prior=prior, valid=valid.to(place)
            )
        sum(terms.values()).backward()
        found[name] = [*(x.detach().cpu() for x in terms.values()), leaf.grad.cpu()]
    assert found["cpu"][-1].abs().sum() > 0
    for mine, other in zip(found["triton"], found["cpu"], strict=True):
        assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_no_masks_and_many_in_portions(rng, monkeypatch):
    pixel, parent, _, length = (x.to(PLACE) for x in random_trees(2, 3, 4, 0))
    values = torch.rand(5, 12, generator=rng).to(PLACE)
    index, none = [0, 1, 1, 0, 1], torch.empty(0, 12, device=PLACE)
    assert operations.propagate(none, [(pixel, parent, length, [], 1.0)]).shape == (0, 12)
    assert operations.propagate_along(none, none[:, None], pixel, parent, length, [], 1.0).shape == (0, 12)
    assert operations.propagate_window(none.view(0, 3, 4), None, [], [(0, 1)], [], 3).shape == (0, 3, 4)

    def both() -> list[Tensor]:
        one = operations.propagate(values, [(pixel, parent, length, index, 1.0), (pixel, parent, length, index, 0.5)])
        return [one, operations.propagate_along(values, values[:, None], pixel, parent, length, index, 2.0)]

    whole = both()
    monkeypatch.setattr(sums, "CELLS", 61)  # five rows at once
    for mine, other in zip(both(), whole, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.slow
def test_hundreds_of_masks_are_each_as_alone(rng):
    """More masks than fit a byte (256), along a tree, along themselves and through a window."""
    pixel, parent, _, length = (x.to(PLACE) for x in random_trees(2, 2, 3, 0))
    few = torch.rand(2, 6, generator=rng).to(PLACE)
    many, index = few.repeat(130, 1), [0, 1] * 130

    def each(values: Tensor, index: list[int]) -> list[Tensor]:
        layer = (values[0].view(1, 2, 3), torch.ones(1, device=PLACE), 1.0, None)
        groups = [([i for i, g in enumerate(index) if g == which], [layer]) for which in (0, 1)]
        return [
            operations.propagate(values, [(pixel, parent, length, index, 1.0)]),
            operations.propagate_along(values, values[:, None], pixel, parent, length, index, 2.0),
            operations.propagate_window(values.view(-1, 2, 3), None, [None, None], [(0, 1)], groups, 1),
        ]

    for mine, other in zip(each(many, index), each(few, [0, 1]), strict=True):
        assert torch.equal(mine, other.repeat(130, *[1] * (other.dim() - 1)))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's, of inf − inf
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_number_is_seen_in_the_result(rng, broken):
    """As on the torch path, so that training notices NaN; integer arithmetic alone would hide it."""
    pixel, parent, _, length = (x.to(PLACE) for x in random_trees(1, 4, 5, 2))
    values, guides = (torch.rand(2, 20, generator=rng).to(PLACE) for _ in range(2))
    spoilt = values.clone()
    spoilt[0, 3] = broken
    found = operations.propagate(spoilt, [(pixel, parent, length, [0, 0], 1.0)])
    assert not found[0].isfinite().any()
    assert found[1].isfinite().all()
    if math.isnan(broken):
        guides[0, 7] = broken
        found = operations.propagate_along(values, guides[:, None], pixel, parent, length, [0, 0], 1.0)
        assert found[0].isnan().all()
        assert found[1].isfinite().all()


def test_a_constant_mask_stays_as_it_is():
    pixel, parent, _, length = (x.to(PLACE) for x in random_trees(1, 3, 3, 4))
    values = torch.full((1, 9), 0.3, device=PLACE)
    assert torch.equal(operations.propagate(values, [(pixel, parent, length, [0], 1.0)]), values)


@pytest.mark.parametrize("p", [1, 2, 60800, 2**18 - 1, 2**18, sums.LARGEST])
def test_masses_and_counts_fit_one_number(p):
    bits, shift = sums.split(p)
    assert p * 2**bits < 2**shift, "the mass of all vertices runs into the count"
    assert p * 2**shift + 2**shift < 2**63, "the count of all vertices runs into the sign"
    assert bits >= 20


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(works, "_said", set())


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("LARGEST", "tree of a map of more than 11 pixels fall back to torch operations"),
        ("MOST", "fewer images at once"),
    ],
)
def test_maps_beyond_the_largest_go_through_torch_operations(rng, monkeypatch, limit, words):
    """With a single warning: a second one would be an error."""
    pixel, parent, _, length = (x.to(PLACE) for x in random_trees(1, 3, 4, 0))
    values = torch.rand(2, 12, generator=rng).to(PLACE)
    arguments = values, [(pixel, parent, length, [0, 0], 1.0)]
    along = values, values[:, None], pixel, parent, length, [0, 0], 1.0
    monkeypatch.setattr(sums, limit, 11)
    monkeypatch.setattr(sums, "_weighted", None)  # not to be called
    with pytest.warns(UserWarning, match=words):
        found = operations.propagate(*arguments)
    assert torch.equal(found, torch_ops.propagate(*arguments))
    assert torch.equal(operations.propagate(*arguments), found)
    assert torch.equal(operations.propagate_along(*along), torch_ops.propagate_along(*along))


@pytest.mark.usefixtures("nothing_said")
def test_what_is_compiled_is_traced_as_torch_operations(monkeypatch):
    """With a single warning, for CUDA only, and without a graph break."""

    def traced(x: Tensor) -> Tensor:
        works.say_once("a sentence")
        return x + 1

    with pytest.warns(UserWarning, match="a sentence"):
        assert torch.compile(traced, backend="eager", fullgraph=True)(torch.zeros(2)).sum() == 2
    works.say_once("a sentence")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choice.backend(torch.empty(0)) is torch_ops
    with torch._subclasses.FakeTensorMode():
        there = torch.empty(2, device="cuda")
    with pytest.warns(UserWarning, match="leave the losses outside"):
        assert choice.backend(there) is torch_ops
    assert choice.backend(there) is torch_ops


def test_the_kernels_are_chosen_by_the_device_or_by_name(rng, monkeypatch):
    here = torch.rand(1, generator=rng).to(PLACE)
    with use("triton"):
        assert choice.backend(here) is operations
    with use("torch"):
        assert choice.backend(here) is torch_ops
    monkeypatch.setattr(works, "interpreted", lambda: False)
    monkeypatch.setattr(choice, "interpreted", lambda: False)
    with use("triton"), pytest.raises(choice.UserError, match="set TRITON_INTERPRET=1"):
        choice.backend(torch.rand(1))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(2, device="cuda")
        monkeypatch.setattr(choice, "triton_works", lambda: True)
        assert choice.backend(fake) is torch_ops
