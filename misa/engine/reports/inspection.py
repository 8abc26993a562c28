"""Error analysis of a run as one page: scores with intervals, errors by type, and the worst images.

misa inspect runs/demo-long-seed0        # writes runs/demo-long-seed0/inspection.html
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pycocotools.coco import COCO

from misa.data.digest import data_digests
from misa.data.formats.coco import DataError
from misa.data.images import read_image
from misa.data.rle import Part, decode, decode_part
from misa.data.source import Source
from misa.engine.runs.detections import read_detections, results_file
from misa.engine.runs.folder import opened
from misa.engine.runs.record import changed_splits
from misa.engine.runs.samples import health, losses
from misa.engine.runs.state import remarks, smoke_mark, warn
from misa.errors import UserError, counted, option_name
from misa.evaluation.ap import category_ids, matched, present, read_truth
from misa.evaluation.bootstrap import Estimate, estimates, image_scores, matches_of, worst_images
from misa.evaluation.failures import BACKGROUND, KINDS, MEANING, TIDE, ImageErrors, Outcome, error_types
from misa.experiment import Experiment
from misa.figures.overlay import overlay
from misa.figures.overlay import whole as whole_parts
from misa.figures.page import render
from misa.figures.plots import health_curves, loss_curves, matched_colors
from misa.figures.style import ACCENT
from misa.files import atomic_write

PAGE = "inspection.html"
LOSSES = "losses.jsonl"
_GENERATOR = "misa inspect"  # in the head of inspection.html.j2
_SIDE = 280  # longer side of the page's pictures, in pixels
_LINE = 1 / 170  # width of outlines, which scales letters too, relative to the picture: legible at this size
_AROUND = 12  # margin around an object, in pixels
_ROWS = 1000  # maximum rows of the table of images


@dataclass(frozen=True)
class Inspection:
    """A run's errors.

    scores: AP, AP50, ... and "class <name>" with intervals; images: the AP of each image id, None without objects;
    errors: the outcomes of each image id; page: the HTML file, if written.
    """

    scores: dict[str, Estimate]
    images: dict[int, float | None]
    errors: dict[int, ImageErrors]
    page: Path | None
    smoke: str = ""  # warning about a smoke run

    def kinds(self) -> dict[str, int]:
        """The number of objects with each outcome, and of false positives."""
        count = Counter(outcome.kind for one in self.errors.values() for outcome in one.outcomes)
        false = sum(len(one.background) for one in self.errors.values())
        return {**{kind: count[kind] for kind in KINDS}, BACKGROUND: false}

    def worst(self, count: int = 12) -> list[int]:
        """The images of lowest AP (`worst_images`)."""
        return worst_images(self.images, {i: len(one.outcomes) for i, one in self.errors.items()}, count)


def inspect_run(
    run_folder: str | Path,
    *,
    predictions: str | Path | None = None,
    data_root: str | Path | None = None,
    out: str | Path | None = "",
    threshold: float = 0.3,
    good: float = 0.5,
    resamples: int = 1000,
    seed: int = 0,
    examples: int = 12,
) -> Inspection:
    """Inspect a student's predictions on its validation data; a warning tells if its training has not ended.

    Args:
        run_folder: a run folder made by `misa train`.
        predictions: another COCO results file, as written by `misa evaluate --predictions`; None: the run's.
        data_root: the data, if it has moved since the training.
        out: the page; empty: inspection.html in the run folder; None: no page.
        threshold: score threshold of the detections for error types; scores use all.
        good: minimum IoU of a detected object, above 0.
        resamples: bootstrap samples of the images for the 95 % intervals.
        seed: of the bootstrap.
        examples: number of pictures of the worst images, and of each error type.

    Raises UserError: no student, no predictions, unreadable predictions, or data without masks.
    """
    _check(resamples, examples, threshold=threshold, good=good)
    _require_page(Path(out or "").expanduser())
    experiment, source, folder, params = _student(run_folder, data_root, own=predictions is None)
    truth = read_truth(source.val.annotations)
    images = truth.getImgIds()[: experiment.limit]
    wanted = set(category_ids(truth, present(truth, source.classes)))  # as AP
    given = read_detections(results_file(folder, predictions), truth, source.root)
    found = [detection for detection in given if detection["category_id"] in wanted]
    matches = matches_of(matched(truth, found, images=images, categories=wanted))
    by_image: dict[int, list[dict[str, Any]]] = {image: [] for image in images}
    for detection in found:
        if detection["score"] >= threshold and detection["image_id"] in by_image:
            by_image[detection["image_id"]].append(detection)
    errors = {image: _errors(truth, wanted, image, by_image[image], good) for image in images}
    scores = estimates(matches, resamples=resamples, seed=seed)
    inspection = Inspection(scores, image_scores(matches), errors, None, smoke_mark(experiment))
    if out is None:
        return inspection
    path = Path(out).expanduser() if out else folder / PAGE
    page = render(
        "inspection.html.j2",
        title=f"{params['row']}, seed {params['seed']}",
        subtitle=_about(f"{counted(len(images), 'validation image')} of {source.root}", threshold, good),
        warning=" ".join(remarks(folder, experiment)),
        charts=_charts(folder),
        resamples=resamples,
        **_values(inspection, Painter(truth, source, by_image), examples),
    )
    _write(path, page)
    return replace(inspection, page=path)


def _about(images: str, threshold: float, good: float) -> str:
    return (
        f"{images}. Error types count detections of score {threshold:g} or more; an object is found from an "
        f"intersection over union of {good:g} on."
    )


def _require_page(path: Path) -> None:
    """Raise UserError for a folder, or a file that is not a page of ours, which may be replaced."""
    if path.is_dir() and path != Path():
        raise UserError(f"{path} is a folder; give a file, such as {path / PAGE}.")
    if path.is_file():
        with path.open("rb") as file:
            if _GENERATOR.encode() not in file.read(1000):
                raise UserError(f"{path} exists already and is no page of misa inspect; choose another file.")


def _check(*counts: int, **shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} must be from 0 to 1, not {value}.")
    if not shares["good"]:
        raise UserError("good must be above 0: an object without any overlap is not found.")
    if min(counts) < 0:
        raise UserError("resamples and examples must be at least 0.")


def _student(
    run_folder: str | Path, data_root: str | Path | None, *, own: bool
) -> tuple[Experiment, Source, Path, dict[str, Any]]:
    """Open a run folder (see `opened`) and `warn`; own: to inspect the run's own predictions.

    Raises UserError: it is not a student's, its data has no masks, or the predictions are of other data.
    """
    found = experiment, source, folder, params = opened(run_folder, data_root=data_root)
    if experiment.semantic is not None:
        raise UserError(f"{folder} is a teacher's run; there are instances to inspect in a student's only.")
    if not source.masks:
        what = "has no masks to compare with; only scores of boxes are known there"
        raise UserError(f"the val split of {source.root} {what}.")
    if own and data_root is not None:
        _require_same_val(folder, source, params)
    warn(folder, experiment)
    return found


def _require_same_val(folder: Path, source: Source, params: dict[str, Any]) -> None:
    """Raise UserError if the run's own predictions are of another val split, whose image ids may be the same."""
    if "val" in changed_splits(params, data_digests(source.train, source.val)):
        raise UserError(
            f"the predictions in {folder} are of another val split than that of {source.root}; predict there first "
            f"(misa evaluate {folder} --data-root {source.root} --predictions FILE), and give that file as "
            f"{option_name('predictions')}."
        )


