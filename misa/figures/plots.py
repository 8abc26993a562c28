"""Plots of data, training and results: arrays in, a matplotlib Figure out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from pycocotools import mask as rle

from misa.errors import counted
from misa.figures.overlay import overlay, whole
from misa.figures.style import CLASS_COLORS, COLORS, Picture, ink

LABELS = (7, 6, 5)
"""Font sizes of an image's labels, in points: the first with which each has room at its box, or the last."""

_LETTER, _LINE = 0.03, 0.061  # width and height of the smallest letter, relative to an image's longer side in a grid

_Extent = tuple[float, float, float, float]
_Corners = Sequence[float] | NDArray[np.float64]


def draw_objects(
    axes: Axes,
    image: NDArray[np.uint8],
    *,
    masks: NDArray[np.bool_] | None = None,
    boxes: NDArray[np.float64] | None = None,
    labels: Sequence[str] | None = None,
    colors: Sequence[int | str] | None = None,
    title: str = "",
) -> list[int]:
    """Draw an image (h w 3) with tinted and outlined masks (n h w) and boxes (n 4, xyxy).

    colors: for each object, as in `misa.figures.overlay.overlay`; by default its index.
    Returns the objects without a label, as there is no room for it at their boxes.
    """
    height, width = image.shape[:2]
    parts = whole(() if masks is None else masks)
    # The image is drawn small: thick enough lines, and antialiased downsampling.
    painted = overlay(image, parts, boxes=() if boxes is None else boxes, colors=colors, line=1 / 150)
    axes.imshow(painted, interpolation="antialiased", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
    places: list[_Corners] = list(() if boxes is None else boxes)
    if boxes is None:
        places += [(left, top, left + pixels.shape[1], top + pixels.shape[0]) for top, left, pixels in parts]
    for size in LABELS:
        taken: list[_Extent] = []
        found = [
            _place(text, places[i], image.shape[:2], taken, places, scale=size / LABELS[-1])
            for i, text in enumerate(labels or ())
        ]
        if None not in found:
            break
    for i, (text, place) in enumerate(zip(labels or (), found, strict=True)):
        if place is None:
            continue
        x, y, side = place
        number = i if colors is None else colors[i]
        face = _face(number)
        axes.text(x, y, text, fontsize=size, color=ink(face), ha=side, va="bottom", clip_on=True,
                  bbox={"facecolor": face, "edgecolor": "none", "pad": 0.8})  # fmt: skip
    return [i for i, place in enumerate(found) if place is None]


def _place(
    text: str,
    box: _Corners,
    size: tuple[int, ...],
    taken: list[_Extent],
    boxes: Sequence[_Corners],
    *,
    scale: float,
) -> tuple[float, float, str] | None:
    """Returns the position of a label (x, y of its lower end) and its alignment, or None if there is no room for it.

    It is above its box, else inside at the top or the bottom, else below: within the image, off the labels in `taken`,
    to which it is added, and off the centers of all `boxes`, so that a crowd of small boxes remains visible.
    """
    height, width = size
    side = max(size) * scale
    line, across = _LINE * side, min(_LETTER * len(text) * side, width)
    right = box[0] + box[2] > width
    left = min(max(box[2] - across, 0.0), width - across) if right else max(min(box[0], width - across), 0.0)
    centers = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in boxes]
    for y in (max(box[1], line), box[1] + line, box[3], box[3] + line):
        mine = left, y - line, left + across, y
        covered = any(mine[0] < x < mine[2] and mine[1] < center < y for x, center in centers)
        if line <= y <= height and not covered and not any(_overlap(mine, other) for other in taken):
            taken.append(mine)
            return (left + across if right else left) - 0.5, y, "right" if right else "left"
    return None


def _face(color: int | str) -> str:
    return color if isinstance(color, str) else CLASS_COLORS[color % len(CLASS_COLORS)]


