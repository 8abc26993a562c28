"""Bootstrap confidence intervals of AP over images, from pycocotools' matches.

Images are resampled with replacement, since the objects of one image are not independent. Matching does not depend on
the resample, so it runs once.

Axes: r resample · t IoU threshold · d detection · i image.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval
from scipy.stats import DegenerateDataWarning, bootstrap
from tqdm.auto import tqdm

from misa.evaluation.guidance import FEWEST

SIZES = ("all", "small", "medium", "large")
_RECALLS = np.linspace(0, 1, 101)


class _Cell(NamedTuple):
    """The detections of a class and size, best score first, and the number of objects of each image (i)."""

    right: NDArray[np.bool_]  # t d
    wrong: NDArray[np.bool_]  # t d
    image: NDArray[np.int64]  # d
    objects: NDArray[np.int64]


class Estimate(NamedTuple):
    """A score in percent and its 95 % bootstrap interval; None without ground truth."""

    value: float | None
    low: float | None
    high: float | None
    objects: int


@dataclass(frozen=True)
class Matches:
    """The matches that scores are computed from: see `matches_of`."""

    images: tuple[int, ...]
    classes: tuple[str, ...]
    cells: dict[tuple[str, str], _Cell]

    def objects(self) -> dict[int, int]:
        """The number of objects of each image."""
        counts = sum(self.cells[name, "all"].objects for name in self.classes)
        return dict(zip(self.images, np.broadcast_to(counts, len(self.images)).tolist(), strict=True))


def matches_of(evaluation: COCOeval) -> Matches:
    """Return the matches of a COCOeval after `evaluate`, with the standard thresholds, sizes and 100 detections."""
    params = evaluation.params
    names = {c["id"]: c["name"] for c in evaluation.cocoGt.dataset["categories"]}
    count, cells = len(params.imgIds), {}
    for k, category in enumerate(params.catIds):
        for a, size in enumerate(params.areaRngLbl):
            first = (k * len(params.areaRng) + a) * count
            cells[names[category], size] = _cell(evaluation.evalImgs[first : first + count], params.maxDets[-1])
    return Matches(tuple(params.imgIds), tuple(names[category] for category in params.catIds), cells)


def _cell(images: Sequence[dict[str, Any] | None], most: int) -> _Cell:
    objects = np.zeros(len(images), np.int64)
    scores, right, wrong, image = [], [], [], []
    for i, found in enumerate(images):
        if found is None:
            continue
        objects[i] = np.count_nonzero(np.asarray(found["gtIgnore"]) == 0)
        matched, ignored = np.asarray(found["dtMatches"])[:, :most] > 0, np.asarray(found["dtIgnore"])[:, :most] > 0
        scores.append(np.asarray(found["dtScores"], dtype=float)[:most])
        right.append(matched & ~ignored)
        wrong.append(~matched & ~ignored)
        image.append(np.full(len(scores[-1]), i))
    if not scores:
        return _Cell(np.zeros((10, 0), bool), np.zeros((10, 0), bool), np.zeros(0, np.int64), objects)
    order = np.argsort(-np.concatenate(scores), kind="mergesort")
    return _Cell(
        np.concatenate(right, axis=1)[:, order],
        np.concatenate(wrong, axis=1)[:, order],
        np.concatenate(image)[order],
        objects,
    )


def average_precision(cell: _Cell, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return AP at each IoU threshold (t), in [0, 1], with image i counted `weights[i]` times; NaN without objects."""
    total = int(cell.objects @ weights)
    if total == 0:
        return np.full(len(cell.right), np.nan)
    each = weights[cell.image]
    right, wrong = np.cumsum(cell.right * each, axis=1), np.cumsum(cell.wrong * each, axis=1)
    precision = right / np.maximum(right + wrong, np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    found = np.zeros((len(right), len(_RECALLS)))
    for row, recall, best in zip(found, right / total, precision, strict=True):
        at = np.searchsorted(recall, _RECALLS, side="left")
        row[at < recall.size] = best[at[at < recall.size]]
    return found.mean(axis=1)


def scores(matches: Matches, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return AP, AP50, AP75, APs, APm, APl, then the AP of each class, in percent; NaN without objects."""
    by_size = {
        size: np.stack([average_precision(matches.cells[name, size], weights) for name in matches.classes])
        for size in SIZES
    }
    everything = by_size["all"]
    figures = [everything, everything[:, 0], everything[:, 5], *(by_size[size] for size in SIZES[1:]), *everything]
    return 100 * np.array([_mean(values) for values in figures])


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else np.nan


def estimates(matches: Matches, *, resamples: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """Return AP, AP50, AP75, APs, APm, APl and "class <name>" of each class with 95 % percentile intervals over images.

    A resample without objects of a class or size is left out of its interval. A score whose objects (all, those of a
    size or class) are in fewer than `FEWEST` images has no interval: it would be far too narrow.
    """
    count = len(matches.images)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", *(f"class {name}" for name in matches.classes))
    each = [np.sum([matches.cells[name, size].objects for name in matches.classes], axis=0) for size in SIZES]
    each = [each[0]] * 3 + each[1:] + [matches.cells[name, "all"].objects for name in matches.classes]
    objects = [int(of_image.sum()) for of_image in each]
    enough = np.array([np.count_nonzero(of_image) >= FEWEST for of_image in each])
    whole = scores(matches, np.ones(count, np.int64))
    low: NDArray[np.float64] = np.full(len(names), np.nan)
    high = low
    if enough.any() and resamples > 0:
        bar = tqdm(total=resamples, desc="resample", unit="resample", leave=False, delay=2, disable=None)

        def statistic(drawn: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
            rows = drawn.reshape(-1, count)
            bar.update(len(rows))
            found = np.stack([scores(matches, np.bincount(row, minlength=count)) for row in rows], axis=-1)
            return found if drawn.ndim > 1 else found[:, 0]

        with bar, warnings.catch_warnings():
            # scipy's own interval is NaN if any resample is, with a warning; the percentiles below skip NaN.
            warnings.simplefilter("ignore", DegenerateDataWarning)
            drawn = bootstrap(
                (np.arange(count),),
                statistic,
                n_resamples=resamples,
                batch=50,
                vectorized=True,
                method="percentile",
                rng=seed,
            ).bootstrap_distribution
        known = np.isfinite(drawn).any(axis=-1) & enough
        low, high = (np.where(known, _percentile(drawn, known, q), np.nan) for q in (2.5, 97.5))
    return {
        name: Estimate(_known(value), _known(least), _known(most), number)
        for name, value, least, most, number in zip(names, whole, low, high, objects, strict=True)
    }


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _percentile(drawn: NDArray[np.float64], known: NDArray[np.bool_], q: float) -> NDArray[np.float64]:
    found = np.full(len(drawn), np.nan)
    found[known] = np.nanpercentile(drawn[known], q, axis=-1)
    return found


def image_scores(matches: Matches) -> dict[int, float | None]:
    """Return the AP of each image alone, over the classes in its ground truth, in percent; None without objects."""
    found: dict[int, float | None] = {}
    for i, image in enumerate(matches.images):
        alone = np.zeros(len(matches.images), np.int64)
        alone[i] = 1
        values = [
            average_precision(matches.cells[name, "all"], alone)
            for name in matches.classes
            if matches.cells[name, "all"].objects[i]
        ]
        found[int(image)] = 100 * float(np.mean(values)) if values else None
    return found


def worst_images(scores: Mapping[int, float | None], objects: Mapping[int, int], count: int) -> list[int]:
    """Return the first `count` images by increasing AP of `image_scores`; ties by decreasing number of objects."""
    known = [(value, -objects[image], image) for image, value in scores.items() if value is not None]
    return [image for *_, image in sorted(known)[:count]]
