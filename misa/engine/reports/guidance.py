"""Compare affinities by the pseudo masks that they produce from a trained student's masks, given ground truth (§3.3).

This takes a minute or two instead of a training per affinity; `misa.evaluation.guidance` defines the measure. A
"reading" is an `Affinity`; pseudo masks are computed by the functions that the loss calls.

Axes: b image · n object · d channel · h row · w column.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mmcv
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from misa.data.check.annotations import has_masks
from misa.data.check.masks import mask_fault_of
from misa.data.formats.plain import is_empty
from misa.data.pipeline import network_input
from misa.data.source import Source, open_source
from misa.engine.reports.explore import open_networks
from misa.engine.runs.folder import recorded
from misa.engine.runs.state import smoke_mark, warn
from misa.engine.runs.teacher import load_teacher
from misa.errors import UserError, counted, did_you_mean, option_name
from misa.evaluation.ap import read_truth
from misa.evaluation.guidance import FEWEST, Figure, Pull, iou, pull_of, ratio, summary
from misa.experiment import Affinity, Augmentation
from misa.figures.guidance import NAMES, TERMS, guidance_chart
from misa.figures.plots import save
from misa.losses.inputs import Batch, shrink, union_of_boxes
from misa.losses.pairwise import pseudo_masks
from misa.models.students.base import BoxSupervised
from misa.models.teacher.contract import TeacherNetwork
from misa.objectives.misa import reading_of
from misa.ops.boxes import box_masks
from misa.ops.readings import Classifier, class_probabilities
from misa.ops.resize import coarse_masks, resized

SIZES = {"small": 0.0, "medium": 32.0**2, "large": 96.0**2}  # COCO's minimum areas
_PRODUCT: dict[str, Any] = {"saliency": True, "local_form": "product", "global_form": "product"}
_CLASS = {**_PRODUCT, "semantic_values": "class", "semantic_scale": 0.3}
_SHARE = {**_PRODUCT, "semantic_values": "probability", "semantic_scale": 0.3}
_CLOSE: dict[str, Any] = {"window": 3, "local_steps": 5}
_STRETCH: dict[str, Any] = {"stretch": 0.5}
_NEAR: dict[str, Any] = {"mode": "pamr", "pamr_dilations": (1, 2), "pamr_steps": 5}
READINGS: dict[str, dict[str, Any]] = {
    "color": {},
    "color, 3x3": {"window": 3},
    "color, 3x3, 5 steps": _CLOSE,
    "color, tree 0.03": {"tree_bandwidth": 0.03},
    "color, tree 0.1": {"tree_bandwidth": 0.1},
    "feature, sum": {"feature": True},
    "feature, product 1.5σ": {**_PRODUCT, "saliency": False, "feature": True, "semantic_scale": 1.5},
    "saliency, sum (printed)": {"saliency": True},
    "saliency, sum 0.3σ": {"saliency": True, "semantic_scale": 0.3},
    "saliency, product 1.5σ": {**_PRODUCT, "semantic_scale": 1.5},
    "saliency, product 0.75σ": {**_PRODUCT, "semantic_scale": 0.75},
    "saliency, S per channel": {**_PRODUCT, "semantic_norm": "channel", "semantic_scale": 1.5},
    "saliency, S of length 1": {**_PRODUCT, "semantic_norm": "pixel", "semantic_scale": 1.5},
    "saliency, K − background": {**_PRODUCT, "semantic_factors": "contrast", "semantic_scale": 1.5},
    "saliency, embedding 1σ": {"saliency": True, "global_form": "embedding"},
    "class map, sum": {"saliency": True, "semantic_values": "class", "semantic_scale": 0.3},
    "class map, 0.1σ": {**_CLASS, "semantic_scale": 0.1},
    "class map, 0.2σ": {**_CLASS, "semantic_scale": 0.2},
    "class map, 0.3σ": _CLASS,
    "class map, 0.5σ": {**_CLASS, "semantic_scale": 0.5},
    "class map, 3x3": {**_CLASS, "window": 3},
    "class map, K − background, 3x3": {**_CLASS, "semantic_factors": "contrast", "window": 3},
    "class map, K − background, 3x3, 5 steps": {**_CLASS, "semantic_factors": "contrast", **_CLOSE},
    "class map, tree 0.1": {**_CLASS, "tree_bandwidth": 0.1},
    "class map, embedding": {**_CLASS, "global_form": "embedding"},
    "class map alone": {**_CLASS, "local_bandwidth": 1e3, "tree_bandwidth": 1e3},
    "class map, |K|": {**_CLASS, "semantic_factors": "absolute"},
    "class map, K > 0": {**_CLASS, "semantic_factors": "positive"},
    "class map, K − background": {**_CLASS, "semantic_factors": "contrast"},
    "class map, S per channel": {**_CLASS, "semantic_norm": "channel"},
    "class map, S of length 1": {**_CLASS, "semantic_norm": "pixel"},
    "probability": _SHARE,
    "probability, 0.15σ": {**_SHARE, "semantic_scale": 0.15},
    "probability, balance 2": {**_SHARE, "balance": 2.0},
    "probability, 3x3": {**_SHARE, "window": 3},
    "probability, 3x3, 5 steps": {**_SHARE, **_CLOSE},
    "no propagation, stretched": {"window": 1, "refine_bandwidth": None, "tree_bandwidth": 1e-6, **_STRETCH},
    "color, stretched": _STRETCH,
    "color, 3x3, 5 steps, stretched": {**_CLOSE, **_STRETCH},
    "class map, 3x3, stretched": {**_CLASS, "window": 3, **_STRETCH},
    "class map alone, stretched": {**_CLASS, "local_bandwidth": 1e3, "tree_bandwidth": 1e3, **_STRETCH},
    "probability, 3x3, stretched": {**_SHARE, "window": 3, **_STRETCH},
    "probability, 3x3, 5 steps, stretched": {**_SHARE, **_CLOSE, **_STRETCH},
    "PAMR: color": {"mode": "pamr"},
    "PAMR: color, near": _NEAR,
    "PAMR: class map, near": {**_CLASS, **_NEAR},
}
"""The default readings by name, as changes of the run's bandwidths and windows.

