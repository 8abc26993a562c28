"""Loops of the CPU path, in the kernel language of `_compile`: numbers and flat arrays, nothing allocated inside.

Each function says what it serves; `_merge` explains the merge tree that `meet` builds and `sums` walks.
"""

import math

from misa.ops._compile import (
    F4,
    F8,
    I8,
    F4s,
    F8s,
    I4s,
    I8s,
    bits,
    f4,
    f8,
    i8,
    kernel,
    lanes,
    power_of_two,
    prefetch,
    put,
    registers,
    unrolled,
    wide,
)

NONE = 9223372036854775807  # no edge: larger than any key
LOW = 4294967295  # the lower half of a key holds the edge number
FLAT = 3e-8  # exp(−s) rounds to 1 in single precision below this: one flat zone
FAR = 48.0  # exp(−48) · 10^6 pixels is below the rounding of a double: not connected
INFINITE = math.inf
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


@kernel
def exp_minus(s: F8) -> F8:
    """exp(−s) for 0 ≤ s < 700, relative error below 1e-10: 2^k times a polynomial, so that loops vectorise."""
    k = i8(-s * LOG2E - 0.5)
    r = -s - f8(k) * LN2
    p = 1.0 + r * (1.0 / 9.0)
    p = 1.0 + r * (1.0 / 8.0) * p
    p = 1.0 + r * (1.0 / 7.0) * p
    p = 1.0 + r * (1.0 / 6.0) * p
    p = 1.0 + r * (1.0 / 5.0) * p
    p = 1.0 + r * (1.0 / 4.0) * p
    p = 1.0 + r * (1.0 / 3.0) * p
    p = 1.0 + r * (1.0 / 2.0) * p
    return power_of_two(k) * (1.0 + r * p)


@kernel
def edge_keys(lengths: F4s, m: I8, keys: I8s, chosen: I4s) -> None:
    """(length, edge number) as one integer: the total order that makes the minimum spanning tree unique."""
    for e in range(m):
        keys[e] = (bits(lengths[e]) << 32) | e
        chosen[e] = 0


@kernel
def shortest_on_grid(keys: I8s, h: I8, w: I8, best: I8s) -> None:
    """The smallest key around each pixel: round one of Boruvka, straight over the grid."""
    vertical = (h - 1) * w
    for v in range(vertical):
        best[v] = keys[v]
    for v in range(vertical, h * w):
        best[v] = NONE
    for v in range(vertical):
        best[v + w] = min(best[v + w], keys[v])
    for y in range(h):
        row = y * w
        edge = vertical + y * (w - 1)
        for x in range(w - 1):
            best[row + x] = min(best[row + x], keys[edge + x])
        for x in range(w - 1):
            best[row + x + 1] = min(best[row + x + 1], keys[edge + x])


@kernel
def join_pixels(best: I8s, h: I8, w: I8, link: I4s, chosen: I4s) -> None:
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
            chosen[number] = 1
            if best[other] != best[v] or other < v:
                link[v] = other


@kernel
def number_clusters(link: I4s, n: I8, label: I4s) -> I8:
    """Shorten the links until each goes to its root and number the roots: label[v] is the cluster of v.

    Passes without a branch inside, as how far a root is cannot be foreseen.
    """
    open_links = 1
    while open_links != 0:
        open_links = 0
        for v in range(n):
            near = i8(link[v])
            far = i8(link[near])
            link[v] = far
            open_links = open_links | (near - far)
    clusters = 0
    for v in range(n):
        label[v] = clusters
        clusters += 1 if link[v] == v else 0
    for v in range(n):
        label[v] = label[link[v]]
    return clusters


@kernel
def edges_between(keys: I8s, h: I8, w: I8, label: I4s, ends: I4s) -> I8:
    """The grid edges between different clusters: their keys move to the front, the clusters to `ends`, two by two."""
    vertical = (h - 1) * w
    m = 0
    for e in range(vertical):
        a = i8(label[e])
        b = i8(label[e + w])
        ends[2 * m] = a
        ends[2 * m + 1] = b
        keys[m] = keys[e]
        if a != b:
            m += 1
    for y in range(h):
        row = y * w
        edge = vertical + y * (w - 1)
        for x in range(w - 1):
            a = i8(label[row + x])
            b = i8(label[row + x + 1])
            ends[2 * m] = a
            ends[2 * m + 1] = b
            keys[m] = keys[edge + x]
            if a != b:
                m += 1
    return m


@kernel
def shortest_between(keys: I8s, ends: I4s, m: I8, n: I8, best: I8s) -> None:
    """The shortest edge that leaves each of n clusters: its length and its place in `keys`, ordered like numbers."""
    for c in range(n):
        best[c] = NONE
    for i in range(m):
        key = keys[i] - (keys[i] & LOW) + i
        a = i8(ends[2 * i])
        b = i8(ends[2 * i + 1])
        best[a] = min(best[a], key)
        best[b] = min(best[b], key)


