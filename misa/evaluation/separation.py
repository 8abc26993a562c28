"""How well a map separates an object from its surroundings (Figure 4 as a number).

The affinities of Eq. 8-12 fall with the distance between two pixels' vectors. We measure how often a pixel of an object
is closer to another pixel of the object than to one outside: the area under the ROC curve (AUC) of pairs. 0.5 is
chance, 1 perfect; below 0.5 the object's parts are further apart than object and surroundings.

Axes: n object · d channel · h row · w column.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from misa.ops.axes import check_shapes


def auc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Return the AUC: the probability that a positive scores above a negative, ties count half; NaN if one is empty."""
    if not len(positive) or not len(negative):
        return float("nan")
    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    least = len(positive) * (len(positive) + 1) / 2
    return float((ranks.sum() - least) / (len(positive) * len(negative)))


def surroundings(mask: NDArray[np.bool_], *, reach: float = 0.25) -> NDArray[np.bool_]:
    """Return the bounding box of a mask (h w), grown by `reach` of its sides (two pixels at least), minus the mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    around = np.zeros_like(mask)
    if len(rows):
        dy, dx = (max(2, round(reach * (side[-1] + 1 - side[0]))) for side in (rows, columns))
        around[max(rows[0] - dy, 0) : rows[-1] + 1 + dy, max(columns[0] - dx, 0) : columns[-1] + 1 + dx] = True
    return around & ~mask


def separation(
    values: NDArray[np.floating],
    masks: NDArray[np.bool_],
    *,
    factors: NDArray[np.floating] | None = None,
    pairs: int = 2000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Return the AUC of same-object against other pairs for each mask (n h w) on a map (d h w).

    Each pair starts at a pixel of the object; its other end is drawn from the object or from its surroundings, other
    objects included, `pairs` times each. The score is minus the distance of the two vectors. `factors` (n d) reweight
    the channels for each object (Eq. 11). NaN for objects of one pixel or without surroundings.
    """
    check_shapes("separation", values=(values, "d h w"), masks=(masks, "n h w"), factors=(factors, "n d"))
    rng = np.random.default_rng(seed)
    table = np.moveaxis(np.asarray(values, np.float64), 0, -1)
    results = np.full(len(masks), np.nan)
    for n, mask in enumerate(masks):
        inside, outside = np.argwhere(mask), np.argwhere(surroundings(mask))
        if len(inside) < 2 or not len(outside):
            continue
        weights = 1.0 if factors is None else np.asarray(factors[n], np.float64)
        mine, other = table[tuple(inside.T)] * weights, table[tuple(outside.T)] * weights
        start = rng.integers(len(mine), size=pairs)
        end = (start + rng.integers(1, len(mine), size=pairs)) % len(mine)  # never the same pixel
        away = rng.integers(len(other), size=pairs)
        results[n] = auc(
            -np.linalg.norm(mine[start] - mine[end], axis=1), -np.linalg.norm(mine[start] - other[away], axis=1)
        )
    return results
