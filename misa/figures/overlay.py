"""Draw masks and boxes over an image, with OpenCV because a matplotlib figure per image would be slow.

Axes: n instance · h row · w column.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from matplotlib.colors import to_hex, to_rgb
from matplotlib.font_manager import FontProperties, findfont
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from misa.data.rle import Part, trimmed
from misa.figures.style import CLASS_COLORS, ink

PALETTE = np.array([[round(255 * value) for value in to_rgb(color)] for color in CLASS_COLORS], dtype=np.uint8)
"""The figures' colors (k 3) in RGB, by the index of an object or a class."""

# Side in pixels up to which an image is enlarged so that labels are readable, and the largest factor.
_READABLE = 512
_MOST = 8
_DARK = (32, 32, 32)


def overlay(
    image: NDArray[np.uint8],
    parts: Iterable[Part] = (),
    labels: Sequence[str] = (),
    *,
    boxes: ArrayLike = (),
    colors: Sequence[int | str] | None = None,
    opacity: float | Sequence[float] = 0.45,
    readable: int = _READABLE,
    line: float = 1 / 600,
) -> NDArray[np.uint8]:
    """Returns a copy of an RGB image (h w 3) with tinted and outlined masks, boxes and labels; the first is on top.

    A small image is enlarged by an integer factor, so that outlines and labels do not cover it.

    Args:
        image: uint8 RGB (h w 3).
        parts: the masks, each cropped to its tight box.
        labels: a text for each mask, or empty.
        boxes: (n 4), xyxy in pixels of the image.
        colors: for each object an index into `PALETTE` or a color of matplotlib; by default its own index.
        opacity: of the tint, 0 (only the outline) to 1; one value for all masks or one per mask.
        readable: longer side in pixels up to which a small image is enlarged.
        line: width of outlines as a share of the longer side, at least one pixel.
    """
    by = min(max(readable // max(image.shape[:2]), 1), _MOST)
    canvas = np.ascontiguousarray(image.repeat(by, axis=0).repeat(by, axis=1))
    masks = [Part(by * top, by * left, pixels.repeat(by, axis=0).repeat(by, axis=1)) for top, left, pixels in parts]
    # Sizes in pixels, proportional to the image so that they stay visible.
    width = max(1, round(max(canvas.shape[:2]) * line))
    strength = [opacity] * len(masks) if isinstance(opacity, int | float) else list(opacity)
    frames = by * np.asarray(boxes, dtype=float).reshape(-1, 4)
    chosen = [_color(i if colors is None else colors[i]) for i in range(max(len(masks), len(frames)))]
    for i in reversed(range(len(frames))):
        x1, y1, x2, y2 = (round(side) for side in frames[i])
        _bordered(canvas, [np.array([[x1, y1], [x2 - 1, y1], [x2 - 1, y2 - 1], [x1, y2 - 1]])], chosen[i], width)
    for i in reversed(range(len(masks))):
        _mask(canvas, masks[i], chosen[i], strength[i], width)
    for i in reversed(range(len(labels))):
        _label(canvas, labels[i], masks[i][1], masks[i][0], chosen[i], scale=0.4 * max(1.0, width * 0.75))
    return canvas


def whole(masks: Iterable[NDArray[np.bool_]]) -> list[Part]:
    """Crop full masks (n h w) to their tight boxes."""
    return [trimmed(0, 0, mask) for mask in masks]


def _color(color: int | str) -> tuple[int, int, int]:
    if isinstance(color, str):
        red, green, blue = (round(255 * value) for value in to_rgb(color))
        return red, green, blue
    red, green, blue = map(int, PALETTE[color % len(PALETTE)])
    return red, green, blue


def _mask(canvas: NDArray[np.uint8], part: Part, color: tuple[int, int, int], opacity: float, line: int) -> None:
    top, left, pixels = part
    window = canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]]
    tint = (1 - opacity) * window[pixels] + opacity * np.array(color, np.float32)
    window[pixels] = tint.round().astype(np.uint8)
    framed = np.pad(pixels.astype(np.uint8), 1)
    contours, _ = cv2.findContours(framed, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE, offset=(left - 1, top - 1))
    _bordered(canvas, contours, color, line)


def _bordered(
    canvas: NDArray[np.uint8], lines: Sequence[NDArray[Any]], color: tuple[int, int, int], width: int
) -> None:
    """Draw closed lines with a thin dark rim, so that they are visible on objects of the same color."""
    for shade, thickness in ((_DARK, width + 2), (color, width)):
        cv2.drawContours(canvas, [line.reshape(-1, 1, 2) for line in lines], -1, shade, thickness)


def _label(
    canvas: NDArray[np.uint8], text: str, left: int, top: int, color: tuple[int, int, int], *, scale: float
) -> None:
    """Draw text on a colored patch, kept within the image."""
    # Matplotlib's font, so that rcParams["font.family"] chooses one for scripts that DejaVu Sans lacks.
    font = _font(findfont(FontProperties()), round(28 * scale))
    shown = " ".join(text.split())  # one line
    x1, _, x2, _ = font.getbbox(shown)
    ascent, descent = font.getmetrics()
    width, height = round(x2 - min(x1, 0)) + 4, ascent + descent
    if not shown or width > canvas.shape[1] or 2 * height > canvas.shape[0]:
        return  # the image is too small for text
    x = min(max(left, 0), canvas.shape[1] - width)
    y = min(max(top - height, 0), canvas.shape[0] - height)
    patch = Image.new("RGB", (width, height), color)
    ImageDraw.Draw(patch).text((2 - min(x1, 0), 0), shown, fill=ink(to_hex(tuple(np.array(color) / 255))), font=font)
    canvas[y : y + height, x : x + width] = np.asarray(patch)


@lru_cache(maxsize=8)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def label_palette(colors: int = 256) -> list[int]:
    """Returns the palette of an instance map: black for background, then the figures' colors (flat R G B ...)."""
    table = np.zeros((colors, 3), np.uint8)
    table[1:] = PALETTE[np.arange(colors - 1) % len(PALETTE)]
    return [int(value) for value in table.reshape(-1)]