@kernel
def join_clusters(keys: I8s, ends: I4s, n: I8, best: I8s, link: I4s, chosen: I4s) -> None:
    """One more round of Boruvka: every cluster joins the one across; of two with the same edge the first stays."""
    for c in range(n):
        link[c] = c
        if best[c] != NONE:
            i = best[c] & LOW
            chosen[keys[i] & LOW] = 1
            other = ends[2 * i] + ends[2 * i + 1] - c
            if best[other] != best[c] or other < c:
                link[c] = other


@kernel
def keep_between(keys: I8s, ends: I4s, m: I8, label: I4s) -> I8:
    """Drop the edges that have come to lie inside a cluster."""
    kept = 0
    for i in range(m):
        a = i8(label[ends[2 * i]])
        b = i8(label[ends[2 * i + 1]])
        key = keys[i]
        ends[2 * kept] = a
        ends[2 * kept + 1] = b
        keys[kept] = key
        if a != b:
            kept += 1
    return kept


@kernel
def preorder(chosen: I4s, h: I8, w: I8, pixel: I4s, up: I4s, edge: I4s, stack: I4s) -> None:
    """Number the vertices of the tree depth first: a subtree is contiguous and a parent comes before its children.

    The stack holds, three by three, the pixel, its parent's number and the edge between them.
    """
    vertical = (h - 1) * w
    stack[0] = 0
    stack[1] = 0
    stack[2] = -1
    top = 1
    count = 0
    while top > 0:
        top -= 1
        v = i8(stack[3 * top])
        above = i8(stack[3 * top + 1])
        by = i8(stack[3 * top + 2])
        pixel[count] = v
        up[count] = above
        edge[count] = by
        y = v // w
        x = v - y * w
        right = vertical + v - y
        if x > 0 and chosen[right - 1] == 1 and right - 1 != by:
            stack[3 * top] = v - 1
            stack[3 * top + 1] = count
            stack[3 * top + 2] = right - 1
            top += 1
        if x + 1 < w and chosen[right] == 1 and right != by:
            stack[3 * top] = v + 1
            stack[3 * top + 1] = count
            stack[3 * top + 2] = right
            top += 1
        if y > 0 and chosen[v - w] == 1 and v - w != by:
            stack[3 * top] = v - w
            stack[3 * top + 1] = count
            stack[3 * top + 2] = v - w
            top += 1
        if y + 1 < h and chosen[v] == 1 and v != by:
            stack[3 * top] = v + w
            stack[3 * top + 1] = count
            stack[3 * top + 2] = v
            top += 1
        count += 1


@kernel
def spanning_tree(
    lengths: F4s,
    h: I8,
    w: I8,
    m: I8,
    keys: I8s,
    best: I8s,
    link: I4s,
    label: I4s,
    ends: I4s,
    chosen: I4s,
) -> None:
    """Which edges of a grid are in its minimum spanning tree under the total order (length, edge number): Boruvka."""
    edge_keys(lengths, m, keys, chosen)
    shortest_on_grid(keys, h, w, best)
    join_pixels(best, h, w, link, chosen)
    clusters = number_clusters(link, h * w, label)
    kept = edges_between(keys, h, w, label, ends)
    while clusters > 1:
        shortest_between(keys, ends, kept, clusters, best)
        join_clusters(keys, ends, clusters, best, link, chosen)
        clusters = number_clusters(link, clusters, label)
        kept = keep_between(keys, ends, kept, label)


@kernel
def at_edges(values: F4s, edge: I4s, length: F4s, result: F4s, p: I8) -> None:
    """Values of grid edges at the upward edges of a tree; infinite at the root and where `length` is."""
    result[0] = INFINITE
    for v in range(1, p):
        value = values[edge[v]]
        result[v] = value if length[v] < 1e37 else f4(INFINITE)


@kernel
def tree_lengths(guide: F4s, d: I8, p: I8, pixel: I4s, up: I4s, length: F4s, factor: F8, at: F4s, s: F4s) -> None:
    """s of every vertex's upward edge: squared distance of the guide times `factor`; infinite where the tree's is."""
    for v in range(p):
        s[v] = 0.0
    for k in range(d):
        plane = k * p
        for v in range(p):
            at[v] = guide[plane + pixel[v]]
        for v in range(1, p):
            difference = at[v] - at[up[v]]
            s[v] += difference * difference
    scale = f4(factor)
    for v in range(p):
        s[v] = s[v] * scale if length[v] < 1e37 else 1e37


