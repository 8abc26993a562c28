"""Features of a trained student and its teacher in images, for notebooks and figures."""

import functools
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.registry import MODELS
from numpy.typing import NDArray
from torch import Tensor, nn

from misa.data.pipeline import at_test_size, network_input
from misa.data.scenes.scenes import Scene
from misa.data.source import Source
from misa.engine.runs.checkpoints import last_checkpoint, load_weights
from misa.engine.runs.folder import opened, recorded
from misa.engine.runs.places import teacher_place
from misa.engine.runs.samples import boxed, stacked_objects
from misa.engine.runs.state import warn
from misa.engine.runs.teacher import load_teacher, ready_teacher
from misa.engine.training.train import train
from misa.errors import UserError, counted
from misa.evaluation.ap import read_truth
from misa.experiment import FRAMEWORKS, Affinity, Augmentation, Experiment
from misa.figures.example import STRIDE, Example
from misa.losses.distillation import spread_unit
from misa.machine import Machine
from misa.models.students.base import BoxSupervised
from misa.models.students.table import implementation, model_config
from misa.models.teacher.contract import TeacherNetwork
from misa.objectives.misa import reading_of
from misa.ops.boxes import centers_within
from misa.ops.readings import Reading
from misa.ops.resize import resized
from misa.rows import find_row, teacher_row

_PLAIN = ("channels", "none", "signed")  # Eq. 11 per channel, with unscaled S and K


