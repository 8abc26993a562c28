"""Loops of the CPU path, compiled by numba: rows of the grid, trees in depth-first order, windows around pixels.

Each function says what it serves; `torch_ops` does the same in torch operations and explains the merge tree that `meet`
builds and `sums` walks. Numbers that serve as an index after a sum are unsigned: numba would otherwise ask of each
whether it counts from the end, which keeps loops from running several numbers at a time.
"""

# mypy: disable-error-code="return-value,assignment"
# numpy's integers of a fixed size, which numba compiles to machine integers, are no `int` for mypy.

import pickle
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import numba
import numpy as np
from numba.core import event
from numpy.typing import NDArray

F4: TypeAlias = NDArray[np.float32]
F8: TypeAlias = NDArray[np.float64]
U4: TypeAlias = NDArray[np.uint32]
I4: TypeAlias = NDArray[np.int32]
I8: TypeAlias = NDArray[np.int64]
U1: TypeAlias = NDArray[np.uint8]

njit: Any = numba.njit  # its overloads know no options in a dict
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "nsz", "contract"}, "error_model": "numpy"}
NONE = np.iinfo(np.int64).max  # no edge: larger than any key
LOW = 0xFFFFFFFF  # the lower half of a key holds the edge number
FLAT = 3e-8  # exp(−s) rounds to 1 in single precision below this: one flat zone
FAR = 48.0  # exp(−48) · 10^6 pixels is below the rounding of a double: not connected
NOWHERE = 0xFFFFFFFF  # the meeting point of what is not connected
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
STRIP = 8  # rows of features that are read together
BLOCK = 1024  # pixels of a crop that go together
ALIKE = 4  # channels that go through a row together


class Announcement(event.Listener):
    """One line on standard error when a kernel is compiled and not loaded: it takes seconds, and is silent else."""

    said = False

    def on_start(self, event: Any) -> None:
        """The first function of a process to be compiled."""
        if not Announcement.said:
            Announcement.said = True
            print("misa: compiling the loops of the CPU, about ten seconds, kept for later runs", file=sys.stderr)

    def on_end(self, event: Any) -> None:
        """Nothing to say."""


def kernel(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function when the module is imported, or load it from numba's cache.

    Where no folder can keep the machine code, or what it kept is damaged, the function is compiled in memory.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        with event.install_listener("numba:compile", Announcement()):
            try:
                return njit(signature, cache=True, **OPTIONS)(function)
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):
                return njit(signature, **OPTIONS)(function)

    return compiled


helper = njit(inline="always", **OPTIONS)  # compiled within each kernel alone: a seventh less to compile


# ---- numbers ----


@helper
def exp_minus(s: float) -> float:
    """exp(−s) for 0 ≤ s < 700, relative error below 1e-10: 2^k times a polynomial, so that loops vectorise."""
    k = np.int64(-s * LOG2E - 0.5)
    r = -s - k * LN2
    p = 1.0 + r * (1.0 / 9.0)
    p = 1.0 + r * (1.0 / 8.0) * p
    p = 1.0 + r * (1.0 / 7.0) * p
    p = 1.0 + r * (1.0 / 6.0) * p
    p = 1.0 + r * (1.0 / 5.0) * p
    p = 1.0 + r * (1.0 / 4.0) * p
    p = 1.0 + r * (1.0 / 3.0) * p
    p = 1.0 + r * (1.0 / 2.0) * p
    return np.int64((k + 1023) << 52).view(np.float64) * (1.0 + r * p)


@helper
def exp_minus_4(s: np.float32) -> np.float32:
    """exp(−s) in single precision, relative error below 3e-7; 0 where it is below 1e-20 (denormals are slow)."""
    bounded = min(s, np.float32(46.0))
    k = np.int32(-bounded * np.float32(LOG2E) - np.float32(0.5))
    r = (-bounded - np.float32(k) * np.float32(0.693145751953125)) - np.float32(k) * np.float32(1.42860677e-06)
    one = np.float32(1.0)
    q = one + r * np.float32(1.0 / 7.0)
    q = one + r * np.float32(1.0 / 6.0) * q
    q = one + r * np.float32(1.0 / 5.0) * q
    q = one + r * np.float32(1.0 / 4.0) * q
    q = one + r * np.float32(1.0 / 3.0) * q
    q = one + r * np.float32(1.0 / 2.0) * q
    value = np.int32((k + np.int32(127)) << np.int32(23)).view(np.float32) * (one + r * q)
    return value if s < np.float32(46.0) else np.float32(0.0)


