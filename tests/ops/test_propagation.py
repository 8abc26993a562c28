"""Propagation against the equations in float64 loops, against recorded outputs, and by its properties."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from misa.ops.backends.choice import use
from misa.ops.propagation import SemanticGuide, propagate_global, propagate_local, propagate_pamr, stretched
from misa.ops.tree import Tree, minimum_spanning_tree

SIZES = [(7, 9), (5, 6), (1, 8), (6, 1), (1, 2), (2, 1), (1, 1)]
CASES = ["synA", "synB_pad", "synC_frac", "realA", "realB"]


@pytest.fixture(params=["cpu", "torch"])
def path(request):
    """Both code paths on the CPU; CUDA has one."""
    with use(request.param):
        yield request.param


# ---- oracles ----


def slow_kernel(guide: np.ndarray, edges: np.ndarray, scale: float) -> np.ndarray:
    """k(i, j) for all pairs, by walking the tree from every pixel."""
    d, h, w = guide.shape
    values = guide.reshape(d, -1).astype(np.float64)
    near: dict[int, list[int]] = {i: [] for i in range(h * w)}
    for a, b in edges:
        near[int(a)].append(int(b))
        near[int(b)].append(int(a))
    k = np.zeros((h * w, h * w))
    for i in range(h * w):
        stack, seen = [(i, 0.0)], {i}
        while stack:
            v, longest = stack.pop()
            k[i, v] = math.exp(-longest / scale)
            for u in near[v]:
                if u not in seen:
                    seen.add(u)
                    stack.append((u, max(longest, float(((values[:, u] - values[:, v]) ** 2).sum()))))
    return k


def slow_tree(guide: np.ndarray) -> list[tuple[int, int]]:
    """Kruskal, edges by length and then vertical ones first, row by row."""
    _, h, w = guide.shape
    edges = [(i * w + j, i * w + j + w) for i in range(h - 1) for j in range(w)]
    edges += [(i * w + j, i * w + j + 1) for i in range(h) for j in range(w - 1)]
    values = guide.reshape(len(guide), -1)
    edges.sort(key=lambda e: float(((values[:, e[0]] - values[:, e[1]]) ** 2).sum(dtype=np.float32)))
    top = list(range(h * w))

    def find(v: int) -> int:
        while top[v] != v:
            v = top[v]
        return v

    kept = []
    for a, b in edges:
        if find(a) != find(b):
            top[find(a)] = find(b)
            kept.append((a, b))
    return kept


def slow_global(masks: np.ndarray, kernels: list[tuple[np.ndarray, float]]) -> np.ndarray:
    """Eq. 14 with dense kernels."""
    flat = masks.reshape(len(masks), -1).astype(np.float64)
    top = sum(share * flat @ k.T for k, share in kernels)
    return (top / sum(share * k.sum(axis=1) for k, share in kernels)).reshape(masks.shape)


def slow_local(masks, layers, boxes=None, window=5, steps=2, valid=None):
    """Eq. 14 with N = a window; `layers` are (values, squared bandwidth, share)."""
    n, h, w = masks.shape
    r = window // 2
    boxes = np.ones(masks.shape) if boxes is None else boxes.astype(np.float64)
    valid = np.ones((h, w), dtype=bool) if valid is None else valid
    now = masks.astype(np.float64) * boxes
    for _ in range(steps):
        then = np.zeros_like(now)
        for y in range(h):
            for x in range(w):
                top, bottom = np.zeros(n), 0.0
                for v in range(max(0, y - r), min(h, y + r + 1)):
                    for u in range(max(0, x - r), min(w, x + r + 1)):
                        if not (valid[y, x] and valid[v, u]):
                            continue
                        for values, scale, share in layers:
                            difference = values[:, y, x].astype(np.float64) - values[:, v, u]
                            affinity = share * math.exp(-float((difference**2).sum()) / scale)
                            top += affinity * now[:, v, u]
                            bottom += affinity
                if bottom:
                    then[:, y, x] = top / bottom
        now = then * boxes
    return now


def slow_pamr(masks, guide, dilations, steps, sharpness=0.1, layer=None, valid=None, form="sum", scale=1.0):
    """PAMR: |difference| over the local spread per channel, mean over channels; `layer` adds (S^c, share)."""
    _, h, w = masks.shape
    ring = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]

    def near(y, x, offset):
        return min(max(y + offset[0], 0), h - 1), min(max(x + offset[1], 0), w - 1)

    affinity = np.zeros((h, w, h, w))
    for y in range(h):
        for x in range(w):
            here = [near(y, x, o) for o in ring]
            if valid is not None:
                here = [at for at in here if valid[at]] if valid[y, x] else []
            if not here:
                continue
            samples = np.stack([guide[:, v, u] for v, u in here] + [guide[:, y, x]] * len(dilations)).astype(np.float64)
            spread = samples.std(axis=0, ddof=1)
            for v, u in here:
                logit = -(
                    np.abs(guide[:, v, u].astype(np.float64) - guide[:, y, x]) / (1e-8 + sharpness * spread)
                ).mean()
                affinity[y, x, v, u] += math.exp(logit)
            if layer is not None:
                values, share = layer
                samples = np.stack([values[:, v, u] for v, u in here] + [values[:, y, x]] * len(dilations))
                spread = math.sqrt(samples.astype(np.float64).var(axis=0, ddof=1).mean())
                for v, u in here:
                    distance = math.sqrt(((values[:, v, u].astype(np.float64) - values[:, y, x]) ** 2).mean())
                    own = math.exp(-distance / (1e-8 + sharpness * scale * spread))
                    if form == "sum":
                        affinity[y, x, v, u] += share * own
                    else:
                        affinity[y, x, v, u] *= own**share
    affinity /= np.maximum(affinity.sum(axis=(2, 3), keepdims=True), 1e-300)
    now = masks.astype(np.float64)
    for _ in range(steps):
        now = np.einsum("yxvu,nvu->nyx", affinity, now)
    return now


def scene(rng, h, w, n=3, d=3, step=0.1):
    """Masks and a guide with some exactly equal neighbors."""
    masks = torch.rand(n, h, w, generator=rng)
    guide = (torch.rand(d, h, w, generator=rng) / step).round() * step
    return masks, guide


def semantic(rng, h, w, d=6, c=4):
    return torch.randn(d, h, w, generator=rng), torch.randn(c, d, generator=rng)


def saliency_scale(features: np.ndarray) -> float:
    """σ² of S^c: the variance of all its entries."""
    return float(features.astype(np.float64).var())


def golden(shared, case):
    with np.load(shared / "data" / "golden" / "apro_propagation.npz") as file:
        return {key.split("/")[1]: file[key] for key in file.files if key.startswith(case + "/")}


# ---- global ----


@pytest.mark.parametrize(("h", "w"), SIZES)
@pytest.mark.parametrize("bandwidth", [0.02, 0.3, 2.0])
def test_global_is_the_closed_form(rng, device, path, h, w, bandwidth):
    masks, guide = scene(rng, h, w)
    tree = slow_tree(guide.numpy())
    expected = slow_global(masks.numpy(), [(slow_kernel(guide.numpy(), tree, bandwidth**2), 1.0)])
    result = propagate_global(masks.to(device), guide.to(device), bandwidth=bandwidth)
    assert_close(result.cpu(), torch.tensor(expected).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_second_pass_keeps_the_tree_and_measures_it_anew(rng, device, path, h, w):
    masks, guide = scene(rng, h, w)
    along = torch.rand(3, 2, h, w, generator=rng)
    tree = minimum_spanning_tree(guide.to(device))
    edges = tree.edges.cpu().numpy()
    expected = np.concatenate(
        [slow_global(masks[i : i + 1].numpy(), [(slow_kernel(along[i].numpy(), edges, 0.3**2), 1.0)]) for i in range(3)]
    )
    result = propagate_global(masks.to(device), along.to(device), bandwidth=0.3, tree=tree)
    assert_close(result.cpu(), torch.tensor(expected).float(), atol=1e-6, rtol=0)
    one = propagate_global(masks[:1].to(device), along[0].to(device), bandwidth=0.3, tree=tree)
    assert_close(one.cpu(), torch.tensor(expected[:1]).float(), atol=1e-6, rtol=0)


def test_one_guide_per_mask_is_one_tree_per_mask(rng, device, path):
    masks, _ = scene(rng, 6, 7)
    guides = torch.rand(3, 2, 6, 7, generator=rng).to(device)
    alone = [propagate_global(masks[i : i + 1].to(device), guides[i], bandwidth=0.4) for i in range(3)]
    assert_close(propagate_global(masks.to(device), guides, bandwidth=0.4), torch.cat(alone))


@pytest.mark.parametrize(("h", "w"), [(6, 7), (1, 9), (1, 1)])
@pytest.mark.parametrize("saliency", [True, False])
def test_semantic_global_adds_both_kernels_before_the_division(rng, device, path, h, w, saliency):
    masks, guide = scene(rng, h, w)
    s, k = semantic(rng, h, w)
    labels = torch.tensor([2, 0, 2])
    color = slow_kernel(guide.numpy(), slow_tree(guide.numpy()), 0.3**2)
    expected = []
    for mask, label in zip(masks, labels, strict=True):
        values = (s * k[label][:, None, None] if saliency else s).numpy()
        scale = max(saliency_scale(values) * 0.5**2, 1e-12)
        other = slow_kernel(values, slow_tree(values), scale)
        expected.append(slow_global(mask[None].numpy(), [(color, 1.0), (other, 0.4)]))
    result = propagate_global(
        masks.to(device),
        guide.to(device),
        bandwidth=0.3,
        semantic=SemanticGuide(s.to(device), k.to(device)),
        labels=labels.to(device),
        balance=0.4,
        saliency=saliency,
        semantic_scale=0.5,
    )
    assert_close(result.cpu(), torch.tensor(np.concatenate(expected)).float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("form", ["embedding", "product"])
def test_other_global_forms(rng, device, path, form):
    masks, guide = scene(rng, 6, 7)
    s, k = semantic(rng, 6, 7)
    labels = torch.tensor([3, 1, 3])
    expected = []
    for mask, label in zip(masks, labels, strict=True):
        values = (s * k[label][:, None, None]).numpy()
        if form == "embedding":
            kernel = slow_kernel(values, slow_tree(guide.numpy()), 2.5**2)
        else:
            joint = np.concatenate([guide.numpy() / 0.3, values * math.sqrt(0.7) / 2.5])
            kernel = slow_kernel(joint, slow_tree(joint), 1.0)
        expected.append(slow_global(mask[None].numpy(), [(kernel, 1.0)]))
    result = propagate_global(
        masks.to(device),
        guide.to(device),
        bandwidth=0.3,
        semantic=SemanticGuide(s.to(device), k.to(device)),
        labels=labels,
        global_form=form,
        semantic_sigma=2.5,
    )
    assert_close(result.cpu(), torch.tensor(np.concatenate(expected)).float(), atol=2e-6, rtol=0)


def test_nothing_crosses_padding(rng, device, path):
    masks, guide = scene(rng, 6, 8)
    valid = torch.ones(6, 8, dtype=torch.bool)
    valid[:, 5:] = False
    valid[5] = False
    cut = propagate_global(masks.to(device), guide.to(device), bandwidth=1.0, valid=valid.to(device)).cpu()
    small = propagate_global(masks[:, :5, :5].to(device), guide[:, :5, :5].to(device), bandwidth=1.0).cpu()
    assert_close(cut[:, :5, :5], small)
    assert_close(cut[:, ~valid], masks[:, ~valid])
    tree = minimum_spanning_tree(guide.to(device), valid=valid.to(device))
    again = propagate_global(masks.to(device), masks[:, None].to(device), bandwidth=1.0, tree=tree).cpu()
    assert_close(again[:, ~valid], masks[:, ~valid])
    own = propagate_global(
        masks.to(device), guide.expand(3, -1, -1, -1).to(device), bandwidth=1.0, valid=valid.to(device)
    )
    assert_close(own.cpu(), cut)


# ---- local ----


@pytest.mark.parametrize(("h", "w"), [(7, 9), (1, 8), (6, 1), (1, 1)])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_local_is_the_closed_form(rng, device, path, h, w, window):
    masks, guide = scene(rng, h, w)
    boxes = torch.zeros(3, h, w)
    boxes[0, : h // 2 + 1, w // 3 :] = 1
    boxes[1] = torch.rand(h, w, generator=rng)  # fractional
    expected = slow_local(masks.numpy(), [(guide.numpy(), 0.4**2, 1.0)], boxes.numpy(), window, 3)
    result = propagate_local(
        masks.to(device), guide.to(device), box_masks=boxes.to(device), window=window, bandwidth=0.4, steps=3
    )
    assert_close(result.cpu(), torch.tensor(expected).float(), atol=2e-6, rtol=0)
    free = propagate_local(masks.to(device), guide.to(device), window=window, bandwidth=0.4, steps=2)
    expected = slow_local(masks.numpy(), [(guide.numpy(), 0.4**2, 1.0)], None, window, 2)
    assert_close(free.cpu(), torch.tensor(expected).float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("saliency", [True, False])
def test_semantic_local_adds_both_kernels_before_the_division(rng, device, path, saliency):
    masks, guide = scene(rng, 6, 7)
    s, k = semantic(rng, 6, 7)
    labels = torch.tensor([2, 0, 2])
    boxes = torch.zeros(3, 6, 7, dtype=torch.bool)
    boxes[:, 1:5, 2:6] = True
    boxes[2] = False
    boxes[2, 3, 0] = True
    expected = []
    for mask, box, label in zip(masks, boxes, labels, strict=True):
        values = (s * k[label][:, None, None] if saliency else s).numpy()
        layers = [(guide.numpy(), 0.4**2, 1.0), (values, saliency_scale(values) * 1.5**2, 0.4)]
        expected.append(slow_local(mask[None].numpy(), layers, box[None].numpy(), 5, 2))
    result = propagate_local(
        masks.to(device),
        guide.to(device),
        box_masks=boxes.to(device),
        bandwidth=0.4,
        steps=2,
        semantic=SemanticGuide(s.to(device), k.to(device)),
        labels=labels.to(device),
        balance=0.4,
        saliency=saliency,
        semantic_scale=1.5,
    )
    assert_close(result.cpu(), torch.tensor(np.concatenate(expected)).float(), atol=3e-6, rtol=0)


@pytest.mark.parametrize("saliency", [True, False])
def test_the_local_product_cuts_where_either_cuts(rng, device, path, saliency):
    masks, guide = scene(rng, 6, 7)
    s, k = semantic(rng, 6, 7)
    labels = torch.tensor([2, 0, 2])
    boxes = torch.zeros(3, 6, 7, dtype=torch.bool)
    boxes[:, 1:5, 1:6] = True
    expected = []
    for mask, box, label in zip(masks, boxes, labels, strict=True):
        values = (s * k[label][:, None, None] if saliency else s).numpy()
        joint = np.concatenate([guide.numpy() / 0.4, values * math.sqrt(0.4 / saliency_scale(values)) / 1.5])
        expected.append(slow_local(mask[None].numpy(), [(joint, 1.0, 1.0)], box[None].numpy(), 5, 2))
    semantics = {
        "semantic": SemanticGuide(s.to(device), k.to(device)),
        "labels": labels.to(device),
        "balance": 0.4,
        "saliency": saliency,
    }
    result = propagate_local(
        masks.to(device),
        guide.to(device),
        box_masks=boxes.to(device),
        bandwidth=0.4,
        steps=2,
        semantic_scale=1.5,
        local_form="product",
        **semantics,
    )
    assert_close(result.cpu(), torch.tensor(np.concatenate(expected)).float(), atol=3e-6, rtol=0)


def test_a_local_form_that_is_none(rng):
    masks, guide = scene(rng, 4, 5, n=1)
    s, k = semantic(rng, 4, 5)
    common = {"semantic": SemanticGuide(s, k), "labels": torch.tensor([1])}
    with pytest.raises(ValueError, match="'sum' and"):
        propagate_local(masks, guide, local_form="mean", **common)
    with pytest.raises(ValueError, match="sigma 'window'"):
        propagate_local(masks, guide, local_form="product", semantic_sigma="window", **common)


def test_local_spread_over_the_window(rng, device, path):
    """σ per pixel: the trace of the covariance of the window's vectors."""
    h, w = 5, 6
    masks, guide = scene(rng, h, w, n=1)
    s, k = semantic(rng, h, w)
    values = (s * k[1][:, None, None]).double().numpy()
    top, bottom = np.zeros((h, w)), np.zeros((h, w))
    for y in range(h):
        for x in range(w):
            window = [(v, u) for v in range(max(0, y - 1), min(h, y + 2)) for u in range(max(0, x - 1), min(w, x + 2))]
            spread = np.stack([values[:, v, u] for v, u in window]).var(axis=0).sum()
            for v, u in window:
                color = math.exp(-float(((guide[:, y, x] - guide[:, v, u]) ** 2).sum()) / 0.4**2)
                a = color + 0.7 * math.exp(-float(((values[:, y, x] - values[:, v, u]) ** 2).sum()) / spread)
                top[y, x] += a * float(masks[0, v, u])
                bottom[y, x] += a
    result = propagate_local(
        masks.to(device),
        guide.to(device),
        window=3,
        bandwidth=0.4,
        steps=1,
        semantic=SemanticGuide(s.to(device), k.to(device)),
        labels=torch.tensor([1]),
        semantic_sigma="window",
    )
    assert_close(result[0].cpu(), torch.tensor(top / bottom).float(), atol=3e-6, rtol=0)