@dataclass(frozen=True)
class Networks:
    """A run's student and teacher, either of which may be missing, and their data."""

    experiment: Experiment
    source: Source
    teacher: TeacherNetwork | None
    student: nn.Module | None
    folders: tuple[Path, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the categories, in the order of the labels and of K's rows."""
        return self.source.classes

    def image_ids(self) -> list[int]:
        """Ids of the validation images."""
        ids: list[int] = read_truth(self.source.val.annotations).getImgIds()
        return ids

    def example(self, image_id: int) -> Example:
        """Run the networks on a validation image; UserError if there is none of that id."""
        truth = read_truth(self.source.val.annotations)
        if image_id not in truth.imgs:
            ids = truth.getImgIds()
            raise UserError(
                f"the val split of {self.source.root} has no image {image_id}; it has {len(ids)}, the first are "
                f"{', '.join(map(str, ids[:5]))}."
            )
        sample = boxed(truth, self.source.val, self.classes, image_id)
        masks = stacked_objects(truth, self.classes, image_id) if self.source.masks else None
        labels = tuple(self.classes.index(name) for name in sample["labels"])
        return self.see(sample["image"], name=f"image {image_id}", boxes=sample["boxes"], labels=labels, masks=masks)

    def nth(self, place: int) -> Example:
        """Run the networks on the validation image at a place, from 0; UserError if there are not as many."""
        ids = self.image_ids()
        if not 0 <= place < len(ids):
            raise UserError(f"place is {place}, and there are {counted(len(ids), 'validation image')}, from 0 on.")
        return self.example(ids[place])

    @property
    def teacher_folder(self) -> Path | None:
        """Run folder of the teacher; None if there is none, or it was not trained here, such as torchvision's."""
        trained_here = self.experiment.semantic is not None or self.experiment.trains_teacher
        return self.folders[-1] if trained_here else None

    def requiring(self, *, teacher: bool = False, distilled: bool = False) -> "Networks":
        """Return these networks; UserError if there is no teacher, or no student that it was distilled into."""
        whole = self.teacher is not None and self.student is not None and self.experiment.distillation is not None
        if (teacher and self.teacher is None) or (distilled and not whole):
            what = "no student that a teacher was distilled into" if distilled else "no semantic teacher"
            raise UserError(f"{self.folders[0]} has {what}; give a run of a row such as demo:misa.")
        return self

    def scene(self, scene: Scene, name: str) -> Example:
        """An embedded scene as the networks see it; labels that they do not know wrap around their own classes."""
        return self.see(
            scene.image,
            name=name.replace("_", " "),
            boxes=scene.boxes.astype(np.float64),
            labels=tuple(int(label) % len(self.classes) for label in scene.labels),
            masks=scene.masks,
        )

    @property
    def extractor(self) -> "FeatureExtractor":
        """The networks without the run's data."""
        row = self.experiment
        networks = self.classes, row.augmentation, self.teacher, self.student
        return FeatureExtractor(*networks, self.unit, row.student, row.affinity)

    @functools.cached_property
    def unit(self) -> float | None:
        """What S was divided by for the student to learn it, √d σ or 1; None without a distillation.

        Training takes σ of each batch; this is that of a batch of validation images, of at most eight.
        """
        distillation = self.experiment.distillation
        if distillation is None or self.teacher is None or self.student is None:
            return None
        if distillation.unit != "spread":
            return 1.0
        truth = read_truth(self.source.val.annotations)
        extractor = FeatureExtractor(self.classes, self.experiment.augmentation, self.teacher)
        found = []
        for key in self.image_ids()[: min(self.experiment.schedule.batch, 8)]:
            maps = extractor.see(boxed(truth, self.source.val, self.classes, key)["image"]).features
            assert maps is not None
            found.append(maps.flatten(1))
        return float(spread_unit(torch.cat(found, dim=1)[None, :, :, None]))

    def see(self, image: NDArray[np.uint8], **about: Any) -> Example:
        """Run the networks on any RGB image (H W 3); `about`: keywords of `FeatureExtractor.see`."""
        return self.extractor.see(image, **about)


@dataclass(frozen=True)
class FeatureExtractor:
    """Computes features of images: `teacher` is any network with `prior`, `student` one with a dense feature, or None.

    classes: in the order of K's rows; sizes: resizing as at test time; unit: of S in the student's distillation, or
    None without one.
    """

    classes: tuple[str, ...]
    sizes: Augmentation
    teacher: nn.Module | None = None
    student: nn.Module | None = None
    unit: float | None = None
    framework: str = ""  # the student's, if there is one
    affinity: Affinity | None = None  # the student's, which defines S^c

    @torch.no_grad()
    def see(
        self,
        image: NDArray[np.uint8],
        *,
        name: str = "image",
        boxes: NDArray[np.float64] | None = None,
        labels: tuple[int, ...] = (),
        masks: NDArray[np.bool_] | None = None,
    ) -> Example:
        """Run the networks on an RGB image (H W 3); boxes (n 4, xyxy), labels (indices of `classes`), masks (n H W)."""
        example = example_of(
            image,
            short_side=self.sizes.test_short_side,
            long_side=self.sizes.long_side,
            name=name,
            boxes=boxes,
            labels=labels,
            classes=self.classes,
            masks=masks,
        )
        pixels, size = network_input(image, self.sizes, divisor=32), example.size
        if self.teacher is not None:
            features, factors = self.teacher.prior(pixels)  # type: ignore[operator]
            maps = _at(features, pixels, size)
            example = replace(example, features=maps, saliency_factors=factors, reading=self._reading(maps))
        if self.student is not None:
            feature = implementation(self.framework).dense_feature
            assert feature is not None
            dense = feature(self.student, self.student.extract_feat(pixels)).float()  # type: ignore[operator]
            example = replace(example, student=_at(dense, pixels, size))
            if self.unit is not None:
                adapted = self.unit * self.student.adapter(dense)  # type: ignore[operator]
                example = replace(example, adapted=_at(adapted, pixels, size))
        return example

    def _reading(self, features: Tensor) -> Reading | None:
        """S^c as the row defines it, from S (d h w); None for the default per channel from unscaled S and K."""
        affinity = self.affinity
        if affinity is None:
            return None
        if (affinity.semantic_values, affinity.semantic_norm, affinity.semantic_factors) == _PLAIN:
            return None
        everywhere = torch.ones(1, *features.shape[1:], dtype=torch.bool)
        last: Any = self.teacher.last_layer()  # type: ignore[union-attr, operator]
        values, factors, sigma = reading_of(affinity, features[None], last, everywhere)
        return Reading(values[0], factors, sigma)


def example_of(
    image: NDArray[np.uint8],
    *,
    short_side: int,
    long_side: int = 10**6,
    name: str = "image",
    boxes: NDArray[np.float64] | None = None,
    labels: tuple[int, ...] = (),
    classes: tuple[str, ...] = (),
    masks: NDArray[np.bool_] | None = None,
) -> Example:
    """An RGB image (H W 3) without features: its colors at stride 4 of the resized image, as in the losses.

    A cell partly beyond the image belongs to the maps if its center is not, as in `misa.losses.inputs.shrink`.
    """
    sizes = Augmentation(test_short_side=short_side, long_side=long_side)
    height, width = at_test_size(image, sizes).shape[:2]
    pixels = network_input(image, sizes, divisor=32)
    size = (max(centers_within(height, STRIDE), 1), max(centers_within(width, STRIDE), 1))
    return Example(
        name=name,
        image=image,
        boxes=np.zeros((0, 4)) if boxes is None else boxes,
        labels=labels,
        classes=classes,
        masks=masks,
        colors=_at(pixels, pixels, size),
        resized=(height, width),
    )


def open_networks(run: str | Path, *, data_root: str | Path | None = None, teacher: bool = True) -> Networks:
    """Load the networks of a run folder: a teacher, or a student with the teacher that it was trained with.

    teacher: False for a student without its teacher, which need not be there then.

    Raises UserError: no run folder, no checkpoint, a student without a dense feature I (a baseline such as BoxInst), or
    the student's teacher is not beside it.
    """
    warnings.filterwarnings("ignore", message=".*torch.meshgrid.*")  # from mmdet's heads at their first call
    experiment, source, folder, params = opened(run, data_root=data_root)
    if experiment.semantic is not None:
        return Networks(experiment, source, load_teacher(folder, classes=source.classes), None, (folder,))
    if implementation(experiment.student).dense_feature is None:
        able = [name for name in FRAMEWORKS if implementation(name).dense_feature is not None]
        raise UserError(
            f"{folder} is a {experiment.student}, which has no dense feature I (Eq. 2) to explore; "
            f"give the run of a {' or a '.join(able)}."
        )
    student = MODELS.build(model_config(experiment.but(network={"pretrained": False}), source.classes))
    load_weights(student, last_checkpoint(folder))
    student.eval().requires_grad_(False)
    if isinstance(student, BoxSupervised):
        student = student.predicting
    if not experiment.teacher or not teacher:
        return Networks(experiment, source, None, student, (folder,))
    if not experiment.trains_teacher:
        return Networks(experiment, source, ready_teacher(experiment, source.classes), student, (folder,))
    beside = _beside(experiment, folder, params)
    return Networks(experiment, source, load_teacher(beside, classes=source.classes), student, (folder, beside))


def open_teacher(run: str | Path) -> tuple[FeatureExtractor, Path] | None:
    """Load the teacher of a run folder, or None, and its folder, a torchvision network's being the run's own.

    Neither data nor student are read, so that both may be elsewhere. Raises UserError: as `open_networks`.
    """
    experiment, folder, params = recorded(run)
    classes, teacher, own = tuple(params["classes"]), None, folder
    if experiment.semantic is None and experiment.trains_teacher:
        own = _beside(experiment, folder, params)
    if experiment.semantic is not None or experiment.trains_teacher:
        teacher = load_teacher(own, classes=classes)
    elif experiment.teacher:
        teacher = ready_teacher(experiment, classes)
    if teacher is None:
        return None
    return FeatureExtractor(classes, experiment.augmentation, teacher, affinity=experiment.affinity), own


def _beside(experiment: Experiment, folder: Path, params: dict[str, Any]) -> Path:
    """The folder of a student's teacher; UserError if there is none."""
    beside = teacher_place(experiment, params["seed"], folder.parent, student=params)
    if not beside.is_dir():
        raise UserError(f"the teacher of {folder} should be in {beside}; put its run folder there, or train again.")
    return beside


def trained(run: str | Path, *, data_root: str | Path = "", threads: int | None = None, **options: Any) -> Networks:
    """Load the networks of a run folder (`trained_folder`), with a warning about a smoke run.

    threads: of torch on the CPU from now on, if given.
    """
    folder = trained_folder(run, data_root=data_root, threads=threads or 1, **options)
    if threads is not None:
        torch.set_num_threads(threads)
    networks = open_networks(folder, data_root=data_root or None)
    warn(folder, networks.experiment)
    return networks


def trained_folder(
    run: str | Path,
    *,
    row: str = "demo:long",
    data_root: str | Path = "",
    teacher_only: bool = False,
    smoke: bool = False,
    threads: int = 1,
) -> Path:
    """Return the folder of a finished run; if there is none, `row` is trained into it first.

    With `teacher_only`, only the row's teacher is trained if missing, in the folder beside `run` where the student
    expects it. A stopped run is resumed. `smoke`: train only two steps. `data_root`: of a finished run, the data in
    place of its own, such as where it has moved; to train, the data, by default in "datasets".
    """
    folder = Path(run).expanduser()
    if (folder / "metrics.json").is_file():
        return folder
    experiment = find_row(row).smoke() if smoke else find_row(row)
    if teacher_only and experiment.trains_teacher:
        folder = teacher_place(experiment, 0, folder.parent)
        experiment, row = teacher_row(experiment), experiment.teacher
    if not (folder / "metrics.json").is_file():
        print(f"no finished run in {folder}: training {row} into it, once", flush=True)
        train(
            experiment,
            data_root=data_root or "datasets",
            work_dir=folder,
            row=row,
            machine=Machine(threads=threads, interactive=True),
        )
    return folder


def _at(features: Tensor, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map of the padded input `pixels` to stride 4, as in training, and remove its padding."""
    padded = (pixels.shape[-2] // STRIDE, pixels.shape[-1] // STRIDE)
    return resized(features, padded)[0, :, : size[0], : size[1]]