# ---- trees ----


@helper
def shortest_on_grid(keys: I8, h: int, w: int, best: I8) -> None:
    """The smallest key around each pixel: round one of Boruvka, straight over the grid."""
    vertical = (h - 1) * w
    below = best[w:]
    for v in range(vertical):
        best[v] = keys[v]
    for v in range(vertical, h * w):
        best[v] = NONE
    for v in range(vertical):
        below[v] = min(below[v], keys[v])
    for y in range(h):
        here, edge = best[y * w : (y + 1) * w], keys[vertical + y * (w - 1) :]
        for x in range(w - 1):
            here[x] = min(here[x], edge[x])
        for x in range(w - 1):
            here[x + 1] = min(here[x + 1], edge[x])


@helper
def join_pixels(best: I8, h: int, w: int, link: U4, chosen: U1) -> None:
    """Every pixel chooses its shortest edge; of two that chose the same one, the first stays a root."""
    vertical = (h - 1) * w
    for v in range(h * w):
        link[v] = v
        if best[v] != NONE:
            number = best[v] & LOW
            other = v + w
            if number < vertical:
                if number != v:
                    other = v - w
            else:
                left = number - vertical + (number - vertical) // (w - 1)
                other = left + 1
                if left != v:
                    other = left
            chosen[np.uintp(number)] = 1
            if best[np.uintp(other)] != best[v] or other < v:
                link[v] = other


@helper
def number_clusters(link: U4, n: int, label: U4) -> int:
    """Shorten the links until each goes to its root and number the roots: label[v] is the cluster of v.

    Passes without a branch inside, as how far a root is cannot be foreseen.
    """
    open_links = np.uint32(1)
    while open_links != 0:
        open_links = np.uint32(0)
        for v in range(n):
            near = link[v]
            far = link[near]
            link[v] = far
            open_links = np.uint32(open_links | (near ^ far))
    clusters = 0
    for v in range(n):
        label[v] = clusters
        clusters += 1 if link[v] == v else 0
    for v in range(n):
        label[v] = label[link[v]]
    return clusters


@helper
def edges_between(keys: I8, h: int, w: int, label: U4, ends: U4) -> int:
    """The grid edges between different clusters: their keys move to the front, the clusters to `ends`."""
    vertical = (h - 1) * w
    m = np.uintp(0)
    for e in range(vertical):
        a, b = label[e], label[e + w]
        ends[m, 0], ends[m, 1] = a, b
        keys[m] = keys[e]
        m += np.uintp(1 if a != b else 0)
    for y in range(h):
        row = label[y * w : (y + 1) * w]
        edge = vertical + y * (w - 1)
        for x in range(w - 1):
            a, b = row[x], row[x + 1]
            ends[m, 0], ends[m, 1] = a, b
            keys[m] = keys[edge + x]
            m += np.uintp(1 if a != b else 0)
    return np.int64(m)


@helper
def shortest_between(keys: I8, ends: U4, m: int, n: int, best: I8) -> None:
    """The shortest edge that leaves each of n clusters: its length and its place in `keys`, ordered like numbers."""
    for c in range(n):
        best[c] = NONE
    for i in range(m):
        key = keys[i] - (keys[i] & LOW) + i
        a, b = ends[i, 0], ends[i, 1]
        best[a] = min(best[a], key)
        best[b] = min(best[b], key)


@helper
def join_clusters(keys: I8, ends: U4, n: int, best: I8, link: U4, chosen: U1) -> None:
    """One more round of Boruvka: every cluster joins the one across; of two with the same edge the first stays."""
    for c in range(n):
        link[c] = c
        if best[c] != NONE:
            i = np.uintp(best[c] & LOW)
            chosen[np.uintp(keys[i] & LOW)] = 1
            other = np.uintp(np.int64(ends[i, 0]) + np.int64(ends[i, 1]) - c)
            if best[other] != best[c] or other < np.uintp(c):
                link[c] = other


