"""Live panels for notebooks: controls over the pure functions of this package.

A panel is an `ipywidgets.Image` that is redrawn whenever a control changes (`observe`). Never use `Output`, `interact`
or `interactive_output`: without a browser, executing a notebook with these can hang forever, and a page with stored
outputs does not show them. So every notebook draws its static figure first.
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import ipywidgets as widgets
from ipyevents import Event
from matplotlib.figure import Figure

from misa.figures.affinity import LINES_OF_MAPS, Layout, affinity_figure, category_at, field_of, on_the_tree
from misa.figures.example import Example
from misa.figures.frequency import maps_of, mask_figure
from misa.figures.style import to_png
from misa.ops.seed_affinity import AffinitySettings, Seed, SeedField
from misa.ops.spectrum import radii

_STEP = 0.025  # step of a logarithmic slider, in exponents of ten


class Panel(widgets.HBox):
    """Controls beside the figure that they redraw, both visible at once even on a screen of 1280 x 720.

    The figure is shown at its pixel size: scaling would blur its text.

    draw: called with the controls' values, by name; returns a Figure. `controls` can also be set from Python:
    `panel.controls["radius"].value = 7` redraws like a moved slider.
    """

    def __init__(self, draw: Callable[..., Figure], controls: Mapping[str, Any]) -> None:
        # Exclude loaded objects from garbage collection: scanning torch's many objects would stall every few moves.
        gc.freeze()
        self.controls = dict(controls)
        self._draw = draw
        self._paused = False
        self.picture = widgets.Image(format="png", layout=widgets.Layout(flex="0 0 auto", object_fit="contain"))
        for name, control in self.controls.items():
            control.style = {"description_width": "48px" if name in ("image", "lines") else "100px"}  # long ones
            control.layout = widgets.Layout(width="262px", margin="1px")
            control.observe(self._redraw, names="value")
        column = widgets.VBox(list(self.controls.values()), layout=widgets.Layout(flex="0 0 266px"))
        super().__init__([column, self.picture], layout=widgets.Layout(align_items="flex-start"))
        self._redraw()

    def values(self) -> dict[str, Any]:
        """Returns the current values of the controls."""
        return {name: control.value for name, control in self.controls.items()}

    def put(self, **values: Any) -> None:
        """Set several controls and redraw once."""
        before = self.values()
        self._paused = True
        try:
            for name, value in values.items():
                self.controls[name].value = value
        finally:
            self._paused = False
        if self.values() != before:
            self._redraw()

    def _redraw(self, _: object = None) -> None:
        if not self._paused:
            figure = self._draw(**self.values())
            self.picture.value = to_png(figure)
            self.picture.layout.width = f"{int(figure.bbox.width)}px"


def number(label: str, value: float, low: float, high: float, *, step: float = 0.1) -> widgets.FloatSlider:
    """Returns a slider for a number that updates while it is moved."""
    return widgets.FloatSlider(value, min=low, max=high, step=step, description=label)


def whole(label: str, value: int, low: int, high: int) -> widgets.IntSlider:
    """Returns a slider for an integer."""
    return widgets.IntSlider(value, min=low, max=high, description=label)


def factor(label: str, value: float, low: float, high: float) -> widgets.FloatLogSlider:
    """Returns a logarithmic slider for a positive number; the range is given as exponents of ten.

    Its lower end is aligned to the value: the browser rounds to steps from there, and would show 8 as 7.94.
    """
    place = math.log10(value)
    low = place - _STEP * max(math.ceil((place - low) / _STEP), 1)
    high = max(high, place)
    return widgets.FloatLogSlider(value, min=low, max=high, step=_STEP, description=label, readout_format=".3g")


def _classes(example: Example) -> list[tuple[str, int]]:
    return [(name, i) for i, name in enumerate(example.classes or ("any",))]


class SeedExplorer(Panel):
    """Shows the affinities of a clicked pixel, with sliders for the parameters that §3.3 leaves open.

    The category is that of the clicked box, and can be changed afterwards.
    """

    def __init__(
        self, examples: Sequence[Example], *, seed: Seed | None = None, settings: AffinitySettings | None = None
    ) -> None:
        self.examples = {f"{i + 1}: {example.name}": example for i, example in enumerate(examples)}
        first = examples[0]
        row, column = seed if seed is not None else first.middle()
        settings = AffinitySettings() if settings is None else settings
        self._fields: dict[tuple[str, int], SeedField] = {}
        controls: dict[str, Any] = {
            "image": widgets.Dropdown(options=list(self.examples), description="image"),
            "label": widgets.Dropdown(
                options=_classes(first), value=category_at(first, (row, column)), description="category c"
            ),
            "row": whole("seed row", row, 0, first.size[0] - 1),
            "column": whole("seed column", column, 0, first.size[1] - 1),
            "local_bandwidth": factor("bandwidth of A", settings.local_bandwidth, -2, 0.5),
            "tree_bandwidth": factor("A on the tree", settings.tree_bandwidth, -3, 0),
            "semantic_scale": factor("scale of σ(S)", settings.semantic_scale, -1, 1.5),
            "balance": number("balance", settings.balance, 0, max(settings.balance, 3)),
            "form": widgets.Dropdown(
                options=[("A + balance · Aᶜ", "sum"), ("A · Aᶜ to the balance", "product")],
                value=settings.form,
                description="SEPA",
            ),
            "window": widgets.Dropdown(
                options=sorted({3, 5, 7, 9, settings.window}), value=settings.window, description="window"
            ),
            "steps": whole("steps", settings.steps, 0, max(settings.steps, 100)),
            "start": widgets.Dropdown(
                options=[("disc at the seed", "seed"), ("blob in its box", "blob"), ("its whole box", "box")],
                description="mask starts as",
            ),
            "reach": widgets.Dropdown(
                options=[("in windows", "local"), ("along the tree", "global")], description="and spreads"
            ),
            "lines": widgets.Dropdown(
                options=[
                    ("window, pixels, mask", ("window", "pixels", "mask")),
                    ("pixels, tree, mask", ("pixels", "tree", "mask")),
                    ("pixels, mask", ("pixels", "mask")),
                    ("all four", LINES_OF_MAPS),
                ],
                description="rows",
            ),
        }
        controls["image"].observe(self._fit, names="value")  # before the redrawing, which needs what fits the image
        super().__init__(self._figure, controls)
        self.clicks = Event(source=self.picture, watched_events=["click"])
        self.clicks.on_dom_event(self._clicked)

    def click(self, x: float, y: float) -> Seed | None:
        """Handle a click at (x, y) in pixels of the figure: the cell there becomes the seed."""
        example = self.examples[self.controls["image"].value]
        seed = self.sheet().cell_at(x, y)
        if seed is not None:
            label = category_at(example, seed) if example.box_at(seed) is not None else self.controls["label"].value
            self.put(row=seed[0], column=seed[1], label=label)
        return seed

    def sheet(self) -> Layout:
        """The layout of the current figure."""
        now = self.values()
        example = self.examples[now["image"]]
        kernels = len(self._field(now["label"]).kernels)
        return Layout.of_panel(example.size, kernels, now["window"], (now["row"], now["column"]), now["lines"])

    def _clicked(self, event: Mapping[str, Any]) -> None:
        self.click(event["dataX"], event["dataY"])

    def _fit(self, _: object) -> None:
        """Adapt the controls to another image, its size and classes; the seed moves to its first box."""
        example = self.examples[self.controls["image"].value]
        before, self._paused = self._paused, True
        if list(self.controls["label"].options) != _classes(example):
            self.controls["label"].options = _classes(example)
        seed = example.middle()
        for name, size, place in zip(("row", "column"), example.size, seed, strict=True):
            self.controls[name].max = size - 1
            self.controls[name].value = place
        self.controls["label"].value = category_at(example, seed)
        self._paused = before

    def _field(self, label: int) -> SeedField:
        name = self.controls["image"].value
        if (name, label) not in self._fields:
            self._fields[name, label] = field_of(self.examples[name], label)
        return self._fields[name, label]

    def _figure(self, image: str, label: int, row: int, column: int, **rest: Any) -> Figure:
        example = self.examples[image]
        self._enable(example)
        seed = min(row, example.size[0] - 1), min(column, example.size[1] - 1)
        settings = AffinitySettings(**{field.name: rest[field.name] for field in fields(AffinitySettings)})
        shown = {name: rest[name] for name in ("start", "reach", "lines")}
        side = self.sheet().side
        return affinity_figure(example, seed, field=self._field(label), settings=settings, side=side, **shown)

    def _enable(self, example: Example) -> None:
        """Disable controls without effect, such as those of the teacher's features if there are none."""
        lines, reach = self.controls["lines"].value, self.controls["reach"].value
        unused = set() if example.features is not None else {"label", "semantic_scale", "balance", "form"}
        if reach == "global":
            unused |= {"steps"} if "window" in lines else {"steps", "window"}
        if not on_the_tree(lines, reach):
            unused.add("tree_bandwidth")
        for name, control in self.controls.items():
            control.disabled = name in unused


