"""The picture of a training in progress: losses, masks, and the names of the classes' colors."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from misa.engine.runs.live import drawn
from misa.figures.style import CLASS_COLORS


@pytest.mark.parametrize("number", [2, 20, len(CLASS_COLORS) + 1])
def test_the_colors_of_classes_are_named_unless_they_share_them(number):
    images = [np.zeros((20, 20, 3), np.uint8)] * 2
    masks = np.ones((1, 20, 20), bool)
    names = [f"class {i}" for i in range(number)]
    figure = drawn({"step": [1.0, 5.0], "loss": [2.0, 1.0]}, images, [(masks, [1]), (masks[:0], [])], names)
    curve, _, last = figure.axes
    assert list(curve.lines[0].get_ydata()) == [2.0, 1.0]
    legend = last.get_legend()
    texts, patches = (legend.get_texts(), legend.get_patches()) if legend else ([], [])
    named = {text.get_text(): to_hex(p.get_facecolor()) for text, p in zip(texts, patches, strict=True)}
    assert named == (dict(zip(names, CLASS_COLORS, strict=False)) if number <= len(CLASS_COLORS) else {})
    FigureCanvasAgg(figure).draw()
    assert legend is None or legend.get_window_extent().x1 <= figure.bbox.x1