@helper
def keep_between(keys: I8, ends: U4, m: int, label: U4) -> int:
    """Drop the edges that have come to lie inside a cluster."""
    kept = np.uintp(0)
    for i in range(m):
        a, b, key = label[ends[i, 0]], label[ends[i, 1]], keys[i]
        ends[kept, 0], ends[kept, 1] = a, b
        keys[kept] = key
        kept += np.uintp(1 if a != b else 0)
    return np.int64(kept)


@helper
def boruvka(lengths: F4, h: int, w: int) -> U1:
    """Which edges of a grid are in its minimum spanning tree under the total order (length, edge number)."""
    p, m = h * w, len(lengths)
    keys, best, chosen = np.empty(m + 1, np.int64), np.empty(p, np.int64), np.empty(m + 1, np.uint8)
    bits = lengths.view(np.int32)
    for e in range(m):
        keys[e] = (np.int64(bits[e]) << 32) | e
        chosen[e] = 0
    link, label, ends = np.empty(p, np.uint32), np.empty(p, np.uint32), np.empty((m + 1, 2), np.uint32)
    shortest_on_grid(keys, h, w, best)
    join_pixels(best, h, w, link, chosen)
    clusters = number_clusters(link, p, label)
    kept = edges_between(keys, h, w, label, ends)
    while clusters > 1:
        shortest_between(keys, ends, kept, clusters, best)
        join_clusters(keys, ends, clusters, best, link, chosen)
        clusters = number_clusters(link, clusters, label)
        kept = keep_between(keys, ends, kept, label)
    return chosen