def _overlap(a: _Extent, b: _Extent) -> bool:
    """Whether two rectangles x1 y1 x2 y2 have a common area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def sample_grid(samples: Sequence[Mapping[str, Any]], *, columns: int = 4, title: str = "") -> Figure:
    """Draw a grid of images, each given as the arguments of `draw_objects`; equal labels have equal colors.

    A legend gives the colors of classes with an object that has no room for its label.
    """
    columns = min(columns, max(len(samples), 1))
    rows = max(1, -(-len(samples) // columns))
    figure = Picture(figsize=(1.75 * columns, 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    names = sorted({name for sample in samples for name in sample.get("labels") or ()})
    shades: dict[str, set[int | str]] = {}
    for ax, sample in zip(axes.flat, samples, strict=False):
        colors = {"colors": [names.index(name) for name in sample.get("labels") or ()] or None, **sample}["colors"]
        for i in draw_objects(ax, **{**sample, "colors": colors}):
            shades.setdefault(sample["labels"][i], set()).add(i if colors is None else colors[i])
    # Colors that are not those of classes, such as of matched objects, have no entry.
    if unnamed := [name for name in names if len(shades.get(name, ())) == 1]:
        marks = [Patch(color=_face(*shades[name]), label=name) for name in unnamed]
        across = max(1, int(1.75 * columns / (0.6 + 0.08 * max(map(len, unnamed)))))  # inches of a mark and its name
        figure.set_figheight(figure.get_figheight() + 0.17 * -(-len(marks) // across))
        figure.legend(handles=marks, fontsize=7, frameon=False, loc="outside lower center", ncols=across)
    if title:
        figure.suptitle(title, fontsize=9)
    return figure


def box_to_mask(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw one column per image: the annotated boxes, the masks predicted without them, the ground truth.

    Each row has `image`, `boxes`, `predicted` (n h w), `predicted_labels` and `truth` (n h w), in the order of the
    boxes; if every `truth` is None that line is omitted. An object has one color throughout; an unmatched prediction is
    gray.
    """
    lines = ["annotated boxes", "predicted masks"]
    lines += ["true masks"] if any(row["truth"] is not None for row in rows) else []
    figure = Picture(figsize=(1.75 * len(rows), 1.8 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), len(rows), squeeze=False)
    for column, row in enumerate(rows):
        image, predicted, truth = row["image"], row["predicted"], row["truth"]
        objects = _filled(row["boxes"], image.shape[:2]) if truth is None else truth
        draw_objects(axes[0, column], image, boxes=row["boxes"])
        colors = matched_colors(predicted, objects)
        draw_objects(axes[1, column], image, masks=predicted, labels=row["predicted_labels"], colors=colors)
        if len(lines) == 3:
            draw_objects(axes[2, column], image, masks=truth)
    for ax, name in zip(axes[:, 0], lines, strict=True):
        ax.set_axis_on()
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, fontsize=8)
        ax.spines[:].set_visible(False)
    return figure


