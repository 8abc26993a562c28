"""The kernel language: machine code does what Python does, and says no to what it cannot."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from misa.ops import _backend, _cpu, _device, _kernels, _run
from misa.ops._compile import (
    F4,
    F8,
    I8,
    F4s,
    F8s,
    I4s,
    Kernel,
    bits,
    f4,
    f8,
    i8,
    kernel,
    lanes,
    llvm_text,
    power_of_two,
    prefetch,
    put,
    registers,
    unrolled,
    wide,
)
from misa.ops.guides import Scene, half_window
from misa.ops.propagation import SemanticGuide, propagate_global, propagate_local
from misa.ops.tree import minimum_spanning_tree

LIMIT = 40
TENTH = 0.1


@kernel
def everything(a: F4s, b: F8s, c: I4s, n: I8, share: F4) -> F8:
    """Every construct once."""
    total = 0.0
    count = n
    for i in range(n):
        if a[i] > 0.5 and not (c[i] == 3 or c[i] == 4):
            total += a[i] * share
        elif a[i] < 0.1 or c[i] > 7:
            total -= TENTH
        else:
            c[i] = c[i] + 1
        if i > LIMIT:
            break
        if i == 2:
            continue
        b[i] = f8(a[i]) / 3.0
    while True:
        count -= 1
        if count <= 0:
            break
    for i in range(n - 1, -1, -1):
        b[i] += (i << 2) // 3 + (i >> 1) + (i & 5) + (i | 8)
    j = i8(-2.7)
    total += j + count + half(total) + max(j, 4) + min(f4(0.1), share) + bits(share) / 1000 + power_of_two(-3)
    total += 1.0 if total > 0.0 else -1.0
    touch(c, n)
    return -total


@kernel
def half(x: F8) -> F8:
    if x > 1.0:
        return x / 2.0
    return x


@kernel
def touch(c: I4s, n: I8) -> None:
    if n < 2:
        return
    c[1] = 77


@kernel
def sixteen(a: F4s, b: F4s, n: I8, share: F4) -> None:
    """The same for sixteen numbers at once."""
    e = registers()
    for o in unrolled(3):
        e[o] = wide(1.5)
    for i in range(0, n, 16):
        prefetch(a, i - 100)
        for o in unrolled(3):
            e[o] += lanes(a, i + 5 * o) * share - 0.25
            e[2 - o] = e[2 - o] * e[o]
    for o in unrolled(3):
        put(b, 16 * o + 1, e[o])
    put(b, 49, 2.0)


@kernel
def unknown(n: I8) -> I8:
    return math.factorial(n)


@kernel
def lists(n: I8) -> I8:
    return [n]


@kernel
def remainder(n: I8) -> I8:
    return n % 2


@kernel
def floored(x: F8) -> F8:
    return x // 2.0


def test_machine_code_does_what_python_does():
    rng = np.random.default_rng(0)
    n = 60
    first = [rng.random(n).astype(np.float32), rng.random(n), rng.integers(0, 10, n).astype(np.int32)]
    second = [x.copy() for x in first]
    share = float(np.float32(0.3))
    slow = everything(*first, n, share)
    fast = everything.compiled(*(x.ctypes.data for x in second), n, share)
    assert fast == pytest.approx(slow, rel=1e-6)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_sixteen_numbers_at_once():
    rng = np.random.default_rng(0)
    a, slow = rng.random(80).astype(np.float32), np.zeros(70, dtype=np.float32)
    fast = slow.copy()
    sixteen(a, slow, 60, 0.5)
    sixteen.compiled(a.ctypes.data, fast.ctypes.data, 60, 0.5)
    np.testing.assert_allclose(fast, slow, rtol=1e-5)
    assert slow[0] == 0
    assert (slow[1:65] != 0).all()


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 40), (37, 1), (35, 19), (70, 33)])
@pytest.mark.parametrize("c", [1, 2, 3, 4])
def test_feature_lengths_are_those_of_torch(rng, h, w, c):
    features, factors = torch.randn(37, h, w, generator=rng) + 3, torch.randn(c, 37, generator=rng)
    expected = _device.feature_lengths(features.double(), factors.double())
    for one, other in zip(_cpu.feature_lengths(features, factors), expected, strict=True):
        assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [3, 5, 7])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_windows_are_those_of_torch(rng, window, offset):
    """Boxes at every border, more channels than go at a time, features far from 0."""
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
    expected = _device.propagate_window(masks, boxes, [None, None], offsets, groups, 3)
    assert_close(_cpu.propagate_window(masks, boxes, [None, None], offsets, groups, 3), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_windows_of_any_boxes_are_those_of_torch(data):
    """Boxes side by side, above each other and overlapping: each pixel of each has all of its neighbors."""
    h, w = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 60))
    n, window = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([3, 5]))
    rng = torch.Generator().manual_seed(h * 60 + w)
    masks, boxes, values = torch.rand(n, h, w, generator=rng), torch.zeros(n, h, w), torch.rand(4, h, w, generator=rng)
    for box in boxes:
        top, left = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
        box[top : data.draw(st.integers(top + 1, h)), left : data.draw(st.integers(left + 1, w))] = 1
    groups = [(list(range(n)), [(values, torch.ones(4), 1.0, None)])]
    arguments = masks, boxes, [None], half_window(window), groups, 2
    assert_close(_cpu.propagate_window(*arguments), _device.propagate_window(*arguments), rtol=1e-5, atol=1e-6)


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
def test_windows_measured_with_the_trees_are_those_of_torch(rng, monkeypatch, window):
    """Two images, categories that share one, an empty box; told ahead, told wrongly, not told, and a second time."""
    h, w = 19, 40
    masks, boxes = torch.rand(5, h, w, generator=rng), torch.zeros(5, h, w)
    for box, (y0, x0, y1, x1) in zip(boxes, [(0, 0, 4, 5), (2, 30, 19, 40), (0, 0, 0, 0), (5, 9, 6, 33)], strict=False):
        box[y0:y1, x0:x1] = 1
    boxes[4] = 1
    valid = torch.ones(2, h, w, dtype=torch.bool)
    valid[1, :, 37:] = False
    guides, features = torch.rand(2, 3, h, w, generator=rng), torch.randn(2, 40, h, w, generator=rng)
    scene = Scene(guides, [0, 1, 0, 1, 1], features, torch.randn(3, 40, generator=rng), [0, 1, 0, 2, 1], valid=valid)
    options = {"window": window, "bandwidth": 0.4, "steps": 3, "balance": 0.7, "sigma": "image", "factor": 0.8}
    results = [scene.along_window(masks, boxes, **options)]
    for told, how in ((boxes, window), (boxes.flip(2), window), (None, 5)):
        scene.look(told, how)
        scene.along_trees(masks, scene.trees(), 0.1)
        results.append(scene.along_window(masks, boxes, **options))
    results.append(scene.along_window(masks, None, **options))
    monkeypatch.setitem(_backend._choice, "kernels", "torch")
    expected = scene.along_window(masks, boxes, **options)
    everywhere = scene.along_window(masks, None, **options)
    for result in results[:-1]:
        assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert_close(results[-1], everywhere, rtol=1e-5, atol=1e-6)


def test_nothing_is_read_before_it_is_written(rng, monkeypatch):
    """Fresh memory full of NaN gives the same results."""
    masks, guide = torch.rand(4, 21, 37, generator=rng), torch.rand(3, 21, 37, generator=rng)
    boxes = torch.zeros(4, 21, 37)
    boxes[0, :3, :4], boxes[1, 15:, 20:], boxes[2, 9, 1:36], boxes[3] = 1, 1, 1, 1
    semantic = SemanticGuide(torch.randn(37, 21, 37, generator=rng), torch.randn(2, 37, generator=rng))
    more = {"semantic": semantic, "labels": torch.tensor([0, 1, 0, 1])}

    def both() -> list[torch.Tensor]:
        tree = propagate_global(masks, guide, bandwidth=0.3, **more)
        return [
            tree,
            propagate_global(tree, tree[:, None], bandwidth=0.3, tree=minimum_spanning_tree(guide)),
            propagate_local(masks, guide, box_masks=boxes, bandwidth=0.3, **more),
            propagate_local(masks, guide, box_masks=boxes, bandwidth=0.3, window=3),
        ]

    usual = both()
    monkeypatch.setattr(_run, "_memory", _run._Memory())
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN then
    try:
        assert torch.empty(3).isnan().all()
        spoiled = both()
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(usual, spoiled, strict=True):
        assert_close(one, other, atol=0, rtol=0)


def test_what_is_no_kernel_is_refused():
    for wrong in (unknown, lists, remainder, floored):
        with pytest.raises(SyntaxError, match="kernel language"):
            llvm_text(wrong)


def test_every_kernel_compiles():
    found = [k for k in vars(_kernels).values() if isinstance(k, Kernel)]
    assert len(found) > 15
    for one in found:
        assert "define" in llvm_text(one)


@pytest.mark.parametrize("s", [0.0, 1e-9, 1e-3, 0.3, 0.7, 1.0, 5.0, 30.0, 47.9, 600.0])
def test_exponentials(s):
    assert _kernels.exp_minus(s) == pytest.approx(math.exp(-s), rel=1e-10)
    assert _kernels.exp_minus.compiled(s) == pytest.approx(math.exp(-s), rel=1e-10)
    expected = math.exp(-float(np.float32(s))) if s < 46 else 0.0
    assert _kernels.exp_minus_4.compiled(s) == pytest.approx(expected, rel=5e-7)


def test_climb_is_that_of_the_plain_loop(rng):
    """Meeting points and order from `meet`, run as Python, against a climb edge by edge."""
    p = 60
    up = torch.tensor([0, *(int(torch.randint(max(0, v - 6), v, (1,), generator=rng)) for v in range(1, p))])
    s = (torch.rand(p, generator=rng) * 8).round() / 4 + 0.1
    s[7] = 0.0
    s[20] = 99.0
    parent = up.int().numpy()
    arrays = {x: np.zeros(p + 1, dtype=np.int32) for x in ("group", "meeting", "jump", "depth", "start")}
    arrays["children"] = np.zeros(p, dtype=np.int64)
    length, decay = np.zeros(p, dtype=np.float32), np.zeros(p, dtype=np.float32)
    arguments = [parent, s.numpy(), p, arrays["group"], arrays["meeting"], length, decay]
    arguments += [arrays["jump"], arrays["depth"], arrays["start"], arrays["children"], np.zeros(p, dtype=np.int64)]
    k = _kernels.meet(*arguments)
    assert k == p - 1
    group = arrays["group"]
    assert group[7] == group[parent[7]]
    assert arrays["meeting"][group[20]] == -1
    for v in range(1, p):
        if v in (7, 20):
            continue
        at = int(parent[v])
        while at != 0 and (s[at] <= s[v]):
            at = int(parent[at])
        assert arrays["meeting"][group[v]] == group[at]
    for t in range(k):
        members = arrays["children"][arrays["start"][t] : arrays["start"][t + 1]] & 0xFFFFFFFF
        assert (np.diff(length[members]) >= 0).all()
        assert (arrays["meeting"][members] == t).all()


@pytest.mark.parametrize(("first", "last"), [(3, 490), (5, 5), (5, 6), (5, 14), (5, 69), (5, 70)])
@pytest.mark.parametrize("largest", [3, 2**31])
def test_sort(first, last, largest):
    """By lengths and then numbers, few keys and many, with and without equal lengths; what is around stays."""
    keys = np.random.default_rng(0).integers(0, largest, 500) << 32 | np.arange(500)
    expected = keys.copy()
    expected[first:last].sort()
    room, place = np.empty(last - first, dtype=np.int64), np.empty(256, dtype=np.int32)
    _kernels.sort.compiled(keys.ctypes.data, first, last, room.ctypes.data, place.ctypes.data)
    np.testing.assert_array_equal(keys, expected)


def test_threads_do_not_change_a_bit(rng):
    masks, image = torch.rand(9, 20, 21, generator=rng), torch.rand(3, 20, 21, generator=rng)
    one = propagate_global(masks, image, bandwidth=0.2)
    torch.set_num_threads(3)
    try:
        three = propagate_global(masks, image, bandwidth=0.2)
        assert _run.spread_out(lambda x: x + 1, range(5)) == [1, 2, 3, 4, 5]
    finally:
        torch.set_num_threads(1)
    assert_close(one, three, atol=0, rtol=0)


def test_without_llvmlite_the_torch_path_answers(rng, monkeypatch):
    masks, image = torch.rand(2, 5, 6, generator=rng), torch.rand(3, 5, 6, generator=rng)
    usual = propagate_global(masks, image, bandwidth=0.2)
    monkeypatch.setattr(_backend, "available", lambda: False)
    assert _backend.backend(masks).__name__ == "misa.ops._device"
    assert_close(propagate_global(masks, image, bandwidth=0.2), usual, atol=1e-6, rtol=0)


def test_many_masks_go_in_portions(rng, monkeypatch):
    masks, image = torch.rand(5, 5, 6, generator=rng), torch.rand(3, 5, 6, generator=rng)
    monkeypatch.setitem(_backend._choice, "kernels", "torch")
    tree = minimum_spanning_tree(image)
    usual = propagate_global(masks, masks[:, None], bandwidth=0.2, tree=tree)
    monkeypatch.setattr(_device, "MOST", 61)
    assert_close(propagate_global(masks, masks[:, None], bandwidth=0.2, tree=tree), usual, atol=0, rtol=0)


def test_importing_costs_no_compiler_and_no_numba():
    text = (
        "import sys, misa.ops.propagation, misa.losses.pairwise; "
        "assert not {'numba', 'llvmlite', 'triton', 'scipy', 'mmdet'} & set(sys.modules), 'too much'"
    )
    subprocess.run([sys.executable, "-c", text], check=True)


TRITON = """
import torch
from misa.ops import _triton
from misa.ops._device import window_affinity
from misa.ops.neighbors import shift
rng = torch.Generator().manual_seed(0)
masks, boxes = torch.rand(3, 9, 70, generator=rng), torch.zeros(3, 9, 70)
boxes[0, 2:7, 3:66], boxes[1] = 1, torch.rand(9, 70, generator=rng)
offsets = [(0, 1), (1, -1), (1, 0), (1, 1)]
layers = [(torch.rand(2, 9, 70, generator=rng), torch.ones(2), 1.0, None)]
planes = window_affinity(9, 70, [None, None], offsets, [layers, layers * 2])
weights = planes / planes.sum(dim=1, keepdim=True)
every = [(0, 0), *offsets, *((-y, -x) for y, x in offsets)]
group = torch.tensor([1, 0, 1])
mine = _triton.propagate_window(masks, boxes, weights, group, every, 3)
now = masks * boxes
for _ in range(3):
    now = sum(weights[group, k] * shift(now, o) for k, o in enumerate(every)) * boxes
torch.testing.assert_close(mine, now, atol=1e-6, rtol=0)
"""


def test_triton_step_in_its_interpreter():
    """The CUDA kernel of the window propagation, run by Triton's own interpreter on the CPU."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", TRITON], check=True, env=environment)
