"""Sources of the paper's figures: run folders, images chosen from their data, and networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from numpy.typing import NDArray

from misa.data.digest import data_digests
from misa.data.source import Source
from misa.engine.reports.explore import Networks, open_networks
from misa.engine.runs.detections import read_detections, results_file
from misa.engine.runs.folder import opened
from misa.engine.runs.places import teacher_place
from misa.engine.runs.record import changed_splits
from misa.errors import UserError
from misa.evaluation.ap import matched, present, read_truth
from misa.evaluation.bootstrap import Matches, image_scores, matches_of, worst_images
from misa.experiment import Affinity, Augmentation, Experiment
from misa.figures.example import STRIDE, Example
from misa.files import digest, read_json
from misa.ops.readings import window_of
from misa.ops.seed_affinity import AffinitySettings


@dataclass(frozen=True)
class Trained:
    """A finished run: its experiment, data and folder."""

    experiment: Experiment
    source: Source
    folder: Path
    params: dict[str, Any]

    @property
    def is_teacher(self) -> bool:
        """Whether it is a semantic network, not a student."""
        return self.experiment.semantic is not None

    def detections(self) -> list[dict[str, Any]]:
        """A student's predictions on its validation data, as COCO results; UserError if they cannot be read."""
        truth = read_truth(self.source.val.annotations)
        return read_detections(results_file(self.folder), truth, self.source.root)

    def image(self, image_id: int) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """A validation image (h w 3, RGB) and its entry."""
        record = read_truth(self.source.val.annotations).loadImgs([image_id])[0]
        return mmcv.imread(self.source.val.images / record["file_name"], channel_order="rgb"), record


@dataclass(frozen=True)
class Choice:
    """Choice of images: `given` ids, the number `drawn` at random by `seed`, and of the student's `worst`."""

    given: tuple[int, ...] = ()
    drawn: int = 5
    worst: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Sources:
    """Finished runs on the same data, the images chosen from it, and parameters of the figures.

    changes: of the run's own affinity in Figure 4, by the fields of `AffinitySettings`. channel: of the features in
    Figure 3. data_root: where the data is now; None: where the runs were trained on it.
    """

    runs: tuple[Trained, ...]
    choice: Choice = field(default_factory=Choice)
    changes: Mapping[str, Any] = field(default_factory=dict)
    channel: int = 5
    data_root: str | Path | None = None

    @classmethod
    def of(cls, runs: Sequence[str | Path], *, data_root: str | Path | None = None, **options: Any) -> "Sources":
        """Open the runs of these folders, and the teachers beside their students.

        Raises UserError: no run folder, an unfinished run, runs on different data, or other data than theirs.
        """
        if not runs:
            raise UserError("figures are made from run folders; give one or more, as made by misa train.")
        found = _with_teachers([_read(run, data_root) for run in runs], data_root)
        first = found[0]
        for run in found[1:]:
            if digest(run.source.val.annotations) != digest(first.source.val.annotations):
                raise UserError(
                    f"{run.folder} was scored on other data than {first.folder}; give runs on the same data."
                )
        known = {name: value for name, value in options.items() if value is not None}
        return cls(tuple(found), data_root=data_root, **known)

    def run_of(self, *, teacher: bool, supervision: str | None = None) -> Trained | None:
        """The first run of that kind; without `supervision` the first from boxes, or else the first of all."""
        kinds = ("box", "mask") if supervision is None else (supervision,)
        own = [run for run in self.runs if run.is_teacher == teacher]
        return next((run for kind in kinds for run in own if run.experiment.supervision == kind), None)

    @property
    def student(self) -> Trained:
        """The first student, from boxes if there is one; ValueError without any (see `misa.engine.reports.figures`)."""
        run = self.run_of(teacher=False)
        if run is None:
            raise ValueError("there is no student among the runs.")
        return run

    @property
    def pair(self) -> tuple[Trained, Trained] | None:
        """A student and a semantic network of the same supervision, from boxes if there are both; None without."""
        for kind in ("box", "mask"):
            student, teacher = (self.run_of(teacher=which, supervision=kind) for which in (False, True))
            if student is not None and teacher is not None:
                return student, teacher
        return None

    @property
    def of_features(self) -> Trained | None:
        """The run whose networks compute features: a student with a teacher, otherwise a teacher."""
        teacher = self.run_of(teacher=True)
        students = [run for run in self.runs if not run.is_teacher and run.experiment.teacher]
        # A ready teacher, such as torchvision's, has no run of its own.
        able = [run for run in students if teacher is not None or not run.experiment.trains_teacher]
        return able[0] if able else teacher

    @cached_property
    def networks(self) -> Networks:
        """Teacher and student that compute features."""
        run = self.of_features
        if run is None:
            raise ValueError("there is no semantic network among the runs.")
        return open_networks(run.folder, data_root=self.data_root)

    @cached_property
    def _examples(self) -> dict[int, Example]:
        return {}

    def example(self, image_id: int) -> Example:
        """A validation image with its features; the networks run once for all figures."""
        if image_id not in self._examples:
            self._examples[image_id] = self.networks.example(image_id)
        return self._examples[image_id]

    @cached_property
    def affinity_settings(self) -> AffinitySettings:
        """The parameters that the run was trained with, with the changes."""
        run = self.of_features
        own = AffinitySettings(semantic_scale=8.0)
        if run is not None:
            own = settings_of(run.experiment.affinity, run.experiment.augmentation)
        return replace(own, **self.changes)

    @property
    def trains_sepa(self) -> bool:
        """Whether the run is trained with SEPA, or is a teacher's."""
        run = self.of_features
        affinity = None if run is None else run.experiment.affinity
        own = affinity is not None and affinity.saliency and affinity.mode == "apro"
        return own or (run is not None and run.is_teacher)

    @cached_property
    def image_ids(self) -> list[int]:
        """Ids of the validation images that were scored."""
        run = self.runs[0]
        ids: list[int] = read_truth(run.source.val.annotations).getImgIds()[: run.experiment.limit]
        unknown = [i for i in self.choice.given if i not in ids]
        if unknown:
            raise UserError(
                f"the val split of {run.source.root} has no image {unknown[0]}; it has {len(ids)}, the first are "
                f"{', '.join(map(str, ids[:5]))}."
            )
        return ids

    @cached_property
    def drawn(self) -> tuple[int, ...]:
        """Randomly drawn images, ordered by id."""
        rng = np.random.default_rng(self.choice.seed)
        chosen = rng.permutation(len(self.image_ids))[: self.choice.drawn]
        return tuple(sorted(self.image_ids[i] for i in chosen))

    @property
    def shown(self) -> tuple[int, ...]:
        """The given images, then the drawn ones."""
        return tuple(dict.fromkeys((*self.choice.given, *self.drawn)))

    @cached_property
    def _matches(self) -> Matches | None:
        student = self.run_of(teacher=False)
        if student is None:
            return None
        truth = read_truth(student.source.val.annotations, masks=student.source.masks)
        evaluation = matched(
            truth,
            student.detections(),
            images=self.image_ids,
            categories=present(truth, student.source.classes),
            compare="segm" if student.source.masks else "bbox",
        )
        return matches_of(evaluation)

    @cached_property
    def scores(self) -> dict[int, float | None]:
        """The student's AP on each image."""
        return {} if self._matches is None else image_scores(self._matches)

    @property
    def worst(self) -> tuple[int, ...]:
        """The student's images of lowest AP (`worst_images`)."""
        found = [] if self._matches is None else worst_images(self.scores, self._matches.objects(), self.choice.worst)
        return tuple(found)