@pytest.mark.parametrize("sigma", ["image", "window"])
def test_padding_is_absent_from_windows_of_s(rng, device, path, sigma):
    masks, guide = scene(rng, 6, 7)
    s, k = semantic(rng, 6, 7)
    options = {"bandwidth": 0.4, "steps": 2, "labels": torch.tensor([0, 2, 0]), "semantic_sigma": sigma}

    def there(right):
        def pad(x):
            return torch.nn.functional.pad(x, (0, right), value=3.0).to(device)

        valid = torch.nn.functional.pad(torch.ones(6, 7, dtype=torch.bool), (0, right)).to(device)
        guides = SemanticGuide(pad(s), k.to(device))
        return propagate_local(pad(masks), pad(guide), semantic=guides, valid=valid, **options)[..., :7]

    assert_close(there(4), there(0), atol=2e-6, rtol=0)


@pytest.mark.parametrize("one_each", [False, True])
def test_padding_is_absent_along_a_tree_that_knows_none(rng, device, path, one_each):
    masks, guide = (x.to(device) for x in scene(rng, 6, 7))
    guides = guide.expand(3, *guide.shape) if one_each else guide
    tree, valid = minimum_spanning_tree(guide), torch.ones(6, 7, dtype=torch.bool, device=device)
    valid[:, 5:] = False
    results = [
        propagate_global(masks + noise * ~valid, guides, bandwidth=0.5, tree=tree, valid=valid)[:, valid]
        for noise in (0.0, 5.0)
    ]
    assert_close(*results, atol=0, rtol=0)
    assert (results[0] - propagate_global(masks, guides, bandwidth=0.5, tree=tree)[:, valid]).abs().max() > 1e-3


