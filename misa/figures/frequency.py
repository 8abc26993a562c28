"""Frequency and space (§3.2, Eq. 3–5; Figure 3): the bands of a feature map, their spectra and energy."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from misa.errors import UserError, counted
from misa.figures.example import Example
from misa.figures.sheet import Scales, Sheet, Tile, chart, outline, trace, write
from misa.figures.style import ACCENT, LINES, SIGNED, Picture, shade
from misa.ops.frequency import fourier_mask, high_pass, low_pass
from misa.ops.spectrum import power, radial_energy, radii

_SIDE, _PANEL = 118, 80  # longer side of a tile in pixels, in figures and in the panel
_MARGIN, _GAP, _TITLE, _LABEL, _BAR = 10, 9, 24, 22, 54
_NARROWEST, _LOWEST = 74, 52  # width of a column and height of a row in pixels: those of the longest names
_CHART = 150
COLUMNS = ("map", "log spectrum", "high pass", "low pass", "high, in boxes", "low, outside")
# The panel shows one map at a time, larger, with the Fourier masks α of Eq. 4 between spectrum and band.
MASK_COLUMNS = ("map", "log spectrum", "mask α", "spectrum x α", "band", "kept by Eq. 5")


def maps_of(example: Example) -> dict[str, Float[Tensor, "d h w"]]:
    """Returns the dense features of an example by their names in the figure: S, I after the adapter, and I itself.

    Without a network, the brightness and colors of the image.
    """
    found = {"teacher S": example.features, "student I, adapted": example.adapted, "student I": example.student}
    maps = {name: values for name, values in found.items() if values is not None}
    return maps or {"brightness": example.colors.mean(dim=0, keepdim=True), "colors": example.colors}


def centered(
    features: Float[Tensor, "h w"], box_mask: Bool[Tensor, "h w"], *, radius: float, scale: float
) -> tuple[dict[str, Float[Tensor, "h w"]], float]:
    """Returns a channel and its results under Eq. 3–5 by column, without the mean, and their symmetric color scale.

    The mean belongs to DC and would hide the signs of a band. The high pass keeps θ times of it. The scale is the map's
    largest deviation from the mean.
    """
    mean = features.mean()
    high = high_pass(features[None, None], radius=radius, scale=scale)[0, 0] - scale * mean
    low = low_pass(features[None, None], radius=radius, scale=scale)[0, 0] - mean
    maps = {
        "map": features - mean,
        "high pass": high,
        "low pass": low,
        "high, in boxes": high * box_mask,
        "low, outside": low * ~box_mask,
    }
    return maps, float(maps["map"].abs().max().clamp(min=1e-12))


def frequency_figure(
    maps: Mapping[str, Float[Tensor, "d h w"]],
    box_mask: Bool[Tensor, "h w"],
    *,
    channel: int = 0,
    radius: float = 10.0,
    scale: float = 0.2,
) -> Picture:
    """Draw one channel of each map, its spectrum with the circle of Eq. 4, both bands, and their parts by Eq. 5.

    All maps of a row are centered at the mean (white) and share one scale, so that the effect of the filter is
    visible. Below, the distribution of the energy of all channels over the frequencies; gray frequencies are damped
    to `scale` by the high pass and kept by the low pass.

    maps: by row name, for example the teacher's S and the student's I after its adapter, all of one size.
    box_mask: B of Eq. 5, the union of the boxes.
    Raises UserError: a map does not have this channel.
    """
    for name, values in maps.items():
        if not 0 <= channel < len(values):
            raise UserError(f"{name} has {counted(len(values), 'channel')}, from 0 on, and no channel {channel}.")
    (h, w) = box_mask.shape
    ratio = _SIDE / max(h, w)
    height, width = max(round(h * ratio), 1), max(round(w * ratio), 1)
    column_width, row_height = max(width, _NARROWEST), max(height, _LOWEST)
    across = _MARGIN + _LABEL + len(COLUMNS) * (column_width + _GAP) + _BAR
    sheet = Sheet(max(across, 560), _TITLE + len(maps) * (row_height + _GAP) + _CHART)
    tiles: dict[tuple[int, str], Tile] = {}
    bars: list[tuple[Tile, float]] = []
    for row, values in enumerate(maps.values()):
        shown, reach = centered(values[channel], box_mask, radius=radius, scale=scale)
        for column, name in enumerate(COLUMNS):
            left = _MARGIN + _LABEL + column * (column_width + _GAP) + (column_width - width) // 2
            above = _TITLE + row * (row_height + _GAP) + (row_height - height) // 2
            tile = tiles[row, name] = Tile(left, above, width, height, h, w)
            if name == "log spectrum":
                sheet.put(tile, _gray(_unit(torch.log10(power(values[channel]) + 1e-6))))
            else:
                sheet.put(tile, _signed(shown[name], reach))
        bars.append((_bar(tile), reach))
        sheet.put(bars[-1][0], _signed(torch.linspace(1, -1, 128)[:, None], 1.0))

    figure = Picture()
    axes = sheet.draw(figure)
    _heads(axes, tiles, COLUMNS, maps, radius)
    in_space = [tile for (_, name), tile in tiles.items() if name != "log spectrum"]
    trace(axes, in_space, outline(box_mask.numpy()), color=ACCENT, width=1.0)
    for bar, reach in bars:
        form = ".2g" if reach < 9.5 else ".0f"
        for share in (-1, 0, 1):
            y = bar.top + bar.height * (1 - share) / 2
            write(axes, bar.left + bar.width + 3, y, f"{share * reach:{form}}", fontsize=7, va="center")
    _draw_energy(axes, sheet, {name: radial_energy(values) for name, values in maps.items()}, radius, scale)
    return figure


def _bar(last: Tile) -> Tile:
    """Returns the tile of the color bar, at the right of a row's last tile."""
    height = max(last.height - 8, 36)
    return Tile(last.left + last.width + _GAP, last.top + (last.height - height) / 2, 7, height, 128, 1)


