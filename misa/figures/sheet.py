"""Many small maps composed into a single image, because one Axes each would be too slow for a live panel.

Lengths are in pixels of the figure at 100 dpi, from its top left corner.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from numpy.typing import NDArray

from misa.figures.style import Picture, shade

DPI = 100


@dataclass(frozen=True)
class Tile:
    """The rectangle of a map of `rows` x `columns` cells on a sheet; converts between points and cells."""

    left: float
    top: float
    width: float
    height: float
    rows: int
    columns: int
    first: tuple[int, int] = (0, 0)  # the cell at the top left, other than (0, 0) for a crop

    def cell(self, x: float, y: float) -> tuple[int, int] | None:
        """Returns the cell (row, column) of the map at a point, None outside."""
        row = int((y - self.top) / self.height * self.rows // 1)
        column = int((x - self.left) / self.width * self.columns // 1)
        inside = 0 <= row < self.rows and 0 <= column < self.columns
        return (row + self.first[0], column + self.first[1]) if inside else None

    def at(
        self, rows: NDArray[np.floating] | float, columns: NDArray[np.floating] | float
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Returns x and y of positions on the map; the center of cell (r, c) is at (r + 0.5, c + 0.5)."""
        y = self.top + (np.asarray(rows, float) - self.first[0]) / self.rows * self.height
        x = self.left + (np.asarray(columns, float) - self.first[1]) / self.columns * self.width
        return x, y