def test_padding_is_absent_from_windows(rng, device, path):
    masks, guide = scene(rng, 6, 7)
    valid = torch.ones(6, 7, dtype=torch.bool)
    valid[:, 5:] = False
    expected = slow_local(masks.numpy(), [(guide.numpy(), 0.4**2, 1.0)], None, 5, 2, valid.numpy())
    result = propagate_local(masks.to(device), guide.to(device), bandwidth=0.4, steps=2, valid=valid.to(device))
    assert_close(result.cpu(), torch.tensor(expected).float(), atol=2e-6, rtol=0)


# ---- PAMR ----


@pytest.mark.parametrize(("h", "w"), [(7, 9), (1, 8), (2, 2)])
def test_pamr_is_the_closed_form(rng, device, h, w):
    masks, guide = scene(rng, h, w, n=2)
    guide = guide + 0.01 * torch.rand(guide.shape, generator=rng)
    expected = slow_pamr(masks.numpy(), guide.numpy(), (1, 3), 2)
    result = propagate_pamr(masks.to(device), guide.to(device), dilations=(1, 3), steps=2)
    assert_close(result.cpu(), torch.tensor(expected).float(), atol=1e-5, rtol=0)
    s, k = semantic(rng, h, w)
    values = s * k[2][:, None, None]
    expected = slow_pamr(masks.numpy(), guide.numpy(), (1, 3), 2, layer=(values.numpy(), 0.4))
    result = propagate_pamr(
        masks.to(device),
        guide.to(device),
        dilations=(1, 3),
        steps=2,
        semantic=SemanticGuide(s.to(device), k.to(device)),
        labels=torch.tensor([2, 2]),
        balance=0.4,
    )
    assert_close(result.cpu(), torch.tensor(expected).float(), atol=1e-5, rtol=0)