def _errors(truth: COCO, wanted: set[int], image: int, detections: list[dict[str, Any]], good: float) -> ImageErrors:
    annotations = truth.loadAnns(truth.getAnnIds(imgIds=[image], catIds=list(wanted)))
    objects = [a for a in annotations if not a.get("iscrowd")]
    crowds = [truth.annToRLE(a) for a in annotations if a.get("iscrowd")]
    return error_types(objects, [truth.annToRLE(a) for a in objects], detections, crowds=crowds, good=good)


def _values(inspection: Inspection, draw: "Painter", examples: int) -> dict[str, Any]:
    """The variables of the page's template."""
    scores, classes = _scores(inspection)
    kinds, by_class = _kinds(inspection, draw.names)
    images, note = _all(inspection, draw)
    return {
        "scores": scores,
        "classes": classes,
        "kinds": kinds,
        "by_class": by_class,
        "examples": list(_examples(inspection, draw, examples)),
        "worst": list(_worst(inspection, draw, examples)),
        "images": images,
        "all_note": note,
    }


def _charts(folder: Path) -> list[dict[str, Any]]:
    """The training's curves, if there are any."""
    path = folder / LOSSES
    if not path.is_file() or not path.stat().st_size:
        return []
    drawn = {"losses, faint as recorded and bold as a running mean": loss_curves(losses(folder))}
    if watched := health(folder):
        drawn["health: how much of its box a mask fills, and each loss's gradient"] = health_curves(watched)
    return [
        {"figure": figure, "caption": caption, "width": round(100 * figure.get_figwidth())}
        for caption, figure in drawn.items()
    ]


