"""The Python API: inference with a trained student, and the features and affinities of a semantic teacher.

    student = misa.load("runs/demo-long-seed0")
    found = student("photo.jpg")
    given = student("photo.jpg", boxes=[[385, 60, 600, 357]])
    teacher = misa.load_teacher("torchvision:deeplabv3_resnet50")
    scene = teacher.see("photo.jpg", boxes=[[385, 60, 600, 357]], labels=["cat"])

An image is a path, a PIL image, an RGB array (H W 3), a gray one (H W) or an RGB tensor (3 H W), of uint8 or floats 0
to 1. One image gives one result; a list, or an array with a batch axis, gives a list of results. Boxes are xyxy and
seeds (row, column), both in pixels of the image. Axes: n instance · H, W height and width of the image.
"""

import base64
import io
import math
import os
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from PIL import Image as Pillow
from torch import Tensor

from misa.data.check.image_files import upright
from misa.data.images import read_image, require_local
from misa.data.rle import decode_part
from misa.engine.prediction.files import rows_of
from misa.engine.prediction.known_boxes import find_boxes, reaching_beyond, require_pixels
from misa.engine.prediction.student import Instances, Student, find, load_student
from misa.engine.reports.explore import FeatureExtractor, open_teacher
from misa.engine.reports.figure_sources import settings_of
from misa.engine.runs.folder import recorded
from misa.engine.runs.state import warn
from misa.errors import UserError, counted, did_you_mean, stem
from misa.experiment import TORCHVISION, Augmentation
from misa.figures.affinity import NAMES, affinity_figure, blob, field_of
from misa.figures.example import Example
from misa.figures.overlay import overlay
from misa.figures.style import Picture
from misa.files import atomic_write, write_json
from misa.models.teacher.torchvision import named_teacher, network_names
from misa.ops.seed_affinity import AffinitySettings, Kernel, Seed, SeedField, seed_mask

if TYPE_CHECKING:
    from misa.figures.widgets import SeedExplorer

Images = str | Path | Pillow.Image | NDArray[Any] | Tensor
Kind = Literal["color", "feature", "saliency", "sepa"]
_ROUNDING = 1e-4  # resizing and blending leave floats slightly outside of 0 to 1
_KERNELS: dict[str, Kernel] = {"color": "color", "feature": "feature", "saliency": "saliency", "sepa": "enhanced"}


def load(run_or_file: str | Path, *, device: str = "auto") -> "Predictor":
    """Load a trained student for inference.

    Args:
        run_or_file: a run folder of `misa train`, one of its checkpoints, or a file of `misa export`.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one.

    Raises UserError: there is no student at that path, or no such device.
    """
    return Predictor(load_student(_path(run_or_file, "the path of a student"), device=device))


def load_teacher(run_or_name: str | Path, *, weights: str | Path | None = "default") -> "Teacher":
    """Load a semantic teacher, which gives S and K of Eq. 1 for any image.

    Args:
        run_or_name: the run folder of a teacher, or of a student with its teacher beside it; or one of torchvision's
            segmentation networks (the 20 classes of VOC), such as "torchvision:deeplabv3_resnet50", or
            "torchvision:deeplabv3_resnet50:<file>" with the weights of a file.
        weights: of a torchvision network: "default" downloads torchvision's once; a path to a file of weights; or
            None for random weights (to test that code runs).

    Raises UserError: there is no teacher at that path, or its weights are not available.
    """
    name = str(run_or_name)
    if name.startswith(TORCHVISION):
        network = named_teacher(name.removeprefix(TORCHVISION), weights=weights)
        return Teacher(FeatureExtractor(network.contract.classes, Augmentation(test_short_side=520), network), name)
    path = _path(run_or_name, "the path or name of a teacher")
    if name.partition(":")[0] in network_names() and not path.exists():
        raise UserError(f"there is no run folder {name}; did you mean {TORCHVISION + name!r}?")
    found = open_teacher(path)
    if found is None:
        raise UserError(
            f"{run_or_name} has no teacher; give a teacher's run, or a student's of a row such as demo:misa."
        )
    extractor, place = found
    experiment, folder, _ = recorded(place)
    if experiment.semantic is not None or experiment.limit is not None:  # not for torchvision's beside a full student
        warn(folder, experiment)
    return Teacher(extractor, name, settings_of(extractor.affinity, extractor.sizes))