def test_pamr_at_the_published_dilations_and_steps_is_the_closed_form_in_any_range_of_colors(rng, device):
    """48 neighbors, ten steps and dilations up to 24 pixels, on windows that torch cuts out."""
    h, w, dilations = 40, 56, (1, 2, 4, 8, 12, 24)
    pixels = 255 * torch.rand(3, h // 8, w // 8, generator=rng).repeat_interleave(8, 1).repeat_interleave(8, 2)
    pixels = (pixels + 9 * torch.randn(3, h, w, generator=rng)).clamp(0, 255)
    masks = (torch.rand(2, h, w, generator=rng) > 0.5).float()

    def windows(values):  # n h w -> dilation n 9 h w; the fifth is the centre
        padded = [(F.pad(values[:, None], [d] * 4, mode="replicate"), d) for d in dilations]
        return torch.stack([F.unfold(x, 3, dilation=d).reshape(-1, 9, h, w) for x, d in padded])

    def ring(values):  # n h w -> n 48 h w
        return windows(values)[:, :, [0, 1, 2, 3, 5, 6, 7, 8]].transpose(0, 1).flatten(1, 2)

    spread = windows(pixels.double()).transpose(0, 1).flatten(1, 2).std(dim=1, keepdim=True)
    logits = -(ring(pixels.double()) - pixels[:, None]).abs() / (1e-8 + 0.1 * spread)
    affinity, expected = logits.mean(dim=0).softmax(dim=0), masks.double()
    for _ in range(10):
        expected = (affinity * ring(expected)).sum(dim=1)
    for colors in (pixels, (pixels - 120) / 58):
        found = propagate_pamr(masks.to(device), colors.to(device)).cpu()
        assert_close(found, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["sum", "product"])
def test_pamr_joins_color_and_saliency_in_either_form(rng, device, form):
    """Without replicated borders, where the slow form would count a neighbor twice."""
    masks, guide = scene(rng, 7, 9, n=2)
    s, k = semantic(rng, 7, 9)
    values = s * k[2][:, None, None]
    valid = torch.zeros(7, 9, dtype=torch.bool)
    valid[1:6, 1:8] = True
    expected = slow_pamr(
        masks.numpy(), guide.numpy(), (1,), 2, layer=(values.numpy(), 0.4), valid=valid.numpy(), form=form, scale=2.5
    )
    result = propagate_pamr(
        masks.to(device),
        guide.to(device),
        dilations=(1,),
        steps=2,
        semantic=SemanticGuide(s.to(device), k.to(device)),
        labels=torch.tensor([2, 2]),
        balance=0.4,
        form=form,
        semantic_scale=2.5,
        valid=valid.to(device),
    )
    assert_close(result.cpu(), torch.tensor(expected).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["sum", "product"])
@pytest.mark.parametrize("padded", [False, True])
def test_pamr_of_a_pixel_unlike_all_its_neighbors_is_still_a_mean(rng, device, form, padded):
    """Every affinity of the outlier pixel is 0 in float32; its nearest neighbors still count."""
    masks, guide = scene(rng, 9, 9, n=1)
    guide = 1e-3 * guide
    s, k = semantic(rng, 9, 9)
    s = 1e-3 * s
    guide[:, 4, 4] = s[:, 4, 4] = 5.0
    values, valid = s * k[2][:, None, None], torch.zeros(9, 9, dtype=torch.bool)
    valid[1:8, 1:8] = True
    expected = slow_pamr(
        masks.numpy(), guide.numpy(), (1,), 1, layer=(values.numpy(), 0.7), valid=valid.numpy(), form=form, scale=0.1
    )
    result = propagate_pamr(
        masks.to(device),
        guide.to(device),
        dilations=(1,),
        steps=1,
        semantic=SemanticGuide(s.to(device), k.to(device)),
        labels=torch.tensor([2]),
        form=form,
        semantic_scale=0.1,
        valid=valid.to(device) if padded else None,
    ).cpu()
    assert torch.isfinite(result).all()
    inside = result[:, 2:7, 2:7]  # the border is replicated without `valid`
    assert_close(inside, torch.tensor(expected).float()[:, 2:7, 2:7], atol=1e-4, rtol=0)


def test_padding_is_absent_from_pamr(rng, device):
    masks, guide = scene(rng, 7, 9, n=2)
    s, k = semantic(rng, 7, 9)
    valid = torch.ones(7, 9, dtype=torch.bool)
    valid[:, 6:] = False
    valid[5:] = False
    valid[2, 2] = False
    values = s * k[2][:, None, None]
    arrays = (masks.numpy(), guide.numpy(), (1, 3), 2)
    expected = slow_pamr(*arrays, layer=(values.numpy(), 0.4), valid=valid.numpy())
    for noise in (0.0, 5.0):  # whatever is in the padding
        result = propagate_pamr(
            (masks + noise * ~valid).to(device),
            (guide + noise * ~valid).to(device),
            dilations=(1, 3),
            steps=2,
            semantic=SemanticGuide((s - noise * ~valid).to(device), k.to(device)),
            labels=torch.tensor([2, 2]),
            balance=0.4,
            valid=valid.to(device),
        )
        assert_close(result.cpu(), torch.tensor(expected).float(), atol=1e-5, rtol=0)
    assert (result.cpu()[:, ~valid] == 0).all()
    plain = propagate_pamr(masks.to(device), guide.to(device), valid=torch.ones(7, 9, dtype=torch.bool, device=device))
    assert_close(plain, propagate_pamr(masks.to(device), guide.to(device)))


def test_pamr_stays_in_the_box(rng, device):
    masks, guide = scene(rng, 9, 9)
    boxes = torch.zeros(3, 9, 9)
    boxes[:, 2:6, 3:7] = 1
    result = propagate_pamr(masks.to(device), guide.to(device), box_masks=boxes.to(device)).cpu()
    assert (result[boxes == 0] == 0).all()
    assert (result[boxes == 1] > 0).all()


# ---- recorded outputs ----


@pytest.mark.shared
@pytest.mark.parametrize("case", CASES)
def test_golden_parity(shared, device, path, case):
    data = {name: torch.tensor(value).to(device) for name, value in golden(shared, case).items()}
    tree = minimum_spanning_tree(data["img"], tie_rule="official")
    first = propagate_global(data["masks"], data["img"], bandwidth=0.01)
    second = propagate_global(data["g1"], data["g1"][:, None], bandwidth=0.07, tree=tree)
    chain = propagate_global(first, first[:, None], bandwidth=0.07, tree=tree)
    five = propagate_local(data["masks"], data["img"], box_masks=data["boxes"])
    three = propagate_local(data["masks"], data["img"], box_masks=data["boxes"], window=3)
    for mine, name in ((first, "g1"), (second, "g2"), (five, "local5"), (three, "local3")):
        assert_close(mine, data[f"{name}_exact"], atol=1e-5, rtol=0)
        assert_close(mine, data[name], atol=3e-3, rtol=0)
    assert_close(chain, data["g2_chain_exact"], atol=1e-5, rtol=0)


# ---- properties ----

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
grids = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))


