"""Where a run fails: its worst images, its failures by kind, and how sure its scores are, as one page.

misa inspect runs/demo        # writes runs/demo/inspection.html
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from misa.data.check.masks import broken_runs, mask_fault
from misa.data.formats.coco import DataError
from misa.data.images import read_image
from misa.data.rle import decode_part
from misa.data.source import Source
from misa.engine.runs.folder import opened
from misa.engine.runs.samples import health, losses
from misa.engine.runs.scores import DETECTIONS
from misa.errors import UserError
from misa.evaluation.ap import matched, read_truth
from misa.evaluation.bootstrap import Estimate, estimates, image_scores, matches_of
from misa.evaluation.failures import KINDS, MEANING, Judged, Verdict, judge
from misa.figures.overlay import overlay
from misa.figures.page import Markup, bar, chart, gallery, page, section, table
from misa.figures.plots import health_curves, loss_curves
from misa.files import atomic_write

PAGE = "inspection.html"
LOSSES = "losses.jsonl"
_SIDE = 280  # pixels of a picture on the page
_AROUND = 12  # pixels that are shown around an object
_ROWS = 1000  # of the table of all images


@dataclass(frozen=True)
class Inspection:
    """A run's failures.

    scores: AP, AP50, ... and "class <name>" with intervals; images: the AP of each image id, None without objects;
    judged: the verdicts of each image id; page: the HTML file, None where none was asked for.
    """

    scores: dict[str, Estimate]
    images: dict[int, float | None]
    judged: dict[int, Judged]
    page: Path | None

    def kinds(self) -> dict[str, int]:
        """How many objects met each fate, and the detections that are of no object ("invented")."""
        count = Counter(verdict.kind for one in self.judged.values() for verdict in one.verdicts)
        return {**{kind: count[kind] for kind in KINDS}, "invented": sum(len(j.invented) for j in self.judged.values())}

    def worst(self, count: int = 12) -> list[int]:
        """The images of the lowest AP; of equal ones first those with more objects."""
        known = [(value, -len(self.judged[i].verdicts), i) for i, value in self.images.items() if value is not None]
        return [i for *_, i in sorted(known)[:count]]


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
    """Inspect a finished student's predictions on its validation data.

    Args:
        run_folder: a run folder made by `misa train`.
        predictions: another COCO results file, as `misa evaluate --predictions` writes it; None: the run's own.
        data_root: the data, where it is not where the run was trained.
        out: the page; empty: inspection.html in the run folder; None: no page.
        threshold: detections of this score or more are taken seriously in judging failures; scores count all.
        good: the intersection over union from which on an object is found.
        resamples: of the images, for the 95 % intervals.
        seed: of the resamples.
        examples: pictures of the worst images, and of each kind of failure.

    Raises:
        UserError: no finished student, unreadable predictions, or data without masks.
    """
    for name, value in (("threshold", threshold), ("good", good)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} must be from 0 to 1, not {value}.")
    if resamples < 0 or examples < 0:
        raise UserError("resamples and examples must be at least 0.")
    experiment, source, folder, params = opened(run_folder, data_root=data_root)
    if experiment.semantic is not None:
        raise UserError(f"{folder} is a teacher's run; there are instances to inspect in a student's only.")
    if not source.masks:
        raise UserError(f"{source.val.annotations} has no masks to compare with; only scores of boxes are known there.")
    truth = read_truth(source.val.annotations)
    images = truth.getImgIds()[: experiment.limit]
    found = _detections(Path(predictions).expanduser() if predictions else folder / DETECTIONS, truth)
    matches = matches_of(matched(truth, found, images=images, categories=source.classes))
    by_image: dict[int, list[dict[str, Any]]] = {image: [] for image in images}
    for detection in found:
        if detection["score"] >= threshold and detection["image_id"] in by_image:
            by_image[detection["image_id"]].append(detection)
    judged = {image: _judged(truth, source, image, by_image[image], good) for image in images}
    scores = estimates(matches, resamples=resamples, seed=seed)
    inspection = Inspection(scores, image_scores(matches), judged, None)
    if out is None:
        return inspection
    path = Path(out).expanduser() if out else folder / PAGE
    title = f"{params['row']}, seed {params['seed']}"
    about = (
        f"{len(images)} validation images of {source.root}. Failures are judged by detections of score "
        f"{threshold:g} or more; an object is found from an intersection over union of {good:g} on."
    )
    parts = _parts(inspection, truth, source, by_image, resamples, examples)
    if (folder / LOSSES).is_file() and (folder / LOSSES).stat().st_size:
        parts.insert(1, _training(folder))
    _write(path, page(title, about, parts))
    return Inspection(scores, inspection.images, judged, path)


def _detections(path: Path, truth: COCO) -> list[dict[str, Any]]:
    """The content of a COCO results file; UserError where it is none of this data."""
    if not path.is_file():
        raise UserError(f"there are no predictions {path}; finish the run with misa train first.")
    try:
        rows = json.loads(path.read_bytes())
        known = set(truth.getImgIds())
        for row in rows:
            if row["image_id"] not in known or row["category_id"] not in truth.cats:
                raise UserError(f"{path} holds predictions on other data: image {row['image_id']} is not in this.")
            image, mask = truth.imgs[row["image_id"]], row["segmentation"]
            fault = mask_fault(mask, image["height"], image["width"]) if isinstance(mask, dict) else "is no run lengths"
            if fault is None and not (isinstance(mask["counts"], str) and -1e9 < row["score"] < 1e9):
                fault = "or score is none"
            if fault is None and broken_runs([mask["counts"]], [image["height"] * image["width"]])[0]:
                fault = "has counts that cannot be decoded"
            if fault is not None:
                raise ValueError(f"a segmentation of image {row['image_id']} {fault}")
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no COCO results file with masks ({error!r}); evaluate the run again.") from error
    return list(rows)


def _judged(truth: COCO, source: Source, image: int, detections: list[dict[str, Any]], good: float) -> Judged:
    wanted = [c["id"] for c in truth.dataset["categories"] if c["name"] in source.classes]
    annotations = truth.loadAnns(truth.getAnnIds(imgIds=[image], catIds=wanted))
    objects = [a for a in annotations if not a.get("iscrowd")]
    crowds = [truth.annToRLE(a) for a in annotations if a.get("iscrowd")]
    return judge(objects, [truth.annToRLE(a) for a in objects], detections, crowds=crowds, good=good)


def _parts(
    inspection: Inspection,
    truth: COCO,
    source: Source,
    detections: dict[int, list[dict[str, Any]]],
    resamples: int,
    examples: int,
) -> list[Markup]:
    draw = _Painter(truth, source, detections)
    return [
        _scores(inspection, resamples),
        _kinds(inspection, truth),
        *_examples(inspection, draw, examples),
        _worst(inspection, draw, examples),
        _all(inspection, truth),
    ]


def _scores(inspection: Inspection, resamples: int) -> Markup:
    rows = [
        (name, e.value, _interval(e), e.objects, bar((e.value or 0) / 100)) for name, e in inspection.scores.items()
    ]
    plain, classes = [r for r in rows if not r[0].startswith("class ")], [r for r in rows if r[0].startswith("class ")]
    head = ["", "AP (%)", "95 % interval", "objects", ""]
    note = (
        f"Mask AP by pycocotools. The interval is where AP lies in 95 % of {resamples} draws of as many images with "
        "replacement: what other images of the same kind might give. It says nothing of other seeds."
    )
    named = [(name.removeprefix("class "), *rest) for name, *rest in classes]
    named.sort(key=lambda row: -1.0 if row[1] is None else float(row[1]))
    return section("Scores", note, table(head, plain), Markup("<p></p>"), table(["class", *head[1:]], named))


def _training(folder: Path) -> Markup:
    note = (
        "Losses can fall while the masks turn into plain boxes: what the masks looked like, and which loss moved the "
        "student, at every so manyth step."
    )
    charts = [chart(loss_curves(losses(folder)), "losses, faint as recorded and bold as a running mean")]
    if watched := health(folder):
        charts.append(
            chart(health_curves(watched), "health: how much of its box a mask fills, and each loss's gradient")
        )
    return section("Training", note, *charts)


def _interval(estimate: Estimate) -> str | None:
    return None if estimate.low is None or estimate.high is None else f"{estimate.low:.1f} – {estimate.high:.1f}"


def _kinds(inspection: Inspection, truth: COCO) -> Markup:
    kinds = inspection.kinds()
    total = max(sum(kinds[kind] for kind in KINDS), 1)
    rows: list[tuple[str, int, Markup, str]] = [
        (kind, kinds[kind], bar(kinds[kind] / total), MEANING[kind]) for kind in KINDS
    ]
    rows.append(("invented", kinds["invented"], bar(kinds["invented"] / total), "detections that touch no object"))
    names = {c["id"]: c["name"] for c in truth.dataset["categories"]}
    by_class: dict[str, Counter[str]] = {}
    for judged in inspection.judged.values():
        for verdict in judged.verdicts:
            by_class.setdefault(names[verdict.annotation["category_id"]], Counter())[verdict.kind] += 1
    grouped = [(name, sum(c.values()), *(c[kind] for kind in KINDS)) for name, c in sorted(by_class.items())]
    return section(
        "What happened to the objects",
        "Each object has one fate; it is told by the mask of its class that comes nearest.",
        table(["", "objects", "", "note"], rows),
        Markup("<p></p>"),
        table(["class", "objects", *KINDS], grouped),
    )


def _examples(inspection: Inspection, draw: "_Painter", count: int) -> Iterable[Markup]:
    for kind in KINDS[1:]:
        cases = [(i, v) for i, one in inspection.judged.items() for v in one.verdicts if v.kind == kind]
        cases.sort(key=lambda case: -case[1].annotation.get("area", 0))
        figures = [figure for image, verdict in cases[:count] if (figure := draw.verdict(image, verdict)) is not None]
        if figures:
            note = f"{MEANING[kind]}. The true outline and, tinted, the mask that comes nearest; the largest first."
            yield section(f"{kind.capitalize()} ({len(cases)})", note[0].upper() + note[1:], gallery(figures))


def _worst(inspection: Inspection, draw: "_Painter", count: int) -> Markup:
    figures = []
    for image in inspection.worst(count):
        if (pictures := draw.image(image)) is not None:
            figures.append((pictures, f"{draw.name(image)}: AP {inspection.images[image]:.1f}"))
    return section(
        "Worst images", "Image, predicted masks, true masks; by AP of the image alone.", gallery(figures, wide=True)
    )


def _all(inspection: Inspection, truth: COCO) -> Markup:
    order = sorted(inspection.images, key=lambda i: (inspection.images[i] is None, inspection.images[i] or 0.0))
    rows = []
    for image in order[:_ROWS]:
        one = inspection.judged[image]
        count = Counter(verdict.kind for verdict in one.verdicts)
        name = truth.imgs[image]["file_name"]
        rows.append((name, inspection.images[image], len(one.verdicts), *(count[k] for k in KINDS), len(one.invented)))
    more = f" The first {_ROWS} of {len(order)}." if len(order) > _ROWS else ""
    note = f"From the lowest AP to the highest; images without objects have none.{more}"
    return section("All images", note, table(["image", "AP", "objects", *KINDS, "invented"], rows))


class _Painter:
    """Pictures of images and objects, small enough for a page."""

    def __init__(self, truth: COCO, source: Source, detections: dict[int, list[dict[str, Any]]]) -> None:
        self.truth, self.source, self.detections = truth, source, detections
        self.names = {c["id"]: c["name"] for c in truth.dataset["categories"]}

    def name(self, image: int) -> str:
        return str(self.truth.imgs[image]["file_name"])

    def pixels(self, image: int) -> NDArray[np.uint8] | None:
        try:
            return read_image(self.source.val.images / self.name(image))
        except DataError:  # gone since the run was trained
            return None

    def image(self, image: int) -> list[NDArray[np.uint8]] | None:
        """The image, its predictions and its truth."""
        pixels = self.pixels(image)
        if pixels is None:
            return None
        found = sorted(self.detections[image], key=lambda d: -d["score"])
        labels = [f"{self.names[d['category_id']]} {d['score']:.2f}" for d in found]
        true = [a for a in self.truth.imgToAnns[image] if not a.get("iscrowd")]
        named = [self.names[a["category_id"]] for a in true]
        return [
            _small(pixels),
            _small(overlay(pixels, [decode_part(d["segmentation"]) for d in found], labels)),
            _small(overlay(pixels, [decode_part(self.truth.annToRLE(a)) for a in true], named)),
        ]

    def verdict(self, image: int, verdict: Verdict) -> tuple[list[NDArray[np.uint8]], str] | None:
        """The surroundings of an object with its outline and what was found of it."""
        pixels = self.pixels(image)
        if pixels is None:
            return None
        true = decode_part(self.truth.annToRLE(verdict.annotation))
        parts = [true] if verdict.detection is None else [true, decode_part(verdict.detection["segmentation"])]
        top, left = max(min(y for y, _, _ in parts) - _AROUND, 0), max(min(x for _, x, _ in parts) - _AROUND, 0)
        bottom = max(y + mask.shape[0] for y, _, mask in parts) + _AROUND
        right = max(x + mask.shape[1] for _, x, mask in parts) + _AROUND
        crop = np.ascontiguousarray(pixels[top:bottom, left:right])
        by = max(1, min(8, _SIDE // max(crop.shape[:2])))
        crop = crop.repeat(by, axis=0).repeat(by, axis=1)
        label = self.names[verdict.annotation["category_id"]]
        if verdict.detection is not None:
            crop = _tinted(crop, parts[1], top, left, by)
            label += f", IoU {verdict.iou:.2f}, score {verdict.detection['score']:.2f}"
            if verdict.kind == "wrong class":
                label += f", taken for {self.names[verdict.detection['category_id']]}"
        _outline(crop, true, top, left, by)
        return [_small(crop)], f"{self.name(image)}: {label}"


def _tinted(
    crop: NDArray[np.uint8], part: tuple[int, int, NDArray[np.bool_]], top: int, left: int, by: int
) -> NDArray[np.uint8]:
    y, x, pixels = part
    window = crop[
        (y - top) * by : (y - top + pixels.shape[0]) * by, (x - left) * by : (x - left + pixels.shape[1]) * by
    ]
    mask = pixels.repeat(by, axis=0).repeat(by, axis=1)
    window[mask] = (0.5 * window[mask] + 0.5 * np.array([63, 144, 218])).astype(np.uint8)
    return crop


def _outline(crop: NDArray[np.uint8], part: tuple[int, int, NDArray[np.bool_]], top: int, left: int, by: int) -> None:
    y, x, pixels = part
    mask = np.pad(pixels.repeat(by, axis=0).repeat(by, axis=1).astype(np.uint8), 1)
    offset = ((x - left) * by - 1, (y - top) * by - 1)
    contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE, offset=offset)
    for color, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.drawContours(crop, contours, -1, color, width)


def _small(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image shrunk to the page's pictures; small ones stay."""
    scale = _SIDE / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    size = max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1)
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _write(path: Path, text: str) -> None:
    try:
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"the page {path} cannot be written ({error.strerror}); choose another place.") from error


def summary(inspection: Inspection, rows: Sequence[str] = ("AP", "AP50", "AP75", "APs", "APm", "APl")) -> str:
    """The scores with their intervals and the failures by kind, as text."""
    lines = []
    for name in rows:
        estimate = inspection.scores[name]
        shown = "-" if estimate.value is None else f"{estimate.value:.1f}"
        lines.append(f"{name:<6}{shown:>6}   {_interval(estimate) or ''}")
    lines.append("")
    lines += [f"{kind:<14}{count:>6}" for kind, count in inspection.kinds().items()]
    return "\n".join(lines)
