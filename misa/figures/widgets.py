"""Live panels for notebooks: a thin skin of controls over the pure functions of this room.

A panel is an `ipywidgets.Image` whose bytes are redrawn whenever a control changes (`observe`). Never `Output`,
`interact` or `interactive_output`: executing a notebook with these and without a browser can hang for ever, and a
page that holds only stored outputs shows none of them. So every notebook draws its static figure first.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import ipywidgets as widgets
from ipyevents import Event
from matplotlib.figure import Figure

from misa.figures.affinity import Layout, affinity_figure, category_at, field_of
from misa.figures.example import Example
from misa.figures.frequency import energies_of, frequency_figure, maps_of
from misa.figures.style import to_png
from misa.ops.seed_affinity import Knobs, Seed, SeedField

_WIDE = {"description_width": "120px"}


class Panel(widgets.VBox):
    """Controls above a picture that they redraw.

    draw: from the controls' values, by name, to a Figure. `controls` may be set from Python as well:
    `panel.controls["radius"].value = 7` redraws as a moved slider does.
    """

    def __init__(self, draw: Callable[..., Figure], controls: Mapping[str, Any], *, columns: int = 2) -> None:
        # What is loaded by now stays: without this, the collector looks through torch's many objects every few moves.
        gc.freeze()
        self.controls = dict(controls)
        self._draw = draw
        self._paused = False
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", object_fit="contain"))
        for control in self.controls.values():
            control.style = _WIDE
            control.layout = widgets.Layout(width="400px")
            control.observe(self._redraw, names="value")
        grid = widgets.GridBox(
            list(self.controls.values()), layout=widgets.Layout(grid_template_columns=f"repeat({columns}, 410px)")
        )
        super().__init__([grid, self.picture])
        self._redraw()

    def values(self) -> dict[str, Any]:
        """What the controls say now."""
        return {name: control.value for name, control in self.controls.items()}

    def put(self, **values: Any) -> None:
        """Set several controls and redraw once."""
        before = self.values()
        self._paused = True
        for name, value in values.items():
            self.controls[name].value = value
        self._paused = False
        if self.values() != before:
            self._redraw()

    def _redraw(self, _: object = None) -> None:
        if not self._paused:
            self.picture.value = to_png(self._draw(**self.values()))


def number(label: str, value: float, low: float, high: float, *, step: float = 0.1) -> widgets.FloatSlider:
    """A slider for a number; it reports while it is moved."""
    return widgets.FloatSlider(value, min=low, max=high, step=step, description=label)


def whole(label: str, value: int, low: int, high: int, *, step: int = 1) -> widgets.IntSlider:
    """A slider for a whole number."""
    return widgets.IntSlider(value, min=low, max=high, step=step, description=label)


def factor(label: str, value: float, low: float, high: float) -> widgets.FloatLogSlider:
    """A slider for a positive number over some powers of ten, given as exponents."""
    return widgets.FloatLogSlider(value, min=low, max=high, step=0.025, description=label, readout_format=".3g")


class SeedExplorer(Panel):
    """Click a pixel in any of the maps and see what it is near to; sliders for everything that §3.3 leaves open.

    The category follows the box that was clicked, and can be chosen freely afterwards.
    """

    def __init__(self, examples: Sequence[Example], *, seed: Seed | None = None, knobs: Knobs | None = None) -> None:
        self.examples = {f"{i + 1}: {example.name}": example for i, example in enumerate(examples)}
        first = examples[0]
        row, column = seed if seed is not None else (first.size[0] // 2, first.size[1] // 2)
        knobs = Knobs() if knobs is None else knobs
        self._fields: dict[tuple[str, int], SeedField] = {}
        controls: dict[str, Any] = {
            "image": widgets.Dropdown(options=list(self.examples), description="image"),
            "label": widgets.Dropdown(
                options=[(name, i) for i, name in enumerate(first.classes or ("any",))],
                value=category_at(first, (row, column)),
                description="category c",
            ),
            "row": whole("seed row", row, 0, first.size[0] - 1),
            "column": whole("seed column", column, 0, first.size[1] - 1),
            "local_bandwidth": factor("color bandwidth", knobs.local_bandwidth, -2, 0.5),
            "tree_bandwidth": factor("tree bandwidth", knobs.tree_bandwidth, -3, 0),
            "semantic_scale": factor("scale of σ(S)", knobs.semantic_scale, -1, 1.5),
            "balance": number("balance", knobs.balance, 0, 3),
            "form": widgets.Dropdown(
                options=[("A + balance · Aᶜ", "sum"), ("A · Aᶜ to the balance", "product")],
                value=knobs.form,
                description="SEPA",
            ),
            "window": widgets.Dropdown(options=[3, 5, 7, 9], value=knobs.window, description="window"),
            "steps": whole("steps", knobs.steps, 0, 100),
            "start": widgets.Dropdown(
                options=[("a disc around the seed", "seed"), ("a blob in its box", "blob"), ("its whole box", "box")],
                description="mask starts as",
            ),
            "reach": widgets.Dropdown(
                options=[("in windows", "local"), ("along the tree", "global")], description="and spreads"
            ),
        }
        super().__init__(self._figure, controls)
        self.controls["image"].observe(self._fit, names="value")
        self.clicks = Event(source=self.picture, watched_events=["click"])
        self.clicks.on_dom_event(self._clicked)

    def click(self, x: float, y: float) -> Seed | None:
        """What a click at (x, y), in pixels of the picture, does: the cell there becomes the seed."""
        example = self.examples[self.controls["image"].value]
        here = self.controls["row"].value, self.controls["column"].value
        field = self._field(self.controls["label"].value)
        seed = Layout(*example.size, len(field.kernels), self.controls["window"].value, here).cell_at(x, y)
        if seed is not None:
            label = category_at(example, seed) if example.box_at(seed) is not None else self.controls["label"].value
            self.put(row=seed[0], column=seed[1], label=label)
        return seed

    def _clicked(self, event: Mapping[str, Any]) -> None:
        self.click(event["dataX"], event["dataY"])

    def _fit(self, _: object) -> None:
        """Another image may be smaller; it is drawn already, with the seed inside it."""
        example = self.examples[self.controls["image"].value]
        self._paused = True
        for name, size in zip(("row", "column"), example.size, strict=True):
            self.controls[name].max = size - 1
        self._paused = False

    def _field(self, label: int) -> SeedField:
        name = self.controls["image"].value
        if (name, label) not in self._fields:
            self._fields[name, label] = field_of(self.examples[name], label)
        return self._fields[name, label]

    def _figure(self, image: str, label: int, row: int, column: int, start: Any, reach: Any, **rest: Any) -> Figure:
        example = self.examples[image]
        seed = min(row, example.size[0] - 1), min(column, example.size[1] - 1)
        knobs = Knobs(**{field.name: rest[field.name] for field in fields(Knobs)})
        return affinity_figure(example, seed, field=self._field(label), knobs=knobs, start=start, reach=reach)


class FrequencyExplorer(Panel):
    """Sliders for the radius t and the scale θ of Eq. 4 and for the channel, on any of the examples."""

    def __init__(
        self, examples: Sequence[Example], *, channel: int = 0, radius: float = 10.0, scale: float = 0.2
    ) -> None:
        self.examples = {f"{i + 1}: {example.name}": example for i, example in enumerate(examples)}
        self._energies = {name: energies_of(maps_of(example)) for name, example in self.examples.items()}
        channels = min(len(values) for example in examples for values in maps_of(example).values())
        reach = max(max(example.size) for example in examples) / 2**0.5
        controls: dict[str, Any] = {
            "image": widgets.Dropdown(options=list(self.examples), description="image"),
            "channel": whole("channel", min(channel, channels - 1), 0, channels - 1),
            "radius": number("radius t", radius, 0, max(radius, reach), step=0.5),
            "scale": number("scale θ", scale, 0, 1, step=0.05),
        }
        super().__init__(self._figure, controls)

    def _figure(self, image: str, channel: int, radius: float, scale: float) -> Figure:
        example = self.examples[image]
        inside = example.box_masks().any(dim=0)
        return frequency_figure(
            maps_of(example), inside, channel=channel, radius=radius, scale=scale, energies=self._energies[image]
        )
