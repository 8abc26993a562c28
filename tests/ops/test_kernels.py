"""The CPU loops: as Python and compiled, in threads, in uninitialised memory, without numba, without a cache."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from misa.errors import UserError
from misa.ops import backends
from misa.ops.backends import choice, cpu, loops, torch_ops
from misa.ops.backends.loops import compiled, sums, windows
from misa.ops.guides import Guides, Join, half_window
from misa.ops.propagation import propagate_global, propagate_local
from misa.ops.tree import minimum_spanning_tree


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 40), (37, 1), (35, 19), (70, 33)])
@pytest.mark.parametrize("c", [1, 2, 3, 4])
def test_feature_lengths_are_those_of_torch(rng, h, w, c):
    features, factors = torch.randn(37, h, w, generator=rng) + 3, torch.randn(c, 37, generator=rng)
    expected = torch_ops.feature_lengths(features.double(), factors.double())
    for one, other in zip(cpu.feature_lengths(features, factors), expected, strict=True):
        assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [3, 5, 7])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_windows_are_those_of_torch(rng, window, offset):
    """Boxes at every border, more channels than are processed at a time, features far from 0."""
    h, w = 21, 57
    masks, boxes = torch.rand(5, h, w, generator=rng), torch.zeros(5, h, w)
    for box, (y0, x0, y1, x1) in zip(
        boxes, [(0, 0, 4, 5), (2, 30, 20, 57), (11, 0, 21, 3), (5, 9, 6, 41), (20, 50, 21, 57)], strict=True
    ):
        box[y0:y1, x0:x1] = 1
    values = torch.randn(70, h, w, generator=rng) + offset
    rows = torch.rand(2, 70, generator=rng) / 70
    layers = [[(values, row, 0.7, None), (values[:3], rows[0, :3], 1.0, None)] for row in rows]
    groups = [([0, 2, 4], layers[0]), ([1, 3], layers[1])]
    offsets = half_window(window)
    expected = torch_ops.propagate_window(masks, boxes, [None, None], offsets, groups, 3)
    assert_close(cpu.propagate_window(masks, boxes, [None, None], offsets, groups, 3), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_windows_of_any_boxes_are_those_of_torch(data):
    """Adjacent and overlapping boxes: each pixel of each box has all of its neighbors."""
    h, w = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 60))
    n, window = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([3, 5]))
    rng = torch.Generator().manual_seed(h * 60 + w)
    masks, boxes, values = torch.rand(n, h, w, generator=rng), torch.zeros(n, h, w), torch.rand(4, h, w, generator=rng)
    for box in boxes:
        top, left = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
        box[top : data.draw(st.integers(top + 1, h)), left : data.draw(st.integers(left + 1, w))] = 1
    groups = [(list(range(n)), [(values, torch.ones(4), 1.0, None)])]
    arguments = masks, boxes, [None], half_window(window), groups, 2
    assert_close(cpu.propagate_window(*arguments), torch_ops.propagate_window(*arguments), rtol=1e-5, atol=1e-6)


def test_a_box_that_begins_within_its_neighbours_last_lanes(rng):
    """A run of columns is rounded up to sixteen; the box at column 14 needs rows above the first one's."""
    masks, boxes, values = (
        torch.rand(2, 16, 32, generator=rng),
        torch.zeros(2, 16, 32),
        torch.rand(3, 16, 32, generator=rng),
    )
    boxes[0, 5:8, 2:9] = boxes[1, 0:8, 14:18] = 1
    together = propagate_local(masks, values, box_masks=boxes)
    for i in (0, 1):
        alone = propagate_local(masks[i : i + 1], values, box_masks=boxes[i : i + 1])
        assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_windows_of_two_images_are_those_of_torch(rng, window):
    """Categories that share an image, padding, an empty box, a box of the whole image, no boxes."""
    h, w = 19, 40
    masks, boxes = torch.rand(5, h, w, generator=rng), torch.zeros(5, h, w)
    for box, (y0, x0, y1, x1) in zip(boxes, [(0, 0, 4, 5), (2, 30, 19, 40), (0, 0, 0, 0), (5, 9, 6, 33)], strict=False):
        box[y0:y1, x0:x1] = 1
    boxes[4] = 1
    valid = torch.ones(2, h, w, dtype=torch.bool)
    valid[1, :, 37:] = False
    images, features = torch.rand(2, 3, h, w, generator=rng), torch.randn(2, 40, h, w, generator=rng)
    factors, kernels = torch.randn(3, 40, generator=rng), ("color", "saliency")
    guides = Guides(images, [0, 1, 0, 1, 1], features, factors, [0, 1, 0, 2, 1], kernels, valid)
    options = {"window": window, "bandwidth": 0.4, "steps": 3, "join": Join(factor=0.8)}
    for its in (boxes, None):
        result = guides.along_window(masks, its, **options)
        with choice.use("torch"):
            expected = replace(guides).along_window(masks, its, **options)
        assert_close(result, expected, rtol=1e-5, atol=1e-6)