def forms(masks, guide, s, k, labels):
    """Returns the results of every propagation, with and without a semantic guide."""
    both = {"semantic": SemanticGuide(s, k), "labels": labels}
    return [
        propagate_global(masks, guide, bandwidth=0.3),
        propagate_global(masks, guide, bandwidth=0.3, semantic_scale=0.4, **both),
        propagate_local(masks, guide, steps=3),
        propagate_local(masks, guide, steps=3, bandwidth=0.3, **both),
        propagate_pamr(masks, guide, dilations=(1, 2), steps=2),
        propagate_pamr(masks, guide, dilations=(1, 2), steps=2, **both),
    ]


def drawn(grid):
    h, w, seed = grid
    rng = torch.Generator().manual_seed(seed)
    masks, guide = scene(rng, h, w, n=4, step=0.05)
    s, k = semantic(rng, h, w)
    return masks, guide, s, k, torch.tensor([1, 0, 1, 3])


@few
@given(grid=grids)
def test_range_and_constants_are_kept(path, grid):
    masks, guide, s, k, labels = drawn(grid)
    for result in forms(masks, guide, s, k, labels):
        assert (result.amin(dim=(1, 2)) >= masks.amin(dim=(1, 2)) - 1e-6).all()
        assert (result.amax(dim=(1, 2)) <= masks.amax(dim=(1, 2)) + 1e-6).all()
    for result in forms(torch.full_like(masks, 0.3), guide, s, k, labels):
        assert_close(result, torch.full_like(masks, 0.3), atol=1e-6, rtol=0)