@kernel("void(f4[::1], i8, i8, u4[::1], u4[::1], i4[::1])")
def spanning_tree(lengths: F4, h: int, w: int, pixel: U4, up: U4, edge: I4) -> None:
    """The minimum spanning tree of a grid with its vertices numbered depth first.

    A subtree is contiguous and a parent comes before its children. The stack holds the pixel, its parent's number
    and the edge between them.
    """
    chosen = boruvka(lengths, h, w)
    vertical = (h - 1) * w
    stack = np.empty((h * w, 3), np.int32)
    stack[0, 0], stack[0, 1], stack[0, 2] = 0, 0, -1
    top = np.uintp(1)
    count = 0
    while top > 0:
        top -= np.uintp(1)
        v, above, by = np.int64(stack[top, 0]), stack[top, 1], np.int64(stack[top, 2])
        pixel[count], up[count], edge[count] = v, above, by
        y = np.int64(np.uint32(v) // np.uint32(w))
        x = v - y * w
        right = vertical + v - y
        if x > 0 and right - 1 != by and chosen[np.uintp(right - 1)] == 1:
            stack[top, 0], stack[top, 1], stack[top, 2] = v - 1, count, right - 1
            top += np.uintp(1)
        if x + 1 < w and right != by and chosen[np.uintp(right)] == 1:
            stack[top, 0], stack[top, 1], stack[top, 2] = v + 1, count, right
            top += np.uintp(1)
        if y > 0 and v - w != by and chosen[np.uintp(v - w)] == 1:
            stack[top, 0], stack[top, 1], stack[top, 2] = v - w, count, v - w
            top += np.uintp(1)
        if y + 1 < h and v != by and chosen[np.uintp(v)] == 1:
            stack[top, 0], stack[top, 1], stack[top, 2] = v + w, count, v
            top += np.uintp(1)
        count += 1


@kernel("void(f4[::1], i4[::1], f4[::1], f4[::1])")
def at_edges(values: F4, edge: I4, length: F4, result: F4) -> None:
    """Values of grid edges at the upward edges of a tree; infinite at the root and where `length` is."""
    result[0] = np.inf
    for v in range(1, len(edge)):
        value = values[np.uintp(edge[v])]
        result[v] = value if length[v] < 1e37 else np.float32(np.inf)


# ---- sums over a tree ----


@helper
def sort(keys: I8, room: I8, place: U4) -> None:
    """Sort keys that ascend in their lower halves: by insertion, or where there are many digit by digit.

    Four digits of a byte in the upper half, the least first, each pass keeping the order of equals; `room` is for as
    many keys, `place` for 256 numbers.
    """
    many = len(keys)
    if many <= 64:
        for i in range(1, many):
            key = keys[i]
            j = np.uintp(i)
            while j > 0 and keys[j - np.uintp(1)] > key:
                keys[j] = keys[j - np.uintp(1)]
                j -= np.uintp(1)
            keys[j] = key
        return
    for digit in range(4):
        shift = 32 + 8 * digit
        for b in range(256):
            place[b] = 0
        for i in range(many):
            place[np.uintp((keys[i] >> shift) & 255)] += np.uint32(1)
        total = np.uint32(0)
        for b in range(256):
            place[b], total = total, np.uint32(total + place[b])
        for i in range(many):
            b = np.uintp((keys[i] >> shift) & 255)
            room[place[b]] = keys[i]
            place[b] += np.uint32(1)
        for i in range(many):
            keys[i] = room[i]


@helper
def climb(up: U4, s: F4, group: U4, meeting: U4, length: F4, start: U4) -> int:
    """Flat zones, which become one vertex each, and the meeting point t(x) of each; `start` counts those of a t.

    Edges beyond FAR join nothing. Climbing to t(x) goes along the t's above, whose edges grow, by jumps that make
    it logarithmic at worst. Whether an edge is flat is hard to foresee, so the next vertex is written in any case
    and counted only if it stays.
    """
    p = len(up)
    jump, depth = np.empty(p, np.uint32), np.empty(p, np.int32)
    for v in range(p + 1):
        start[v] = 0
    group[0] = 0
    length[0] = 1e30
    meeting[0], jump[0], depth[0] = 0, 0, 0
    k = np.uintp(1)
    for v in range(1, p):
        sv = s[v]
        a = group[up[v]]
        keep = np.uint32(0 if sv < np.float32(FLAT) else 1)
        group[v] = np.uint32(k) if keep == 1 else a
        if sv < np.float32(FAR):
            length[k] = sv
            while length[a] <= sv:
                far = jump[a]
                a = far if length[far] <= sv else meeting[a]
            meeting[k] = a
            start[a] += keep
            over = jump[a]
            jump[k] = jump[over] if depth[a] - depth[over] == depth[over] - depth[jump[over]] else a
            depth[k] = depth[a] + 1
        else:
            length[k] = 1e30
            meeting[k] = NOWHERE
            jump[k] = k
            depth[k] = 0
        k += np.uintp(keep)
    meeting[0] = NOWHERE
    return np.int64(k)


Merges: TypeAlias = tuple[U4, U4, U4, F4, int]


MERGES = "Tuple((u4[::1], u4[::1], u4[::1], f4[::1], i8))"


@kernel(f"{MERGES}(u4[::1], f4[::1])")
def meet(up: U4, s: F4) -> Merges:
    """The merge tree of one rooted tree with edges s: of every pixel its flat zone, and the merges in the order of t.

    A merge is the zone x, its meeting point t(x) and exp(−s): those of one t stand together, ascending in s.
    """
    p = len(up)
    group, meeting, start = np.empty(p, np.uint32), np.empty(p, np.uint32), np.empty(p + 1, np.uint32)
    length = np.empty(p, np.float32)
    k = climb(up, s, group, meeting, length, start)
    total = np.uint32(0)
    for x in range(k):
        total = np.uint32(total + start[x])
        start[x] = total
    start[k] = total
    merges = np.int64(total)
    keys, bits = np.empty(merges, np.int64), length.view(np.int32)
    for i in range(k):
        x = np.uintp(k - 1 - i)
        t = meeting[x]
        if t != np.uint32(NOWHERE):
            slot = np.uint32(start[t] - np.uint32(1))
            start[t] = slot
            keys[slot] = (np.int64(bits[x]) << 32) | np.int64(x)
    room, place = np.empty(merges, np.int64), np.empty(256, np.uint32)
    child, top, decay = np.empty(merges, np.uint32), np.empty(merges, np.uint32), np.empty(merges, np.float32)
    for t in range(k):
        first, last = np.int64(start[t]), np.int64(start[t + 1])
        if last - first == 2:
            a, b = keys[first], keys[first + 1]
            keys[first], keys[first + 1] = min(a, b), max(a, b)
        elif last - first > 2:
            sort(keys[first:last], room, place)
        for i in range(first, last):
            top[i] = t
    for i in range(merges):
        child[i] = keys[i] & LOW
        decay[i] = exp_minus(np.float64(np.int32(keys[i] >> 32).view(np.float32)))
    return group, child, top, decay, k


@kernel(f"f8[:,::1](f4[::1], u4[::1], {MERGES})")
def sums(values: F4, pixel: U4, merges: Merges) -> F8:
    """Numerator and denominator of Eq. 14 for one mask, side by side, per flat zone.

    Backwards over the merges: the mass below every vertex and what later siblings send it. Forwards: what its meeting
    point held before it, what reaches that from above, and what it sends there. Nothing is subtracted, so no digits
    are lost.
    """
    group, child, top, decay, k = merges
    own, below, out = np.empty((k, 2)), np.empty((k, 2)), np.empty((k, 2))
    for g in range(k):
        own[g, 0], own[g, 1] = 0.0, 0.0
    for v in range(len(pixel)):
        g = group[v]
        own[g, 0] += values[pixel[v]]
        own[g, 1] += 1.0
    for g in range(k):
        below[g, 0], below[g, 1] = own[g, 0], own[g, 1]
        out[g, 0], out[g, 1] = 0.0, 0.0
    many = len(child)
    sent, sent_d, before = 0.0, 0.0, np.uint32(NOWHERE)
    for i in range(many):
        j = many - 1 - i
        c, t, e = child[j], top[j], np.float64(decay[j])
        sent = sent if t == before else 0.0
        sent_d = sent_d if t == before else 0.0
        before = t
        out[c, 0] = sent
        out[c, 1] = sent_d
        sent += e * below[c, 0]
        sent_d += e * below[c, 1]
        below[t, 0] += below[c, 0]
        below[t, 1] += below[c, 1]
    held, held_d, above, above_d, before = 0.0, 0.0, 0.0, 0.0, np.uint32(NOWHERE)
    for i in range(many):
        c, t, e = child[i], top[i], np.float64(decay[i])
        held = held if t == before else own[t, 0]
        held_d = held_d if t == before else own[t, 1]
        above = above if t == before else out[t, 0]
        above_d = above_d if t == before else out[t, 1]
        before = t
        out[c, 0] += above + e * held
        out[c, 1] += above_d + e * held_d
        out[t, 0] += e * below[c, 0]
        out[t, 1] += e * below[c, 1]
        held += below[c, 0]
        held_d += below[c, 1]
    for i in range(k):
        out[i, 0] += own[i, 0]
        out[i, 1] += own[i, 1]
    return out


@kernel("void(f8[:,::1], u4[::1], u4[::1], f4[::1])")
def write_ratio(totals: F8, pixel: U4, group: U4, result: F4) -> None:
    """The one division of Eq. 14, back in pixel order."""
    for v in range(len(pixel)):
        g = group[v]
        result[pixel[v]] = totals[g, 0] / totals[g, 1]


@kernel("void(f8[:,::1], u4[::1], f8, f8[:,::1], u4[::1], f8, f4[::1])")
def write_ratio_of_two(a: F8, a_zone: U4, a_share: float, b: F8, b_zone: U4, b_share: float, result: F4) -> None:
    """The one division of Eq. 14 after the numerators and denominators of two kernels are added (Eq. 13)."""
    for i in range(len(a_zone)):
        g, q = a_zone[i], b_zone[i]
        result[i] = (a_share * a[g, 0] + b_share * b[q, 0]) / (a_share * a[g, 1] + b_share * b[q, 1])


@kernel("f4[::1](f4[:,::1], u4[::1], u4[::1], f4[::1], f8)")
def tree_lengths(guide: F4, pixel: U4, up: U4, length: F4, factor: float) -> F4:
    """s of every vertex's upward edge: squared distance of the guide times `factor`; infinite where the tree's is."""
    d, p = guide.shape
    s, at = np.empty(p, np.float32), np.empty(p, np.float32)
    for v in range(p):
        s[v] = 0.0
    for k in range(d):
        plane = guide[k]
        for v in range(p):
            at[v] = plane[pixel[v]]
        for v in range(1, p):
            difference = at[v] - at[up[v]]
            s[v] += difference * difference
    scale = np.float32(factor)
    for v in range(p):
        s[v] = s[v] * scale if length[v] < 1e37 else np.float32(1e37)
    return s


# ---- features and windows ----


@helper
def add_squares(
    out: F4, to: int, n: int, values: F4, weights: F4, k: int, here: tuple[int, int], there: tuple[int, int]
) -> None:
    """out[to + x] += Σ_d weights_d (V_d(there + x) − V_d(here + x))² for x < n, for the channels k … k + 3 that exist.

    Places are (row, column).
    """
    y, i, y2, j = np.uintp(here[0]), np.uintp(here[1]), np.uintp(there[0]), np.uintp(there[1])
    last = len(weights) - 1
    k1, k2, k3 = min(k + 1, last), min(k + 2, last), min(k + 3, last)
    zero = np.float32(0.0)
    w0 = weights[k]
    w1 = weights[k1] if k + 1 <= last else zero
    w2 = weights[k2] if k + 2 <= last else zero
    w3 = weights[k3] if k + 3 <= last else zero
    for x in range(np.uintp(n)):
        a = values[k, y2, x + j] - values[k, y, x + i]
        b = values[k1, y2, x + j] - values[k1, y, x + i]
        c = values[k2, y2, x + j] - values[k2, y, x + i]
        d = values[k3, y2, x + j] - values[k3, y, x + i]
        out[x + np.uintp(to)] += w0 * (a * a) + w1 * (b * b) + w2 * (c * c) + w3 * (d * d)


@kernel("void(f4[:,:,::1], f4[:,::1], i8, i8, f4[:,:,::1], f4[:,:,::1], f8[:,::1])")
def feature_lengths(values: F4, squares: F4, first: int, last: int, down: F4, right: F4, moments: F8) -> None:
    """Σ_d (K^c_d)² (S_d(i) − S_d(j))² along the grid edges of the rows first … last, all categories (Eq. 12).

    `moments` are the sums of S_d and S_d² over these rows, from which σ_{S^c} follows. All three are added to.
    """
    d, h, w = values.shape
    for strip in range(first, last, STRIP):
        stop = min(strip + STRIP, last)
        for k in range(0, d, ALIKE):
            for y in range(strip, stop):
                for c in range(len(squares)):
                    if y + 1 < h:
                        add_squares(down[c, y], 0, w, values, squares[c], k, (y, 0), (y + 1, 0))
                    add_squares(right[c, y], 0, w - 1, values, squares[c], k, (y, 0), (y, 1))
                for one in range(k, min(k + ALIKE, d)):
                    total, total_2, row = np.float32(0.0), np.float32(0.0), values[one, y]
                    for x in range(w):
                        total += row[x]
                        total_2 += row[x] * row[x]
                    moments[one, 0] += total
                    moments[one, 1] += total_2


@kernel("i8[::1](f4[:,::1])")
def bounds(box: F4) -> I8:
    """First row and column where the box is not 0, and one past the last; the ends are 0 for an empty box."""
    h, w = box.shape
    columns, found = np.empty(w, np.float32), np.empty(4, np.int64)
    for x in range(w):
        columns[x] = 0.0
    y0, y1 = h, 0
    for y in range(h):
        row, total = box[y], np.float32(0.0)
        for x in range(w):
            size = abs(row[x])
            total += size
            columns[x] += size
        if total > 0:
            y0, y1 = min(y0, y), y + 1
    x0, x1 = w, 0
    for x in range(w):
        if columns[x] > 0:
            x0, x1 = min(x0, x), x + 1
    found[0], found[1], found[2], found[3] = y0, x0, y1, x1
    return found


@kernel("i8(i8[:,::1], i8, i8, i8, i8, i8[:,::1])")
def find_runs(crops: I8, groups: int, reach: int, h: int, w: int, runs: I8) -> int:
    """Row, group, first column and one past the last of every run of pixels whose half of a window serves a crop.

    A crop is (group, first row, first column, one past the last of both). Half of a window looks right and down, so
    what serves a crop reaches over it on all sides but below. Runs come row by row; the result is their number.
    """
    count = 0
    marks = np.empty((groups, w + 1), np.uint8)
    for y in range(h):
        for g in range(groups):
            for x in range(w + 1):
                marks[g, x] = 0
        for n in range(len(crops)):
            if crops[n, 1] - reach <= y < crops[n, 3]:
                row = marks[crops[n, 0]]
                for x in range(max(0, crops[n, 2] - reach), min(w, crops[n, 4] + reach)):
                    row[x] = 1
        for g in range(groups):
            row, begin = marks[g], -1
            for x in range(w + 1):
                if row[x] == 1 and begin < 0:
                    begin = x
                elif row[x] == 0 and begin >= 0:
                    runs[count, 0], runs[count, 1], runs[count, 2], runs[count, 3] = y, g, begin, x
                    count += 1
                    begin = -1
    return count


@kernel("void(f4[:,:,::1], f4[:,::1], f4[::1], i8[::1], i8[:,::1], i8[:,::1], f4[:,::1], i8, f4[:,:,:,::1])")
def add_affinities(
    values: F4, squares: F4, shares: F4, layer: I8, runs: I8, offsets: I8, valid: F4, reach: int, planes: F4
) -> None:
    """planes_g[o] += shares_l · exp(−Σ_d squares_ld (V_d(i) − V_d(k))²) for k = i + offset o (Eq. 8, 12).

    `layer` says which row of `squares` and `shares` a group takes, −1 for none. Planes have a border of `reach` pixels
    above and on both sides; pixels that are absent keep their 0.
    """
    d, h, w = values.shape
    half = len(offsets)
    first = 0
    while first < len(runs):  # the runs of STRIP rows at a time, so that features are read in long pieces
        last = first
        while last < len(runs) and runs[last, 0] < runs[first, 0] + STRIP:
            last += 1
        distance = np.empty((last - first, half, w), np.float32)
        for n in range(last - first):
            for o in range(half):
                row = distance[n, o]
                for x in range(w):
                    row[x] = 0.0
        for start in range(0, d, 4 * ALIKE):
            for n in range(first, last):
                y, at, begin, end = runs[n, 0], layer[runs[n, 1]], runs[n, 2], runs[n, 3]
                if at < 0:
                    continue
                for k in range(start, min(start + 4 * ALIKE, d), ALIKE):
                    for o in range(half):
                        dy, dx = offsets[o, 0], offsets[o, 1]
                        if y + dy < h:
                            x = max(begin, -dx)
                            many, here, there = max(0, min(end, w - dx) - x), (y, x), (y + dy, x + dx)
                            add_squares(distance[n - first, o], x, many, values, squares[at], k, here, there)
        for n in range(first, last):
            y, g, begin, end = runs[n, 0], runs[n, 1], runs[n, 2], runs[n, 3]
            if layer[g] < 0:
                continue
            share = shares[layer[g]]
            for o in range(half):
                dy, dx = offsets[o, 0], offsets[o, 1]
                if y + dy < h:
                    here, there, row, out = valid[y], valid[y + dy], distance[n - first, o], planes[g, o, y + reach]
                    for x in range(np.uintp(max(begin, -dx)), np.uintp(max(0, min(end, w - dx)))):
                        both = here[x] * there[x + np.uintp(dx)]
                        out[x + np.uintp(reach)] += share * both * exp_minus_4(row[x])
        first = last


@helper
def pack(planes: F4, crop: I8, reach: int, pitch: int, packed: F4) -> None:
    """The planes around a crop side by side in memory: rows of `pitch` numbers, pixel 0 where `around` looks for it."""
    y0, x0, y1, x1 = crop[0], crop[1], crop[2], crop[3]
    for o in range(len(planes)):
        for y in range(y0 - reach, y1):
            to = np.uintp((y - y0 + reach) * pitch)
            row, out = planes[o, y + reach], packed[o]
            for x in range(np.uintp(x1 - x0 + 2 * reach)):
                out[x + to] = row[x + np.uintp(x0)]
        for x in range((y1 - y0 + reach) * pitch, packed.shape[1]):
            packed[o, x] = 0.0


@helper
def around(packed: F4, moves: I8, now: F4, lead: int, start: int, total: F4) -> None:
    """total += Σ_k Â(i, k) now(k) for the pixels i from `start` on, four offsets at a time.

    `packed` holds one of each two opposite neighbors: Â(i, i − o) is Â(i − o, i). Pixel 0 is at `lead` in both arrays;
    half of a window, and so the number of `moves`, is a multiple of four.
    """
    at = np.uintp(lead + start)
    for o in range(0, len(moves), 4):
        o1, o2, o3 = o + 1, o + 2, o + 3
        m, m1, m2, m3 = np.uintp(moves[o]), np.uintp(moves[o1]), np.uintp(moves[o2]), np.uintp(moves[o3])
        b, b1, b2, b3 = at - m, at - m1, at - m2, at - m3
        f, f1, f2, f3 = at + m, at + m1, at + m2, at + m3
        for i in range(np.uintp(len(total))):
            total[i] += (
                (packed[o, i + at] * now[i + f] + packed[o, i + b] * now[i + b])
                + (packed[o1, i + at] * now[i + f1] + packed[o1, i + b1] * now[i + b1])
                + (packed[o2, i + at] * now[i + f2] + packed[o2, i + b2] * now[i + b2])
                + (packed[o3, i + at] * now[i + f3] + packed[o3, i + b3] * now[i + b3])
            )


@kernel("void(f4[:,:,::1], i8[:,::1], f8, i8, i8, f4[:,::1], f4[:,::1], f4[:,::1], i8[::1], f4[:,::1])")
def local_steps(
    planes: F4,
    offsets: I8,
    centre: float,
    reach: int,
    steps: int,
    mask: F4,
    box: F4,
    valid: F4,
    crop: I8,
    result: F4,
) -> None:
    """Eq. 14 `steps` times on the crop, outside of which the result is 0.

    The crop lies in one piece of memory, with a border of `reach` zeros on all sides, and is gone through BLOCK pixels
    at a time. The division by the sum of a window's weights (Eq. 9) and the box are one factor a pixel, 0 in the
    border.
    """
    y0, x0, y1, x1 = crop[0], crop[1], crop[2], crop[3]
    ch, cw, pitch = y1 - y0, x1 - x0, x1 - x0 + 2 * reach
    lead, size, half = reach * pitch + reach, ch * pitch, len(offsets)
    packed, moves = np.empty((half, lead + size), np.float32), np.empty(half, np.int64)
    for o in range(half):
        moves[o] = offsets[o, 0] * pitch + offsets[o, 1]
    pack(planes, crop, reach, pitch, packed)
    now, then = np.empty(size + 2 * lead, np.float32), np.empty(size + 2 * lead, np.float32)
    factor, total = np.empty(size, np.float32), np.empty(BLOCK, np.float32)
    weight = np.float32(centre)
    for i in range(size + 2 * lead):
        now[i], then[i] = 1.0, 0.0
    for i in range(size):
        factor[i] = 0.0
    for start in range(0, size, BLOCK):
        around(packed, moves, now, lead, start, factor[start : start + BLOCK])
    for i in range(size + 2 * lead):
        now[i] = 0.0
    for y in range(ch):
        for x in range(cw):
            i = y * pitch + x
            norm = factor[i] + weight * valid[y0 + y, x0 + x]
            inside = box[y0 + y, x0 + x]
            factor[i] = inside / norm if norm > 0 else np.float32(0.0)
            now[lead + i] = mask[y0 + y, x0 + x] * inside
        for x in range(cw, pitch):
            factor[y * pitch + x] = 0.0
    for _ in range(steps):
        for start in range(0, size, BLOCK):
            many = min(BLOCK, size - start)
            here, its, out = now[lead + start :], factor[start:], then[lead + start :]
            for i in range(many):
                total[i] = weight * here[i]
            around(packed, moves, now, lead, start, total[:many])
            for i in range(many):
                out[i] = total[i] * its[i]
        now, then = then, now
    for y in range(ch):
        for x in range(cw):
            result[y0 + y, x0 + x] = now[lead + y * pitch + x]
