"""Figures 1, 3, 4 and 5 in the layout of the venue: arrays in, a figure of exactly one column or page width out.

Images are drawn as pixels, everything else as vectors. Each figure has one shared scale and one color bar, unless a
row states otherwise.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Circle, Patch
from numpy.typing import NDArray

from misa.figures.affinity import NAMES, SYMBOLS, field_of, start_mask
from misa.figures.example import Example
from misa.figures.frequency import COLUMNS, centered
from misa.figures.overlay import PALETTE
from misa.figures.plots import draw_objects
from misa.figures.sheet import outline
from misa.figures.style import ACCENT, CLASS_COLORS, COLUMN, LINES, MAP, PAGE, PRINT, SIGNED, Picture
from misa.ops.seed_affinity import AffinitySettings, Kernel, Seed
from misa.ops.spectrum import power, radial_energy


def _blank(axes: Axes, *, title: str = "", label: str = "", size: float = 7, label_size: float | None = None) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, fontsize=size, pad=3)
    if label:
        axes.set_ylabel(label, fontsize=label_size or size, labelpad=2)


def _printed(width: float, height: float) -> Picture:
    with matplotlib.rc_context(PRINT):
        figure = Picture(figsize=(width, height), layout="constrained")
        figure.set_layout_engine("constrained", w_pad=0.015, h_pad=0.015, wspace=0.01, hspace=0.01)
    return figure


def class_picture(labels: NDArray[np.integer], classes: int) -> NDArray[np.uint8]:
    """Color a label map (h w); background, the last label, and void are white."""
    table = np.full((256, 3), 255, np.uint8)
    table[:classes] = PALETTE[np.arange(classes) % len(PALETTE)]
    return table[labels]


def figure1(
    scores: Mapping[str, Mapping[str, float]], rows: Sequence[Mapping[str, Any]], *, classes: Sequence[str] = ()
) -> Picture:
    """Draw semantic segmentation: (a) mIoU in percent by network and supervision, (b) label maps.

    scores: for "boxes" and "masks", if measured, the mIoU of "instances, merged" and "semantic".
    rows: `image` (h w 3) and images (h w 3) by name to show beside it. classes: names of the colors of
    `class_picture`, at most 24, for a legend below the maps.
    """
    shown = len(rows[0]) if rows else 0
    columns = [2.2] + [1.0] * shown
    cell = (PAGE - 0.6) / sum(columns)
    height = max(1.4, cell * sum(max(p.shape[0] / p.shape[1] for p in row.values()) for row in rows)) + 0.35
    figure = _printed(PAGE if rows else COLUMN, height if rows else 1.6)
    grid = figure.add_gridspec(max(len(rows), 1), len(columns) if rows else 1, width_ratios=columns if rows else None)
    _bars(figure.add_subplot(grid[:, 0]), scores)
    for r, row in enumerate(rows):
        for c, (name, picture) in enumerate(row.items(), 1):
            axes = figure.add_subplot(grid[r, c])
            axes.imshow(picture, interpolation="none")
            _blank(axes, title=name if r == 0 else "")
            if name != "image":
                axes.spines[:].set_visible(True)
                axes.spines[:].set(color="#BBBBBB", linewidth=0.5)
    if rows and classes and len(classes) <= len(CLASS_COLORS):
        patches = [Patch(color=CLASS_COLORS[i], label=name) for i, name in enumerate(classes)]
        across = min(len(classes), 8)
        figure.legend(
            handles=patches, loc="outside lower right", ncols=across, fontsize=6, frameon=False, handlelength=1
        )
    return figure


def _bars(axes: Axes, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Draw mIoU as bars, one group per supervision."""
    kinds = list(dict.fromkeys(kind for values in scores.values() for kind in values))
    width = 0.8 / max(len(kinds), 1)
    for i, kind in enumerate(kinds):
        at = [g + (i - (len(kinds) - 1) / 2) * width for g, values in enumerate(scores.values()) if kind in values]
        heights = [values[kind] for values in scores.values() if kind in values]
        look = {"color": LINES[(3, 0)[i % 2]]["color"], "hatch": ("", "///")[i % 2], "edgecolor": "white"}
        drawn = axes.bar(at, heights, width * 0.94, label=kind, linewidth=0, **look)
        axes.bar_label(drawn, fmt="%.1f", fontsize=6, padding=1)
    axes.set_xticks(range(len(scores)), [f"from {name}" for name in scores], fontsize=7)
    axes.set_ylabel("mIoU (%)", fontsize=7)
    axes.tick_params(labelsize=6, length=2)
    axes.margins(y=0.12)
    axes.legend(fontsize=6, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handlelength=1.4)
    axes.spines[["top", "right"]].set_visible(False)


