"""Affinity from a seed pixel (§3.3, Eq. 7–14; Figure 4), as one figure.

All maps share one scale from 0 to 1 and one perceptual color map; white lines are the ground-truth outline, which no
affinity uses; rows and columns are cells of the map at stride 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor

from misa.figures.example import Example
from misa.figures.sheet import Scales, Sheet, Tile, chart, outline, trace, write
from misa.figures.style import ACCENT, LINES, PAGE, Picture
from misa.ops.propagation import SemanticGuide
from misa.ops.seed_affinity import KERNELS, AffinitySettings, Kernel, Seed, SeedField, seed_mask

Start = Literal["seed", "blob", "box"]
Reach = Literal["local", "global"]
# Unicode instead of TeX, which would be parsed again at every move of a slider.
SYMBOLS: dict[Kernel, str] = {"color": "A", "feature": "Aᶠ", "saliency": "Aᶜ", "enhanced": "Âᶜ"}
NAMES: dict[Kernel, str] = {"color": "color", "feature": "feature", "saliency": "saliency", "enhanced": "SEPA"}
_SIDE = 150  # pixels of a tile's longer side
Line = Literal["window", "pixels", "tree", "mask"]
LINES_OF_MAPS: tuple[Line, ...] = ("window", "pixels", "tree", "mask")
# The tiles of the image's column, by the number of lines drawn.
_FIRST = {1: ("image",), 2: ("image", "start"), 3: ("image", "start", "truth"), 4: ("image", "seen", "start", "truth")}
_MARGIN, _GAP, _TITLE, _LABEL, _BAR = 10, 9, 22, 24, 46
_PROFILE = 128
_ACROSS, _DOWN = 566, 552  # width and height of a panel's figure in pixels
_NARROWEST, _LOWEST = 66, 46  # width of a column and height of a row in pixels: those of the longest names
_LETTER = 8.2  # mean width of a bold letter of the title in pixels; a longer name is shortened in the middle
_AROUND = 2  # cells around the window in the zoomed tiles


@dataclass(frozen=True)
class Layout:
    """The layout of the figure for a map of `h` x `w` cells with `kernels` columns.

    lines: the maps to draw, one below the other; side: longer side of a tile in pixels.
    """

    h: int
    w: int
    kernels: int
    window: int
    seed: Seed
    lines: tuple[Line, ...] = LINES_OF_MAPS
    side: int = _SIDE

    @property
    def first(self) -> tuple[str, ...]:
        """The tiles of the image's column."""
        return _FIRST[len(self.lines)]

    @cached_property
    def _side(self) -> tuple[int, int]:
        scale = self.side / max(self.h, self.w)
        return max(round(self.h * scale), 1), max(round(self.w * scale), 1)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the figure in pixels."""
        down, step = self.steps
        across = _MARGIN + step * (self.kernels + 1) + _LABEL + _BAR
        return max(across, 520), _TITLE + 22 + len(self.lines) * down + _PROFILE

    @property
    def steps(self) -> tuple[int, int]:
        """Distances of two rows and of two columns in pixels, of which tiles are the middle."""
        height, width = self._side
        return max(height, _LOWEST) + _GAP, max(width, _NARROWEST) + _GAP

    def tile(self, column: int, row: int) -> Tile:
        """Returns a tile: column 0 is the image's, the kernels follow; their line "window" shows the window only."""
        (height, width), (down, across) = self._side, self.steps
        left = _MARGIN + column * across + (_LABEL if column else 0) + (across - _GAP - width) // 2
        top = _TITLE + 22 + row * down + (down - _GAP - height) // 2
        if column and self.lines[row] == "window":
            reach = self.window // 2 + _AROUND
            first = self.seed[0] - reach, self.seed[1] - reach
            side = min(height, width)
            inset = (width - side) // 2
            return Tile(left + inset, top + (height - side) // 2, side, side, 2 * reach + 1, 2 * reach + 1, first)
        return Tile(left, top, width, height, self.h, self.w)

    @classmethod
    def of_panel(
        cls, size: tuple[int, int], kernels: int, window: int, seed: Seed, lines: tuple[Line, ...]
    ) -> "Layout":
        """Returns the layout with the largest tiles that leave room for controls at the left on a 1280 x 720 screen."""
        h, w = size
        across = (_ACROSS - _MARGIN - _LABEL - _BAR) / (kernels + 1) - _GAP
        down = (_DOWN - _TITLE - 22 - _PROFILE) / len(lines) - _GAP
        return cls(h, w, kernels, window, seed, lines, int(max(h, w) * min(across / w, down / h)))

    def cell_at(self, x: float, y: float) -> Seed | None:
        """Returns the cell of the map at a point of the figure, None between the tiles."""
        for column in range(self.kernels + 1):
            for row in range(len(self.lines)):
                cell = self.tile(column, row).cell(x, y)
                if cell is not None:
                    return cell if 0 <= cell[0] < self.h and 0 <= cell[1] < self.w else None
        return None


def field_of(example: Example, label: int) -> SeedField:
    """Returns the affinities of an example for a category; reuse it, so that only the seed is computed anew."""
    semantic = saliency = None
    if example.features is not None and example.saliency_factors is not None:
        semantic = SemanticGuide(example.features, example.saliency_factors)
    if example.reading is not None:
        values, factors, sigma = example.reading
        if sigma == "image":
            saliency = SemanticGuide(values, factors)
        else:  # one map per class, with spread 1
            saliency = SemanticGuide(values[label][None], torch.ones(len(factors), 1))
    return SeedField(example.colors, semantic, label, saliency)


def category_at(example: Example, seed: Seed) -> int:
    """Returns the category of the smallest box that contains the seed, 0 if there is none."""
    box = example.box_at(seed)
    return example.labels[box] if box is not None else 0


def start_mask(example: Example, seed: Seed, start: Start) -> Tensor:
    """Returns the initial mask (h w): a disc around the seed, a soft blob in the seed's box, or the whole box."""
    box = example.box_at(seed)
    if start == "seed" or box is None:
        return seed_mask(*example.size, seed, radius=1.0)
    inside = example.box_masks()[box]
    if start == "box":
        return inside.float()
    return blob(inside)


def blob(inside: Tensor) -> Tensor:
    """Returns a soft disc (h w) in the middle of a box mask (h w), 1 at its center and 0 outside the box."""
    h, w = inside.shape
    rows, columns = inside.any(dim=1).nonzero().flatten(), inside.any(dim=0).nonzero().flatten()
    y = (torch.arange(h)[:, None] - rows.float().mean()) / (len(rows) / 3)
    x = (torch.arange(w)[None] - columns.float().mean()) / (len(columns) / 3)
    return torch.exp(-(y**2 + x**2)) * inside


def affinity_figure(
    example: Example,
    seed: Seed,
    *,
    field: SeedField | None = None,
    settings: AffinitySettings | None = None,
    start: Start = "seed",
    reach: Reach = "local",
    lines: tuple[Line, ...] = LINES_OF_MAPS,
    side: int = _SIDE,
) -> Picture:
    """Draw the affinity of a seed (row, column) under each kernel, and the mask that it propagates to.

    Columns: the image, then A, A^f, A^c and Â^c (only A without a teacher). Rows: the window around the seed; every
    pixel; along the minimum spanning tree, set by the longest edge on the path; the mask after `settings.steps`
    iterations inside the box, or after one pass along the tree (reach="global"), relative to its maximum. Below, the
    affinity along the seed's row with the object's true extent shaded: along the tree if any row uses the tree, else
    to every pixel.

    field: `field_of(example, label)`, cached by the caller; by default for the category of the seed's box.
    lines: the rows to draw; side: longer side of a tile in pixels.
    """
    settings = AffinitySettings() if settings is None else settings
    field = field_of(example, category_at(example, seed)) if field is None else field
    layout = Layout(*example.size, len(field.kernels), settings.window, seed, lines, side)
    box = example.box_at(seed)
    inside = example.box_masks()[box] if box is not None else None
    first = start_mask(example, seed, start)
    maps = {"pixels": field.direct(seed, settings)}
    if on_the_tree(lines, reach):
        maps["tree"] = field.along_tree(seed, settings)
    maps["window"] = maps["pixels"]
    masks = maps["mask"] = field.masks(first, settings, box=inside, reach=reach) if "mask" in lines else {}

    width, height = layout.size
    sheet = Sheet(width, height)
    _put_first_column(sheet, layout, example, first)
    _put_maps(sheet, layout, field.kernels, maps)
    bar = _bar(layout)
    sheet.put(bar, np.linspace(1, 0, 128)[:, None].repeat(2, axis=1))

    figure = Picture()
    axes = sheet.draw(figure)
    _name(axes, layout, example, field, settings, reach, bar)
    truth = example.coarse_masks()
    everywhere = [layout.tile(c, r) for c in range(layout.kernels + 1) for r in range(len(lines))]
    if truth is not None and len(truth):
        trace(axes, everywhere, outline(truth.any(dim=0).numpy()), width=0.8)
    if inside is not None:
        trace(axes, [layout.tile(0, 0)], outline(inside.numpy()), color=ACCENT, width=1.2)
    for column, kernel in enumerate(field.kernels if masks else (), 1):
        half = _relative(masks[kernel].numpy()) >= 0.5
        trace(axes, [layout.tile(column, lines.index("mask"))], outline(half), color=ACCENT, width=1.2)
    _crosses(axes, layout, everywhere)
    _window_frames(axes, layout, seed)
    way = "tree" if "tree" in maps else "pixels"
    _draw_profile(axes, layout, {k: v[seed[0]].numpy() for k, v in maps[way].items()}, example, box, _WAYS[way])
    return figure


_WAYS = {"pixels": "to every pixel", "tree": "along the tree"}


def on_the_tree(lines: Sequence[Line], reach: Reach) -> bool:
    """Whether any drawn row needs the spanning tree."""
    return "tree" in lines or ("mask" in lines and reach == "global")


def _put_first_column(sheet: Sheet, layout: Layout, example: Example, first: Tensor) -> None:
    low, high = example.colors.amin(), example.colors.amax()
    seen = ((example.colors - low) / (high - low).clamp(min=1e-6) * 255).byte().permute(1, 2, 0).numpy()
    truth = example.coarse_masks()
    objects = example.box_masks() if truth is None else truth
    pictures: dict[str, NDArray[Any]] = {
        "seen": seen,
        "start": first.numpy(),
        "truth": objects.any(dim=0).float().numpy() if len(objects) else np.zeros(example.size),
    }
    for row, name in enumerate(layout.first):
        if name == "image":
            sheet.put_image(layout.tile(0, row), example.image, example.cells)
        else:
            sheet.put(layout.tile(0, row), pictures[name])


def _put_maps(sheet: Sheet, layout: Layout, kernels: tuple[Kernel, ...], maps: dict[str, dict[Kernel, Tensor]]) -> None:
    for column, kernel in enumerate(kernels, 1):
        for row, line in enumerate(layout.lines):
            tile, values = layout.tile(column, row), maps[line][kernel].numpy()
            if line == "window":
                values = _cropped(values, tile)
            sheet.put(tile, _relative(values) if line == "mask" else values)


def _relative(mask: NDArray[np.floating]) -> NDArray[np.floating]:
    return mask / max(float(mask.max()), 1e-12)


def _cropped(values: NDArray[np.floating], tile: Tile) -> NDArray[np.floating]:
    """Returns the part of a map that a tile shows; outside the map the affinity is 0."""
    reach = tile.rows
    wide = np.pad(values, reach)
    row, column = tile.first[0] + reach, tile.first[1] + reach
    return wide[row : row + tile.rows, column : column + tile.columns]


def _bar(layout: Layout) -> Tile:
    last = len(layout.lines) - 1
    top, bottom = layout.tile(0, min(1, last)), layout.tile(0, last)
    left = _MARGIN + _LABEL + (layout.kernels + 1) * layout.steps[1]
    height = bottom.top + bottom.height - top.top
    return Tile(left, top.top + min(height - 36, 0) / 2, 10, max(height, 36), 128, 2)


def _name(
    axes: Axes, layout: Layout, example: Example, field: SeedField, settings: AffinitySettings, reach: Reach, bar: Tile
) -> None:
    category = example.classes[field.label] if example.classes else f"category {field.label}"
    row, column = layout.seed
    about = f"   seed at cell ({row}, {column}) of {layout.h} x {layout.w}"
    if field.semantic is not None:
        about += f"   c = {category}"
    name, most = example.name, max(int((layout.size[0] - _MARGIN) / _LETTER) - len(about), 8)
    about = (name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most // 2 :]}") + about
    axes.text(_MARGIN, 6, about, fontsize=9, weight="bold", va="top")
    small: dict[str, Any] = {"fontsize": 8, "ha": "center", "va": "bottom"}
    titles = ("image", *(f"{NAMES[kernel]} {SYMBOLS[kernel]}" for kernel in field.kernels))
    for number, title in enumerate(titles):
        tile = layout.tile(number, 0)
        write(axes, tile.left + tile.width / 2, _TITLE + 19, title, **small)
    way = f"mask, {settings.steps} steps" if reach == "local" else "mask, tree"
    window = f"window {settings.window} x {settings.window}"
    words = {"window": window, **_WAYS, "mask": way}
    for number, line in enumerate(layout.lines):
        tile = layout.tile(0, number)
        edge = _MARGIN + layout.steps[1] + _LABEL - 5
        low = tile.height < 80  # of a wide image: split the text into two lines
        text, size = (words[line].replace(" ", "\n", 1), 7) if low else (words[line], 8)
        across: dict[str, Any] = {"ha": "right", "va": "center", "rotation": 90, "multialignment": "center"}
        write(axes, edge, tile.top + tile.height / 2, text, fontsize=size, **across)
    inside: dict[str, Any] = {
        "fontsize": 7,
        "color": "white",
        "va": "top",
        "bbox": {"facecolor": "#000000A0", "lw": 0, "pad": 1.2},
    }
    truth = "truth" if example.masks is not None else "boxes"
    names = {"seen": "as the loss sees it", "start": "start", "truth": truth}
    if layout.tile(0, 0).width < 96:
        names["seen"] = "as seen"
    for number, name in enumerate(layout.first[1:], 1):  # the image is named above its column
        tile = layout.tile(0, number)
        write(axes, tile.left + 3, tile.top + 4, names[name], **inside)
    for value in (0, 0.5, 1):
        y = bar.top + bar.height * (1 - value)
        write(axes, bar.left + bar.width + 4, y, f"{value:g}", fontsize=7, va="center")


def _crosses(axes: Axes, layout: Layout, tiles: Sequence[Tile]) -> None:
    """Mark the seed on every tile except the initial mask, which a cross would hide if it is small."""
    start = layout.tile(0, layout.first.index("start")) if "start" in layout.first else None
    places = [tile.at(layout.seed[0] + 0.5, layout.seed[1] + 0.5) for tile in tiles if tile != start]
    x, y = np.array(places).T
    size = min(9.0, 0.08 * layout.side)
    axes.plot(x, y, "+", color="black", markersize=size, markeredgewidth=0.29 * size)
    axes.plot(x, y, "+", color="white", markersize=0.89 * size, markeredgewidth=0.13 * size)


def _window_frames(axes: Axes, layout: Layout, seed: Seed) -> None:
    """Draw the window around the seed, and the part of the map that the zoomed tiles show."""
    reach = layout.window // 2
    r, c = seed[0] - reach, seed[1] - reach
    far = layout.window
    frame = np.array([r, r, r + far, r + far, r], float), np.array([c, c + far, c + far, c, c], float)
    if "window" in layout.lines:
        line = layout.lines.index("window")
        tiles = [layout.tile(k, line) for k in range(1, layout.kernels + 1)]
        trace(axes, tiles, frame, color="black", width=1.2)
    if "seen" in layout.first:
        trace(axes, [layout.tile(0, layout.first.index("seen"))], frame, color="black", width=1.2)


def _draw_profile(
    axes: Axes, layout: Layout, lines: dict[Kernel, NDArray[np.floating]], example: Example, box: int | None, way: str
) -> None:
    """Plot the affinities to the seed along its row."""
    width, height = layout.size
    inside = extent(example, layout.seed, box)
    columns = np.arange(layout.w, dtype=float)
    chart(
        axes,
        Tile(46, height - _PROFILE + 14, width - 46 - 116, _PROFILE - 58, 1, layout.w),
        {f"{NAMES[kernel]} {SYMBOLS[kernel]}": (columns, values) for kernel, values in lines.items()},
        [LINES[KERNELS.index(kernel)] for kernel in lines],
        Scales(
            xlim=(-0.5, layout.w - 0.5),
            ylim=(0, 1),
            xlabel=f"column of row {layout.seed[0]}: affinity {way}{_gray(example, inside)}",
            xticks=sorted({0, layout.seed[1], layout.w - 1}),
            yticks={"0": 0, "1": 1},
        ),
        shaded=_stretches(inside),
        marks=[layout.seed[1]],
    )


def _gray(example: Example, inside: object | None) -> str:
    return "" if inside is None else "; gray: the object" if example.masks is not None else "; gray: its box"


def extent(example: Example, seed: Seed, box: int | None) -> NDArray[np.bool_] | None:
    """Returns the columns of the seed's row inside its object: by the ground-truth mask, else by its box."""
    if box is None:
        return None
    truth = example.coarse_masks()
    of_row: NDArray[np.bool_] = (truth if truth is not None else example.box_masks())[box, seed[0]].numpy()
    return of_row


def _stretches(inside: NDArray[np.bool_] | None) -> list[tuple[float, float]]:
    """Returns the intervals of columns that are inside, including the full width of their first and last cells."""
    ends = [] if inside is None else np.flatnonzero(np.diff(np.pad(inside, 1).astype(int))).tolist()
    return [(first - 0.5, last - 0.5) for first, last in zip(ends[::2], ends[1::2], strict=True)]


def profile_figure(example: Example, seed: Seed, *, settings: AffinitySettings | None = None) -> Picture:
    """Plot all kernels along the seed's row, to every pixel and along the tree.

    An affinity should fall at the end of the shaded object, and nowhere before.
    """
    settings = AffinitySettings() if settings is None else settings
    field = field_of(example, category_at(example, seed))
    box = example.box_at(seed)
    inside = extent(example, seed, box)
    figure = Picture(figsize=(PAGE, 2.9), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 2.2))
    picture = figure.add_subplot(grid[:, 0])
    picture.imshow(example.image, interpolation="none", extent=(0, example.cells[1], example.cells[0], 0))
    picture.axhline(seed[0] + 0.5, color="white", linewidth=2.2)
    picture.axhline(seed[0] + 0.5, color="black", linewidth=1.0)
    picture.plot(seed[1] + 0.5, seed[0] + 0.5, "+", color="white", markersize=9, markeredgewidth=2)
    picture.set_axis_off()
    columns = np.arange(example.size[1])
    maps = {_WAYS["pixels"]: field.direct(seed, settings), _WAYS["tree"]: field.along_tree(seed, settings)}
    for place, (name, values) in enumerate(maps.items()):
        axes = figure.add_subplot(grid[place, 1])
        for first, last in _stretches(inside):
            axes.axvspan(first, last, color="#DDDDDD", linewidth=0)
        for kernel, affinity in values.items():
            label, style = f"{NAMES[kernel]} {SYMBOLS[kernel]}", LINES[KERNELS.index(kernel)]
            axes.plot(columns, affinity[seed[0]].numpy(), label=label, linewidth=1.4, **style)
        axes.axvline(seed[1], color="black", linewidth=0.8)
        axes.set(xlim=(0, example.size[1] - 1), ylim=(0, 1.04), yticks=(0, 0.5, 1))
        axes.set_title(name, fontsize=8, loc="left", pad=2)
        axes.tick_params(labelsize=7, length=2, labelbottom=place == 1)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"column of row {seed[0]}{_gray(example, inside)}", fontsize=8)
    figure.axes[1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=2.6)
    return figure
