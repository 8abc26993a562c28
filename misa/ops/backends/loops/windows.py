"""Distances of features along the grid, and Eq. 14 over the window around every pixel."""

# mypy: disable-error-code="return-value,assignment"
# numpy's integers of a fixed size, which numba compiles to machine integers, are no `int` for mypy.

import numpy as np

from misa.ops.backends.loops.compiled import F4, F8, I8, helper, kernel

LOG2E = 1.4426950408889634
STRIP = 8  # rows of features per pass
BLOCK = 1024  # pixels of a crop per pass
ALIKE = 4  # channels per pass over a row


@helper
def exp_minus_4(s: np.float32) -> np.float32:
    """Return exp(−s) in float32, relative error below 3e-7; 0 if it is below 1e-20 (denormals are slow)."""
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


@helper
def add_squares(
    out: F4, to: int, n: int, values: F4, weights: F4, k: int, here: tuple[int, int], there: tuple[int, int]
) -> None:
    """out[to + x] += Σ_d weights_d (V_d(there + x) − V_d(here + x))² for x < n, over existing channels k … k + 3.

    `here` and `there` are (row, column).
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
    """Add Σ_d (K^c_d)² (S_d(i) − S_d(j))² along the grid edges of rows first … last − 1, all categories (Eq. 12).

    `moments` are the sums of S_d and S_d² over these rows, from which σ_{S^c} follows. All outputs are accumulated.
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
    """Return the first row and column where the box is not 0, and one past the last; the ends are 0 if it is empty."""
    h, w = box.shape
    columns, found = np.zeros(w, np.float32), np.empty(4, np.int64)
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
    """Write row, group, first column and one past the last of every run of pixels whose half windows reach a crop.

    A crop is (group, first row, first column, one past the last of both). Half of a window looks right and down, so
    the pixels needed extend beyond a crop on all sides but below. Runs are in row order; returns their number.
    """
    count = 0
    marks = np.empty((groups, w + 1), np.uint8)
    for y in range(h):
        marks[:] = 0
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

    `layer` is each group's row of `squares` and `shares`, −1 for none. Planes have a border of `reach` pixels above and
    on both sides; padding stays 0.
    """
    d, h, w = values.shape
    half = len(offsets)
    first = 0
    while first < len(runs):  # the runs of STRIP rows at a time, so that features are read contiguously
        last = first
        while last < len(runs) and runs[last, 0] < runs[first, 0] + STRIP:
            last += 1
        distance = np.zeros((last - first, half, w), np.float32)
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
    """Copy the planes around a crop to contiguous memory: rows of `pitch` values, pixel 0 where `around` expects it."""
    y0, x0, y1, x1 = crop[0], crop[1], crop[2], crop[3]
    for o in range(len(planes)):
        for y in range(y0 - reach, y1):
            to = np.uintp((y - y0 + reach) * pitch)
            row, out = planes[o, y + reach], packed[o]
            for x in range(np.uintp(x1 - x0 + 2 * reach)):
                out[x + to] = row[x + np.uintp(x0)]
        packed[o, (y1 - y0 + reach) * pitch :] = 0.0


@helper
def around(packed: F4, moves: I8, now: F4, lead: int, start: int, total: F4) -> None:
    """total += Σ_k Â(i, k) now(k) for the pixels i from `start` on, four offsets at a time.

    `packed` holds one of each pair of opposite neighbors: Â(i, i − o) = Â(i − o, i). Pixel 0 is at `lead` in both
    arrays; half of a window, and so the number of `moves`, is a multiple of four.
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
    planes: F4, offsets: I8, centre: float, reach: int, steps: int, mask: F4, box: F4, valid: F4, crop: I8, result: F4
) -> None:
    """Apply Eq. 14 `steps` times to the crop, outside of which the result is 0.

    The crop is contiguous in memory, with a border of `reach` zeros on all sides, and processed BLOCK pixels at a time.
    The division by the sum of a window's weights (Eq. 9) and the box form one factor per pixel, 0 in the border.
    """
    y0, x0, y1, x1 = crop[0], crop[1], crop[2], crop[3]
    ch, cw, pitch = y1 - y0, x1 - x0, x1 - x0 + 2 * reach
    lead, size, half = reach * pitch + reach, ch * pitch, len(offsets)
    packed, moves = np.empty((half, lead + size), np.float32), np.empty(half, np.int64)
    for o in range(half):
        moves[o] = offsets[o, 0] * pitch + offsets[o, 1]
    pack(planes, crop, reach, pitch, packed)
    now, then = np.ones(size + 2 * lead, np.float32), np.zeros(size + 2 * lead, np.float32)
    factor, total = np.zeros(size, np.float32), np.empty(BLOCK, np.float32)
    weight = np.float32(centre)
    for start in range(0, size, BLOCK):
        around(packed, moves, now, lead, start, factor[start : start + BLOCK])
    now[:] = 0.0
    for y in range(ch):
        for x in range(cw):
            i = y * pitch + x
            norm = factor[i] + weight * valid[y0 + y, x0 + x]
            inside = box[y0 + y, x0 + x]
            factor[i] = inside / norm if norm > 0 else np.float32(0.0)
            now[lead + i] = mask[y0 + y, x0 + x] * inside
        factor[y * pitch + cw : (y + 1) * pitch] = 0.0
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