def figure3(
    rows: Mapping[str, tuple[torch.Tensor, torch.Tensor]], *, channel: int = 0, radius: float = 10.0, scale: float = 0.2
) -> Picture:
    """Draw the decomposition of features in frequency and space, one row each on one scale, and their energy.

    Maps and bands are centered at the mean, which is white.

    rows: by name the features (d h w) and the union of the boxes (h w).
    """
    tall = [1.06 * min(inside.shape[0] / inside.shape[1], 1.5) for _, inside in rows.values()]
    figure = _printed(PAGE, sum(tall) + 1.25)
    parts: Any = figure.subfigures(2, 1, height_ratios=(sum(tall), 1.15))
    axes = parts[0].subplots(len(rows), len(COLUMNS), squeeze=False, height_ratios=tall)
    label_size = 7 if all(len(name) < 14 * high for name, high in zip(rows, tall, strict=True)) else 5.5
    for r, (name, (features, inside)) in enumerate(rows.items()):
        shown, reach = centered(features[channel], inside, radius=radius, scale=scale)
        edge = outline(inside.numpy())
        for c, column in enumerate(COLUMNS):
            ax = axes[r, c]
            beside = name if c == 0 else ""
            _blank(ax, title=column if r == 0 else "", label=beside, label_size=label_size)
            if column == "log spectrum":
                h, w = inside.shape
                ax.imshow(torch.log10(power(features[channel]) + 1e-6).numpy(), cmap="gray", interpolation="none")
                ax.add_patch(Circle((w // 2, h // 2), radius, fill=False, edgecolor=LINES[0]["color"], linewidth=1))
                ax.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))
                continue
            drawn = ax.imshow(shown[column].numpy(), cmap=SIGNED, vmin=-reach, vmax=reach, interpolation="none")
            ax.plot(edge[1] - 0.5, edge[0] - 0.5, color=ACCENT, linewidth=0.6)
        bar = parts[0].colorbar(drawn, ax=axes[r].tolist(), fraction=0.012, pad=0.004)
        bar.ax.tick_params(labelsize=5, length=1.5)
        bar.outline.set_linewidth(0.3)
    ax = parts[1].subplots()
    for (name, (features, _)), style in zip(rows.items(), (LINES[3], LINES[0], LINES[2], LINES[1]), strict=False):
        rings = radial_energy(features).numpy()
        ax.plot(rings / rings.sum(), label=name, linewidth=1.1, **style)
    ax.axvspan(0, radius, color="#E4E4E4", linewidth=0)
    ax.set_yscale("log")
    ax.set_xlim(0, None)
    ax.set_xlabel(f"frequency (bins from DC); the high pass damps the gray part to θ = {scale:g}", fontsize=7)
    ax.set_ylabel("share of energy", fontsize=7)
    ax.tick_params(labelsize=6, length=2)
    ax.legend(fontsize=6, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def figure4(
    examples: Sequence[tuple[Example, Seed]], *, settings: AffinitySettings | None = None, trained: bool = True
) -> Picture:
    """Compare color affinity and SEPA from a seed: one row per image, every map from 0 to 1.

    Columns: the image with seed and box, A, A^f, A^c and SEPA to every pixel, the masks that color and SEPA propagate
    from a blob in the box, relative to their maximum, and the ground truth, for comparison only (omitted if no image
    has any). The orange line of a mask is its contour at half of its maximum; below is its IoU with the ground truth.
    trained: whether a run is trained with SEPA; if not, the title of its column says so.
    """
    settings = AffinitySettings() if settings is None else settings
    kernels = field_of(examples[0][0], 0).kernels
    made: tuple[Kernel, ...] = ("color", "enhanced") if len(kernels) > 1 else ("color",)
    rows = [_figure4_row(example, seed, settings, made) for example, seed in examples]
    named = {k: f"{NAMES[k]} {SYMBOLS[k]}" for k in kernels} | ({} if trained else {"enhanced": "SEPA, unused"})
    titles = ["image", *(named[k] for k in kernels), *(f"mask, {NAMES[k]}" for k in made)]
    titles += ["truth"] if any(row.truth is not None for row in rows) else []
    shapes = [example.size[0] / example.size[1] for example, _ in examples]
    cell = (PAGE - 0.95) / len(titles)
    figure = _printed(PAGE, sum(cell * shape + 0.17 for shape in shapes) + 0.2)
    axes = figure.subplots(len(examples), len(titles), squeeze=False, height_ratios=shapes)
    for r, ((example, _), row) in enumerate(zip(examples, rows, strict=True)):
        for c, title in enumerate(titles):
            _blank(axes[r, c], title=title if r == 0 else "", label=example.name if c == 0 else "", size=6)
            if c == len(row.maps):
                axes[r, c].text(0.5, 0.5, "no truth", ha="center", fontsize=6, transform=axes[r, c].transAxes)
                continue
            values, kind = row.maps[c], row.kinds[c]
            _figure4_map(axes[r, c], row, values, kind)
            if kind == "mask" and row.truth is not None:
                axes[r, c].set_xlabel(f"IoU {_iou(values >= 0.5, row.truth):.2f}", fontsize=6, labelpad=1)
    shade = ScalarMappable(Normalize(0, 1), MAP)
    bar = figure.colorbar(shade, ax=axes.ravel().tolist(), fraction=0.012, pad=0.004, ticks=(0, 0.5, 1))
    bar.set_label("affinity; mask / largest value", fontsize=6)
    bar.ax.tick_params(labelsize=5, length=1.5)
    bar.outline.set_linewidth(0.3)
    return figure


class _Row(NamedTuple):
    """A row of Figure 4: its images from left to right with the kind of each."""

    maps: list[NDArray[Any]]
    kinds: list[str]
    size: tuple[int, int]
    cells: tuple[float, float]
    seed: Seed
    box: NDArray[np.bool_] | None
    truth: NDArray[np.bool_] | None


def _figure4_row(example: Example, seed: Seed, settings: AffinitySettings, made: Sequence[Kernel]) -> _Row:
    box = example.box_at(seed)
    inside = example.box_masks()[box] if box is not None else None
    field = field_of(example, example.labels[box] if box is not None else 0)
    direct = field.direct(seed, settings)
    masks = field.masks(start_mask(example, seed, "blob"), settings, box=inside)
    truth = example.coarse_masks()
    own = truth[box].numpy() if truth is not None and box is not None else None
    maps = [example.image, *(direct[k].numpy() for k in field.kernels)]
    maps += [(masks[k] / masks[k].max().clamp(min=1e-12)).numpy() for k in made]
    maps += [] if own is None else [own]
    kinds = ["image", *["affinity"] * len(field.kernels), *["mask"] * len(made), "truth"][: len(maps)]
    return _Row(maps, kinds, example.size, example.cells, seed, None if inside is None else inside.numpy(), own)


def _figure4_map(axes: Axes, row: _Row, values: NDArray[Any], kind: str) -> None:
    """Draw one map with its overlays: the ground-truth outline, box, contour and seed."""
    h, w = row.size
    if kind == "image":
        down, across = row.cells
        axes.imshow(values, interpolation="antialiased", extent=(-0.5, across - 0.5, down - 0.5, -0.5))
    else:
        axes.imshow(values, cmap=MAP, vmin=0, vmax=1, interpolation="none")
    lines = [(row.truth, "white", 0.6)] if row.truth is not None and kind != "truth" else []
    lines += [(row.box, ACCENT, 0.9)] if row.box is not None and kind == "image" else []
    lines += [(values >= 0.5, ACCENT, 0.8)] if kind == "mask" else []
    for mask, color, width in lines:
        rows, columns = outline(mask)
        axes.plot(columns - 0.5, rows - 0.5, color=color, linewidth=width)
    if kind in ("image", "affinity"):
        axes.plot(row.seed[1], row.seed[0], "+", color="black", markersize=5, markeredgewidth=1.6)
        axes.plot(row.seed[1], row.seed[0], "+", color="white", markersize=4.4, markeredgewidth=0.8)
    axes.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))


