"""Outlines and textures of the embedded classes, by which (and never by color) the classes differ.

Axes: h row, w column. Outlines lie in [-1, 1] x [-1, 1] as (points, 2) arrays of (x, y); textures are in pixels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Points = NDArray[np.floating[Any]]
Outline = list[Points]
Grid = NDArray[np.float32]

# Supersampling per axis, so that the covered share of a pixel is accurate to 1/16.
_SUPERSAMPLE = 4


def _polar(radius: Points, angle: Points) -> Points:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _around(points: int) -> Points:
    return np.linspace(0, 2 * np.pi, points, endpoint=False)


def _star(rng: Generator) -> Outline:
    tips = int(rng.integers(5, 7))
    return [_polar(np.tile([1.0, rng.uniform(0.42, 0.55)], tips), _around(2 * tips))]


def _ring(rng: Generator) -> Outline:
    # Two contours: by the even-odd fill rule the inner one is a hole.
    circle = _polar(np.ones(48), _around(48))
    return [circle, circle * rng.uniform(0.42, 0.55)]


def _cross(rng: Generator) -> Outline:
    a = rng.uniform(0.26, 0.36)
    quarter = np.array([[1.0, -a], [1.0, a], [a, a]])
    turns = [np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) for t in _around(4)]
    return [np.concatenate([quarter @ turn.T for turn in turns])]


def _blob(rng: Generator) -> Outline:
    angle = _around(64)
    radius = np.ones(64)
    for wave in (2, 3, 5):
        radius += rng.uniform(0.12, 0.22) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return [_polar(radius / radius.max(), angle)]


def _heart(rng: Generator) -> Outline:
    t = _around(64)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack([x, y + 2.5], axis=1) / 16.5]


def _crescent(rng: Generator) -> Outline:
    outer = np.linspace(0.35 * np.pi, 1.65 * np.pi, 32)
    tip = np.array([np.cos(outer[0]), np.sin(outer[0])])
    centre = rng.uniform(0.55, 0.75)  # of the circle that is cut out
    bite = np.hypot(tip[0] - centre, tip[1])
    start = np.arctan2(tip[1], tip[0] - centre)
    inner = np.linspace(2 * np.pi - start, start, 32)
    bitten = _polar(np.full(32, bite), inner) + np.array([centre, 0.0])
    return [np.concatenate([_polar(np.ones(32), outer), bitten])]


def _arrow(rng: Generator) -> Outline:
    a = rng.uniform(0.2, 0.3)
    return [np.array([[1, 0], [0.05, 0.85], [0.05, a], [-1, a], [-1, -a], [0.05, -a], [0.05, -0.85]])]


def _mottle(x: Grid, y: Grid, rng: Generator) -> Grid:
    # Band-passed white noise: irregular spots at the wavelength, without a direction.
    wavelength = 2 * np.pi / max(float(np.hypot(np.ptp(x[0]), np.ptp(y[0]))) / max(x.shape[1] - 1, 1), 1e-6)
    noise = rng.standard_normal(x.shape).astype(np.float32)
    sigma = wavelength / 5
    return np.tanh(6 * (cv2.GaussianBlur(noise, (0, 0), sigma) - cv2.GaussianBlur(noise, (0, 0), 1.8 * sigma)) * sigma)


def _bricks(x: Grid, y: Grid, rng: Generator) -> Grid:
    row = np.floor(y / (2 * np.pi))
    joint = np.minimum(np.abs(np.sin(0.5 * y)), np.abs(np.sin(0.25 * x + row * np.pi / 2)) * 2)
    return np.tanh(4 * (joint - 0.45))


def _dashes(x: Grid, y: Grid, rng: Generator) -> Grid:
    row = np.floor(x / (2 * np.pi))
    return np.tanh(3 * (np.sin(x) + np.sin(0.4 * y + row * np.pi) - 0.3))


class Kind(NamedTuple):
    """A class of the embedded data: a name, an outline and a texture."""

    name: str
    outline: Callable[[Generator], Outline]
    texture: Callable[[Grid, Grid, Generator], Grid]


KINDS = (
    Kind("striped star", _star, lambda x, y, rng: np.sin(x)),
    Kind("checked ring", _ring, lambda x, y, rng: np.tanh(3 * np.sin(0.7 * x) * np.sin(0.7 * y))),
    Kind("dotted cross", _cross, lambda x, y, rng: np.tanh(3 * (np.cos(x) + np.cos(y) - 0.7))),
    Kind("mottled blob", _blob, _mottle),
    Kind(
        "zigzag triangle",
        lambda rng: [_polar(np.ones(3), _around(3) + rng.uniform(-0.2, 0.2, 3))],
        lambda x, y, rng: np.sin(x + 1.6 * np.arcsin(np.sin(0.6 * y))),
    ),
    Kind("rippled heart", _heart, lambda x, y, rng: np.sin(np.hypot(x - x.mean(), y - y.mean()))),
    Kind("bricked crescent", _crescent, _bricks),
    Kind("dashed arrow", _arrow, _dashes),
)


def stamp(label: int, diameter: float, rng: Generator) -> Grid:
    """Returns the coverage (h w), 0 to 1, of a randomly rotated and squeezed object in a tight square patch."""
    outline = KINDS[label].outline(rng)
    angle = rng.uniform(0, 2 * np.pi)
    squeeze = np.diag([1.0, rng.uniform(0.75, 1.0)])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    contours = [points @ squeeze @ turn.T for points in outline]
    side = int(np.ceil(diameter)) + 2
    fine = np.zeros((side * _SUPERSAMPLE,) * 2, np.uint8)
    scaled = [np.round((c * diameter / 2 + side / 2) * _SUPERSAMPLE).astype(np.int32) for c in contours]
    cv2.fillPoly(fine, scaled, 255)
    covered = cv2.resize(fine, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
    return covered / np.float32(255)


def texture(label: int, shape: tuple[int, ...], wavelength: float, rng: Generator) -> Grid:
    """Returns the texture of a class (h w), randomly rotated and shifted; the caller normalizes mean and spread."""
    angle = rng.uniform(0, 2 * np.pi)
    shift = rng.uniform(0, 20 * np.pi, 2)
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float32) * np.float32(2 * np.pi / wavelength)
    x = np.cos(angle) * columns - np.sin(angle) * rows + shift[0]
    y = np.sin(angle) * columns + np.cos(angle) * rows + shift[1]
    return KINDS[label].texture(x.astype(np.float32), y.astype(np.float32), rng)
