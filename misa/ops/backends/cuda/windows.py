"""Window affinities of every image and category, and propagation steps with them (Eq. 7–9, 12–14)."""

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from misa.ops.backends.cuda.features import distances
from misa.ops.backends.cuda.works import block, table
from misa.ops.backends.torch_ops import Index, Layer, Near
from misa.ops.neighbors import Offset


@triton.jit
def _exponent(distance, precision, use, k, half, p, at, i, near):
    """Return the distance at an offset times its layer's precision 1/σ²: one per pixel, one for all, or none."""
    row, start, stride = tl.load(use).to(tl.int64) * half + k, tl.load(use + 1), tl.load(use + 2)
    e = tl.load(distance + row * p + at, mask=near, other=0.0)
    return e * tl.load(precision + start + i * stride, mask=near & (start >= 0), other=1.0)


@triton.jit
def _kernel(e):
    """Return exp(−e); 0 if it is below 1e-20."""
    a = tl.exp(-e)
    return tl.where(a < 1e-20, 0.0, a)


@triton.jit
def _weights(
    distance, known, precision, shares, uses, valid, images, offsets, planes, half, h, w,
    L: tl.constexpr, KNOWN: tl.constexpr, PRODUCT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write Â of group g plane by plane: 1 / its sum, then the center, the offsets and their opposites.

    Â combines L layers; for a PRODUCT their exponents are added. If KNOWN, `known` holds the last one's distances.
    """
    p = h * w
    g = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < p
    y, x = i // w, i % w
    image = tl.load(images + g)
    valid += image.to(tl.int64) * p
    here = ok & (tl.load(valid + i, mask=ok & (image >= 0), other=1) != 0)
    planes += g.to(tl.int64) * (2 * half + 2) * p
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if PRODUCT:
        total += 1.0
    else:
        for u in tl.static_range(L):
            total += tl.load(shares + g * L + u)
    total = tl.where(here, total, 0.0)
    tl.store(planes + p + i, total, mask=ok)
    plane = planes + 2 * p
    for k in range(half):
        dy, dx = tl.load(offsets + 2 * k), tl.load(offsets + 2 * k + 1)
        for turn in tl.static_range(2):
            ny, nx = y + dy * (1 - 2 * turn), x + dx * (1 - 2 * turn)
            j = ny * w + nx
            near = here & (ny >= 0) & (ny < h) & (nx >= 0) & (nx < w)
            near = near & (tl.load(valid + j, mask=near & (image >= 0), other=1) != 0)
            at = i if turn == 0 else j
            a = tl.zeros((BLOCK,), dtype=tl.float32)
            for u in tl.static_range(L):
                use = g * L + u
                share = tl.load(shares + use)
                if KNOWN and u == L - 1:
                    e = _exponent(known, precision, uses + 3 * use, k, half, p, at, i, near)
                else:
                    e = _exponent(distance, precision, uses + 3 * use, k, half, p, at, i, near)
                a += share * (e if PRODUCT else _kernel(e))
            a = tl.where(near, _kernel(a) if PRODUCT else a, 0.0)
            total += a
            tl.store(plane + turn * half * p + i, a, mask=ok)
        plane += p
    tl.store(planes + i, tl.where(total == 0, 0.0, 1 / tl.where(total == 0, 1.0, total)), mask=ok)  # 0 at padding


@triton.jit
def _step(
    now, then, planes, box, group, offsets, half, h, w, BOXES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write one weighted mean over the window, times the box; tiles outside the box stay 0 in both buffers."""
    n = tl.program_id(0).to(tl.int64)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    x = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    p = h * w
    i = y * w + x
    ok = (y < h) & (x < w)
    now += n * p
    inside = tl.load(box + n * p + i, mask=ok, other=0.0) if BOXES else ok.to(tl.float32)
    if tl.max(tl.abs(inside)) > 0:
        mine = planes + tl.load(group + n).to(tl.int64) * (2 * half + 2) * p
        mean = tl.load(mine + p + i, mask=ok, other=0.0) * tl.load(now + i, mask=ok, other=0.0)
        plane = mine + 2 * p
        for k in range(2 * half):
            turned = k >= half
            q = tl.where(turned, k - half, k)
            dy, dx = tl.load(offsets + 2 * q), tl.load(offsets + 2 * q + 1)
            dy, dx = tl.where(turned, -dy, dy), tl.where(turned, -dx, dx)
            near = ok & (y + dy >= 0) & (y + dy < h) & (x + dx >= 0) & (x + dx < w)
            weight = tl.load(plane + i, mask=near, other=0.0)
            mean += weight * tl.load(now + i + dy * w + dx, mask=near, other=0.0)
            plane += p
        mean *= tl.load(mine + i, mask=ok, other=0.0) * inside
        tl.store(then + n * p + i, mean, mask=ok)


def window_planes(
    h: int,
    w: int,
    valid: Sequence[Tensor | None],
    offsets: Tensor,
    groups: Sequence[Sequence[Layer]],
    product: bool = False,
    near: Near | None = None,
) -> Float[Tensor, "g k h w"]:
    """Return per group 1 / Σ Â, then Â to the center, to the offsets (k 2) and to their opposites.

    Layers with the same values, the categories of an image, share one pass over them; with the same factors too, as
    for colors, they share the distances. `near` has the distances of every group's last layer.
    """
    like, half, layers = groups[0][0][0], len(offsets), len(groups[0])
    every = [(g, u, layer) for g, mine in enumerate(groups) for u, layer in enumerate(mine)]
    assert len(every) == layers * len(groups), "every group has as many layers"
    unknown = [layer for _, u, layer in every if near is None or u < layers - 1]
    rows: dict[int, dict[int, Tensor]] = {}  # the rows of factors of each map, both by identity
    for its, row, *_ in unknown:
        rows.setdefault(id(its), {})[id(row)] = row
    maps = {id(its): its for its, *_ in unknown}
    place = {pair: k for k, pair in enumerate((its, row) for its in rows for row in rows[its])}
    found = torch.empty(len(place), half, h, w, device=like.device)
    for key, mine in rows.items():
        squares = torch.stack(list(mine.values())).float()
        first = place[key, next(iter(mine))]
        distances(maps[key].float(), squares, offsets, found[first : first + len(squares)])
    spreads = {id(layer[3]): layer[3] for *_, layer in every if layer[3] is not None}
    masks = {id(mine): mine for mine in valid if mine is not None}
    scales = [] if near is None or near.scale is None else [1 / near.scale]
    shift = sum(map(len, scales))

    def use(g: int, u: int, layer: Layer) -> tuple[int, int, int]:
        """Return the row of a layer's distances, the start of its precision (−1: none) and its stride per pixel."""
        its, row, _, spread = layer
        known = near is not None and u == layers - 1
        at = g if known else place[id(its), id(row)]
        if spread is not None:
            return at, shift + number(spread, spreads) * h * w, 1
        return at, g if known and scales else -1, 0

    numbers = table([x for mine in every for x in use(*mine)] + [number(mine, masks) for mine in valid], like)
    shares = torch.tensor([float(layer[2]) for *_, layer in every]).to(like.device, non_blocking=True)
    present = torch.stack(list(masks.values())).view(torch.int8) if masks else shares
    precisions = [*scales, *(spread.float().flatten() for spread in spreads.values())]
    precision = torch.cat(precisions) if precisions else shares
    planes = torch.empty(len(groups), 2 + 2 * half, h, w, device=like.device)
    size = block(128, h * w)
    _weights[(triton.cdiv(h * w, size), len(groups))](
        found, found if near is None else near.distances, precision, shares, numbers, present,
        numbers[3 * len(every) :], offsets, planes, half, h, w,
        L=layers, KNOWN=near is not None, PRODUCT=product, BLOCK=size,
    )  # fmt: skip
    return planes


def number(mine: Tensor | None, among: Mapping[int, Tensor]) -> int:
    """Return the index of a tensor among others, by identity; −1 for None."""
    return -1 if mine is None else list(among).index(id(mine))


def propagate_window(
    masks: Float[Tensor, "n h w"],
    boxes: Tensor | None,
    valid: Sequence[Tensor | None],
    offsets: Sequence[Offset],
    groups: Sequence[tuple[Index, Sequence[Layer]]],
    steps: int,
    *,
    product: bool = False,
    near: Near | None = None,
) -> Float[Tensor, "n h w"]:
    """Apply Eq. 14 over a window to groups of masks, each with its affinity layers; `offsets` is half of the window.

    `near`: the distances of every group's last layer, from `lengths_and_variance`.
    """
    n, h, w = masks.shape
    if n == 0:
        return masks.clone()
    now = masks.float().contiguous() if boxes is None else (masks * boxes).float().contiguous()
    if steps == 0:
        return now
    of_mask = [0] * n
    for which, (members, _) in enumerate(groups):
        for i in members:
            of_mask[i] = which
    numbers = table([*(x for offset in offsets for x in offset), *of_mask], masks)
    half = len(offsets)
    where, group = numbers[: 2 * half].view(-1, 2), numbers[2 * half :]
    planes = window_planes(h, w, valid, where, [layers for _, layers in groups], product, near)
    box = now if boxes is None else boxes.float().contiguous()
    then = torch.zeros_like(now)
    rows, columns = block(4, min(h, 16)), block(64, min(w, 64))
    grid = (n, triton.cdiv(h, rows), triton.cdiv(w, columns))
    for step in range(steps):
        _step[grid](
            now, then, planes, box, group, where, half, h, w, BOXES=boxes is not None, ROWS=rows, COLUMNS=columns
        )
        if step == 0 and boxes is None:
            now = torch.empty_like(now)  # never write into the caller's masks
        now, then = then, now
    return now