Unless the name says otherwise, class maps and probabilities are combined with color as a product with 0.3 σ.
"Stretched": each pseudo mask is mapped to [0, 1] in its box, "no propagation" does so with the mask itself.
"""
AS_TRAINED = "as trained"
TRUTH = "truth"
"""Name of the perfect teacher, whose S are the true masks of each class."""
_SURE = 10.0  # logit of the perfect teacher
COLUMNS = """IoU: of the pseudo masks with the true masks, inside the boxes, in percent
gain: this IoU minus that of the student's masks, in points
pull: share of the change of the masks towards the true masks minus the share away from them: 100 is all towards, 0 as
      much towards as away, -100 all away
moved: mean change of the probability of a pixel of the boxes, in percentage points
growth: the same with its sign: the projection loss only enlarges masks within the boxes; if the pseudo masks do not
      reduce them, they fill the boxes in the end"""
"""The columns of `Guidance.text`."""
_BRACKETS = "in brackets 95 % intervals over images"
# The fields of an affinity that say how S joins it, and those that a term looks at besides.
_READ: tuple[str, ...] = ("feature", "saliency", "balance", "semantic_scale", "kernels")
_READ += ("semantic_values", "semantic_norm", "semantic_factors")
_LOOKS = {
    "local": ("local_form", "window", "window_share", "local_bandwidth", "local_steps"),
    "global": ("global_form", "tree_bandwidth", "refine_bandwidth", "global_size"),
    "pamr": ("local_form", "pamr_dilations", "pamr_steps"),
}


@dataclass(frozen=True)
class Objects:
    """The objects of an image as in the pairwise loss, with the ground truth at its resolution."""

    image_id: int
    batch: Batch
    masks: Tensor  # (n h w) the student's foreground probabilities
    boxes: Tensor  # (n h w) bool
    truth: NDArray[np.bool_]  # (n h w)
    labels: Tensor  # (n)
    classes: Tensor  # (c h w) the true masks of each class, also of objects left out
    groups: tuple[tuple[str, ...], ...]  # of each object: class, size, failure mode if annotated
    pixels: Tensor  # (1 3 H W) the network's input


class TeacherOutput(NamedTuple):
    """A teacher's S (1 d h w) and class probabilities (1 c h w) at the size of the masks, and its last layer."""

    features: Tensor
    probabilities: Tensor
    classifier: Classifier


