"""Chart of the guidance measurement: which readings pull masks towards the ground truth, and how far."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from misa.figures.style import COLORS, Picture

TERMS = ("local", "global", "pamr")
NAMES = {"local": "in windows", "global": "along the tree", "pamr": "PAMR"}
MARKERS = {"local": "o", "global": "s", "pamr": "D"}


def guidance_chart(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Draw one line per reading, sorted by the pull in its windows: the pull, the gain in IoU, change and growth.

    `table` as from `misa.engine.reports.guidance.Guidance.table`. Bars are 95 % intervals over images.
    """
    ranked = table.assign(rank=table["term"].map(TERMS.index)).sort_values(["rank", "pull"])
    first = ranked.drop_duplicates("reading").sort_values("pull", kind="stable")
    place = {name: at for at, name in enumerate(first["reading"])}
    figure = Picture(figsize=(7.4, 0.2 * len(place) + 1.4), layout="constrained")
    pull, gain, moved, growth = figure.subplots(1, 4, sharey=True, width_ratios=(3, 3, 1.5, 1.7))
    for i, term in enumerate(term for term in TERMS if (table["term"] == term).any()):
        own = table[table["term"] == term]
        at = [place[name] + 0.22 * (1 - i) for name in own["reading"]]
        style = {"color": COLORS[i], "fmt": MARKERS[term], "markersize": 4, "linewidth": 1.0}
        for ax, name in ((pull, "pull"), (gain, "gain")):
            sides = [100 * (own[name] - own[f"{name}_low"]), 100 * (own[f"{name}_high"] - own[name])]
            ax.errorbar(
                100 * own[name], at, xerr=[side.clip(lower=0).fillna(0) for side in sides], label=NAMES[term], **style
            )
        for ax, name in ((moved, "moved"), (growth, "growth")):
            ax.plot(100 * own[name], at, MARKERS[term], color=COLORS[i], markersize=4, clip_on=False)
    for ax in (pull, gain, growth):
        ax.axvline(0, color="0.4", linewidth=0.8)
    pull.set_yticks(range(len(place)), list(place), fontsize=7)
    pull.set_xlabel("pull to the truth (%)", fontsize=8)
    gain.set_xlabel("gain in IoU over the masks\n(points, log beyond ±2)", fontsize=8)
    moved.set_xlabel("movement (%)", fontsize=8)
    moved.set_xlim(left=0)
    growth.set_xlabel("growth (%)", fontsize=8)
    gain.margins(x=0.1)
    gain.set_xscale("symlog", linthresh=2, linscale=0.6)  # most gains are a point or two, a few losses are large
    low, high = gain.get_xlim()
    gain.set_xticks([place for place in (-50, -10, -2, 0, 2, 10, 50) if low <= place <= high])
    gain.xaxis.set_major_formatter(ScalarFormatter())
    for ax in figure.axes:
        ax.tick_params(labelsize=7, top=True, labeltop=True)  # the figure is long
        ax.grid(axis="y", color="0.92", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*pull.get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside upper center", ncols=3,
                  title=title or None, title_fontsize=9)  # fmt: skip
    pull.set_ylim(-0.7, len(place) - 0.3)
    return figure