@few
@given(grid=grids)
def test_linear_in_the_masks(path, grid):
    masks, guide, s, k, labels = drawn(grid)
    mixed = 0.25 * masks + 2.0 * masks.flip(0)
    one, other = forms(masks, guide, s, k, labels), forms(masks.flip(0), guide, s, k, labels)
    for a, b, c in zip(one, other, forms(mixed, guide, s, k, labels), strict=True):
        assert_close(c, 0.25 * a + 2.0 * b, atol=1e-5, rtol=0)


def bent(values, middle):
    return torch.from_numpy(np.interp(values.numpy(), [0.0, middle, 1.0], [0.0, 0.5, 1.0]))


@few
@given(grid=grids, gain=st.floats(1.0, 3.0), shift=st.floats(-1.0, 1.0))
def test_stretching_is_the_closed_form_and_forgets_gain_and_shift(grid, gain, shift):
    masks = drawn(grid)[0].double()
    boxes = torch.rand(masks.shape, generator=torch.Generator().manual_seed(grid[2])) > 0.6
    boxes[0] = False
    expected, varied = masks.numpy().copy(), []
    for i, (mask, box) in enumerate(zip(expected, boxes.numpy(), strict=True)):
        inside = mask[box]
        if inside.size and np.ptp(inside) > torch.finfo(torch.float16).eps:
            mask[box] = (inside - inside.min()) / np.ptp(inside)
            varied.append(i)
    result = stretched(masks, boxes)
    assert_close(result, torch.tensor(expected))
    assert_close(stretched(result, boxes), result)
    again = stretched(torch.where(boxes, gain * masks + shift, masks), boxes)
    assert_close(again[varied], result[varied], atol=1e-9, rtol=0)
    other = stretched(masks, boxes, 0.3)[varied]
    assert_close(other, torch.where(boxes[varied], bent(result[varied], 0.3), masks[varied]), atol=1e-9, rtol=0)


def test_nothing_is_stretched_in_a_box_of_one_value_or_without_a_pixel():
    masks = torch.tensor([[[0.3, 0.3, 0.9]], [[0.1, 0.5, 0.7]]], requires_grad=True)
    result = stretched(masks, torch.tensor([[[1, 1, 0]], [[0, 0, 0]]]))
    assert torch.equal(result, masks)
    assert not result.requires_grad
    assert stretched(masks[:0], torch.zeros(0, 1, 3)).shape == (0, 1, 3)
    with pytest.raises(ValueError, match="box_masks"):
        stretched(masks, torch.ones(2, 3, 1))
    for middle in (0.0, 1.0):
        with pytest.raises(ValueError, match="it must be above 0 and below 1"):
            stretched(masks, torch.ones(1, 1, 3), middle)