def _scores(inspection: Inspection) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The metrics, and AP per class in decreasing order."""
    rows = [(name, e.value, _interval(e), e.objects, (e.value or 0) / 100) for name, e in inspection.scores.items()]
    head = ["AP (%)", "95 % interval", "objects", "share"]
    plain = [row for row in rows if not row[0].startswith("class ")]
    named = [(name.removeprefix("class "), *rest) for name, *rest in rows if name.startswith("class ")]
    classes = pd.DataFrame(named, columns=["class", *head], dtype=object)
    classes = classes.sort_values("AP (%)", ascending=False, na_position="last", kind="stable")
    return pd.DataFrame(plain, columns=["", *head], dtype=object), classes


def _interval(estimate: Estimate) -> str | None:
    return None if estimate.low is None or estimate.high is None else f"{estimate.low:.1f} – {estimate.high:.1f}"


def _kinds(inspection: Inspection, names: dict[int, str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The outcomes of all objects, and of every class."""
    counts = inspection.kinds()
    total = max(sum(counts[kind] for kind in KINDS), 1)
    kinds = pd.DataFrame(
        [(kind, TIDE.get(kind, ""), count, count / total, MEANING[kind]) for kind, count in counts.items()],
        columns=["", "TIDE", "objects", "share", "meaning"],
    )
    rows = [
        (names[outcome.annotation["category_id"]], outcome.kind)
        for one in inspection.errors.values()
        for outcome in one.outcomes
    ]
    found = pd.DataFrame(rows, columns=["class", "kind"])
    by_class = pd.crosstab(found["class"], found["kind"]).reindex(columns=list(KINDS), fill_value=0)
    by_class.insert(0, "objects", by_class.sum(axis=1))
    return kinds, by_class.reset_index()


def _examples(inspection: Inspection, draw: "Painter", count: int) -> Iterator[dict[str, Any]]:
    """The largest objects of each error type."""
    for kind in KINDS[1:]:
        cases = [(i, o) for i, one in inspection.errors.items() for o in one.outcomes if o.kind == kind]
        cases.sort(key=lambda case: -case[1].annotation.get("area", 0))
        figures = [figure for image, outcome in cases[:count] if (figure := draw.outcome(image, outcome)) is not None]
        if figures:
            note = f"{MEANING[kind]}. White: the true outline; orange: the mask that comes nearest; the largest first."
            yield {
                "name": kind.capitalize(),
                "count": len(cases),
                "note": note[0].upper() + note[1:],
                "figures": figures,
            }


def _worst(inspection: Inspection, draw: "Painter", count: int) -> Iterator[dict[str, Any]]:
    for image in inspection.worst(count):
        if (pictures := draw.image(image)) is not None:
            yield {"pictures": pictures, "caption": f"{draw.name(image)}: AP {inspection.images[image]:.1f}"}


def _all(inspection: Inspection, draw: "Painter") -> tuple[pd.DataFrame, str]:
    """One row per image, and a note above the table."""
    order = sorted(inspection.images, key=lambda i: (inspection.images[i] is None, inspection.images[i] or 0.0))
    rows = []
    for image in order[:_ROWS]:
        one = inspection.errors[image]
        count = Counter(outcome.kind for outcome in one.outcomes)
        counts = [len(one.outcomes), *(count[kind] for kind in KINDS), len(one.background)]
        rows.append((draw.name(image), inspection.images[image], *counts))
    more = f" The first {_ROWS} of {len(order)}." if len(order) > _ROWS else ""
    head = ["image", "AP", "objects", *KINDS, BACKGROUND]
    frame = pd.DataFrame(rows, columns=head, dtype=object)
    return frame, f"From the lowest AP to the highest; images without objects have none.{more}"


