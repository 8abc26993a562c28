"""The CPU path of features and windows: distances of S along grid edges and over windows, Eq. 14 over a window."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from misa.ops import _device
from misa.ops import _kernels as kernels
from misa.ops._device import Layer
from misa.ops._run import run, scratch, spread_out

ROWS = 8  # the kernels take so many rows at once
STRIP = 4 * ROWS  # and a thread so many
Crop = tuple[int, int, int, int]  # first row and column, one past the last


@dataclass
class Field:
    """Where the planes of a group lie in the image: around its boxes, with a border of half a window."""

    crops: Sequence[Crop]
    top: int = 0
    left: int = 0
    rows: int = 0
    columns: int = 0
    start: int = 0

    @property
    def size(self) -> int:
        """Pixels of a plane."""
        return self.rows * self.columns


class Windows:
    """Â of several groups of masks around the boxes of each: a plane per offset in half of the window.

    Planes of all groups lie in one piece of memory. `members` are the masks of every group; a mask with an empty box
    counts nowhere.
    """

    def __init__(
        self, boxes: Tensor | None, h: int, w: int, members: Sequence[Sequence[int]], offsets: Sequence[tuple[int, int]]
    ) -> None:
        n = sum(len(group) for group in members)
        self.boxes = torch.ones(1, h, w).expand(n, h, w) if boxes is None else boxes.float().contiguous()
        self.crops = spread_out(_bounds, self.boxes) if n else []
        self.h, self.w, self.half = h, w, len(offsets)
        self.offsets = torch.tensor(list(offsets), dtype=torch.int64).reshape(-1, 2)
        self.reach = reach = max((max(abs(dy), abs(dx)) for dy, dx in offsets), default=0)
        self.needed = torch.zeros(len(members), -(-h // ROWS), w, dtype=torch.int32)
        self.members = [[i for i in group if self.crops[i][2] > 0] for group in members]
        self.fields: list[Field] = []
        start = 0
        for group, needed in zip(self.members, self.needed, strict=True):
            field = Field([self.crops[i] for i in group])
            if group:
                top, left, bottom, right = zip(*field.crops, strict=True)
                field.top, field.left = min(top) - reach, min(left) - reach
                field.rows, field.columns = max(bottom) + reach - field.top, max(right) + reach - field.left
                crops = torch.tensor(field.crops)
                run(kernels.mark_needed, crops, len(crops), reach, h, w, needed)
            field.start = start
            start += self.half * field.size
            self.fields.append(field)
        self.planes = torch.empty(start)
        for g, field in enumerate(self.fields):  # strips end where the image does
            self.of(g)[:, : max(0, -field.top)] = 0.0
            self.of(g)[:, max(0, h - field.top) :] = 0.0

    def of(self, g: int) -> Tensor:
        """The planes of one group."""
        field = self.fields[g]
        return self.planes[field.start :][: self.half * field.size].view(self.half, field.rows, field.columns)

    def shape(self, groups: Sequence[int]) -> Tensor:
        """The `fields` of the kernels."""
        chosen = [self.fields[g] for g in groups]
        return torch.tensor([[f.top, f.left, f.rows, f.columns, f.start] for f in chosen], dtype=torch.int64)

    def room(self, new: Callable[[int, torch.dtype], int], groups: int) -> tuple[int, int, int]:
        """`runs`, `packed` and `distance` of the kernels."""
        return (
            new(4 * groups * (self.w // 16 + 1), torch.int64),
            new(16 * (ROWS + self.reach) * (self.w + 64) + 2 * self.reach, torch.float32),
            new(groups * ROWS * self.half * (self.w + 16), torch.float32),
        )


def plan_windows(
    boxes: Tensor | None, h: int, w: int, members: Sequence[Sequence[int]], offsets: Sequence[tuple[int, int]]
) -> Windows:
    """The windows that `feature_lengths` is to measure and `propagate_window` to go along."""
    return Windows(boxes, h, w, members, offsets)


def _bounds(box: Tensor) -> Crop:
    """First row and column where the box is not 0, and one past the last; all 0 for an empty box."""
    h, w = box.shape
    found = torch.empty(4, dtype=torch.int64)
    with scratch() as new:
        run(kernels.bounds, box, h, w, new(w, torch.float32), found)
    y0, x0, y1, x1 = found.tolist()
    return (y0, x0, y1, x1) if y1 > 0 else (0, 0, 0, 0)


def feature_lengths(
    features: Tensor, factors: Tensor, windows: Windows | None = None, groups: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Squared distances of K^c · S along the grid edges (c m), and the sums of S_d and S_d² (d 2).

    With `windows`, which has a group per row of `factors`, those over the windows go to its planes in the same pass.
    """
    d, h, w = features.shape
    c = len(factors)
    features, factors = features.contiguous(), factors.contiguous()
    squares = factors.square()
    lengths = torch.empty(c, (h - 1) * w + h * (w - 1))
    workers = torch.get_num_threads()
    moments = torch.zeros(workers, d, 2, dtype=torch.float64)
    blocks = -(-h // ROWS)
    cuts = [min(h, ROWS * (blocks * i // workers)) for i in range(workers)] + [h]
    if windows is None:
        windows, groups = Windows(None, h, w, [[]] * c, []), range(c)
    shape, needed = windows.shape(groups), windows.needed[list(groups)]

    def strip(first: int, last: int, sums: Tensor) -> None:
        with scratch() as new:
            run(
                kernels.feature_distances, features, factors, squares, c, d, h, w, first, last,
                new(ROWS * c * w + 16, torch.float32), lengths, sums, windows.reach, windows.half, windows.offsets,
                shape, needed, *windows.room(new, c), windows.planes,
            )  # fmt: skip

    spread_out(strip, cuts[:-1], cuts[1:], list(moments))
    return lengths, moments.sum(dim=0)


def propagate_window(
    masks: Tensor,
    boxes: Tensor | None,
    valid: Sequence[Tensor | None],
    offsets: Sequence[tuple[int, int]],
    groups: Sequence[tuple[Sequence[int], Sequence[Layer]]],
    steps: int,
    windows: Windows | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Eq. 14 over a window for groups of masks, each with its layers of affinity; `offsets` is half of the window.

    Where `feature_lengths` has filled `windows`, the last layer of every group is there already but for a factor in
    `scales`. A spread that changes from pixel to pixel makes the affinity lopsided; such layers go the torch way.
    """
    if any(layer[3] is not None for _, layers in groups for layer in layers):
        return _device.propagate_window(masks, boxes, valid, offsets, groups, steps)
    n, h, w = masks.shape
    masks, result = masks.contiguous(), torch.zeros(n, h, w)
    present = _present(valid, h, w)
    layers = [layers for _, layers in groups]
    if windows is None:
        windows = Windows(boxes, h, w, [members for members, _ in groups], offsets)
    _fill(windows, layers, present, scales)
    norms = [torch.empty(field.rows, field.columns) for field in windows.fields]
    centres = [float(sum(share for _, _, share, _ in mine)) for mine in layers]

    def normalize(g: int) -> None:
        field = windows.fields[g]
        run(
            kernels.local_norm, windows.of(g), windows.half, windows.offsets, field.rows, field.columns, windows.reach,
            h, w, field.top, field.left, centres[g], present[g], norms[g],
        )  # fmt: skip

    def one(i: int, g: int) -> None:
        field, (y0, x0, y1, x1) = windows.fields[g], windows.crops[i]
        size = (y1 - y0 + 2 * windows.reach) * (x1 - x0 + 2 * windows.reach)
        with scratch() as new:
            now, then, sums = (new(length, torch.float32) for length in (size, size, w))
            run(
                kernels.local_steps, windows.of(g), norms[g], windows.half, windows.offsets, field.rows, field.columns,
                w, field.top, field.left, windows.reach, windows.boxes[i], y0, x0, y1 - y0, x1 - x0, centres[g], steps,
                masks[i], now, then, sums, result[i],
            )  # fmt: skip

    tasks = [(i, g) for g, members in enumerate(windows.members) for i in members]
    if tasks:
        spread_out(normalize, range(len(groups)))
        spread_out(one, *zip(*tasks, strict=True))
    return result


def _present(valid: Sequence[Tensor | None], h: int, w: int) -> list[Tensor]:
    """1 where a pixel is there, for every group; groups of one image share theirs."""
    made: dict[int, Tensor] = {}
    for mine in valid:
        if id(mine) not in made:
            made[id(mine)] = torch.ones(h, w) if mine is None else mine.float().contiguous()
    return [made[id(mine)] for mine in valid]


def _fill(
    windows: Windows, layers: Sequence[Sequence[Layer]], present: Sequence[Tensor], scales: Tensor | None
) -> None:
    """The affinities of all groups, strip by strip; layers with the same values share one reading of these.

    With `scales` the last layer of every group is in the planes already, as distances.
    """
    h, w, half = windows.h, windows.w, windows.half
    shared: dict[tuple[int, int], list[tuple[int, Layer]]] = {}
    for g, mine in enumerate(layers):
        for layer in mine if scales is None else mine[:-1]:
            shared.setdefault((id(layer[0]), id(present[g])), []).append((g, layer))
    calls = []
    for users in shared.values():
        its = [g for g, _ in users]
        factors = torch.stack([squares for _, (_, squares, _, _) in users]).sqrt()
        shares = torch.tensor([share for _, (_, _, share, _) in users])
        there = () if scales is None else (scales[its].contiguous(), torch.tensor([layers[g][-1][2] for g in its]))
        where = (present[its[0]], windows.shape(its), windows.needed[its])
        calls.append((users[0][1][0].contiguous(), factors, shares, where, there))
    every = windows.shape(range(len(layers)))

    def strip(first: int) -> None:
        last = min(first + STRIP, h)
        if scales is None:
            run(kernels.clear_planes, len(layers), half, every, first, last, windows.planes)
        for values, factors, shares, (valid, fields, needed), there in calls:
            c = len(factors)
            if there:
                run(
                    kernels.decay_planes, c, half, windows.offsets, fields, first, last, h, w, *there, valid,
                    windows.planes,
                )  # fmt: skip
            with scratch() as new:
                run(
                    kernels.add_affinities, values, factors, shares, c, len(values), h, w, first, last, windows.reach,
                    half, windows.offsets, valid, fields, needed, *windows.room(new, c), windows.planes,
                )  # fmt: skip

    spread_out(strip, range(0, h, STRIP))