def mask_figure(
    image: NDArray[np.uint8],
    features: Float[Tensor, "h w"],
    box_mask: Bool[Tensor, "h w"],
    *,
    radius: float = 10.0,
    scale: float = 0.2,
    name: str = "",
    side: int = _PANEL,
    cells: tuple[float, float] | None = None,
) -> Picture:
    """Draw the Fourier masks applied to one map: a row for the high pass of Eq. 4, one for its mirror, the low pass.

    From left to right the map, its log spectrum with the circle of radius t, α (0 black, 1 white), the filtered
    spectrum, the resulting band, and its part by Eq. 5, the high band inside the boxes, the low one outside. Bands are
    signed: white is 0, with one scale for all. Below, the image and α over the frequency. side: longer side of a tile
    in pixels. cells: height and width of the image in the map's cells (`Example.cells`), by default those of the map.
    """
    h, w = features.shape
    ratio = side / max(h, w)
    height, width = max(round(h * ratio), 1), max(round(w * ratio), 1)
    column_width, row_height = max(width, _NARROWEST), max(height, _LOWEST)
    across = _MARGIN + _LABEL + len(MASK_COLUMNS) * (column_width + _GAP)
    top = _TITLE + 16
    sheet = Sheet(max(across, 560), top + 2 * (row_height + _GAP) + 24 + max(height, 118))
    tiles: dict[tuple[int, str], Tile] = {}
    for row, pictures in enumerate(at_work(features, box_mask, radius, scale)):
        for column, title in enumerate(MASK_COLUMNS):
            left = _MARGIN + _LABEL + column * (column_width + _GAP) + (column_width - width) // 2
            above = top + row * (row_height + _GAP) + (row_height - height) // 2
            tile = tiles[row, title] = Tile(left, above, width, height, h, w)
            sheet.put(tile, pictures[title])
    chart_top = top + 2 * (row_height + _GAP) + 20
    shown = Tile(tiles[0, "map"].left, chart_top, width, height, h, w)
    sheet.put_image(shown, image, cells or (h, w))
    figure = Picture()
    axes = sheet.draw(figure)
    write(axes, _MARGIN, 6, name, fontsize=9, weight="bold", va="top")
    _heads(axes, tiles, MASK_COLUMNS, ("high pass", "low pass"), radius)
    edge = outline(box_mask.numpy())
    trace(
        axes, [shown, *(tiles[r, c] for r in (0, 1) for c in ("map", MASK_COLUMNS[-1]))], edge, color=ACCENT, width=1.0
    )
    frame = np.array([0, 0, h, h, 0], float), np.array([0, w, w, 0, 0], float)  # α is white on white paper
    trace(axes, [tiles[r, "mask α"] for r in (0, 1)], frame, color="#999999", width=0.6)
    write(axes, _MARGIN + _LABEL - 5, shown.top + height / 2, "image", fontsize=8, ha="right", va="center", rotation=90)
    left = _MARGIN + _LABEL + column_width + 50
    _draw_alpha(axes, Tile(left, chart_top + 4, across - left - 148, 70, 1, 1), h, w, radius, scale)
    return figure