def photograph(image: Images, boxes: str = "", teacher: str = "") -> Example:
    """Prepare an image for the notebooks' panels, with a teacher's features if `teacher` is given.

    Args:
        image: one image, see the module.
        boxes: "x1 y1 x2 y2 label" in pixels, separated by ";"; without a teacher labels may be any words.
        teacher: as `run_or_name` of `load_teacher`; empty: colors only.

    Raises UserError: as `Teacher.see`, or boxes of another form.
    """
    frames, names = [], []
    for part in filter(None, (part.strip() for part in boxes.split(";"))):
        *sides, name = part.replace(",", " ").split(maxsplit=4) or [""]
        try:
            frames.append([float(side) for side in sides])
        except ValueError as error:
            raise UserError(f"write a box as x1 y1 x2 y2 label, with ; between two: {part!r} is not one.") from error
        if len(sides) != 4:
            raise UserError(f"write a box as x1 y1 x2 y2 label, with ; between two: {part!r} is not one.")
        names.append(name)
    if teacher:
        return load_teacher(teacher).see(image, boxes=frames, labels=names).example
    classes = tuple(dict.fromkeys(names))
    extractor = FeatureExtractor(classes, Augmentation(test_short_side=256))
    return Teacher(extractor, "of colors").see(image, boxes=frames, labels=names).example


