"""Minimum spanning trees of grids, numbered depth first, by Borůvka's algorithm."""

# mypy: disable-error-code="return-value,assignment"
# numpy's integers of a fixed size, which numba compiles to machine integers, are no `int` for mypy.

import numpy as np

from misa.ops.backends.loops.compiled import F4, I4, I8, U1, U4, helper, kernel

NONE = np.iinfo(np.int64).max  # no edge: larger than any key
LOW = 0xFFFFFFFF  # the lower half of a key holds the edge number


@helper
def grid_edges(lengths: F4, h: int, w: int, keys: I8, ends: U4) -> None:
    """Write every edge's key (length, then edge number) and its two pixels, vertical edges first, row by row."""
    bits, vertical = lengths.view(np.int32), (h - 1) * w
    for e in range(len(lengths)):
        keys[e] = (np.int64(bits[e]) << 32) | e
    for v in range(vertical):
        ends[v, 0], ends[v, 1] = v, v + w
    for y in range(h):
        here = ends[vertical + y * (w - 1) :]
        for x in range(w - 1):
            here[x, 0], here[x, 1] = y * w + x, y * w + x + 1


@helper
def join(keys: I8, ends: U4, m: int, n: int, best: I8, link: U4, chosen: U1) -> None:
    """Link each of n clusters across its shortest of the m edges; of two linked by one edge the first stays a root.

    `best` packs the length of a cluster's shortest edge and the edge's index in `keys` into one comparable integer.
    """
    for c in range(n):
        best[c] = NONE
        link[c] = c
    for i in range(m):
        key = keys[i] - (keys[i] & LOW) + i
        a, b = ends[i, 0], ends[i, 1]
        best[a] = min(best[a], key)
        best[b] = min(best[b], key)
    for c in range(n):
        if best[c] != NONE:
            i = np.uintp(best[c] & LOW)
            chosen[np.uintp(keys[i] & LOW)] = 1
            other = np.uintp(np.int64(ends[i, 0]) + np.int64(ends[i, 1]) - c)
            if best[other] != best[c] or other < np.uintp(c):
                link[c] = other


@helper
def number_clusters(link: U4, n: int, label: U4) -> int:
    """Compress the links until each points to its root and number the roots: label[v] is the cluster of v.

    Branch-free passes, because the distance to the root is unpredictable.
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
def keep_between(keys: I8, ends: U4, m: int, label: U4) -> int:
    """Drop the edges that now lie inside a cluster; return how many remain."""
    kept = np.uintp(0)
    for i in range(m):
        a, b, key = label[ends[i, 0]], label[ends[i, 1]], keys[i]
        ends[kept, 0], ends[kept, 1] = a, b
        keys[kept] = key
        kept += np.uintp(1 if a != b else 0)
    return np.int64(kept)


@helper
def boruvka(lengths: F4, h: int, w: int) -> U1:
    """Return which edges of a grid are in its minimum spanning tree under the total order (length, edge number)."""
    clusters, kept = h * w, len(lengths)
    keys, best, chosen = np.empty(kept + 1, np.int64), np.empty(clusters, np.int64), np.zeros(kept + 1, np.uint8)
    link, label = np.empty(clusters, np.uint32), np.empty(clusters, np.uint32)
    ends = np.empty((kept + 1, 2), np.uint32)
    grid_edges(lengths, h, w, keys, ends)
    while clusters > 1:
        join(keys, ends, kept, clusters, best, link, chosen)
        clusters = number_clusters(link, clusters, label)
        kept = keep_between(keys, ends, kept, label)
    return chosen


@kernel("void(f4[::1], i8, i8, u4[::1], u4[::1], i4[::1])")
def spanning_tree(lengths: F4, h: int, w: int, pixel: U4, up: U4, edge: I4) -> None:
    """Write the minimum spanning tree of a grid with its vertices numbered depth first.

    A subtree is contiguous and a parent comes before its children. The stack holds pixel, parent's number and edge to
    the parent.
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
    """Gather values of grid edges at a tree's edges to the parents; infinite at the root and where `length` is."""
    result[0] = np.inf
    for v in range(1, len(edge)):
        value = values[np.uintp(edge[v])]
        result[v] = value if length[v] < 1e37 else np.float32(np.inf)