RESULTS = """
import sys, torch
from misa.ops.propagation import SemanticGuide, propagate_global, propagate_local
from misa.ops.tree import minimum_spanning_tree
rng = torch.Generator().manual_seed(0)
masks, guide = torch.rand(4, 21, 37, generator=rng), torch.rand(3, 21, 37, generator=rng)
boxes = torch.zeros(4, 21, 37)
boxes[0, :3, :4], boxes[1, 15:, 20:], boxes[2, 9, 1:36], boxes[3] = 1, 1, 1, 1
semantic = SemanticGuide(torch.randn(37, 21, 37, generator=rng), torch.randn(2, 37, generator=rng))
more = {"semantic": semantic, "labels": torch.tensor([0, 1, 0, 1])}
for _ in range(2):
    tree = propagate_global(masks, guide, bandwidth=0.3, **more)
    results = [
        tree,
        propagate_global(tree, tree[:, None], bandwidth=0.3, tree=minimum_spanning_tree(guide)),
        propagate_local(masks, guide, box_masks=boxes, bandwidth=0.3, **more),
        propagate_local(masks, guide, box_masks=boxes, bandwidth=0.3, window=3),
    ]
torch.save(results, sys.argv[1])
"""


def results_of_a_process(folder, **environment):
    """Run `RESULTS` in a separate process; returns its results and standard error."""
    path = folder / f"{len(list(folder.iterdir()))}.pt"
    done = subprocess.run(
        [sys.executable, "-c", RESULTS, str(path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return torch.load(path), done.stderr


def test_nothing_is_read_before_it_is_written(tmp_path):
    """The C library fills new memory with a given byte (glibc; elsewhere this is the same run twice)."""
    first, second = (results_of_a_process(tmp_path, MALLOC_PERTURB_=byte)[0] for byte in ("1", "170"))
    for one, other in zip(first, second, strict=True):
        assert_close(one, other, atol=0, rtol=0)


@pytest.mark.slow
def test_the_first_compilation_says_one_line_and_is_kept(tmp_path):
    cache = tmp_path / "cache"
    results = tmp_path / "results"
    results.mkdir()
    first, said = results_of_a_process(results, NUMBA_CACHE_DIR=str(cache))
    assert said.count("compiling") == 1
    assert len(said.splitlines()) == 1
    second, said = results_of_a_process(results, NUMBA_CACHE_DIR=str(cache))
    assert said == ""
    for path in cache.rglob("*.nbi"):  # a cache truncated by a full disk
        path.write_bytes(path.read_bytes()[:40])
    third, said = results_of_a_process(results, NUMBA_CACHE_DIR=str(cache))
    assert said.count("compiling") == 1
    for one, two, three in zip(first, second, third, strict=True):
        assert_close(one, two, atol=0, rtol=0)
        assert_close(one, three, atol=0, rtol=0)


def no_room(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("trouble", ["no folder", "full disk"])
def test_without_a_cache_kernels_are_compiled_in_memory(monkeypatch, capsys, trouble):
    from numba.core import caching

    if trouble == "no folder":
        monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    else:
        monkeypatch.setattr(caching.IndexDataCacheFile, "save", no_room)
    monkeypatch.setattr(compiled.CompilationNotice, "said", False)

    def twice(x: float) -> float:
        return 2 * x

    assert compiled.kernel("f8(f8)")(twice)(1.5) == 3.0
    assert capsys.readouterr().err.count("compiling") == 1


@pytest.mark.parametrize("s", [0.0, 1e-9, 1e-3, 0.3, 0.7, 1.0, 5.0, 30.0, 47.9, 600.0])
def test_exponentials(s):
    assert sums.exp_minus.py_func(np.float64(s)) == pytest.approx(math.exp(-s), rel=1e-10)
    expected = math.exp(-float(np.float32(s))) if s < 46 else 0.0
    assert windows.exp_minus_4.py_func(np.float32(s)) == pytest.approx(expected, rel=5e-7)


@pytest.mark.parametrize("how", ["python", "compiled"])
def test_merges_are_those_of_the_plain_climb(rng, how):
    """Flat zones, meeting points and their order against climbing edge by edge."""
    p = 60
    up = np.array([0, *(int(torch.randint(max(0, v - 6), v, (1,), generator=rng)) for v in range(1, p))], np.uint32)
    s = ((torch.rand(p, generator=rng) * 8).round() / 4 + 0.1).numpy()
    s[7], s[20] = 0.0, 99.0  # flat, far
    group, child, top, decay, k = (sums.meet if how == "compiled" else sums.meet.py_func)(up, s)
    assert k == p - 1
    assert group[7] == group[up[7]]
    zone = {int(g): v for v, g in enumerate(group) if v != 7}
    assert {zone[int(g)] for g in child} == set(range(1, p)) - {7, 20}
    for x, t, e in zip(child, top, decay, strict=True):
        v = zone[int(x)]
        at = int(up[v])
        while at != 0 and s[at] <= s[v]:
            at = int(up[at])
        assert t == group[at]
        assert e == pytest.approx(math.exp(-s[v]), rel=1e-6)
    assert (np.diff(top.astype(int)) >= 0).all()
    assert all(one >= other for one, other, t, u in zip(decay, decay[1:], top, top[1:], strict=False) if t == u)


@pytest.mark.parametrize("many", [0, 1, 9, 64, 65, 487])
@pytest.mark.parametrize("largest", [3, 2**31])
def test_sort(many, largest):
    """Stable order by length, few keys and many, with and without ties."""
    keys = np.random.default_rng(0).integers(0, largest, many) << 32 | np.arange(many)
    expected = np.sort(keys)
    sums.sort.py_func(keys, np.empty(many, dtype=np.int64), np.empty(256, dtype=np.uint32))
    np.testing.assert_array_equal(keys, expected)


def test_threads_do_not_change_a_bit(rng):
    masks, image = torch.rand(9, 70, 21, generator=rng), torch.rand(3, 70, 21, generator=rng)
    features, factors = torch.randn(17, 70, 21, generator=rng), torch.randn(2, 17, generator=rng)

    def results() -> list[torch.Tensor]:
        guides = Guides(image[None], [0] * 9, features[None], factors, [0, 1, 0] * 3, ("color", "saliency"))
        trees = guides.trees()
        first = guides.along_trees(masks, trees, 0.2)
        options = {"window": 5, "bandwidth": 0.2, "steps": 5}
        local = guides.along_window(masks, None, **options)
        return [first, guides.along_masks(first, first[:, None], trees, 0.2), local]

    usual = results()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            spread = results()
            assert cpu.spread_out(lambda x: x + 1, range(5)) == [1, 2, 3, 4, 5]
        finally:
            torch.set_num_threads(1)
        for one, other in zip(usual, spread, strict=True):
            assert_close(one, other, atol=0, rtol=0)


@pytest.fixture
def no_numba(monkeypatch):
    """Simulate that numba is not installed."""
    for name in [name for name in sys.modules if name.startswith("misa.ops.backends.loops.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(loops, name.rpartition(".")[2])
    monkeypatch.delitem(sys.modules, "misa.ops.backends.cpu")
    monkeypatch.delattr(backends, "cpu")
    monkeypatch.setitem(sys.modules, "numba", None)
    choice.compiled_loops.cache_clear()
    yield
    choice.compiled_loops.cache_clear()


def test_without_numba_the_torch_path_answers(rng, request):
    masks, image = torch.rand(2, 5, 6, generator=rng), torch.rand(3, 5, 6, generator=rng)
    usual = propagate_global(masks, image, bandwidth=0.2)
    assert choice.warm()
    request.getfixturevalue("no_numba")
    assert not choice.warm()
    assert choice.backend(masks) is torch_ops
    assert_close(propagate_global(masks, image, bandwidth=0.2), usual, atol=1e-6, rtol=0)
    with choice.use("cpu"), pytest.raises(UserError, match="numba is not installed"):
        propagate_global(masks, image, bandwidth=0.2)


def test_a_backend_is_chosen_by_name(rng, monkeypatch):
    masks = torch.rand(1, 2, 2, generator=rng)
    assert choice.backend(masks) is cpu
    with choice.use("torch"):
        assert choice.backend(masks) is torch_ops
        with choice.use("cpu"):
            assert choice.backend(masks) is cpu
    assert choice.backend(masks.to("meta")) is torch_ops
    monkeypatch.setenv("MISA_KERNELS", "torch")
    assert choice.backend(masks) is torch_ops
    monkeypatch.setenv("MISA_KERNELS", "fast")
    with pytest.raises(UserError, match="MISA_KERNELS is 'fast'; set it to auto, cpu, torch or triton"):
        choice.backend(masks)
    with pytest.raises(ValueError, match="no backend 'fast'"), choice.use("fast"):
        pass


def test_many_masks_go_in_portions(rng, monkeypatch):
    masks, image = torch.rand(5, 5, 6, generator=rng), torch.rand(3, 5, 6, generator=rng)
    with choice.use("torch"):
        tree = minimum_spanning_tree(image)
        usual = propagate_global(masks, masks[:, None], bandwidth=0.2, tree=tree)
        monkeypatch.setattr(torch_ops, "MOST", 61)
        assert_close(propagate_global(masks, masks[:, None], bandwidth=0.2, tree=tree), usual, atol=0, rtol=0)


def test_importing_costs_no_compiler():
    text = (
        "import sys, misa.ops.propagation, misa.losses.pairwise; "
        "assert not {'numba', 'llvmlite', 'triton', 'scipy', 'mmdet'} & set(sys.modules), 'too much'"
    )
    subprocess.run([sys.executable, "-c", text], check=True)