@dataclass(frozen=True)
class Predictor:
    """A trained student, called on images: see `load`."""

    student: Student

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that it predicts."""
        return self.student.classes

    def __call__(
        self,
        images: Images | Sequence[Images],
        *,
        boxes: ArrayLike | Sequence[ArrayLike] | None = None,
        labels: str | Sequence[str | None] | Sequence[Sequence[str | None] | None] | None = None,
        score: float = 0.3,
        mask: float | None = None,
    ) -> "Result | list[Result]":
        """Predict the instances of one image or of each of several, or the masks of given boxes.

        Given boxes get at most one mask each, as by `misa predict --boxes`, whatever its score. A box in which the
        student finds nothing has none, and one that reaches beyond the image is clipped; warnings on standard error say
        so, and `Result.prompts` tells which box a mask is of.

        Args:
            images: see the module.
            boxes: known boxes, (n 4) or (4), xyxy in pixels of the image; of several images, such an array for each,
                [] for an image without boxes.
            labels: a class of `classes` for each box, None where it is to be predicted; of several images, a list each.
            score: score threshold of an instance, 0 to 1; without boxes only.
            mask: binarization threshold of the mask probability, 0 to 1, for SOLOv2 only (default: the row's).

        Raises UserError: an image that cannot be read or is of another form, a threshold out of range, a box of no area
        in the image, or a label that the student does not know.
        """
        for name, value in (("score", score), ("mask", mask)):
            try:
                known = bool(0 <= value <= 1) if value is not None else name == "mask"
            except (TypeError, ValueError, RuntimeError):  # a text, several numbers
                known = False
            if not known:
                raise UserError(f"{name} must be from 0 to 1, not {value!r}.")
        pixels, single = as_images(images)
        if boxes is None and labels is not None:
            raise UserError("labels are those of given boxes; give boxes too.")
        if boxes is None:
            found = find(self.student, pixels, score=score, mask=mask)
        else:
            found = self._of_boxes(pixels, [boxes] if single else boxes, [labels] if single else labels, mask)
        results = [Result(*pair) for pair in zip(pixels, found, strict=True)]
        return results[0] if single else results

    def _of_boxes(
        self, pixels: Sequence[NDArray[np.uint8]], boxes: Any, labels: Any, mask: float | None
    ) -> list[Instances]:
        """Returns the instances of each image's boxes, by `find_boxes`, and prints warnings of them."""
        for name, values in (("boxes", boxes), ("labels", labels)):
            if values is not None and (isinstance(values, str) or not _has_length(values, len(pixels))):
                raise UserError(f"several images need {name} for each: a list of {len(pixels)}, one item per image.")
        names = [[one] if isinstance(one, str) else one for one in ([None] * len(pixels) if labels is None else labels)]
        names = [None if one is None else _listed(one) for one in names]
        found, left, beyond = [], 0, 0
        for i, (image, given, called) in enumerate(zip(pixels, boxes, names, strict=True)):
            if given is None:
                raise UserError(
                    f"image {i} of the list has None for boxes; give [] if it has none, or predict the images without "
                    "given boxes in another call."
                )
            own = _numbers(given)
            try:
                found.append(find_boxes(self.student, image, own, called, mask=mask))
            except UserError as error:
                raise UserError(f"image {i} of the list: {error}" if len(pixels) > 1 else str(error)) from error
            left += np.asarray(own).size // 4 - len(found[-1])
            beyond += reaching_beyond(own, image.shape[:2])
        many = counted(beyond, "box reaches", "boxes reach")
        clipped = f"{many} more than a pixel beyond the image, and only the part inside was used"
        without = f"{counted(left, 'box has', 'boxes have')} no mask, the student found nothing there"
        for sentence in [clipped] * (beyond > 0) + [without] * (left > 0):
            print(f"warning: {sentence}.", file=sys.stderr, flush=True)
        return found

    def __repr__(self) -> str:
        names = ", ".join(self.classes[:6]) + (", …" if len(self.classes) > 6 else "")
        kind, total = self.student.experiment.student, counted(len(self.classes), "class", "classes")
        return f"<{kind} of {total} ({names}) on {self.student.device}>"


@dataclass(frozen=True, repr=False)
class Result:
    """The instances found in an image, by descending score or in the order of given boxes.

    `instances` holds the masks as run lengths.
    """

    image: NDArray[np.uint8] = field(repr=False)
    instances: Instances = field(repr=False)

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """All masks (n H W) at the image's size."""
        return self.instances.masks()

    @property
    def boxes(self) -> NDArray[np.float64]:
        """Tight boxes of the masks (n 4): x1 y1 x2 y2 in pixels."""
        return self.instances.boxes

    @property
    def scores(self) -> NDArray[np.float64]:
        """Scores (n), 0 to 1."""
        return self.instances.scores

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names (n)."""
        return self.instances.labels

    @property
    def prompts(self) -> tuple[int, ...] | None:
        """The index of the given box that each mask is of (n); None without given boxes."""
        return self.instances.prompts

    def __len__(self) -> int:
        return len(self.instances)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        counts = pd.Series(self.labels, dtype=object).value_counts()
        found = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
        return f"<{counted(len(self), 'instance')} in {height} x {width}: {found}>"

    def frame(self) -> pd.DataFrame:
        """Returns a table with a row per instance: label, score, area in pixels, and the box."""
        rows = [(row["label"], row["score"], row["area"], *row["box"]) for row in rows_of(self.instances)]
        kinds = {"label": object, "score": float, "area": int, "x1": float, "y1": float, "x2": float, "y2": float}
        return pd.DataFrame(rows, columns=list(kinds)).astype(kinds)  # also without rows, for pd.concat

    def plot(self) -> Pillow.Image:
        """Draw masks and labels over the image; returns a PIL image."""
        parts = [decode_part(runs) for runs in self.instances.runs]
        labels = [f"{label} {score:.2f}" for label, score in zip(self.labels, self.scores, strict=True)]
        return Pillow.fromarray(overlay(self.image, parts, labels))

    def save(self, path: str | Path) -> Path:
        """Write the overlay (.png, .jpg), the instances (.json, with COCO run lengths) or a table (.csv).

        Raises UserError: the suffix is none of these, or the file cannot be written.
        """
        path = Path(path).expanduser()
        kind = path.suffix.lower()
        if kind not in (".png", ".jpg", ".jpeg", ".json", ".csv"):
            raise UserError(f"{path} should end in .png or .jpg (the picture), .json (instances) or .csv (a table).")
        try:
            if kind == ".json":
                write_json(path, {"size": list(self.image.shape[:2]), "instances": rows_of(self.instances)})
            elif kind == ".csv":
                with atomic_write(path) as partial:
                    self.frame().to_csv(partial, index=False)
            else:
                with atomic_write(path) as partial:
                    self.plot().save(partial, format="PNG" if kind == ".png" else "JPEG")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror or error}); choose another place.") from error
        return path

    def _repr_html_(self) -> str:
        buffer = io.BytesIO()
        shown = self.plot()
        shown.thumbnail((640, 640))
        shown.save(buffer, format="PNG")
        picture = f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        table = self.frame().round(2).to_html(index=False, border=0, max_rows=20)
        return f'<div style="display:flex;gap:1em;align-items:flex-start">{picture}{table}</div>'


@dataclass(frozen=True)
class Teacher:
    """A semantic network that computes S and K (Eq. 1) of an image: see `load_teacher`."""

    extractor: FeatureExtractor = field(repr=False)
    name: str
    settings: AffinitySettings = field(default_factory=lambda: AffinitySettings(semantic_scale=8.0))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the categories, in the order of the rows of K."""
        return self.extractor.classes

    def see(
        self, image: Images, *, boxes: ArrayLike | None = None, labels: str | Sequence[str] | None = None
    ) -> "SceneView":
        """Prepare an image as for the losses, and compute the teacher's features.

        Args:
            image: one image, see the module.
            boxes: (n 4) or (4), xyxy in pixels of the image.
            labels: a class of `classes` for each box.

        Raises UserError: several images, boxes outside the image, or labels that are not in `classes`.
        """
        pixels, single = as_images(image)
        if not single:
            raise UserError(f"a teacher sees one image at a time: {len(pixels)} were given.")
        frames = _boxes(boxes, pixels[0])
        names = [labels] if isinstance(labels, str) else list(() if labels is None else _listed(labels))
        if len(names) != len(frames):
            raise UserError(
                f"each box needs a label, one of the teacher's classes: {counted(len(frames), 'box', 'boxes')}, "
                f"{counted(len(names), 'label')}."
            )
        for name in names:
            if name not in self.classes:
                hint = did_you_mean(name, self.classes) or f"; it knows {', '.join(self.classes)}."
                raise UserError(f"the teacher {self.name} has no class {name!r}{hint}")
        known = tuple(self.classes.index(name) for name in names)
        title = Path(image).stem if isinstance(image, str | Path) else ", ".join(dict.fromkeys(names)) or "image"
        return SceneView(self.extractor.see(pixels[0], name=title, boxes=frames, labels=known), self.settings)


@dataclass(frozen=True)
class SceneView:
    """An image with its colors, boxes and teacher features: see `Teacher.see`. Results have the size of the image."""

    example: Example = field(repr=False)
    settings: AffinitySettings = field(default_factory=AffinitySettings)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.example.image.shape[0], self.example.image.shape[1]

    def __repr__(self) -> str:
        named = ", ".join(self.example.classes[label] for label in self.example.labels) or "no boxes"
        h, w = self.example.size
        return f"<{self.example.name}, {self.size[0]} x {self.size[1]}, maps of {h} x {w}: {named}>"

    def affinity(
        self, seed: Sequence[int], kind: Kind = "sepa", *, label: str | None = None, tree: bool = False, **settings: Any
    ) -> NDArray[np.float32]:
        """Returns the affinity of every pixel to the seed (H W), 0 to 1: Eq. 8 and 10-13.

        Args:
            seed: (row, column) in pixels of the image.
            kind: "color" A, "feature" A^f, "saliency" A^c or "sepa", color and saliency combined
                (Eq. 13 divided by 1 + balance, or their product).
            label: the category of A^c; by default that of the smallest box around the seed.
            tree: along the minimum spanning tree, set by the longest edge on the path, instead of directly.
            settings: parameters to override, see `misa.ops.seed_affinity.AffinitySettings`.

        Raises UserError: the seed is outside the image, the kind is unknown, a setting is unknown or out of range, or
        the category cannot be inferred.
        """
        cell, kernel = self._cell(seed), self._kernel(kind)
        field_ = self._field(self._label(cell, kernel, label))
        chosen = self._with(settings)
        maps = field_.along_tree(cell, chosen) if tree else field_.direct(cell, chosen)
        return self._full(maps[kernel][None])[0]

    def propagate(
        self,
        start: Literal["box", "blob"] | Sequence[int] = "box",
        *,
        kind: Kind = "sepa",
        reach: Literal["local", "global"] = "local",
        label: str | None = None,
        **settings: Any,
    ) -> NDArray[np.float32]:
        """Returns soft masks (n H W), 0 to 1, propagated by an affinity (Eq. 7, 9, 14): one per box, or one for a seed.

        A maximum may be far below 1: the figures take pixels of at least half of the mask's maximum as the object.

        Args:
            start: each "box" filled, a soft "blob" in each box, or a seed (row, column) in pixels of the image.
            kind: as in `affinity`.
            reach: "local" for `steps` iterations of the window within the box, "global" for one pass along the tree.
            label: the category for a seed; by default that of the smallest box around it. Boxes have their own.
            settings: parameters to override, such as steps=20.

        Raises UserError: no boxes to start from, a seed outside the image, an unknown kind, no category, one for boxes,
        or a setting that is unknown or out of range.
        """
        kernel, chosen = self._kernel(kind), self._with(settings)
        if reach not in ("local", "global"):
            raise UserError(f"reach is 'local' or 'global', not {reach!r}.")
        if label is not None and isinstance(start, str):
            raise UserError("label is the category for a seed; boxes have the labels that were given to `see`.")
        masks = []
        for first, box, category in self._starts(start, kernel, label):
            spread = self._field(category).masks(first, chosen, box=box, reach=reach)
            masks.append(spread[kernel])
        return self._full(torch.stack(masks))

    def plot(self, seed: Sequence[int], *, label: str | None = None, **settings: Any) -> Picture:
        """Draw all affinities of a seed and the masks propagated from it, as one figure; `label` as in `affinity`."""
        cell = self._cell(seed)
        kernel: Kernel = "color" if self.example.features is None else "enhanced"
        field_ = self._field(self._label(cell, kernel, label))
        return affinity_figure(self.example, cell, field=field_, settings=self._with(settings))

    def explore(self, seed: Sequence[int] | None = None) -> "SeedExplorer":
        """Returns an interactive panel for notebooks: click a pixel, move a slider."""
        from misa.figures.widgets import SeedExplorer

        cell = None if seed is None else self._cell(seed)
        return SeedExplorer([self.example], seed=cell, settings=self.settings)

    def _cell(self, seed: Sequence[int]) -> Seed:
        try:
            row, column = (math.floor(place) for place in seed)  # no texts, which int() takes
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise UserError(f"a seed is (row, column) in pixels of the image, not {seed!r}.") from error
        height, width = self.size
        if not (0 <= row < height and 0 <= column < width):
            raise UserError(f"the seed (row {row}, column {column}) is outside the image of {height} x {width} pixels.")
        (h, w), (down, across) = self.example.size, self.example.stride
        return min(int((row + 0.5) / down), h - 1), min(int((column + 0.5) / across), w - 1)

    def _kernel(self, kind: str) -> Kernel:
        if kind not in _KERNELS:
            raise UserError(f"there is no affinity {kind!r}; the kinds are {', '.join(_KERNELS)}.")
        if kind != "color" and self.example.features is None:
            raise UserError(f"the affinity {kind!r} needs a teacher's features; without a teacher there is 'color'.")
        return _KERNELS[kind]

    def _label(self, cell: Seed, kernel: Kernel, label: str | None) -> int:
        """Returns the index of `label`, by default of the category of the smallest box around the seed."""
        if label is not None:
            if label not in self.example.classes:
                raise UserError(f"the teacher has no class {label!r}; it knows {', '.join(self.example.classes)}.")
            return self.example.classes.index(label)
        box = self.example.box_at(cell)
        if box is None and kernel in ("saliency", "enhanced") and len(self.example.classes) > 1:
            raise UserError(f"the seed is in no box; name the category with label=..., for {NAMES[kernel]} needs one.")
        return self.example.labels[box] if box is not None else 0

    def _starts(self, start: Any, kernel: Kernel, label: str | None) -> list[tuple[Tensor, Tensor | None, int]]:
        """Returns the initial masks, each with the box that confines it and its category."""
        if not isinstance(start, str):
            cell = self._cell(start)
            box = self.example.box_at(cell)
            inside = None if box is None else self.example.box_masks()[box]
            return [(seed_mask(*self.example.size, cell), inside, self._label(cell, kernel, label))]
        if start not in ("box", "blob"):
            raise UserError(f"start is 'box', 'blob' or a seed (row, column), not {start!r}.")
        if not len(self.example.labels):
            raise UserError("there are no boxes to start from; give boxes to see(), or a seed (row, column) as start.")
        starts: list[tuple[Tensor, Tensor | None, int]] = []
        for inside, category in zip(self.example.box_masks(), self.example.labels, strict=True):
            starts.append((inside.float() if start == "box" else blob(inside), inside, category))
        return starts

    def _with(self, changes: dict[str, Any]) -> AffinitySettings:
        known = self.settings.__dataclass_fields__
        if unknown := changes.keys() - known:
            raise UserError(f"{', '.join(sorted(unknown))}: an affinity's settings are {', '.join(known)}.")
        try:
            chosen = replace(self.settings, **changes)
        except TypeError as error:
            given = ", ".join(f"{name}={value!r}" for name, value in changes.items())
            raise UserError(f"a value of these is of the wrong type: {given} ({error}).") from error
        except ValueError as error:
            raise UserError(str(error)) from error
        h, w = self.example.size
        if "window" in changes and chosen.window > min(h, w):  # its memory grows with the fourth power of its side
            raise UserError(
                f"window is {chosen.window}, larger than the map of {h} x {w} cells; take a smaller one, or "
                "reach='global' for the whole image."
            )
        return chosen

    def _field(self, label: int) -> SeedField:
        if label not in self._fields:
            self._fields[label] = field_of(self.example, label)
        return self._fields[label]

    @cached_property
    def _fields(self) -> dict[int, SeedField]:
        return {}

    def _full(self, maps: Tensor) -> NDArray[np.float32]:
        """Resize maps (n h w) to the size of the image, bilinearly, without rounding errors beyond 0 and 1."""
        places = [
            2 * (torch.arange(count) + 0.5) / (pixels * cells) - 1  # of pixels, -1 and 1 at the ends of the map
            for count, pixels, cells in zip(self.size, self.example.stride, self.example.size, strict=True)
        ]
        grid = torch.stack(torch.meshgrid(*places, indexing="ij")[::-1], dim=-1)[None]
        whole = F.grid_sample(maps[None].float(), grid.float(), padding_mode="border", align_corners=False)
        return np.asarray(whole[0].clamp(0, 1).numpy(), dtype=np.float32)


def as_images(images: Images | Sequence[Images]) -> tuple[list[NDArray[np.uint8]], bool]:
    """Convert any accepted form to uint8 RGB images (H W 3); also returns whether a single image was given.

    Raises UserError: a file that cannot be read, or values of another form or range.
    """
    if isinstance(images, list | tuple):
        return [_as_image(one) for one in images], False
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        return [_as_image(one) for one in images], False
    return [_as_image(images)], True  # type: ignore[arg-type]


def _path(given: Any, what: str) -> Path:
    """Returns a given path; UserError for an empty text, which would mean this folder, for an address or no path."""
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"{what} is a text or a Path, not {given!r}.")
    if not str(given).strip():
        raise UserError(f"{what} is empty; give one.")
    require_local(given)
    return Path(given).expanduser()


