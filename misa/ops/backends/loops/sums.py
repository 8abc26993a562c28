"""Eq. 14 over a tree: its merge tree, built from the lengths of its edges, and sums over it.

`torch_ops` does the same in torch operations and explains the merge tree that `meet` builds and `sums` traverses.
"""

# mypy: disable-error-code="return-value,assignment"
# numpy's integers of a fixed size, which numba compiles to machine integers, are no `int` for mypy.

from typing import TypeAlias

import numpy as np

from misa.ops.backends.loops.compiled import F4, F8, I8, U4, helper, kernel

LOW = 0xFFFFFFFF  # the lower half of a key holds the number of a vertex
FLAT = 3e-8  # below this exp(−s) rounds to 1 in float32: one flat zone
FAR = 48.0  # exp(−48) · 10^6 pixels is below the rounding error of float64: not connected
NOWHERE = 0xFFFFFFFF  # the meeting point of unconnected vertices
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
Merges: TypeAlias = tuple[U4, U4, U4, F4, int]
MERGES = "Tuple((u4[::1], u4[::1], u4[::1], f4[::1], i8))"


@helper
def exp_minus(s: float) -> float:
    """Return exp(−s) for 0 ≤ s < 700, relative error below 1e-10: 2^k times a polynomial, so that loops vectorize."""
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
def sort(keys: I8, room: I8, place: U4) -> None:
    """Sort keys whose lower halves ascend: insertion sort for few, else radix sort of the upper halves.

    The radix sort takes four bytes, the least significant first, with stable passes. `room` is a buffer for as many
    keys, `place` for 256 counts.
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
        place[:] = 0
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
    """Merge flat zones into one vertex each and find their meeting points t(x); `start` counts the children of each t.

    Edges beyond FAR connect nothing. The search for t(x) climbs the t's above, whose edges grow, with jump pointers
    that make it logarithmic at worst. Flat edges are unpredictable, so the next vertex is always written and counted
    only if it is kept. Returns the number of flat zones.
    """
    p = len(up)
    jump, depth = np.empty(p, np.uint32), np.empty(p, np.int32)
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


@kernel(f"{MERGES}(u4[::1], f4[::1])")
def meet(up: U4, s: F4) -> Merges:
    """Return the merge tree of one rooted tree with edges s: every vertex's flat zone, and the merges in order of t.

    A merge is the zone x, its meeting point t(x) and exp(−s); those of one t are contiguous, ascending in s.
    """
    p = len(up)
    group, meeting, start = np.empty(p, np.uint32), np.empty(p, np.uint32), np.zeros(p + 1, np.uint32)
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
    """Return numerator and denominator of Eq. 14 for one mask (k 2), per flat zone.

    Backward over the merges: the mass below every vertex and the contributions of its later siblings. Forward: the mass
    that its meeting point held before, the contributions from above that, and its own to it. There are no subtractions,
    so no cancellation.
    """
    group, child, top, decay, k = merges
    own, out = np.zeros((k, 2)), np.zeros((k, 2))
    for v in range(len(pixel)):
        g = group[v]
        own[g, 0] += values[pixel[v]]
        own[g, 1] += 1.0
    below = own.copy()
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
    """Write numerator / denominator of Eq. 14 in pixel order."""
    for v in range(len(pixel)):
        g = group[v]
        result[pixel[v]] = totals[g, 0] / totals[g, 1]


@kernel("void(f8[:,::1], u4[::1], f8, f8[:,::1], u4[::1], f8, f4[::1])")
def write_ratio_of_two(a: F8, a_zone: U4, a_share: float, b: F8, b_zone: U4, b_share: float, result: F4) -> None:
    """Write the ratio of Eq. 14 after adding the numerators and denominators of two kernels (Eq. 13)."""
    for i in range(len(a_zone)):
        g, q = a_zone[i], b_zone[i]
        result[i] = (a_share * a[g, 0] + b_share * b[q, 0]) / (a_share * a[g, 1] + b_share * b[q, 1])


@kernel("f4[::1](f4[:,::1], u4[::1], u4[::1], f4[::1], f8)")
def tree_lengths(guide: F4, pixel: U4, up: U4, length: F4, factor: float) -> F4:
    """Return s of every edge to the parent: squared distance of the guide times `factor`; 1e37 where it is infinite."""
    d, p = guide.shape
    s, at = np.zeros(p, np.float32), np.empty(p, np.float32)
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