@dataclass(frozen=True)
class Guidance:
    """The measure of every reading, term and object, and of the initial masks."""

    pulls: Mapping[tuple[str, str], Pull]  # (reading, "local", "global" or "pamr")
    start: Mapping[str, NDArray[np.float64]]  # IoU of the student's masks, and of the teacher's class maps
    images: NDArray[np.int64]  # of each object
    groups: tuple[tuple[str, ...], ...]
    split: str
    smoke: str = ""  # warning about a smoke run
    left_out: int = 0  # readings that need a teacher, where there is none

    def table(self, group: str = "all") -> pd.DataFrame:
        """A row a reading and term: iou, gain, pull, moved, growth with 95 % intervals, and the number of objects."""
        chosen = self._of(group)
        images, rows = self.images[chosen], []
        for (reading, term), pull in self.pulls.items():
            own = Pull(*(part[chosen] for part in pull))
            row: dict[str, Any] = {"reading": reading, "term": term, "group": group, "objects": int(chosen.sum())}
            for name, figure in summary(own, images).items():
                row |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
            rows.append(row)
        return pd.DataFrame(rows)

    def _of(self, group: str) -> NDArray[np.bool_]:
        return np.array([group == "all" or group in own for own in self.groups], dtype=bool)

    def started(self, group: str = "all") -> dict[str, Figure]:
        """Mean IoU of the student's masks, and of the teacher's class maps, on a group's objects."""
        own = self._of(group)
        return {name: ratio(values[own], np.ones(own.sum()), self.images[own]) for name, values in self.start.items()}

    def kinds(self) -> list[str]:
        """The groups of all objects."""
        return ["all", *dict.fromkeys(name for own in self.groups for name in own)]

    def whole(self) -> pd.DataFrame:
        """`table` of all groups."""
        return pd.concat([self.table(group) for group in self.kinds()], ignore_index=True)

    def text(self, group: str = "all") -> str:
        """A table for each term as plain text, by decreasing pull, below the initial IoU. UserError: no such group."""
        if group not in self.kinds():
            raise UserError(f"there is no group {group!r}; choose one of {', '.join(self.kinds())}.")
        images = self.images[self._of(group)]
        count = len(set(images.tolist()))
        lines = [self.smoke] if self.smoke else []
        few = count < FEWEST
        what = counted(len(images), "object") + ("" if group == "all" else f" ({group})")
        brackets = f"without intervals, which mean nothing over fewer than {FEWEST} images" if few else _BRACKETS
        lines += [f"{what} of {counted(count, 'image')} of the {self.split} split, {brackets}"]
        lines += [f"{name}: IoU {_percent(figure)}" for name, figure in self.started(group).items()]
        if self.left_out:
            what = counted(self.left_out, "reading needs a teacher and is", "readings need a teacher and are")
            lines.append(f"{what} left out; {option_name('teacher')} gives one")
        table = self.table(group).sort_values("pull", ascending=False, kind="stable")
        for term in (term for term in TERMS if (table["term"] == term).any()):
            lines += ["", f"{NAMES[term]:40s} {'IoU':>6s} {'gain':>16s} {'pull':>16s} {'moved':>6s} {'growth':>6s}"]
            lines += [
                f"{row.reading:40s} {100 * row.iou:6.1f} {_signed(row.gain, row.gain_low, row.gain_high):>16s} "
                f"{_signed(row.pull, row.pull_low, row.pull_high):>16s} {100 * row.moved:6.2f} {100 * row.growth:+6.2f}"
                for row in table[table["term"] == term].itertuples()
            ]
        return "\n".join([*lines, "", COLUMNS])