def _has_length(value: Any, length: int) -> bool:
    return hasattr(value, "__len__") and len(value) == length


def _listed(labels: Any) -> Any:
    """Returns the labels of an image's boxes; UserError if they have no order or number."""
    if not hasattr(labels, "__len__") or isinstance(labels, Set | Mapping):
        raise UserError(f"labels are classes, one for each box in their order, not {labels!r}.")
    return labels


def _numbers(boxes: Any) -> Any:
    """Returns boxes with tensors, of any device and precision, as arrays."""
    if isinstance(boxes, Tensor):
        return boxes.detach().double().cpu().numpy()
    return [_numbers(box) for box in boxes] if isinstance(boxes, list | tuple) else boxes


def _as_image(image: Images) -> NDArray[np.uint8]:
    if isinstance(image, str | Path):
        path = _path(image, "the path of an image")
        if not path.exists():
            beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"there is no file {path}{did_you_mean(path.name, beside, key=stem) or '; give an image.'}")
        if path.is_dir():
            raise UserError(f"{path} is a folder; give an image or a list of them, or use misa predict for the folder.")
        return read_image(path)
    if isinstance(image, Pillow.Image):
        try:
            image.load()
        except Exception as error:  # Pillow raises many kinds
            of = f" of {name}" if (name := getattr(image, "filename", "")) else ""
            raise UserError(
                f"the PIL image{of} cannot be decoded ({error}); give one of a whole, open file."
            ) from error
        turned = upright(image)  # as the file is read from its path
        if not turned.mode.startswith(("I", "F")):
            return np.asarray(turned.convert("RGB"), dtype=np.uint8)
        gray = np.asarray(turned)  # more than 8 bits, which convert("RGB") would clip
        # The pixels of a file have 16 bits, of which OpenCV keeps the upper ones; those of any other "I" are unknown.
        of_16_bits = turned.mode.startswith("I;16") or (turned.mode == "I" and image.format in ("PNG", "PPM"))
        upper = (gray >> 8).astype(np.uint8) if of_16_bits else gray
        return _of_8_bits(upper[..., None].repeat(3, axis=2))
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise UserError(f"a tensor of an image is (3 H W), RGB; this one is {tuple(image.shape)}.")
        short = image.is_floating_point() and image.element_size() < 4  # NumPy has no bfloat16
        return _of_8_bits((image.float() if short else image).detach().cpu().numpy().transpose(1, 2, 0))
    if isinstance(image, np.ndarray):
        pixels = image[..., None].repeat(3, axis=2) if image.ndim == 2 else image
        if pixels.ndim != 3 or pixels.shape[2] != 3:
            raise UserError(f"an array of an image is (H W 3), RGB, or (H W), gray; this one is {image.shape}.")
        return _of_8_bits(pixels)
    raise UserError(f"an image is a path, a PIL image, an array or a tensor, not a {type(image).__name__}.")