class Sheet:
    """A white canvas of `width` x `height` pixels for tiles; `draw` makes it the background of a figure."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels = np.full((height, width, 3), 255, np.uint8)

    def put(self, tile: Tile, picture: NDArray[Any]) -> None:
        """Draw a map (h w) with values 0 to 1, or an RGB image (h w 3), enlarged to its tile by nearest neighbor.

        A larger one is reduced by averaging; maps are averaged before coloring, which is faster.
        """
        w, h = round(tile.width), round(tile.height)
        y, x = round(tile.top), round(tile.left)
        cells: NDArray[Any] = np.ascontiguousarray(picture, np.float32 if picture.ndim == 2 else np.uint8)
        if cells.shape[0] > h:
            cells = cv2.resize(cells, (w, h), interpolation=cv2.INTER_AREA)
        colors: NDArray[Any] = shade(cells) if picture.ndim == 2 else cells
        if colors.shape[:2] != (h, w):
            colors = cv2.resize(colors, (w, h), interpolation=cv2.INTER_NEAREST)
        self.pixels[y : y + h, x : x + w] = colors

    def put_image(self, tile: Tile, image: NDArray[np.uint8], cells: tuple[float, float]) -> None:
        """Draw an RGB image (h w 3) of that many rows and columns of a map's cells where it lies on the map's tile.

        What reaches beyond the map is cut off, to whole pixels of the image.
        """
        shares = [whole / count for whole, count in zip(cells, (tile.rows, tile.columns), strict=True)]
        rows, columns = (
            max(round(side / max(share, 1)), 1) for side, share in zip(image.shape[:2], shares, strict=True)
        )
        height, width = (
            max(side * min(share, 1), 1) for side, share in zip((tile.height, tile.width), shares, strict=True)
        )
        self.put(replace(tile, height=height, width=width), image[:rows, :columns])

    def draw(self, figure: Figure) -> Axes:
        """Returns an Axes over the whole figure, in pixels of the sheet, with the sheet as background."""
        height, width = self.pixels.shape[:2]
        figure.set_size_inches(width / DPI, height / DPI)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        image = _Ready(axes, extent=(0, width, height, 0), interpolation="none")
        image.set_data(self.pixels)
        axes.add_image(image)
        return axes


class RasterText(Artist):
    """Text on the sheet, rasterized once and then copied: text took half of a figure's time."""

    def __init__(self, axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
        super().__init__()
        self.place, self.text, self.style, self.sheet = (x, y), text, style, axes
        self.set_zorder(3)

    def draw(self, renderer: Any) -> None:
        """Called by matplotlib."""
        x, y = (float(v) for v in self.sheet.transData.transform(self.place))
        if isinstance(renderer, RendererAgg):
            plate = tuple(sorted(self.style.get("bbox", {}).items()))
            rest = tuple(sorted((k, v) for k, v in self.style.items() if k != "bbox"))
            pixels, left, bottom = _stamp(self.text, rest, plate, renderer.dpi)
            context = renderer.new_gc()
            renderer.draw_image(context, round(x) + left, round(y) + bottom, pixels)
            context.restore()
            return
        text = Text(x, y, self.text, transform=None, parse_math=False, **self.style)
        text.set_figure(self.sheet.figure)
        text.draw(renderer)


@lru_cache(maxsize=1024)
def _stamp(text: str, style: tuple[Any, ...], plate: tuple[Any, ...], dpi: float) -> tuple[NDArray[np.uint8], int, int]:
    """Returns the pixels of a text, bottom row first, and their offset from its position."""
    across, up = round(8 * dpi), round(3 * dpi)
    figure = Picture(figsize=(2 * across / dpi, 2 * up / dpi), dpi=dpi)
    figure.patch.set_visible(False)
    box = {"bbox": dict(plate)} if plate else {}
    figure.text(across, up, text, transform=None, **dict(style), **box)
    renderer = RendererAgg(2 * across, 2 * up, dpi)
    figure.draw(renderer)
    drawn = np.asarray(renderer.buffer_rgba())[::-1]
    rows, columns = (np.flatnonzero(drawn[..., 3].any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return np.zeros((1, 1, 4), np.uint8), 0, 0
    part = drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
    return part, int(columns[0]) - across, int(rows[0]) - up


def write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Put text on a sheet, with the arguments of `Axes.text`; meant for text that is drawn repeatedly."""
    axes.add_artist(RasterText(axes, x, y, text, **style))


class _Ready(AxesImage):
    """An image that fills its axes; not resampled if it already has their size, which saves half of the time."""

    def make_image(self, renderer: Any, magnification: float = 1.0, unsampled: bool = False) -> Any:
        """Called by matplotlib."""
        pixels = np.asarray(self.get_array())
        frame = self.axes.bbox
        if magnification == 1 and (round(frame.height), round(frame.width)) == pixels.shape[:2]:
            return cv2.cvtColor(pixels[::-1], cv2.COLOR_RGB2RGBA), frame.x0, frame.y0, None
        return super().make_image(renderer, magnification, unsampled)


def outline(mask: NDArray[np.bool_]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Returns the border of a mask (h w) along its cells, as rows and columns of line ends, NaN between lines."""
    padded = np.pad(mask, 1)
    down, across = padded[1:, :] != padded[:-1, :], padded[:, 1:] != padded[:, :-1]
    r, c = np.nonzero(down[:, 1:-1])
    horizontal = (np.stack([r, r, np.full(len(r), np.nan)], 1), np.stack([c, c + 1.0, np.full(len(c), np.nan)], 1))
    r2, c2 = np.nonzero(across[1:-1])
    vertical = (np.stack([r2, r2 + 1.0, np.full(len(r2), np.nan)], 1), np.stack([c2, c2, np.full(len(c2), np.nan)], 1))
    return (
        np.concatenate([horizontal[0].ravel(), vertical[0].ravel()]),
        np.concatenate([horizontal[1].ravel(), vertical[1].ravel()]),
    )


def trace(
    axes: Axes,
    tiles: Sequence[Tile],
    line: tuple[NDArray[np.floating], NDArray[np.floating]],
    *,
    color: str = "white",
    width: float = 1.0,
) -> None:
    """Draw the same line on several tiles as one artist, clipped to each tile."""
    xs: list[NDArray[np.floating]] = []
    ys: list[NDArray[np.floating]] = []
    gap = np.array([np.nan])
    for tile in tiles:
        x, y = tile.at(*line)
        outside = (
            (x < tile.left - 1)
            | (x > tile.left + tile.width + 1)
            | (y < tile.top - 1)
            | (y > tile.top + tile.height + 1)
        )
        xs += [np.where(outside, np.nan, x), gap]
        ys += [np.where(outside, np.nan, y), gap]
    if xs:
        axes.plot(np.concatenate(xs), np.concatenate(ys), color=color, linewidth=width, solid_capstyle="projecting")


@dataclass(frozen=True)
class Scales:
    """The axes of a small chart: limits, ticks (those of y by their text) and the label of x."""

    xlim: tuple[float, float]
    ylim: tuple[float, float]
    xlabel: str
    xticks: Sequence[float]
    yticks: Mapping[str, float]


def chart(
    axes: Axes,
    tile: Tile,
    lines: Mapping[str, tuple[NDArray[np.floating], NDArray[np.floating]]],
    styles: Sequence[Mapping[str, Any]],
    scales: Scales,
    *,
    shaded: Sequence[tuple[float, float]] = (),
    marks: Sequence[float] = (),
) -> None:
    """Draw a small chart of named lines (x, y) in a tile of a sheet, faster than an Axes of its own.

    shaded: ranges of x with a gray background; marks: x of vertical lines. The names are at the right.
    """
    right, bottom = tile.left + tile.width, tile.top + tile.height
    xlim, ylim = scales.xlim, scales.ylim

    def x(values: NDArray[np.floating] | float) -> NDArray[np.floating]:
        return tile.left + (np.asarray(values, float) - xlim[0]) / (xlim[1] - xlim[0]) * tile.width

    def y(values: NDArray[np.floating] | float) -> NDArray[np.floating]:
        return bottom - (np.clip(values, *ylim) - ylim[0]) / (ylim[1] - ylim[0]) * tile.height

    for first, last in shaded:
        ends = x(np.clip(np.array([first, last]), *xlim))
        axes.fill_between(ends, tile.top, bottom, color="#DDDDDD", linewidth=0)
    for place, ((name, (xs, ys)), style) in enumerate(zip(lines.items(), styles, strict=False)):
        axes.plot(x(xs), y(ys), linewidth=1.5, **style)
        height = tile.top + (place + 0.5) * tile.height / max(len(lines), 4)
        axes.plot([right + 12, right + 40], [height, height], linewidth=1.8, **style)
        write(axes, right + 46, height, name, fontsize=7, va="center")
    axes.plot([tile.left, tile.left, right], [tile.top, bottom, bottom], color="black", linewidth=0.8)
    for mark in marks:
        axes.plot([float(x(mark))] * 2, [tile.top - 4, bottom], color="black", linewidth=0.8)
    for name, value in scales.yticks.items():
        write(axes, tile.left - 5, float(y(value)), name, fontsize=7, ha="right", va="center")
    for value in scales.xticks:
        write(axes, float(x(value)), bottom + 4, f"{value:g}", fontsize=7, ha="center", va="top")
    write(axes, tile.left + tile.width / 2, bottom + 16, scales.xlabel, fontsize=8, ha="center", va="top")