def at_work(features: Tensor, box_mask: Tensor, radius: float, scale: float) -> Iterator[dict[str, NDArray[np.uint8]]]:
    """Yield the tiles of the high pass and of the low pass, by the names of their columns."""
    h, w = features.shape
    spectrum = torch.log10(power(features) + 1e-6)
    low, high = spectrum.min(), spectrum.max()
    found, reach = centered(features, box_mask, radius=radius, scale=scale)
    alpha = fourier_mask(h, w, radius=radius, scale=scale)
    for mask, band, kept in ((alpha, "high pass", "high, in boxes"), (1 + scale - alpha, "low pass", "low, outside")):
        filtered = torch.log10(power(features) * mask**2 + 1e-6)
        yield {
            "map": _signed(found["map"], reach),
            "log spectrum": _gray((spectrum - low) / (high - low).clamp(min=1e-12)),
            "mask α": _gray(mask),
            "spectrum x α": _gray((filtered - low) / (high - low).clamp(min=1e-12)),
            "band": _signed(found[band], reach),
            MASK_COLUMNS[-1]: _signed(found[kept], reach),
        }


def _gray(values: Tensor) -> NDArray[np.uint8]:
    return shade(values.numpy(), colors="gray")


def _signed(values: Tensor, reach: float) -> NDArray[np.uint8]:
    return shade(values.numpy(), -reach, reach, colors=SIGNED)


def _draw_alpha(axes: Axes, tile: Tile, h: int, w: int, radius: float, scale: float) -> None:
    """Plot both masks over the frequency."""
    last = int(radii(h, w).max())
    bins = np.linspace(0, max(last, 1), 400)
    inside = bins <= radius
    lines = {"α, high pass": (bins, np.where(inside, scale, 1.0)), "α, low pass": (bins, np.where(inside, 1.0, scale))}
    ticks = {name: place for name, place in (("1", 1.0), ("0", 0.0)) if abs(place - scale) > 0.1} | {"θ": scale}
    scales = _scales(max(last, 1), radius, scale, (0, 1.05), ticks)
    chart(axes, tile, lines, [LINES[3], LINES[0]], scales, marks=[min(radius, last)])


def _unit(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-12)


def _heads(
    axes: Axes, tiles: Mapping[tuple[int, str], Tile], columns: Iterable[str], rows: Iterable[str], radius: float
) -> None:
    """Name the columns and rows, and draw on every spectrum the circle around the bins that the high pass damps."""
    top = min(tile.top for tile in tiles.values())
    for name in columns:
        tile = tiles[0, name]
        write(axes, tile.left + tile.width / 2, top - 4, name, fontsize=8, ha="center", va="bottom")
    angle = np.linspace(0, 2 * np.pi, 121)
    for row, name in enumerate(rows):
        tile = tiles[row, "map"]
        y = tile.top + tile.height / 2
        write(axes, _MARGIN + _LABEL - 5, y, name, fontsize=8, ha="right", va="center", rotation=90)
        middle = tile.rows // 2 + 0.5, tile.columns // 2 + 0.5  # the DC bin is centered half a cell further
        circle = middle[0] + radius * np.sin(angle), middle[1] + radius * np.cos(angle)
        trace(axes, [tiles[row, "log spectrum"]], circle, color="white", width=1.3)


def _scales(last: int, radius: float, scale: float, ylim: tuple[float, float], yticks: Mapping[str, float]) -> Scales:
    """Returns the axes of a chart over the frequencies 0 to `last`, with some round ticks."""
    places = MaxNLocator(nbins=5, integer=True).tick_values(0, last)
    xlabel = f"frequency: distance from DC in bins; t = {radius:g}, θ = {scale:g}"
    return Scales((0, last), ylim, xlabel, [float(place) for place in places if place <= last], yticks)


def _draw_energy(axes: Axes, sheet: Sheet, energies: Mapping[str, Tensor], radius: float, scale: float) -> None:
    height, width = sheet.pixels.shape[:2]
    lines = {}
    for name, rings in energies.items():
        shares = rings.numpy() / max(float(rings.sum()), 1e-12)
        lines[name] = (np.arange(len(shares), dtype=float), np.log10(shares + 1e-12))
    last = max(len(x) for x, _ in lines.values()) - 1
    tile = Tile(58, height - _CHART + 16, width - 58 - 156, _CHART - 62, 1, 1)
    scales = _scales(last, radius, scale, (-6, 0), {"1": 0, "10⁻²": -2, "10⁻⁴": -4, "10⁻⁶": -6})
    styles, marks = [LINES[3], LINES[0], LINES[2]], [min(radius, last)]
    chart(axes, tile, lines, styles, scales, shaded=[(0, radius)], marks=marks)
    write(axes, 58, height - _CHART + 10, "share of the energy in each ring", fontsize=8, va="bottom")