def _reach(example: Example) -> float:
    """The highest frequency of an example's maps, in bins, rounded up to a slider's step."""
    return max(math.ceil(float(radii(*example.size).max()) * 2) / 2, 0.5)


class FrequencyExplorer(Panel):
    """Shows the Fourier masks of Eq. 4, with sliders for radius t and scale θ, on any map of any example."""

    def __init__(
        self, examples: Sequence[Example], *, channel: int = 0, radius: float = 10.0, scale: float = 0.2
    ) -> None:
        self.examples = {f"{i + 1}: {example.name}": example for i, example in enumerate(examples)}
        first = maps_of(examples[0])
        channels = len(next(iter(first.values())))
        controls: dict[str, Any] = {
            "image": widgets.Dropdown(options=list(self.examples), description="image"),
            "feature": widgets.Dropdown(options=list(first), description="map"),
            "channel": whole("channel", min(channel, channels - 1), 0, max(channels - 1, 1)),
            "radius": number("radius t", radius, 0, max(radius, _reach(examples[0])), step=0.5),
            "scale": number("scale θ", scale, 0, 1, step=0.05),
        }
        self._chosen = {name: controls[name].value for name in ("feature", "channel", "radius")}
        self._fitting = False
        for name in self._chosen:
            controls[name].observe(self._choose, names="value")
        for name in ("image", "feature"):
            controls[name].observe(self._fit, names="value")  # before the redrawing, which needs what fits the image
        super().__init__(self._figure, controls)
        self._fit()

    def _choose(self, change: Mapping[str, Any]) -> None:
        """Remember what was chosen, for when an image that has no such map or channel is left again."""
        if not self._fitting:
            (name,) = (name for name in self._chosen if self.controls[name] is change["owner"])
            self._chosen[name] = change["new"]

    def _fit(self, _: object = None) -> None:
        """Adapt the controls to another image, which may have other maps, fewer channels and lower frequencies."""
        example = self.examples[self.controls["image"].value]
        maps, (feature, channel, radius) = maps_of(example), (self.controls[name] for name in self._chosen)
        before, self._paused, self._fitting = self._paused, True, True
        chosen = self._chosen["feature"]
        if tuple(maps) != tuple(feature.options):
            feature.options = list(maps)
        if chosen in maps:
            feature.value = chosen
        last = len(maps[feature.value]) - 1
        channel.disabled = last == 0
        if last:  # browsers have no slider with a single value
            channel.max = last
            channel.value = min(self._chosen["channel"], last)
        radius.max = _reach(example)
        radius.value = min(self._chosen["radius"], radius.max)
        self._paused, self._fitting = before, False

    def _figure(self, image: str, feature: str, channel: int, radius: float, scale: float) -> Figure:
        example = self.examples[image]
        maps = maps_of(example)
        name, values = (feature, maps[feature]) if feature in maps else next(iter(maps.items()))
        shown = min(channel, len(values) - 1)
        return mask_figure(
            example.image,
            values[shown],
            example.box_masks().any(dim=0),
            radius=radius,
            scale=scale,
            cells=example.cells,
            name=f"{example.name}   {name}" + (f", channel {shown}" if len(values) > 1 else ""),
        )