def _filled(boxes: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns boxes (n 4) as filled masks (n h w), for data without ground-truth masks."""
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, np.asarray(boxes).round().astype(int), strict=True):
        mask[max(y1, 0) : y2, max(x1, 0) : x2] = True
    return masks


def matched_colors(predicted: NDArray[np.bool_], truth: NDArray[np.bool_], *, least: float = 0.3) -> list[int | str]:
    """Match predicted masks (p h w) to ground truth (n h w); returns an object's index or "gray" for each prediction.

    Greedy by IoU, the largest first, down to `least`; each object is matched once.
    """
    colors: list[int | str] = ["gray"] * len(predicted)
    if not len(predicted) or not len(truth):
        return colors
    found, true = ([rle.encode(np.asfortranarray(mask, np.uint8)) for mask in masks] for masks in (predicted, truth))
    ious = np.asarray(rle.iou(found, true, [False] * len(true)))
    while ious.max() >= least:
        one, object_ = np.unravel_index(int(ious.argmax()), ious.shape)
        colors[int(one)] = int(object_)
        ious[one, :] = ious[:, object_] = 0
    return colors


def _tidy(ax: Axes) -> None:
    """Remove the frame and shrink the tick labels."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_fontsize(8)


def _nothing(why: str) -> Figure:
    """Returns a figure with only a text."""
    figure = Picture(figsize=(4, 0.5))
    figure.text(0.02, 0.5, why, fontsize=9, va="center")
    return figure


def loss_curves(losses: Mapping[str, NDArray[np.float64]], *, window: int = 20) -> Figure:
    """Plot each loss over the steps, raw (faint) and as a running mean (bold) of `window` steps, or of half of all."""
    figure = Picture(figsize=(5, 2.8), layout="constrained")
    ax = figure.subplots()
    styles = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
    for i, (name, values) in enumerate(losses.items()):
        steps = np.arange(1, len(values) + 1)
        color = COLORS[i % len(COLORS)]
        ax.plot(steps, values, color=color, alpha=0.2, linewidth=0.7)
        width = min(window, max(1, len(values) // 2))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        ax.plot(steps[width - 1 :], smooth, color=color, linestyle=styles[i % len(styles)], label=name, linewidth=1.6)
    ax.set(xlabel="step", ylabel="loss", yscale="log")  # on a linear scale the largest term would hide the others
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _tidy(ax)
    return figure


def health_curves(health: Mapping[str, NDArray[np.float64]]) -> Figure:
    """Plot mask diagnostics (left: box fill, share of box-shaped masks) and the gradient share of each loss (right).

    `health` as from `misa.engine.runs.samples.health`.
    """
    if not health:
        return _nothing("this run was not watched")
    figure = Picture(figsize=(7.2, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    step = health["step"]
    dot: dict[str, Any] = {"marker": "o", "markersize": 4} if len(step) == 1 else {}
    left.plot(step, 100 * health["mask_fill"], color=COLORS[0], label="mask area / box area", **dot)
    left.plot(step, 100 * health["mask_is_box"], color=COLORS[1], linestyle="--", label="masks that are the box", **dot)
    left.set(xlabel="step", ylabel="share (%)", ylim=(-2, 105))
    shares = {name.removeprefix("gradient_"): 100 * v for name, v in health.items() if name.startswith("gradient_")}
    # The first color is the total's: each term has the color that it has in `loss_curves`.
    if len(step) == 1:  # as after a smoke run: an area needs two
        left.set_xlim(step[0] - 1, step[0] + 1)
        step, shares = np.append(step, step + 1), {name: values.repeat(2) for name, values in shares.items()}
    areas = right.stackplot(step, *shares.values(), labels=shares, colors=COLORS[1:], linewidth=0)
    for area, hatch in zip(areas, ("", "//", "..", "xx", "--", "++", "oo"), strict=False):
        area.set_hatch(hatch)
        area.set_edgecolor("white")
    right.set(
        xlabel="step", ylabel="share of gradient norm (%)", ylim=(0, 100), xlim=(step[0], max(step[-1], step[0] + 1))
    )
    left.legend(fontsize=7, frameon=False)
    right.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        _tidy(ax)
    return figure


def grouped_intervals(frame: pd.DataFrame, *, label: str = "AP (%)") -> Figure:
    """Plot means with confidence intervals (above) and differences paired by seed (below), by `group` and `row`.

    `frame` as from `misa.engine.reports.tables.Table.by_mode`: columns row, group, mean, ci, difference,
    difference_ci. The line at 0 is the baseline; a row without pairs has no difference.
    """
    if frame.empty:
        return _nothing("none of these trainings has scores by mode or size yet")
    rows, groups = list(dict.fromkeys(frame["row"])), list(dict.fromkeys(frame["group"]))
    figure = Picture(figsize=(max(4.0, 1.1 * len(groups) + 1.5), 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    markers = "osD^vPX*"
    for i, row in enumerate(rows):
        own = frame[frame["row"] == row].set_index("group").reindex(groups)
        at = np.arange(len(groups)) + (i - (len(rows) - 1) / 2) * 0.7 / max(len(rows), 1)
        for ax, mean, half in ((above, own["mean"], own["ci"]), (below, own["difference"], own["difference_ci"])):
            if mean.notna().any():
                ax.errorbar(
                    at, mean, yerr=half.fillna(0), fmt=markers[i % len(markers)], markersize=5, capsize=2.5,
                    linewidth=1.2, color=COLORS[i % len(COLORS)], label=row,
                )  # fmt: skip
    below.axhline(0, color="0.4", linewidth=1)
    above.set_ylim(0, 1.05 * above.get_ylim()[1])
    above.set_ylabel(label)
    below.set_ylabel("difference to the baseline,\nsame seed (points)")
    below.set_xticks(np.arange(len(groups)), groups)
    above.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    for ax in (above, below):
        ax.grid(axis="y", alpha=0.3)
        _tidy(ax)
    return figure


def ap_bars(scores: Mapping[str, Mapping[str, float | None]]) -> Figure:
    """Plot AP or IoU as bars: one group per metric, one bar per variant; metrics without objects are labeled so.

    The names of the variants say of what, as `misa.engine.runs.folder.Run.scores` gives them: masks, or boxes.
    """
    width = max(6.2, 1.6 * len(scores) + 1.2)  # room for the numbers on the bars
    figure = Picture(figsize=(width, 2.6), layout="constrained")
    ax = figure.subplots()
    first = next(iter(scores.values()))
    names = [name for name in first if any(row[name] is not None for row in scores.values())]
    unmeasured = [name for name in first if name not in names]
    width = 0.8 / len(scores)
    for i, (variant, values) in enumerate(scores.items()):
        at = np.arange(len(names)) + (i - (len(scores) - 1) / 2) * width
        heights = np.array([values[name] for name in names], dtype=float)
        look: dict[str, Any] = {"color": COLORS[i], "hatch": ("", "//", "..", "xx")[i % 4]}
        bars = ax.bar(at, np.nan_to_num(heights), width, label=variant, edgecolor="white", linewidth=0, **look)
        ax.bar_label(bars, labels=["" if np.isnan(h) else f"{h:.1f}" for h in heights], fontsize=6)
    ax.set_xticks(np.arange(len(names)), names)
    ax.set_ylim(0, max(1.0, 1.05 * ax.get_ylim()[1]))
    ax.set_ylabel("AP (%)" if "AP" in first else "IoU (%)")
    if unmeasured:
        ax.set_xlabel(f"{', '.join(unmeasured)}: no objects to measure on")
    ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _tidy(ax)
    return figure


def precision_recall(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Plot precision over recall, one line for every entry except "recall"; all values 0 to 1."""
    figure = Picture(figsize=(3.4, 2.8), layout="constrained")
    ax = figure.subplots()
    lines = [name for name in curves if name != "recall"]
    for i, name in enumerate(lines):
        ax.plot(curves["recall"], curves[name], color=COLORS[i], linestyle=("-", "--", ":")[i % 3], label=name)
    ax.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    if lines:
        ax.legend(fontsize=7, frameon=False)
    else:
        ax.text(0.5, 0.5, "no object to find", ha="center", va="center")
    _tidy(ax)
    return figure


def class_bars(scores: Mapping[str, Mapping[str, float | None]], *, metric: str = "AP", most: int = 40) -> Figure:
    """Plot a metric of every class in percent, best first, with the number of `objects`; at most `most` classes.

    Classes without a value come last, without a bar.
    """
    values = {name: np.nan if (value := row[metric]) is None else value for name, row in scores.items()}
    ordered = sorted(values, key=lambda name: np.nan_to_num(values[name], nan=-1.0), reverse=True)
    shown = ordered[:most]
    figure = Picture(figsize=(4.5, 0.8 + 0.17 * len(shown)), layout="constrained")
    ax = figure.subplots()
    bars = ax.barh(np.arange(len(shown)), [np.nan_to_num(values[name]) for name in shown], color=COLORS[0])
    texts = ["–" if np.isnan(values[name]) else f"{values[name]:.1f}" for name in shown]
    ax.bar_label(bars, labels=texts, fontsize=6, padding=2)
    counts = (scores[name].get("objects") for name in shown)
    labels = [name if count is None else f"{name} ({count:.0f})" for name, count in zip(shown, counts, strict=True)]
    ax.set_yticks(np.arange(len(shown)), labels, fontsize=7)
    ax.invert_yaxis()
    left_out = len(ordered) - len(shown)
    ax.set_xlabel(
        f"{metric} (%)" + (f"; {counted(left_out, 'class', 'classes')} further down left out" if left_out else "")
    )
    _tidy(ax)
    return figure


def save(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write a figure as PDF (vectors, embedded fonts) and PNG (200 dpi) into a folder; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("pdf", "png")]
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        for path in paths:
            figure.savefig(path, dpi=200)
    return paths