def _of_8_bits(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert to uint8: floats are 0 to 1, as in torchvision; uint8 is returned unchanged."""
    if pixels.size == 0:
        raise UserError(f"an image of {pixels.shape[0]} x {pixels.shape[1]} pixels holds nothing.")
    if pixels.dtype == np.uint8:
        return np.array(pixels, order="C")  # a copy: the caller may reuse the array, as for the frames of a video
    if np.issubdtype(pixels.dtype, np.floating) and pixels.min() >= -_ROUNDING and pixels.max() <= 1 + _ROUNDING:
        return (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    span = f" of {pixels.min():g} to {pixels.max():g}" if np.issubdtype(pixels.dtype, np.number) else ""
    raise UserError(f"an image holds 8-bit values, or floats of 0 to 1; this one is {pixels.dtype}{span}.")


def _boxes(boxes: ArrayLike | None, image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Returns one or several boxes as (n 4), checked to lie in the image."""
    if boxes is None:
        return np.zeros((0, 4))
    try:
        frames = np.asarray(_numbers(boxes), dtype=float)
        frames = frames.reshape(-1, 4) if frames.size == 0 or frames.shape == (4,) else frames
        if frames.shape[1:] != (4,):
            raise ValueError
    except (ValueError, TypeError) as error:
        given = " ".join(repr(boxes).split())  # that of an array has several lines
        raise UserError(f"boxes are (n 4), x1 y1 x2 y2 in pixels, not {given}.") from error
    require_pixels(frames)
    height, width = image.shape[:2]
    for x1, y1, x2, y2 in frames:
        if x1 == x2 or y1 == y2:
            raise UserError(f"the box {x1:g} {y1:g} {x2:g} {y2:g} (x1 y1 x2 y2) has no area.")
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise UserError(
                f"the box {x1:g} {y1:g} {x2:g} {y2:g} (x1 y1 x2 y2) is not within the image of {width} x {height} "
                "pixels (width x height)."
            )
    return frames