def settings_of(affinity: Affinity | None, sizes: Augmentation) -> AffinitySettings:
    """Parameters of the affinity that a row is trained with, in windows, for figures of images at test size.

    Rows without a semantic term, and teachers, have no bandwidth for S: 8 σ is used, which makes the sum of Eq. 13
    visible.
    """
    if affinity is None:
        return AffinitySettings(semantic_scale=8.0)
    side, share = sizes.test_short_side // STRIDE, affinity.window_share
    colors = AffinitySettings(
        local_bandwidth=affinity.local_bandwidth,
        tree_bandwidth=affinity.tree_bandwidth,
        semantic_scale=8.0,
        window=affinity.window if share is None else window_of(share, side, side),
        steps=affinity.local_steps,
    )
    if not (affinity.feature or affinity.saliency):
        return colors
    semantic = {"semantic_scale": affinity.semantic_scale, "balance": affinity.balance, "form": affinity.local_form}
    return replace(colors, **semantic)  # type: ignore[arg-type]


def _read(folder: str | Path, data_root: str | Path | None) -> Trained:
    experiment, source, path, params = opened(folder, data_root=data_root)
    if read_json(path / "metrics.json") is None:
        raise UserError(f"{path} is not finished; train it to its end first, the same command goes on.")
    if data_root is not None and "val" in changed_splits(params, data_digests(source.train, source.val)):
        raise UserError(
            f"figures show the predictions in {path}, which are of another val split than that of {source.root}; give "
            "the place of the run's own data."
        )
    return Trained(experiment, source, path, params)


def _with_teachers(runs: list[Trained], data_root: str | Path | None) -> list[Trained]:
    found = {run.folder: run for run in runs}
    for run in runs:
        if run.experiment.trains_teacher:
            known = run.params["seed"], run.folder.parent
            beside = teacher_place(run.experiment, *known, student=run.params)
            if beside not in found and (beside / "metrics.json").is_file():
                found[beside] = _read(beside, data_root)
    return list(found.values())