@few
@given(grid=grids)
def test_flips_and_orders_commute(path, grid):
    """Without ties in length the tree of a mirrored image is the mirrored tree."""
    masks, guide, s, k, labels = drawn(grid)
    guide = guide + 0.01 * torch.rand(guide.shape, generator=torch.Generator().manual_seed(grid[2] + 1))
    plain = forms(masks, guide, s, k, labels)
    for dim in (1, 2):
        mirrored = forms(masks.flip(dim), guide.flip(dim), s.flip(dim), k, labels)
        for a, b in zip(plain, mirrored, strict=True):
            assert_close(a.flip(dim), b, atol=1e-5, rtol=0)
    turned = forms(masks.mT, guide.mT, s.mT, k, labels)
    for a, b in zip(plain, turned, strict=True):
        assert_close(a.mT, b, atol=1e-5, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    for a, b in zip(plain, forms(masks[order], guide, s, k, labels[order]), strict=True):
        assert_close(a[order], b, atol=1e-5, rtol=0)


@few
@given(grid=grids)
def test_box_is_a_wall(path, grid):
    masks, guide, s, k, labels = drawn(grid)
    boxes = torch.rand(masks.shape, generator=torch.Generator().manual_seed(grid[2])) > 0.6
    boxes[0] = False
    result = propagate_local(masks, guide, box_masks=boxes, steps=3, semantic=SemanticGuide(s, k), labels=labels)
    assert (result[~boxes] == 0).all()


def test_steep_trees_do_not_slow_or_break_the_climb(path):
    """A long chain of growing lengths, beside equal ones: the worst case of climbing edge by edge."""
    w = 400
    ramp = torch.arange(w).square().float() / w
    guide = torch.stack([ramp, ramp.flip(0)])[None]
    masks = torch.rand(1, 2, w, generator=torch.Generator().manual_seed(0))
    tree = minimum_spanning_tree(guide)
    expected = slow_global(masks.numpy(), [(slow_kernel(guide.numpy(), tree.edges.numpy(), 0.5**2), 1.0)])
    result = propagate_global(masks, guide, bandwidth=0.5)
    assert_close(result, torch.tensor(expected).float(), atol=2e-6, rtol=0)


def test_large_flat_map_keeps_its_digits(path):
    """A flat zone of 40,000 pixels and one other pixel: single-precision sums would lose the fourth digit."""
    guide = torch.zeros(1, 200, 200)
    guide[0, 100, 100] = 10.0
    masks = torch.full((1, 200, 200), 0.25)
    masks[0, 100, 100] = 0.75
    masks[0, 0, 0] = 1.0
    result = propagate_global(masks, guide, bandwidth=1.0)
    flat = (0.25 * 39_998 + 1.0) / 39_999
    assert_close(result[0, 100, 100], torch.tensor(0.75))
    assert_close(result[0, 5, 5], torch.tensor(flat), atol=1e-7, rtol=0)


# ---- precision, errors and side effects ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_promoted_inside(rng, device, path, dtype):
    masks, guide = scene(rng, 6, 7)
    s, k = semantic(rng, 6, 7)
    given_ = [x.to(dtype) for x in (masks, guide, s, k)]
    labels = torch.tensor([0, 1, 1])
    rounded = forms(*(x.float().to(device) for x in given_), labels)
    for a, b in zip(forms(*(x.to(device) for x in given_), labels), rounded, strict=True):
        assert a.dtype == dtype
        assert_close(a, b.to(dtype), atol=2e-6 if dtype == torch.float64 else 0, rtol=0)


def test_autocast_does_not_reach_inside(rng, device, path):
    masks, guide = (x.to(device) for x in scene(rng, 6, 7))
    s, k = (x.to(device) for x in semantic(rng, 6, 7))
    labels = torch.tensor([0, 1, 1])
    plain = forms(masks, guide, s, k, labels)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = forms(masks, guide, s, k, labels)
    for a, b in zip(plain, inside, strict=True):
        assert_close(a, b, atol=0, rtol=0)


def test_pseudo_masks_carry_no_gradient(rng, device, path):
    masks, guide = (x.to(device).requires_grad_() for x in scene(rng, 5, 5))
    assert not propagate_global(masks, guide, bandwidth=0.1).requires_grad
    assert not propagate_local(masks, guide).requires_grad
    assert not propagate_pamr(masks, guide).requires_grad


def test_no_masks_no_work(device, path):
    masks, guide = torch.zeros(0, 4, 5, device=device), torch.zeros(3, 4, 5, device=device)
    assert propagate_global(masks, guide, bandwidth=0.1).shape == (0, 4, 5)
    assert propagate_local(masks, guide).shape == (0, 4, 5)
    assert propagate_pamr(masks, guide).shape == (0, 4, 5)


def test_inputs_are_left_alone(rng, path):
    masks, guide = scene(rng, 6, 7)
    s, k = semantic(rng, 6, 7)
    before = [x.clone() for x in (masks, guide, s, k)]
    forms(masks, guide, s, k, torch.tensor([0, 1, 1]))
    for a, b in zip(before, (masks, guide, s, k), strict=True):
        assert_close(a, b, atol=0, rtol=0)


def test_strided_inputs(rng, path):
    masks, guide = scene(rng, 6, 7)
    s, k = semantic(rng, 6, 7)
    labels = torch.tensor([0, 1, 1])
    strided = [x.mT.contiguous().mT for x in (masks, guide, s, k)]
    for a, b in zip(forms(masks, guide, s, k, labels), forms(*strided, labels), strict=True):
        assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("function", [propagate_global, propagate_local, propagate_pamr])
def test_nan_and_inf_are_refused(rng, function, bad):
    masks, guide = scene(rng, 4, 5)
    options = {"bandwidth": 0.1} if function is propagate_global else {}
    for spoiled in (masks, guide):
        keep = spoiled[0, 1, 1].item()
        spoiled[0, 1, 1] = bad
        with pytest.raises(ValueError, match="NaN or Inf"):
            function(masks, guide, **options)
        spoiled[0, 1, 1] = keep


def test_wrong_input_is_named(rng):
    masks, guide = scene(rng, 4, 5)
    s, k = semantic(rng, 4, 5)
    sem = SemanticGuide(s, k)
    with pytest.raises(ValueError, match="of one size"):
        propagate_global(masks, guide[:, :3], bandwidth=0.1)
    with pytest.raises(ValueError, match="positive bandwidth"):
        propagate_global(masks, guide, bandwidth=0.0)
    with pytest.raises(ValueError, match="one guide per mask"):
        propagate_global(masks, guide.expand(2, -1, -1, -1), bandwidth=0.1)
    with pytest.raises(ValueError, match="spans 4 x 4 pixels, masks are 4 x 5"):
        propagate_global(masks, guide, bandwidth=0.1, tree=minimum_spanning_tree(guide[..., :4]))
    with pytest.raises(ValueError, match="'sum', 'embedding' and 'product'"):
        propagate_global(masks, guide, bandwidth=0.1, semantic=sem, labels=torch.zeros(3).long(), global_form="max")
    with pytest.raises(ValueError, match="labels"):
        propagate_global(masks, guide, bandwidth=0.1, semantic=sem)
    with pytest.raises(ValueError, match="0 … 3"):
        propagate_local(masks, guide, semantic=sem, labels=torch.tensor([0, 4, 1]))
    with pytest.raises(ValueError, match="SemanticGuide needs features"):
        SemanticGuide(s, k[:, :-1])
    with pytest.raises(ValueError, match="size of the masks"):
        propagate_local(masks[:, :3], guide[:, :3], semantic=sem, labels=torch.zeros(3).long())
    with pytest.raises(ValueError, match="one box mask per mask"):
        propagate_local(masks, guide, box_masks=torch.ones(2, 4, 5))
    with pytest.raises(ValueError, match="odd window"):
        propagate_local(masks, guide, window=4)
    with pytest.raises(ValueError, match="steps"):
        propagate_local(masks, guide, steps=-1)
    for bad in ({"steps": -1}, {"sharpness": 0.0}, {"sharpness": math.nan}):
        with pytest.raises(ValueError, match="sharpness > 0 and steps ≥ 0"):
            propagate_pamr(masks, guide, **bad)
    taught = {"semantic": sem, "labels": torch.zeros(3).long()}
    with pytest.raises(ValueError, match="semantic_sigma 'image' or a number: a tree has no window"):
        propagate_global(masks, guide, bandwidth=0.1, semantic_sigma="window", **taught)
    for function in (partial(propagate_global, bandwidth=0.1), propagate_local):
        with pytest.raises(ValueError, match="semantic_sigma by name or positive: it is 'windows'"):
            function(masks, guide, semantic_sigma="windows", **taught)
    for bad in (-1.0, math.nan, math.inf):
        for function in (partial(propagate_global, bandwidth=0.1), propagate_local, propagate_pamr):
            with pytest.raises(ValueError, match="balance of 0 or more"):
                function(masks, guide, balance=bad)
            with pytest.raises(ValueError, match="positive semantic_scale"):
                function(masks, guide, semantic_scale=bad)
        with pytest.raises(ValueError, match="semantic_sigma by name or positive"):
            propagate_local(masks, guide, semantic_sigma=bad)
    with pytest.raises(ValueError, match="one guide"):
        propagate_local(masks, guide[None])


def test_tree_class(rng):
    assert isinstance(minimum_spanning_tree(scene(rng, 3, 3)[1]), Tree)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:propagation on CUDA within torch.compile:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(rng, device, path, backend):
    masks, guide = (x.to(device) for x in scene(rng, 6, 7))

    def both(masks, guide):
        return 2 * propagate_global(masks, guide, bandwidth=0.3), propagate_local(masks, guide, steps=2) + 1

    plain = both(masks, guide)
    for a, b in zip(plain, torch.compile(both, backend=backend)(masks, guide), strict=True):
        assert_close(a, b, atol=2e-6, rtol=0)


@pytest.mark.parametrize("boxed", [False, True])
def test_no_step_is_a_result_of_its_own(rng, device, boxed):
    masks, boxes = torch.rand(2, 6, 7, generator=rng).to(device), torch.ones(2, 6, 7, dtype=torch.bool, device=device)
    found = propagate_local(
        masks, torch.rand(3, 6, 7, generator=rng).to(device), steps=0, box_masks=boxes if boxed else None
    )
    assert torch.equal(found, masks)
    found.zero_()
    assert (masks > 0).all()