def _iou(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    return float((mask & truth).sum() / max((mask | truth).sum(), 1))


def figure5(groups: Mapping[str, Sequence[Mapping[str, Any]]], *, columns: int = 5) -> Picture:
    """Draw predicted masks by group, so that it is clear which images were chosen, drawn at random, or are the worst.

    Each image has `image` (h w 3), `masks` (n h w) and a `title`; `colors` of the masks and, drawn as white outlines,
    the `truth` (m h w) may be None. With `truth`, a mask has the color of its object; unmatched masks are gray.
    """
    lines = [(name, found[i : i + columns]) for name, found in groups.items() for i in range(0, len(found), columns)]
    cell = (PAGE - 0.2) / columns
    tall = [max(s["image"].shape[0] / s["image"].shape[1] for s in found) for _, found in lines]
    figure = _printed(PAGE, sum(cell * ratio + 0.19 for ratio in tall) + 0.05)
    axes = figure.subplots(len(lines), columns, squeeze=False, height_ratios=tall)
    for r, (name, found) in enumerate(lines):
        for c, ax in enumerate(axes[r]):
            ax.set_anchor("N")  # images of a row begin at one height, whatever their shape
            if c < len(found):
                draw_objects(ax, found[c]["image"], masks=found[c]["masks"], colors=found[c].get("colors"))
                truth = found[c].get("truth")
                for mask in () if truth is None else truth:
                    line, across = outline(mask)
                    ax.plot(across - 0.5, line - 0.5, color="white", linewidth=0.5)
                ax.set_axis_on()
            _blank(ax, title=str(found[c]["title"]) if c < len(found) else "", size=6)
        axes[r, 0].set_ylabel(name, fontsize=7, labelpad=2)
    if any(image.get("truth") is not None for _, found in lines for image in found):
        figure.supxlabel("white: true outlines; a mask has its object's color, gray: of no object", fontsize=6)
    return figure
