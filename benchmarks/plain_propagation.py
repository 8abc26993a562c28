"""The propagation written straight from the equations, as a peer for the benchmark: nothing is shared.

One spanning tree per mask, the tree's edges sorted again in every pass and joined by a union-find, the window
propagation by `unfold` on the whole map. The loops are compiled like ours and run one thread per mask, so that
the comparison is between algorithms and not between languages.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from misa.ops import _cpu
from misa.ops._compile import I8, F4s, F8s, I4s, I8s, f4, f8, i8, kernel
from misa.ops._kernels import exp_minus
from misa.ops._run import run, spread_out
from misa.ops.tree import grid_lengths

Masks = Tensor


@kernel
def union_sums(
    values: F4s, ends: I4s, order: I8s, s: F4s, p: I8, top: I4s, size: F8s, total: F8s, up: F8s, down: F8s, out: F4s
) -> None:
    """Kruskal over sorted edges; clusters joined by size, sums that all their pixels receive kept at their tops."""
    for v in range(p):
        top[v] = v
        size[v] = 1.0
        total[v] = values[v]
        up[v] = 0.0
        down[v] = 0.0
    for i in range(p - 1):
        e = order[i]
        a = i8(ends[2 * e])
        b = i8(ends[2 * e + 1])
        while top[a] != a:
            a = i8(top[a])
        while top[b] != b:
            b = i8(top[b])
        if size[a] < size[b]:
            swap = a
            a = b
            b = swap
        near = exp_minus(min(f8(s[e]), 600.0))
        to_a = near * total[b]
        to_b = near * total[a]
        up[a] += to_a
        up[b] += to_b - up[a]
        to_a = near * size[b]
        to_b = near * size[a]
        down[a] += to_a
        down[b] += to_b - down[a]
        total[a] += total[b]
        size[a] += size[b]
        top[b] = a
    for v in range(p):
        numerator = f8(values[v])
        denominator = 1.0
        at = v
        while True:
            numerator += up[at]
            denominator += down[at]
            if top[at] == at:
                break
            at = i8(top[at])
        out[v] = f4(numerator / denominator)


def tree_per_mask(image: Tensor, n: int) -> list[Tensor]:
    """The ends of the tree edges, for every mask anew."""
    h, w = image.shape[1:]

    def one(_: int) -> Tensor:
        pixel, parent, _edge = _cpu.spanning_trees(grid_lengths(image)[None], h, w)
        return torch.stack([pixel[0, 1:], pixel[0][parent[0, 1:].long()]], dim=1).contiguous()

    return spread_out(one, range(n))


def pass_per_mask(masks: Masks, guides: list[Tensor], trees: list[Tensor], bandwidth: float) -> Masks:
    """Eq. 14 with N = all pixels, mask by mask."""
    p = masks[0].numel()
    result = torch.empty_like(masks)

    def one(i: int) -> None:
        flat, ends = guides[i].flatten(1), trees[i].long()
        s = ((flat[:, ends[:, 0]] - flat[:, ends[:, 1]]).square().sum(dim=0) / bandwidth**2).contiguous()
        top = torch.empty(p, dtype=torch.int32)
        size, total, up, down = torch.empty(4, p, dtype=torch.float64)
        run(union_sums, masks[i], trees[i], s.argsort(), s, p, top, size, total, up, down, result[i])

    spread_out(one, range(len(masks)))
    return result


def local_per_mask(masks: Masks, image: Tensor, boxes: Tensor, bandwidth: float, window: int, steps: int) -> Masks:
    """Eq. 14 over a window: affinities of the whole map for every mask, masks unfolded in every step."""
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


def distance_per_category(features: Tensor, factors: Tensor) -> list[Tensor]:
    """Eq. 11–12 along the grid edges, category by category."""
    return [grid_lengths(k[:, None, None] * features) for k in factors]
