"""Common style of all figures: the venue's widths, a perceptual color map, line styles, and fast PNG encoding."""

import io
from functools import lru_cache
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

COLUMN = 3.375  # inches: IJCAI's formatting instructions
PAGE = 7.0  # two columns and the gap of 0.25 between them

MAP = "viridis"
"""Perceptually uniform, readable with any kind of color vision and in gray."""

_GRAYS = ("#94a4a2", "#717581")
SIGNED = "RdBu_r"
"""Diverging, for signed maps: white is 0, red positive, blue negative."""

COLORS: tuple[str, ...] = tuple(
    name for color in matplotlib.color_sequences["petroff10"] if (name := to_hex(color)) not in _GRAYS
)
"""The palette of classes, objects and lines, safe for any kind of color vision (Petroff 2021).

Its two grays are left out: gray marks what belongs to no object.
"""

CLASS_COLORS: tuple[str, ...] = (
    *COLORS,
    *(to_hex(tuple(0.5 * np.array(to_rgb(color)))) for color in COLORS),
    *(to_hex(tuple(0.5 + 0.5 * np.array(to_rgb(color)))) for color in COLORS),
)
"""`COLORS`, then darker and lighter shades of them: enough for the 20 classes of VOC. Beyond 24 they repeat."""


def ink(color: str) -> str:
    """Returns the color of text on a color: "black" on light ones, "white" on others (luma of Rec. 601)."""
    luma: float = np.dot(to_rgb(color), (0.299, 0.587, 0.114))
    return "black" if luma > 0.55 else "white"


ACCENT = COLORS[1]
"""Color of boxes, seed frames and half-maximum contours on maps and photographs."""

LINES: tuple[dict[str, Any], ...] = (
    {"color": COLORS[1], "linestyle": "--"},
    {"color": COLORS[3], "linestyle": ":"},
    {"color": COLORS[2], "linestyle": "-."},
    {"color": COLORS[0], "linestyle": "-"},
)
"""Line styles of a chart, each with its own dashes."""

PRINT: Any = {"pdf.fonttype": 42, "font.size": 7, "axes.linewidth": 0.5, "savefig.dpi": 300}
"""rc parameters of a printed figure: embedded TrueType, small fonts, thin frames."""


class Picture(Figure):
    """A figure that notebooks display without pyplot's global state; a $ in a name does not start a formula."""

    def draw(self, renderer: Any) -> None:
        """Called by matplotlib; formulas remain enabled for the tick labels of logarithmic axes."""
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
    """Encode a figure as PNG, tuned for speed: a widget shows a new one at every slider move."""
    figure.set_dpi(dpi)
    renderer = _renderer(int(figure.bbox.width), int(figure.bbox.height), dpi)
    renderer.clear()
    figure.draw(renderer)
    pixels = cv2.cvtColor(np.asarray(renderer.buffer_rgba()), cv2.COLOR_RGBA2BGR)
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    if hasattr(cv2, "IMWRITE_PNG_FILTER"):  # without filters: four times as fast, and no larger for flat images
        options += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    return bytes(cv2.imencode(".png", pixels, options)[1])


@lru_cache(maxsize=8)
def _renderer(width: int, height: int, dpi: int) -> RendererAgg:
    """Returns the cached renderer of a size: it caches the extents of text, which saves a third of the time."""
    return RendererAgg(width, height, dpi)


@lru_cache(maxsize=8)
def _table(name: str) -> NDArray[np.uint8]:
    colors: NDArray[np.uint8] = (
        (matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    )
    return colors


def shade(values: NDArray[np.floating], low: float = 0.0, high: float = 1.0, *, colors: str = MAP) -> NDArray[np.uint8]:
    """Map values (h w) from `low` to `high` to the colors (h w 3) of a color map, by default the shared one."""
    place = (np.asarray(values, dtype=np.float32) - low) / max(high - low, 1e-12)
    return _table(colors)[np.clip(np.nan_to_num(place) * 255, 0, 255).round().astype(np.uint8)]
