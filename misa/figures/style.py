"""What all figures share: the venue's widths, one perceptual map, one set of line styles, and fast pictures."""

import io
from functools import lru_cache
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

COLUMN = 3.375  # inches: IJCAI's formatting instructions
PAGE = 7.0  # two columns and the gap of 0.25 between them

MAP = "viridis"
"""Perceptual and readable with every kind of color vision; also in gray."""

_GRAYS = ("#94a4a2", "#717581")
SIGNED = "RdBu_r"
"""For maps around zero: white is nothing, red more and blue less."""

COLORS: tuple[str, ...] = tuple(
    name for color in matplotlib.color_sequences["petroff10"] if (name := to_hex(color)) not in _GRAYS
)
"""The one palette, safe for every kind of color vision (Petroff 2021): a color a class, object or line.

Its two grays are left out: gray is what is of no object.
"""

ACCENT = COLORS[1]
"""Boxes, seeds' frames and half-height contours on maps and photographs."""

LINES: tuple[dict[str, Any], ...] = (
    {"color": COLORS[1], "linestyle": "--"},
    {"color": COLORS[7], "linestyle": ":"},
    {"color": COLORS[2], "linestyle": "-."},
    {"color": COLORS[0], "linestyle": "-"},
)
"""Lines of a diagram, each with a dash of its own."""

PRINT: Any = {"pdf.fonttype": 42, "font.size": 7, "axes.linewidth": 0.5, "savefig.dpi": 300}
"""rc parameters of a printed figure: embedded TrueType, small type, thin frames."""


class Picture(Figure):
    """A figure that a notebook shows by itself, without pyplot's global state; a $ in a name begins no formula."""

    def draw(self, renderer: Any) -> None:
        """Called by matplotlib, whose own formulae are the numbers of logarithmic axes."""
        for text in self.findobj(Text):
            assert isinstance(text, Text), "findobj gives what it was asked for"
            if "$" in text.get_text() and not text.get_text().startswith("$\\mathdefault"):
                text.set_parse_math(False)
        super().draw(renderer)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=130)
        return buffer.getvalue()


def to_png(figure: Figure, *, dpi: int = 100) -> bytes:
    """A figure as PNG, encoded for speed: a widget shows a new one at every move."""
    figure.set_dpi(dpi)
    renderer = _renderer(int(figure.bbox.width), int(figure.bbox.height), dpi)
    renderer.clear()
    figure.draw(renderer)
    pixels = cv2.cvtColor(np.asarray(renderer.buffer_rgba()), cv2.COLOR_RGBA2BGR)
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    if hasattr(cv2, "IMWRITE_PNG_FILTER"):  # without filters: four times as fast, and no larger for flat pictures
        options += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    return bytes(cv2.imencode(".png", pixels, options)[1])


@lru_cache(maxsize=8)
def _renderer(width: int, height: int, dpi: int) -> RendererAgg:
    """One for all pictures of a size: it remembers how large each word is, a third of the time."""
    return RendererAgg(width, height, dpi)


@lru_cache(maxsize=8)
def _table(name: str) -> NDArray[np.uint8]:
    colors: NDArray[np.uint8] = (
        (matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    )
    return colors


def shade(values: NDArray[np.floating], low: float = 0.0, high: float = 1.0, *, colors: str = MAP) -> NDArray[np.uint8]:
    """Values (h w) from `low` to `high` as colors of a map (h w 3), the shared one by default."""
    place = (np.asarray(values, dtype=np.float32) - low) / max(high - low, 1e-12)
    return _table(colors)[np.clip(np.nan_to_num(place) * 255, 0, 255).round().astype(np.uint8)]