@kernel
def meet(
    up: I4s,
    s: F4s,
    p: I8,
    group: I4s,
    meeting: I4s,
    length: F4s,
    decay: F4s,
    jump: I4s,
    depth: I4s,
    start: I4s,
    children: I8s,
    room: I8s,
) -> I8:
    """The merge tree of one rooted tree with edges s: flat zones, meeting points t(x), children in ascending s.

    `children` holds (s, x) in one number, grouped by t. Flat zones become one vertex each; `group` says
    which. Edges beyond FAR join nothing. Climbing to t(x) goes along the t's above, whose edges grow, by jumps that
    make it logarithmic at worst. Whether an edge is flat is hard to foresee, so the next vertex is written in any
    case and counted only if it stays.
    """
    for v in range(p + 1):
        start[v] = 0
    k = 1
    group[0] = 0
    length[0] = 1e30
    meeting[0] = 0
    jump[0] = 0
    depth[0] = 0
    for v in range(1, p):
        sv = s[v]
        a = i8(group[up[v]])
        keep = 0 if sv < FLAT else 1
        group[v] = k if keep == 1 else a
        if sv < FAR:
            length[k] = sv
            while length[a] <= sv:
                far = i8(jump[a])
                a = far if length[far] <= sv else i8(meeting[a])
            meeting[k] = a
            start[a] += keep
            over = i8(jump[a])
            jump[k] = i8(jump[over]) if depth[a] - depth[over] == depth[over] - depth[jump[over]] else a
            depth[k] = depth[a] + 1
        else:
            length[k] = 1e30
            meeting[k] = -1
            jump[k] = k
            depth[k] = 0
        k += keep
    meeting[0] = -1
    for x in range(k):
        decay[x] = f4(exp_minus(min(f8(length[x]), 600.0)))
    total = 0
    for x in range(k):
        total += start[x]
        start[x] = total
    start[k] = total
    for i in range(k):
        x = k - 1 - i
        t = i8(meeting[x])
        if t >= 0:
            slot = i8(start[t]) - 1
            start[t] = slot
            children[slot] = (bits(length[x]) << 32) | x
    for t in range(k):
        first = i8(start[t])
        last = i8(start[t + 1])
        if last - first == 2:
            a_key = children[first]
            b_key = children[first + 1]
            children[first] = min(a_key, b_key)
            children[first + 1] = max(a_key, b_key)
        elif last - first > 2:
            sort(children, first, last, room, depth)
    return k


@kernel
def sort(keys: I8s, first: I8, last: I8, room: I8s, place: I4s) -> None:
    """Sort keys[first:last], which ascend in their lower halves: by insertion, or where there are many digit by digit.

    Four digits of a byte in the upper half, the least first, each pass keeping the order of equals; `room` is for as
    many keys, `place` for 256 numbers.
    """
    if last - first <= 64:
        for i in range(first + 1, last):
            key = keys[i]
            j = i
            while j > first and keys[j - 1] > key:
                keys[j] = keys[j - 1]
                j -= 1
            keys[j] = key
        return
    for digit in range(4):
        shift = 32 + 8 * digit
        for b in range(256):
            place[b] = 0
        for i in range(first, last):
            b = (keys[i] >> shift) & 255
            place[b] += 1
        total = 0
        for b in range(256):
            many = place[b]
            place[b] = total
            total += many
        for i in range(first, last):
            b = (keys[i] >> shift) & 255
            room[place[b]] = keys[i]
            place[b] += 1
        for i in range(first, last):
            keys[i] = room[i - first]


@kernel
def sums(
    values: F4s,
    pixel: I4s,
    p: I8,
    k: I8,
    group: I4s,
    meeting: I4s,
    decay: F4s,
    start: I4s,
    children: I8s,
    own: F8s,
    below: F8s,
    out: F8s,
) -> None:
    """Numerator and denominator of Eq. 14 for one mask, side by side: out[2 zone] and out[2 zone + 1].

    Backwards over the merges: the mass below every vertex and what later siblings send it. Forwards: what its meeting
    point held before it, what reaches that from above, and what it sends there. Nothing is subtracted, so no digits
    are lost.
    """
    for i in range(2 * k):
        own[i] = 0.0
    for v in range(p):
        g = 2 * i8(group[v])
        own[g] += values[pixel[v]]
        own[g + 1] += 1.0
    for i in range(2 * k):
        below[i] = own[i]
        out[i] = 0.0
    merges = i8(start[k])
    sent = 0.0
    sent_d = 0.0
    before = -1
    for i in range(merges):
        c = children[merges - 1 - i] & LOW
        t = i8(meeting[c])
        e = f8(decay[c])
        sent = sent if t == before else 0.0
        sent_d = sent_d if t == before else 0.0
        before = t
        out[2 * c] = sent
        out[2 * c + 1] = sent_d
        sent += e * below[2 * c]
        sent_d += e * below[2 * c + 1]
        below[2 * t] += below[2 * c]
        below[2 * t + 1] += below[2 * c + 1]
    held = 0.0
    held_d = 0.0
    above = 0.0
    above_d = 0.0
    before = -1
    for i in range(merges):
        c = children[i] & LOW
        t = i8(meeting[c])
        e = f8(decay[c])
        held = held if t == before else own[2 * t]
        held_d = held_d if t == before else own[2 * t + 1]
        above = above if t == before else out[2 * t]
        above_d = above_d if t == before else out[2 * t + 1]
        before = t
        out[2 * c] += above + e * held
        out[2 * c + 1] += above_d + e * held_d
        out[2 * t] += e * below[2 * c]
        out[2 * t + 1] += e * below[2 * c + 1]
        held += below[2 * c]
        held_d += below[2 * c + 1]
    for i in range(2 * k):
        out[i] += own[i]