class Painter:
    """Pictures of images and objects, small enough for a page."""

    def __init__(self, truth: COCO, source: Source, detections: dict[int, list[dict[str, Any]]]) -> None:
        self.truth, self.source, self.detections = truth, source, detections
        self.names: dict[int, str] = {c["id"]: c["name"] for c in truth.dataset["categories"]}

    def name(self, image: int) -> str:
        """The file name of an image."""
        return str(self.truth.imgs[image]["file_name"])

    def pixels(self, image: int) -> NDArray[np.uint8] | None:
        """The image (h w 3) in RGB; None if it is gone."""
        try:
            return read_image(self.source.val.images / self.name(image))
        except DataError:  # gone since the run was trained
            return None

    def image(self, image: int) -> dict[str, NDArray[np.uint8]] | None:
        """Pictures of the image, its predictions and ground truth, by caption.

        A predicted mask has the color of its object, a false positive is gray.
        """
        pixels = self.pixels(image)
        if pixels is None:
            return None
        found = sorted(self.detections[image], key=lambda d: -d["score"])
        labels = [f"{self.names[d['category_id']]} {d['score']:.2f}" for d in found]
        wanted = category_ids(self.truth, present(self.truth, self.source.classes))
        true = [a for a in self.truth.imgToAnns[image] if not a.get("iscrowd") and a["category_id"] in wanted]
        named = [self.names[a["category_id"]] for a in true]
        runs = [d["segmentation"] for d in found], [self.truth.annToRLE(a) for a in true]
        size = pixels.shape[:2]
        predicted, truth = (np.array([decode(one) for one in masks], bool).reshape(-1, *size) for masks in runs)
        return {
            "image": _fitted(overlay(pixels)),
            "predicted masks": _fitted(
                overlay(pixels, whole_parts(predicted), labels, colors=matched_colors(predicted, truth), line=_LINE)
            ),
            "true masks": _fitted(overlay(pixels, whole_parts(truth), named, line=_LINE)),
        }

    def outcome(self, image: int, outcome: Outcome) -> dict[str, Any] | None:
        """Crop around an object with its outline and its predicted mask, and a caption."""
        pixels = self.pixels(image)
        if pixels is None:
            return None
        parts = [decode_part(self.truth.annToRLE(outcome.annotation))]
        label = self.names[outcome.annotation["category_id"]]
        if outcome.detection is not None:
            parts.append(decode_part(outcome.detection["segmentation"]))
            label += f", IoU {outcome.iou:.2f}, score {outcome.detection['score']:.2f}"
            if outcome.kind == "wrong class":
                label += f", classified as {self.names[outcome.detection['category_id']]}"
        top, left = max(min(y for y, _, _ in parts) - _AROUND, 0), max(min(x for _, x, _ in parts) - _AROUND, 0)
        bottom = max(y + mask.shape[0] for y, _, mask in parts) + _AROUND
        right = max(x + mask.shape[1] for _, x, mask in parts) + _AROUND
        crop = np.ascontiguousarray(pixels[top:bottom, left:right])
        shown = overlay(
            crop,
            [Part(y - top, x - left, mask) for y, x, mask in parts],
            colors=("white", ACCENT),
            opacity=(0.0, 0.45)[: len(parts)],
            readable=_SIDE,
            line=1 / 140,
        )
        return {"picture": _fitted(shown), "caption": f"{self.name(image)}: {label}"}


def _fitted(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Resize an image so that its longer side is `_SIDE`."""
    scale = _SIDE / max(pixels.shape[:2])
    size = max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(pixels, size, interpolation=how), dtype=np.uint8)


def _write(path: Path, text: str) -> None:
    try:
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"the page {path} cannot be written ({error.strerror}); choose another place.") from error


def summary(inspection: Inspection, rows: Sequence[str] = ("AP", "AP50", "AP75", "APs", "APm", "APl")) -> str:
    """Format scores with intervals, and errors by type, as text."""
    lines = [inspection.smoke] if inspection.smoke else []
    intervals = any(_interval(inspection.scores[name]) for name in rows)
    lines += ["masks    (%)   95 % interval"] if intervals else ["masks    (%)"]
    for name in rows:
        estimate = inspection.scores[name]
        shown = "-" if estimate.value is None else f"{estimate.value:.1f}"
        lines.append(f"{name:<6}{shown:>6}   {_interval(estimate) or ''}")
    kinds = inspection.kinds()
    false = kinds.pop(BACKGROUND)
    lines += ["", f"outcome of {counted(sum(kinds.values()), 'object')}"]
    lines += [f"{kind:<14}{count:>6}" for kind, count in kinds.items()]
    lines += ["", f"{counted(false, 'false positive')}: {MEANING[BACKGROUND]}"]
    return "\n".join(lines)