def measure_guidance(
    run: str | Path,
    *,
    teacher: str | Path | None = None,
    readings: Mapping[str, Mapping[str, Any]] | None = None,
    split: Literal["val", "train"] = "val",
    images: int = 60,
    data_root: str | Path | None = None,
    seed: int = 0,
) -> Guidance:
    """Measure the guidance of readings for a box-supervised student on some images of a split.

    run: the student's run folder. teacher: the run folder of another teacher than the student's, or `TRUTH`; without
    any, readings that need S are left out. readings: changes of the row's `Affinity` by name, None for `READINGS`.
    images: number of images with objects, drawn by `seed`.
    Raises UserError: no such run, a student not trained from boxes, data without ground-truth masks, an invalid
    reading.
    """
    networks = open_networks(run, data_root=data_root, teacher=teacher is None)
    warn(Path(run).expanduser().resolve(), networks.experiment)
    student = networks.student
    if not isinstance(student, BoxSupervised):
        raise UserError(f"{run} is not a box-supervised student; give the run of a row such as demo:box.")
    source = _with_masks(run, networks.source, split)
    perfect = teacher == TRUTH
    whose = "true" if perfect else "teacher's"
    guide = networks.teacher if teacher is None or perfect else load_teacher(teacher, classes=source.classes)
    own = networks.experiment.affinity or Affinity()
    wanted = READINGS if readings is None else readings
    chosen = affinities(own, wanted, taught=perfect or guide is not None)
    found: dict[tuple[str, str], list[Pull]] = {}
    start: dict[str, list[NDArray[np.float64]]] = {}
    ids: list[int] = []
    groups: list[tuple[str, ...]] = []
    shown = objects_of(student, networks.experiment.augmentation, source, split=split, images=images, seed=seed)
    for objects in tqdm(shown, total=images, desc="guidance", unit="image", leave=False, delay=2, disable=None):
        ids += [objects.image_id] * len(objects.masks)
        groups += objects.groups
        output = true_output(objects) if perfect else None if guide is None else teacher_output(guide, objects)
        for name, values in starts(objects, output, whose=whose).items():
            start.setdefault(name, []).append(values)
        for key, pull in pulls_of(objects, chosen, output).items():
            found.setdefault(key, []).append(pull)
    if not ids:
        raise UserError(f"{split} of {source.root} has no object with a mask that the student answers.")
    return Guidance(
        {key: Pull(*map(np.concatenate, zip(*parts, strict=True))) for key, parts in found.items()},
        {name: np.concatenate(parts) for name, parts in start.items()},
        np.array(ids),
        tuple(groups),
        split,
        smoke_mark(networks.experiment),
        left_out=len(wanted.keys() - chosen.keys()),
    )


def write_guidance(measured: Guidance, folder: str | Path) -> list[Path]:
    """Write all groups as guidance.csv and the figure as guidance.pdf and .png into a folder; return the paths."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    measured.whole().to_csv(folder / "guidance.csv", index=False)
    start = ", ".join(f"{name} {_percent(values)}" for name, values in measured.started().items())
    title = f"{counted(len(measured.images), 'object')} of {measured.split}; IoU: {start}"
    title = f"{measured.smoke}\n{title}" if measured.smoke else title
    chart = guidance_chart(measured.table(), title=title)
    return [folder / "guidance.csv", *save(chart, folder, "guidance")]


def affinities(own: Affinity, readings: Mapping[str, Mapping[str, Any]], *, taught: bool) -> dict[str, Affinity]:
    """The affinity of a run, and readings as changes of its color part; only those without S if there is no teacher."""
    plain = Affinity()
    fresh = (*_READ, "mode", "global_form", "local_form", "stretch")
    base = replace(own, **{name: getattr(plain, name) for name in fresh})
    special = own.feature or own.saliency or own.kernels or own.stretch or own.mode != plain.mode
    found = {AS_TRAINED: own} if special else {}
    for name, changes in readings.items():
        unknown = [key for key in changes if not hasattr(base, key)]
        if unknown:
            raise UserError(
                f"reading {name!r}: Affinity has no field {unknown[0]!r}{did_you_mean(unknown[0], vars(base))}"
            )
        named = {"window_share": None} if "window" in changes else {}  # a share would replace the window
        try:
            affinity = replace(base, **{**named, **changes})
            _try(affinity)
        except (TypeError, ValueError) as error:
            raise UserError(f"reading {name!r}: {error}") from error
        if taught or not (affinity.feature or affinity.saliency):
            found[name] = affinity
    return found


def _try(affinity: Affinity) -> None:
    """Propagate a mask of 8 x 8 pixels; TypeError or ValueError if the affinity's values do not allow it."""
    one, label = torch.zeros(1, 8, 8), torch.zeros(1, dtype=torch.long)
    row = torch.ones(1, 1)
    layer = Classifier(row, row[0], row[0], row[0, 0])
    with_s = affinity.feature or affinity.saliency
    prior = reading_of(affinity, one[None], layer, torch.ones_like(one, dtype=torch.bool)) if with_s else None
    images = torch.zeros(1, 3, 8, 8)
    pseudo_masks(one, one.bool(), images, label, affinity=affinity, labels=label, prior=prior)


