"""Colors of an embedded scene: the background, and objects in the two ways in which color affinity fails (Figure 4).

camouflage: the object has the color of the adjoining background, so color affinity leaks out of it (4a);
contrast: the object has two strongly contrasting parts, so color affinity stops inside it (4b);
plain: one color, unlike the background. In each mode the object has the texture of its class.

Axes: h row, w column, last 3 red, green, blue in [0, 1].
"""

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from misa.data.scenes.shapes import texture

MODES = ("plain", "camouflage", "contrast")

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Minimum distance of colors from black and white: a texture that is clipped there would shift the mean.
_MARGIN = 0.17
_TEXTURE = 0.085  # standard deviation of a texture around its color
_RING = 6  # pixels around an object that count as adjoining


def background(size: tuple[int, int], clutter: int, rng: Generator) -> tuple[Image, Image]:
    """Returns a smooth color gradient (h w 3), and the same with `clutter` untextured strokes and patches on it."""
    h, w = size
    base = rng.uniform(0.32, 0.68, 3)
    coarse = (base + rng.normal(0, 0.05, (4, 4, 3))).clip(_MARGIN, 1 - _MARGIN).astype(np.float32)
    smooth = cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC).clip(_MARGIN, 1 - _MARGIN)
    drawn = smooth.copy()
    for _ in range(clutter):
        step = rng.normal(0, 1, 3)
        colour = np.clip(base + step / np.linalg.norm(step) * rng.uniform(0.12, 0.3), _MARGIN, 1 - _MARGIN)
        layer = np.zeros((h, w), np.uint8)
        centre = (int(rng.integers(w)), int(rng.integers(h)))
        reach = rng.uniform(0.05, 0.16) * min(h, w)
        if rng.random() < 0.5:
            axes = (max(round(reach), 1), max(round(reach * rng.uniform(0.3, 1)), 1))
            cv2.ellipse(layer, centre, axes, rng.uniform(0, 360), 0, 360, 255, -1, cv2.LINE_AA)
        else:
            points = np.cumsum(rng.normal(0, reach, (4, 2)), axis=0) + centre
            width = max(round(min(h, w) * rng.uniform(0.01, 0.03)), 1)
            cv2.polylines(layer, [points.round().astype(np.int32)], False, 255, width, cv2.LINE_AA)
        share = cv2.GaussianBlur(layer, (0, 0), 0.7).astype(np.float32)[..., None] / 255
        drawn = drawn * (1 - share) + colour.astype(np.float32) * share
    return smooth, drawn


def surroundings(mask: Mask, objects: Mask) -> Mask:
    """Returns the background within a few pixels of `mask` (h w), into which color affinity would leak."""
    grown = cv2.dilate(mask.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * _RING + 1,) * 2))
    return grown.astype(bool) & ~objects


def far_colour(beside: NDArray[np.float32], rng: Generator) -> NDArray[np.float32]:
    """Returns a random color that differs clearly from the color `beside`."""
    tries = rng.uniform(_MARGIN, 1 - _MARGIN, (64, 3))
    distance = np.linalg.norm(tries - beside, axis=1)
    return tries[_first(distance, 0.35)].astype(np.float32)


def two_tones(beside: NDArray[np.float32], rng: Generator) -> NDArray[np.float32]:
    """Returns a dark and a light color (2 3), in random order, both unlike the color `beside`."""
    dark, light = rng.uniform(_MARGIN, 0.36, (64, 3)), rng.uniform(0.64, 1 - _MARGIN, (64, 3))
    distance = np.minimum(np.linalg.norm(dark - beside, axis=1), np.linalg.norm(light - beside, axis=1))
    best = _first(distance, 0.3)
    pair = np.stack([dark[best], light[best]])[rng.permutation(2)]
    return pair.astype(np.float32)


def _first(distance: NDArray[np.float64], enough: float) -> int:
    """Index of the first value above `enough`, else of the largest; always the largest would give extreme colors."""
    return int(np.argmax(distance >= enough)) if (distance >= enough).any() else int(np.argmax(distance))


def _parts(mask: Mask, rng: Generator) -> NDArray[np.float32]:
    """Split an object in two by a wavy line or in patches; returns the soft share (h w) of the second part, 0 to 1."""
    h, w = mask.shape
    rows, columns = np.nonzero(mask)
    reach = float(max(int(np.ptp(rows)), int(np.ptp(columns)), 4))
    if rng.random() < 0.6:
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        y, x = np.mgrid[:h, :w].astype(np.float32)
        along = np.cos(angle) * x - np.sin(angle) * y
        across = np.sin(angle) * x + np.cos(angle) * y
        field = across + 0.08 * reach * np.sin(2 * np.pi * along / (0.5 * reach) + phase)
        slope = 1.0
    else:
        field = cv2.GaussianBlur(rng.standard_normal((h, w)).astype(np.float32), (0, 0), 0.16 * reach)
        slope = float(np.abs(np.diff(field, axis=1)).mean()) + 1e-9
    threshold = np.quantile(field[mask], rng.uniform(0.35, 0.65))
    return np.clip((field - threshold) / slope + 0.5, 0, 1).astype(np.float32)


def paint(
    canvas: Image,
    smooth: Image,
    *,
    alpha: NDArray[np.float32],
    mask: Mask,
    objects: Mask,
    label: int,
    mode: str,
    wavelength: float,
    colour: NDArray[np.float32] | None,
    rng: Generator,
) -> NDArray[np.float32] | None:
    """Paint one object onto `canvas` in place; returns its color if it is plain, for a twin to share.

    `alpha` (h w) is the object's coverage, `mask` (h w) its visible part, `objects` (h w) the union of all objects.
    Mean and spread of the texture are normalized over the visible part, so that they carry no class information.
    """
    ring = surroundings(mask, objects)
    beside = (canvas[ring] if ring.any() else smooth[mask]).mean(axis=0)
    if mode == "camouflage":
        base = smooth + (beside - smooth[mask].mean(axis=0))
    elif mode == "contrast":
        share = _parts(mask, rng)[..., None]
        first, second = two_tones(beside, rng)
        base = first * (1 - share) + second * share
    else:
        colour = far_colour(beside, rng) if colour is None else colour
        base = np.broadcast_to(colour, canvas.shape)
    y, x = (slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(alpha > 0))
    pattern = texture(label, alpha[y, x].shape, wavelength, rng)
    inside = pattern[mask[y, x]]
    # A crop of the texture may be skewed; limiting it here keeps rare peaks from being clipped at black or white.
    pattern = np.clip((pattern - inside.mean()) / max(float(inside.std()), 1e-6), -2.0, 2.0)
    pattern = pattern - pattern[mask[y, x]].mean()
    share = alpha[y, x, None]
    canvas[y, x] = canvas[y, x] * (1 - share) + (base[y, x] + _TEXTURE * pattern[..., None]) * share
    return colour if mode == "plain" else None


def grain(canvas: Image, rng: Generator) -> NDArray[np.uint8]:
    """Add low-contrast noise of equal strength to objects and background; returns the image (h w 3) in uint8."""
    fine = rng.standard_normal(canvas.shape).astype(np.float32)
    soft = cv2.GaussianBlur(rng.standard_normal(canvas.shape[:2]).astype(np.float32), (0, 0), 1.5)
    noisy = canvas + 0.012 * fine + 0.02 * (soft / max(float(soft.std()), 1e-6))[..., None]
    return np.clip(np.round(noisy * 255), 0, 255).astype(np.uint8)