@kernel
def write_ratio(totals: F8s, pixel: I4s, group: I4s, p: I8, result: F4s) -> None:
    """The one division of Eq. 14, back in pixel order."""
    for v in range(p):
        g = 2 * i8(group[v])
        result[pixel[v]] = totals[g] / totals[g + 1]


@kernel
def zones(pixel: I4s, group: I4s, p: I8, zone: I4s) -> None:
    """The flat zone of every pixel, in pixel order."""
    for v in range(p):
        zone[pixel[v]] = group[v]


@kernel
def write_ratio_of_two(a: F8s, a_zone: I4s, a_share: F8, b: F8s, b_zone: I4s, b_share: F8, p: I8, result: F4s) -> None:
    """The one division of Eq. 14 after the numerators and denominators of two kernels are added (Eq. 13)."""
    for i in range(p):
        g = 2 * i8(a_zone[i])
        q = 2 * i8(b_zone[i])
        result[i] = (a_share * a[g] + b_share * b[q]) / (a_share * a[g + 1] + b_share * b[q + 1])


@kernel
def add_distances(
    values: F4s, squares: F4s, q: I8, first: I8, last: I8, p: I8, move: I8, start: I8, stop: I8, out: F4s, at: I8
) -> None:
    """out[at + i] += Σ_d squares_d (V_d(i + move) − V_d(i))² for start ≤ i < stop, channels first … last."""
    for k in range(first, last):
        weight = squares[q + k]
        for i in range(k * p + start, k * p + stop):
            difference = values[i + move] - values[i]
            out[at + i - k * p] += weight * (difference * difference)


@kernel
def add_edges(
    values: F4s,
    squares: F4s,
    q: I8,
    d: I8,
    first: I8,
    last: I8,
    p: I8,
    w: I8,
    ahead: I8,
    start: I8,
    stop: I8,
    down: F4s,
    at: I8,
    m: I8,
    side: F4s,
    to: I8,
    size: I8,
    second: I8,
    third: I8,
) -> None:
    """down[at + i] += Σ_d squares_d (V_d(i + w) − V_d(i))² for start ≤ i < stop; side[to + i] likewise to i + 1.

    Channels first … last, sixteen pixels at a time, for three rows of `squares`: the first starts at q, the others are
    `second` and `third` rows of d numbers on; a row of `down` has m, one of `side` size. With fewer rows to do,
    one is named again and done twice, to the same end: reading V takes longer than that.
    """
    for i in range(start, stop, 16):
        d0 = lanes(down, at + i)
        d1 = lanes(down, at + second * m + i)
        d2 = lanes(down, at + third * m + i)
        s0 = lanes(side, to + i)
        s1 = lanes(side, to + second * size + i)
        s2 = lanes(side, to + third * size + i)
        for k in range(first, last):
            prefetch(values, k * p + i + ahead)
            here = lanes(values, k * p + i)
            below = lanes(values, k * p + w + i) - here
            right = lanes(values, k * p + 1 + i) - here
            below = below * below
            right = right * right
            w0 = wide(squares[q + k])
            w1 = wide(squares[q + second * d + k])
            w2 = wide(squares[q + third * d + k])
            d0 += w0 * below
            d1 += w1 * below
            d2 += w2 * below
            s0 += w0 * right
            s1 += w1 * right
            s2 += w2 * right
        put(down, at + i, d0)
        put(down, at + second * m + i, d1)
        put(down, at + third * m + i, d2)
        put(side, to + i, s0)
        put(side, to + second * size + i, s1)
        put(side, to + third * size + i, s2)


@kernel
def add_moments(values: F4s, start: I8, stop: I8, moments: F8s, at: I8) -> None:
    """Add Σ V and Σ V² over start ≤ i < stop to two entries of `moments`; in two halves, which overlap in time."""
    a = f4(0.0)
    b = f4(0.0)
    aa = f4(0.0)
    bb = f4(0.0)
    half = (stop - start) // 2
    for i in range(start, start + half):
        a += values[i]
        aa += values[i] * values[i]
        b += values[i + half]
        bb += values[i + half] * values[i + half]
    for i in range(start + 2 * half, stop):
        a += values[i]
        aa += values[i] * values[i]
    moments[at] += a + b
    moments[at + 1] += aa + bb


