"""Masks painted over an image at its full size, with OpenCV: for many images, where a Figure each would be slow.

Axes: n instance · h row · w column.
"""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from misa.figures.plots import COLORS

# Colours by the instance's number, as in the other figures.
PALETTE = np.array([[round(255 * value) for value in to_rgb(color)] for color in COLORS], dtype=np.uint8)

# Pixels of a side that words of a few pixels' height fit into, and how far a small image is enlarged for it.
_READABLE = 512
_MOST = 8


def overlay(
    image: NDArray[np.uint8],
    parts: Iterable[tuple[int, int, NDArray[np.bool_]]],
    labels: Sequence[str],
    *,
    opacity: float = 0.45,
) -> NDArray[np.uint8]:
    """A copy of an RGB image (h w 3) with tinted and outlined masks, the first on top, and their labels.

    parts: top, left and pixels (h w) of each mask within its extent. A small image is enlarged by a whole factor, so
    that words do not cover it.
    """
    by = min(max(_READABLE // max(image.shape[:2]), 1), _MOST)
    canvas = np.ascontiguousarray(image.repeat(by, axis=0).repeat(by, axis=1))
    parts = [(by * top, by * left, pixels.repeat(by, axis=0).repeat(by, axis=1)) for top, left, pixels in parts]
    # Sizes in pixels that are seen in a picture of any size.
    line = max(1, round(max(canvas.shape[:2]) / 600))
    named = []
    for i, (top, left, pixels) in reversed(list(enumerate(parts))):
        color = PALETTE[i % len(PALETTE)]
        window = canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]]
        tint = (1 - opacity) * window[pixels] + opacity * color.astype(np.float32)
        window[pixels] = tint.round().astype(np.uint8)
        framed = np.pad(pixels.astype(np.uint8), 1)
        contours, _ = cv2.findContours(framed, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE, offset=(left - 1, top - 1))
        cv2.drawContours(canvas, contours, -1, tuple(map(int, color)), line)
        named.append((labels[i], left, top, tuple(map(int, color))))
    for text, left, top, color in named:
        _label(canvas, text, left, top, color, scale=0.4 * max(1.0, line * 0.75))
    return canvas


def _label(canvas: NDArray[np.uint8], text: str, left: int, top: int, color: tuple[int, ...], *, scale: float) -> None:
    """White text on a patch of the colour, kept within the image."""
    shown = text.encode("ascii", "replace").decode()  # all that OpenCV's fonts have
    thickness = max(1, round(scale * 2))
    (width, height), base = cv2.getTextSize(shown, cv2.FONT_HERSHEY_SIMPLEX, scale, max(1, thickness // 2))
    if width > canvas.shape[1] or 2 * (height + base) > canvas.shape[0]:
        return  # no room for words in so small an image
    x = min(max(left, 0), canvas.shape[1] - width)
    y = min(max(top, height + base), canvas.shape[0] - 1)
    cv2.rectangle(canvas, (x, y - height - base), (x + width, y), color, cv2.FILLED)
    cv2.putText(
        canvas, shown, (x, y - base // 2), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), max(1, thickness // 2),
        cv2.LINE_AA,
    )  # fmt: skip


def label_palette(colors: int = 256) -> list[int]:
    """The palette of an instance map: black for none, then the figures' colours in turn (flat R G B ...)."""
    table = np.zeros((colors, 3), np.uint8)
    table[1:] = PALETTE[np.arange(colors - 1) % len(PALETTE)]
    return [int(value) for value in table.reshape(-1)]
