"""Propagation written directly from the equations, as the benchmark's baseline: masks share no work.

One spanning tree per mask, its edges sorted again in every pass and merged by union-find, the window propagation by
`unfold` on the whole map. The loops are compiled like ours and run one thread per mask, so that the comparison is
between algorithms and not between languages.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from misa.ops.backends import cpu
from misa.ops.backends.cpu import array, spread_out
from misa.ops.backends.loops.compiled import F4, I8, U4, kernel
from misa.ops.backends.loops.sums import exp_minus
from misa.ops.tree import grid_lengths

Masks = Tensor


@kernel("void(f4[::1], u4[:,::1], i8[::1], f4[::1], f4[::1])")
def union_sums(values: F4, ends: U4, order: I8, s: F4, out: F4) -> None:
    """Kruskal over sorted edges: union by size; sums that all pixels of a cluster receive are stored at its root."""
    p = len(values)
    top, size, total = np.empty(p, np.uint32), np.empty(p), np.empty(p)
    up, down = np.empty(p), np.empty(p)
    for v in range(p):
        top[v] = v
        size[v] = 1.0
        total[v] = values[v]
        up[v] = 0.0
        down[v] = 0.0
    for e in order:
        a, b = ends[e, 0], ends[e, 1]
        while top[a] != a:
            a = top[a]
        while top[b] != b:
            b = top[b]
        if size[a] < size[b]:
            a, b = b, a
        near = exp_minus(min(np.float64(s[e]), 600.0))
        to_a, to_b = near * total[b], near * total[a]
        up[a] += to_a
        up[b] += to_b - up[a]
        to_a, to_b = near * size[b], near * size[a]
        down[a] += to_a
        down[b] += to_b - down[a]
        total[a] += total[b]
        size[a] += size[b]
        top[b] = a
    for v in range(p):
        numerator, denominator, at = np.float64(values[v]), 1.0, np.uint32(v)
        while True:
            numerator += up[at]
            denominator += down[at]
            if top[at] == at:
                break
            at = top[at]
        out[v] = numerator / denominator


def tree_per_mask(image: Tensor, n: int) -> list[Tensor]:
    """Return the ends of the tree edges, computed again for every mask."""
    h, w = image.shape[1:]

    def one(_: int) -> Tensor:
        pixel, parent, _edge = cpu.spanning_trees(grid_lengths(image)[None], h, w)
        return torch.stack([pixel[0, 1:], pixel[0][parent[0, 1:].long()]], dim=1).contiguous()

    return spread_out(one, range(n))


def pass_per_mask(masks: Masks, guides: list[Tensor], trees: list[Tensor], bandwidth: float) -> Masks:
    """Apply Eq. 14 with 𝒩 = all pixels, mask by mask."""
    result = torch.empty_like(masks)

    def one(i: int) -> None:
        flat, ends = guides[i].flatten(1), trees[i].long()
        s = ((flat[:, ends[:, 0]] - flat[:, ends[:, 1]]).square().sum(dim=0) / bandwidth**2).contiguous()
        union_sums(*(array(x) for x in (masks[i].flatten(), trees[i], s.argsort(), s, result[i].view(-1))))

    spread_out(one, range(len(masks)))
    return result


def local_per_mask(masks: Masks, image: Tensor, boxes: Tensor, bandwidth: float, window: int, steps: int) -> Masks:
    """Apply Eq. 14 over a window: affinities of the whole map for every mask, masks unfolded in every step."""
    n, h, w = masks.shape
    r, d = window // 2, len(image)
    images = image.expand(n, -1, -1, -1)
    there = unfold(pad(images, [r] * 4), window).view(n, d, window * window, h * w)
    inside = unfold(pad(torch.ones(n, 1, h, w), [r] * 4), window)
    affinity = torch.exp(-(there - images.reshape(n, d, 1, h * w)).square().sum(dim=1) / bandwidth**2) * inside
    del there
    now = masks * boxes
    for _ in range(steps):
        around = unfold(pad(now[:, None], [r] * 4), window)
        now = ((affinity * around).sum(dim=1) / affinity.sum(dim=1)).view(n, h, w) * boxes
    return now