@kernel
def exp_minus_4(s: F4) -> F4:
    """exp(−s) in single precision, relative error below 3e-7; 0 where it is below 1e-20 (denormals are slow)."""
    bounded = min(s, f4(46.0))
    k = i8(-bounded * f4(LOG2E) - f4(0.5))
    r = (-bounded - f4(k) * f4(0.693145751953125)) - f4(k) * f4(1.42860677e-06)
    q = f4(1.0) + r * f4(1.0 / 7.0)
    q = f4(1.0) + r * f4(1.0 / 6.0) * q
    q = f4(1.0) + r * f4(1.0 / 5.0) * q
    q = f4(1.0) + r * f4(1.0 / 4.0) * q
    q = f4(1.0) + r * f4(1.0 / 3.0) * q
    q = f4(1.0) + r * f4(1.0 / 2.0) * q
    value = f4(power_of_two(k)) * (f4(1.0) + r * q)
    return value if s < f4(46.0) else f4(0.0)


@kernel
def add_window(
    values: F4s,
    channels: I8,
    plane: I8,
    pitch: I8,
    here: I8,
    count: I8,
    offsets: I8s,
    half: I8,
    distance: F4s,
    at: I8,
    line: I8,
) -> None:
    """distance[at + o · line + i] += Σ_d (V_d(here + i + offset o) − V_d(here + i))² for i < count.

    Channels are `plane` apart, rows `pitch`. Sixteen pixels and four offsets at a time: half a
    window is always a multiple of four.
    """
    e = registers()
    for i in range(here, here + count, 16):
        for o in range(0, half, 4):
            to = at + o * line + i - here
            m0 = offsets[2 * o] * pitch + offsets[2 * o + 1]
            m1 = offsets[2 * o + 2] * pitch + offsets[2 * o + 3]
            m2 = offsets[2 * o + 4] * pitch + offsets[2 * o + 5]
            m3 = offsets[2 * o + 6] * pitch + offsets[2 * o + 7]
            for n in unrolled(4):
                e[n] = lanes(distance, to + n * line)
            k = i
            for _ in range(channels):
                centre = lanes(values, k)
                a = lanes(values, k + m0) - centre
                e[0] += a * a
                a = lanes(values, k + m1) - centre
                e[1] += a * a
                a = lanes(values, k + m2) - centre
                e[2] += a * a
                a = lanes(values, k + m3) - centre
                e[3] += a * a
                k += plane
            for n in unrolled(4):
                put(distance, to + n * line, e[n])


@kernel
def add_window_5(
    values: F4s,
    channels: I8,
    plane: I8,
    pitch: I8,
    here: I8,
    count: I8,
    distance: F4s,
    at: I8,
    line: I8,
) -> None:
    """`add_window` for the 5x5 window and two rows at once, which share most of what they read."""
    e = registers()
    for i in range(here, here + count, 16):
        to = at + i - here
        for n in unrolled(24):
            e[n] = lanes(distance, to + n * line)
        k = i
        for _ in range(channels):
            first = lanes(values, k)
            second = lanes(values, k + pitch)
            for n in unrolled(12):
                move = k + (n + 3) // 5 * (pitch - 5) + n + 1
                a = lanes(values, move) - first
                e[n] += a * a
                a = lanes(values, move + pitch) - second
                e[n + 12] += a * a
            k += plane
        for n in unrolled(24):
            put(distance, to + n * line, e[n])