@torch.no_grad()
def pulls_of(
    objects: Objects, readings: Mapping[str, Affinity], output: TeacherOutput | None
) -> dict[tuple[str, str], Pull]:
    """Measure every reading and term on the objects of an image, without terms equal to an earlier reading's."""
    found, known = {}, set()
    index = torch.zeros(len(objects.masks), dtype=torch.long)
    for name, affinity in readings.items():
        reading = None
        if affinity.feature or affinity.saliency:
            assert output is not None
            reading = reading_of(affinity, output.features, output.classifier, objects.batch.valid)
        pairs = pseudo_masks(
            objects.masks,
            objects.boxes,
            objects.batch.images,
            index,
            affinity=affinity,
            labels=objects.labels,
            prior=reading,
            valid=objects.batch.valid,
        )
        for term, (own, target) in pairs.items():
            looks = (term, affinity.stretch, *(getattr(affinity, field) for field in _LOOKS[term]), *_joined(affinity))
            if looks not in known:
                known.add(looks)
                found[name, term] = pull_of(own, target, objects.truth, objects.boxes)
    return found


def _joined(affinity: Affinity) -> tuple[Any, ...]:
    """Key of how S is combined with color, equal for all affinities without S."""
    if affinity.feature or affinity.saliency:
        return tuple(getattr(affinity, name) for name in _READ)
    return (affinity.kernels,)


def starts(objects: Objects, output: TeacherOutput | None, *, whose: str) -> dict[str, NDArray[np.float64]]:
    """IoU (n), inside the boxes, of the student's masks and of the class maps of `whose` ("teacher's")."""
    boxes = objects.boxes.numpy()
    found = {"student's masks": iou((objects.masks > 0.5).numpy(), objects.truth, boxes)}
    if output is not None:
        own = output.probabilities[0, objects.labels] > 0.5
        found[f"{whose} class maps"] = iou(own.numpy(), objects.truth, boxes)
    return found


@torch.no_grad()
def teacher_output(teacher: TeacherNetwork, objects: Objects) -> TeacherOutput:
    """Run the teacher on an image."""
    features, size = teacher.prior(objects.pixels).features, (objects.masks.shape[-2], objects.masks.shape[-1])
    layer = teacher.last_layer()
    return TeacherOutput(resized(features, size), resized(class_probabilities(features, layer), size), layer)


def true_output(objects: Objects) -> TeacherOutput:
    """The output of a perfect teacher: S are the true masks of each class, K is such that Eq. 1 returns them."""
    count = len(objects.classes)
    zero = torch.zeros(count)
    layer = Classifier(2 * _SURE * torch.eye(count), zero, zero, torch.tensor(_SURE))
    features = objects.classes[None].float()
    return TeacherOutput(features, class_probabilities(features, layer), layer)


def objects_of(
    student: BoxSupervised, sizes: Augmentation, source: Source, *, split: str, images: int, seed: int
) -> Iterator[Objects]:
    """Yield the objects with a mask of some images of a split, at test size and the losses' resolution."""
    place = source.train if split == "train" else source.val
    truth = read_truth(place.annotations)
    names = {c["id"]: c["name"] for c in truth.dataset["categories"]}
    label = {i: source.classes.index(name) for i, name in names.items() if name in source.classes}
    left = images
    for image_id in np.random.default_rng(seed).permutation(truth.getImgIds()).tolist():
        record = truth.imgs[image_id]
        own = truth.loadAnns(truth.getAnnIds(imgIds=[image_id], catIds=list(label), iscrowd=False))
        own = [annotation for annotation in own if not is_empty(annotation.get("segmentation"))]
        if left == 0:
            return
        for annotation in own:  # nothing else has read the masks of a split for training from boxes
            if (fault := mask_fault_of(annotation, record)) is not None:
                raise UserError(f"the mask of an object of {place.images / record['file_name']} {fault}; correct it.")
        if not own:
            continue
        pixels = mmcv.imread(place.images / record["file_name"], channel_order="rgb")
        found = _objects(student, sizes, pixels, truth, own, label, source.classes)
        if found is not None:
            left -= 1
            yield found