@kernel
def mark_needed(crops: I8s, n: I8, reach: I8, h: I8, w: I8, needed: I4s) -> None:
    """The pixels whose half of the window serves a crop: per eight rows and column, a bit for each two rows.

    Half of a window looks right and down, so what serves a crop reaches over it on all sides but below.
    """
    for i in range(n):
        for y in range(max(0, crops[4 * i] - reach), min(h, crops[4 * i + 2])):
            block = y // 8
            bit = 1 << ((y - 8 * block) // 2)
            for x in range(max(0, crops[4 * i + 1] - reach), min(w, crops[4 * i + 3] + reach)):
                needed[block * w + x] = needed[block * w + x] | bit


@kernel
def find_runs(needed: I4s, c: I8, blocks: I8, block: I8, w: I8, runs: I8s) -> I8:
    """Group, first column, length and rows of every run of columns that a block of rows needs; how many there are.

    Lengths are rounded up to sixteen, so a run may end beyond the last column, or take in columns of the next one.
    """
    count = 0
    for g in range(c):
        at = (g * blocks + block) * w
        x = 0
        while x < w:
            if needed[at + x] == 0:
                x += 1
            else:
                begin = x
                rows = 0
                while x < w and needed[at + x] != 0:
                    rows = rows | needed[at + x]
                    x += 1
                length = (x - begin + 15) // 16 * 16
                for tail in range(x, min(w, begin + length)):  # a neighbour that begins within the rounding
                    rows = rows | needed[at + tail]
                runs[4 * count] = g
                runs[4 * count + 1] = begin
                runs[4 * count + 2] = length
                runs[4 * count + 3] = rows
                count += 1
                x = begin + length
    return count


@kernel
def clear_runs(runs: I8s, count: I8, half: I8, line: I8, distance: F4s) -> None:
    """Distances of the runs start at 0."""
    for n in range(count):
        for i in range(8 * half):
            at = (runs[4 * n] * 8 * half + i) * line + runs[4 * n + 1]
            for x in range(runs[4 * n + 2]):
                distance[at + x] = 0.0


@kernel
def add_runs(
    values: F4s,
    factors: F4s,
    d: I8,
    first: I8,
    last: I8,
    h: I8,
    w: I8,
    block: I8,
    stop: I8,
    reach: I8,
    half: I8,
    offsets: I8s,
    runs: I8s,
    count: I8,
    packed: F4s,
    distance: F4s,
    ahead: I8,
) -> None:
    """The squared distances over the window of all runs in the rows block … stop, channels first … last, at most 16.

    The values of a run, less the first one's so that no digits are lost, times the `factors` of its group, go to
    `packed`, from where all offsets are served. `packed` has room for 16 · (8 + reach) rows of w + 64 numbers,
    `distance` for 8 · half rows of w + 16 a group.
    """
    line = w + 16
    for n in range(count):
        g = runs[4 * n]
        begin = runs[4 * n + 1]
        width = runs[4 * n + 2]
        rows = runs[4 * n + 3]
        top = 0
        while (rows >> (top // 2)) & 1 == 0:
            top += 2
        bottom = 8
        while (rows >> (bottom // 2 - 1)) & 1 == 0:
            bottom -= 2
        pitch = width + 48
        plane = (8 + reach) * pitch
        low = max(0, begin - reach)
        high = min(w, begin + width + reach)
        whole = high if high - low >= 16 else low
        for k in range(first, last):
            origin = values[(k * h + block) * w + begin]
            factor = factors[g * d + k]
            for row in range(block + top, min(block + bottom + reach, h)):
                here = (k * h + row) * w
                to = (k - first) * plane + (row - block) * pitch + 16 - begin
                for x in range(low, whole, 16):
                    at = min(x, whole - 16)  # the last sixteen overlap those before
                    prefetch(values, here + x + ahead)
                    put(packed, to + at, (lanes(values, here + at) - origin) * factor)
                for x in range(whole, high):
                    packed[to + x] = (values[here + x] - origin) * factor
        for row in range(top, bottom, 2):
            if (rows >> (row // 2)) & 1 == 0:
                continue
            at = (g * 8 + row) * half * line + begin
            here = row * pitch + 16
            if half == 12:
                add_window_5(packed, last - first, plane, pitch, here, width, distance, at, line)
            else:
                for _ in range(2):
                    add_window(packed, last - first, plane, pitch, here, width, offsets, half, distance, at, line)
                    at += half * line
                    here += pitch


@kernel
def clear_planes(c: I8, half: I8, fields: I8s, first: I8, last: I8, planes: F4s) -> None:
    """The planes of c groups are 0 in the image rows first … last; `fields` as in `add_affinities`."""
    for g in range(c):
        top = fields[5 * g]
        rows = fields[5 * g + 2]
        columns = fields[5 * g + 3]
        for o in range(half):
            for row in range(max(0, first - top), min(rows, last - top)):
                out = fields[5 * g + 4] + (o * rows + row) * columns
                for x in range(columns):
                    planes[out + x] = 0.0


@kernel
def decay_planes(
    c: I8,
    half: I8,
    offsets: I8s,
    fields: I8s,
    first: I8,
    last: I8,
    h: I8,
    w: I8,
    scales: F4s,
    shares: F4s,
    valid: F4s,
    planes: F4s,
) -> None:
    """The distances in the planes of c groups become shares · exp(−scales · distance), 0 where a pixel is absent."""
    for g in range(c):
        top = fields[5 * g]
        left = fields[5 * g + 1]
        rows = fields[5 * g + 2]
        columns = fields[5 * g + 3]
        scale = scales[g]
        share = shares[g]
        for y in range(max(first, top), min(last, top + rows)):
            for o in range(half):
                dy = offsets[2 * o]
                dx = offsets[2 * o + 1]
                if y + dy < h:
                    here = y * w
                    there = here + dy * w + dx
                    out = fields[5 * g + 4] + (o * rows + y - top) * columns - left
                    for x in range(max(max(0, left), -dx), min(min(w, left + columns), w - dx)):
                        both = valid[here + x] * valid[there + x]
                        planes[out + x] = share * both * exp_minus_4(scale * planes[out + x])


@kernel
def feature_distances(
    features: F4s,
    factors: F4s,
    squares: F4s,
    c: I8,
    d: I8,
    h: I8,
    w: I8,
    first: I8,
    last: I8,
    side: F4s,
    lengths: F4s,
    moments: F8s,
    reach: I8,
    half: I8,
    offsets: I8s,
    fields: I8s,
    needed: I4s,
    runs: I8s,
    packed: F4s,
    distance: F4s,
    planes: F4s,
) -> None:
    """Σ_d (K^c_d)² (S_d(i) − S_d(j))² along grid edges and over windows, all categories, in one pass over S.

    `lengths` are those of the grid edges of the rows first … last, `moments` gathers the sums of S_d and S_d² over
    these rows, from which σ_{S^c} follows, and `planes` are those of `add_affinities`, as are the arguments from
    `fields` on; none of them with half = 0. Rows go in blocks and channels in groups, so that a channel is read in long
    pieces and what was read serves all. `side` holds the edges to the right of one block, 8 c w numbers.
    """
    p = h * w
    vertical = (h - 1) * w
    m = vertical + h * (w - 1)
    size = 8 * w
    line = w + 16
    for block in range(first, last, 8):
        last_row = min(block + 8, last)
        start = block * w
        stop = last_row * w
        below = max(start, min(stop, vertical))
        whole = start + (below - start) // 16 * 16
        for i in range(c * size):
            side[i] = 0.0
        for j in range(c):
            for i in range(start, below):
                lengths[j * m + i] = 0.0
        count = 0
        if half > 0:
            clear_planes(c, half, fields, block, last_row, planes)
            count = find_runs(needed, c, (h + 7) // 8, block // 8, w, runs)
            clear_runs(runs, count, half, line, distance)
        for k in range(0, d, 16):
            end = min(k + 16, d)
            ahead = 16 * p  # what comes next is fetched meanwhile
            if end == d:
                ahead = 8 * w - k * p
            for one in range(k, end):
                add_moments(features, one * p + start, one * p + stop, moments, 2 * one)
            for j in range(0, c, 3):
                add_edges(
                    features, squares, j * d, d, k, end, p, w, ahead, start, whole, lengths, j * m, m, side,
                    j * size - start, size, min(1, c - 1 - j), min(2, c - 1 - j),
                )  # fmt: skip
            for j in range(c):  # what is left of the block, and the last row
                add_distances(features, squares, j * d, k, end, p, w, whole, below, lengths, j * m)
                to = j * size - start
                add_distances(features, squares, j * d, k, end, p, 1, whole, min(stop, p - 1), side, to)
            if count > 0:
                add_runs(
                    features, factors, d, k, end, h, w, block, last_row, reach, half, offsets, runs, count, packed,
                    distance, ahead,
                )  # fmt: skip
        for j in range(c):
            for i in range(block, last_row):
                at = j * m + vertical + i * (w - 1)
                to = j * size + (i - block) * w
                for x in range(w - 1):
                    lengths[at + x] = side[to + x]
        for n in range(count):
            g = runs[4 * n]
            top = fields[5 * g]
            left = fields[5 * g + 1]
            rows = fields[5 * g + 2]
            columns = fields[5 * g + 3]
            begin = max(runs[4 * n + 1], left)
            until = min(runs[4 * n + 1] + runs[4 * n + 2], left + columns)
            for y in range(max(block, top), min(last_row, top + rows)):
                for o in range(half):
                    dx = offsets[2 * o + 1]
                    if y + offsets[2 * o] < h:
                        at = ((g * 8 + y - block) * half + o) * line
                        out = fields[5 * g + 4] + (o * rows + y - top) * columns - left
                        for x in range(max(begin, -dx), min(until, w - max(dx, 0))):
                            planes[out + x] = distance[at + x]


@kernel
def add_affinities(
    values: F4s,
    factors: F4s,
    shares: F4s,
    c: I8,
    d: I8,
    h: I8,
    w: I8,
    first: I8,
    last: I8,
    reach: I8,
    half: I8,
    offsets: I8s,
    valid: F4s,
    fields: I8s,
    needed: I4s,
    runs: I8s,
    packed: F4s,
    distance: F4s,
    planes: F4s,
) -> None:
    """planes_g[o] += shares_g · exp(−Σ_d (factors_gd (V_d(i) − V_d(k)))²) for k = i + offset o (Eq. 8, 12), c groups.

    `fields` holds five numbers a group: first row and column of its planes in the image, their rows and columns, and
    where they start. They may reach over the image: absent pixels are left alone. Image rows first … last go eight at
    a time, of which each group does the columns that `needed` (group, eight rows, column) marks; `runs` has room for
    c · (w / 16 + 1) of these, times four.
    """
    line = w + 16
    for block in range(first, last, 8):
        stop = min(block + 8, last)
        count = find_runs(needed, c, (h + 7) // 8, block // 8, w, runs)
        clear_runs(runs, count, half, line, distance)
        for k in range(0, d, 16):
            end = min(k + 16, d)
            add_runs(
                values, factors, d, k, end, h, w, block, stop, reach, half, offsets, runs, count, packed, distance, 0
            )
        for n in range(count):
            g = runs[4 * n]
            top = fields[5 * g]
            left = fields[5 * g + 1]
            rows = fields[5 * g + 2]
            columns = fields[5 * g + 3]
            begin = max(runs[4 * n + 1], left)
            end = min(runs[4 * n + 1] + runs[4 * n + 2], left + columns)
            share = shares[g]
            for y in range(max(block, top), min(stop, top + rows)):
                for o in range(half):
                    dy = offsets[2 * o]
                    dx = offsets[2 * o + 1]
                    if y + dy < h:
                        here = y * w
                        there = here + dy * w + dx
                        at = ((g * 8 + y - block) * half + o) * line
                        out = fields[5 * g + 4] + (o * rows + y - top) * columns - left
                        for x in range(max(begin, -dx), min(end, w - max(dx, 0))):
                            both = valid[here + x] * valid[there + x]
                            planes[out + x] += share * both * exp_minus_4(distance[at + x])


@kernel
def local_norm(
    planes: F4s,
    half: I8,
    offsets: I8s,
    eh: I8,
    ew: I8,
    r: I8,
    h: I8,
    w: I8,
    top: I8,
    left: I8,
    centre: F4,
    valid: F4s,
    norm: F4s,
) -> None:
    """1 / Σ_k Â(i, k) over the full window (Eq. 9), 0 where nothing is present; r is the window's reach."""
    size = eh * ew
    for row in range(r, eh - r):
        for x in range(r, ew - r):
            i = row * ew + x
            norm[i] = centre * valid[(top + row) * w + left + x]
        for o in range(half):
            move = offsets[2 * o] * ew + offsets[2 * o + 1]
            for x in range(r, ew - r):
                i = row * ew + x
                norm[i] += planes[o * size + i] + planes[o * size + i - move]
        for x in range(r, ew - r):
            i = row * ew + x
            norm[i] = f4(1.0) / norm[i] if norm[i] > f4(0.0) else f4(0.0)


@kernel
def local_steps(
    planes: F4s,
    norm: F4s,
    half: I8,
    offsets: I8s,
    eh: I8,
    ew: I8,
    w: I8,
    top: I8,
    left: I8,
    r: I8,
    box: F4s,
    y0: I8,
    x0: I8,
    ch: I8,
    cw: I8,
    centre: F4,
    steps: I8,
    mask: F4s,
    now: F4s,
    then: F4s,
    sum: F4s,
    result: F4s,
) -> None:
    """Eq. 14 `steps` times on the crop of ch x cw pixels from (y0, x0), outside of which the result is 0.

    `planes` holds one of each two opposite neighbors: Â(i, i − o) is Â(i − o, i). `now` and `then` are the crop with
    a border of r pixels of 0.
    """
    size = eh * ew
    width = cw + 2 * r
    for i in range((ch + 2 * r) * width):
        now[i] = 0.0
        then[i] = 0.0
    for y in range(ch):
        for x in range(cw):
            i = (y0 + y) * w + x0 + x
            now[(y + r) * width + r + x] = mask[i] * box[i]
    for _ in range(steps):
        for y in range(ch):
            here = (y + r) * width + r
            there = (y0 + y - top) * ew + x0 - left
            for x in range(cw):
                sum[x] = centre * now[here + x]
            for o in range(half):
                move = offsets[2 * o] * width + offsets[2 * o + 1]
                slide = offsets[2 * o] * ew + offsets[2 * o + 1]
                forth = o * size + there
                back = forth - slide
                ahead = here + move
                behind = here - move
                for x in range(cw):
                    sum[x] += planes[forth + x] * now[ahead + x] + planes[back + x] * now[behind + x]
            inside = (y0 + y) * w + x0
            for x in range(cw):
                then[here + x] = sum[x] * norm[there + x] * box[inside + x]
        for i in range((ch + 2 * r) * width):
            now[i] = then[i]
    for y in range(ch):
        for x in range(cw):
            result[(y0 + y) * w + x0 + x] = now[(y + r) * width + r + x]


@kernel
def bounds(box: F4s, h: I8, w: I8, columns: F4s, result: I8s) -> None:
    """First row and column where the box is not 0, and one past the last; all 0 for an empty box."""
    y0 = h
    y1 = 0
    for x in range(w):
        columns[x] = 0.0
    for y in range(h):
        total = f4(0.0)
        for x in range(w):
            size = max(box[y * w + x], -box[y * w + x])
            total += size
            columns[x] += size
        if total > 0.0:
            y0 = min(y0, y)
            y1 = y + 1
    x0 = w
    x1 = 0
    for x in range(w):
        if columns[x] > 0.0:
            x0 = min(x0, x)
            x1 = x + 1
    result[0] = y0
    result[1] = x0
    result[2] = y1
    result[3] = x1