@torch.no_grad()
def _objects(
    student: BoxSupervised,
    sizes: Augmentation,
    pixels: NDArray[np.uint8],
    truth: Any,
    own: list[dict[str, Any]],
    label: Mapping[int, int],
    classes: tuple[str, ...],
) -> Objects | None:
    """The objects of an image that have a mask of the student and are not empty at the masks' resolution."""
    image = network_input(pixels, sizes)
    size, (h, w) = pixels.shape[:2], image.shape[-2:]
    image = F.pad(image, (0, -w % 32, 0, -h % 32))
    corners = torch.tensor([[x, y, x + dx, y + dy] for x, y, dx, dy in (a["bbox"] for a in own)])
    corners = corners * torch.tensor([w / size[1], h / size[0]] * 2)
    labels = torch.tensor([label[a["category_id"]] for a in own])
    answers = student.masks_of_boxes(image, [InstanceData(bboxes=corners, labels=labels)])[0]
    masks = answers.probabilities
    stride = image.shape[-2] // masks.shape[-2]
    boxes = box_masks(corners, masks.shape[-2], masks.shape[-1], stride=stride)
    cells = (masks.shape[-2], masks.shape[-1])
    whole = (torch.from_numpy(truth.annToMask(a).astype(bool))[None] for a in own)  # one by one: images are large
    true = torch.cat([coarse_masks(mask, (h, w), cells, stride=stride) for mask in whole])
    kept = answers.answered & (true & boxes).flatten(1).any(dim=1)
    if not kept.any():
        return None
    union = union_of_boxes([corners], masks[None], stride)
    groups = tuple(
        _groups(a, classes[label[a["category_id"]]]) for a, keep in zip(own, kept.tolist(), strict=True) if keep
    )
    return Objects(
        own[0]["image_id"],
        shrink(image, [(h, w)], union),
        masks[kept],
        boxes[kept],
        true[kept].numpy(),
        labels[kept],
        class_maps(true, labels, len(classes)),
        groups,
        image,
    )


def class_maps(true: Tensor, labels: Tensor, count: int) -> Tensor:
    """The true semantic map (c h w) of objects (n h w): one class a cell, the smallest object's where they overlap.

    As `misa.data.label_maps.rasterise`, whose maps hold no more than 255 classes.
    """
    label_map = torch.full(true.shape[-2:], -1)
    for n in true.flatten(1).sum(dim=1).argsort(descending=True, stable=True).tolist():
        label_map[true[n]] = labels[n]
    return label_map == torch.arange(count)[:, None, None]


def _groups(annotation: Mapping[str, Any], name: str) -> tuple[str, ...]:
    size = [kind for kind, least in SIZES.items() if annotation["area"] >= least][-1]
    mode = (f"mode {annotation['mode']}",) if isinstance(annotation.get("mode"), str) else ()
    return (f"class {name}", size, *mode)


def _with_masks(run: str | Path, source: Source, split: str) -> Source:
    """Open and check the split of the run's data; UserError if it has no ground-truth masks."""
    if split not in ("val", "train"):
        raise UserError(f"split is {split!r}; choose val or train.")
    if split == "train":
        experiment, *_ = recorded(run)
        there = replace(experiment, data="coco", scenes=()) if experiment.data == "demo" else experiment
        source = open_source(there, source.root, classes=source.classes)
    if not has_masks((source.train if split == "train" else source.val).annotations):
        raise UserError(f"guidance compares with true masks, and the {split} split of {source.root} has none.")
    return source


def _percent(figure: Figure) -> str:
    if np.isnan(figure.low):
        return f"{100 * figure.value:.1f}"
    return f"{100 * figure.value:.1f} ({100 * figure.low:.1f} to {100 * figure.high:.1f})"


def _signed(value: float, low: float, high: float) -> str:
    return f"{100 * value:+.1f}" if np.isnan(low) else f"{100 * value:+.1f} ({100 * low:+.1f},{100 * high:+.1f})"
