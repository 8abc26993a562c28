"""The figure factory: Figures 1, 3, 4 and 5 from run folders, with where they come from written into each file."""

import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pycocotools import mask as rle

import misa
from misa.data.label_maps import merge_by_score, read_label_map
from misa.data.scenes.scenes import named_scene
from misa.data.semantic import true_maps
from misa.data.source import Source
from misa.engine.reports.explore import Networks, open_networks
from misa.engine.runs.checkpoints import last_checkpoint
from misa.engine.runs.folder import opened
from misa.engine.runs.places import teacher_place
from misa.engine.runs.record import _commit, read_params
from misa.engine.runs.samples import surest
from misa.engine.runs.scores import DETECTIONS, LABEL_MAPS, MERGE_SCORE, score_merged
from misa.errors import UserError
from misa.evaluation.ap import matched, read_truth
from misa.evaluation.bootstrap import image_scores, matches_of
from misa.experiment import Experiment
from misa.figures.example import Example
from misa.figures.paper import class_picture, figure1, figure3, figure4, figure5
from misa.figures.provenance import save_figure
from misa.files import read_json
from misa.ops.seed_affinity import Knobs, Seed
from misa.parameters import FiguresParameters

FIGURES = ("1", "3", "4", "5")
# Figure 4's two failures, drawn, each with a seed (row, column).
_SCENES: dict[str, Seed] = {"same_color_neighbors": (14, 8), "two_tone_object": (14, 19)}


@dataclass(frozen=True)
class Trained:
    """A finished run: what it is, its data, and its files."""

    experiment: Experiment
    source: Source
    folder: Path
    params: dict[str, Any]

    @property
    def is_teacher(self) -> bool:
        """A semantic network, not a student."""
        return self.experiment.semantic is not None


@dataclass(frozen=True)
class Choice:
    """Which images: `given` ids, `drawn` by chance from `seed`, and the `worst` of the student's."""

    given: tuple[int, ...] = ()
    drawn: int = 5
    worst: int = 10
    seed: int = 0


class Factory:
    """Figures from run folders, whose part (student or teacher, from boxes or from masks) is read from them.

    A student's teacher is found beside it. Figure 1 shows what there is of the four networks; Figures 3 and 4 want a
    teacher; Figure 5 a student.

    Raises:
        UserError: no run folder, an unfinished run, or runs on other data than the first.
    """

    def __init__(
        self,
        runs: Sequence[str | Path],
        *,
        choice: Choice | None = None,
        knobs: Knobs | None = None,
        channel: int = 5,
        wanted: Sequence[str] = FIGURES,
    ) -> None:
        if not runs:
            raise UserError("figures are made from run folders; give one or more, as made by misa train.")
        self.runs = _with_teachers([_read(run) for run in runs])
        self.given_runs = tuple(str(run) for run in runs)
        self.choice = Choice() if choice is None else choice
        self.knobs = Knobs(semantic_scale=8.0) if knobs is None else knobs
        self.channel = channel
        self.wanted = tuple(wanted)
        if unknown := [name for name in wanted if name not in FIGURES]:
            raise UserError(f"there is no figure {unknown[0]!r}; the figures are {', '.join(FIGURES)}.")
        self._figures: dict[str, Figure] = {}
        first = self.runs[0]
        for run in self.runs[1:]:
            if _digest(run.source.val.annotations) != _digest(first.source.val.annotations):
                raise UserError(
                    f"{run.folder} was scored on other data than {first.folder}; give runs on the same data."
                )

    def run_of(self, *, teacher: bool, supervision: str = "box") -> Trained | None:
        """The first run of that kind."""
        kind = (teacher, supervision)
        return next((r for r in self.runs if (r.is_teacher, r.experiment.supervision) == kind), None)

    def make(self, out: str | Path) -> list[Path]:
        """Draw and write the wanted figures that the runs suffice for; what is missing is said in a line."""
        written: list[Path] = []
        for name in self.wanted:
            missing = self.missing(name)
            if missing:
                print(f"figure {name} is left out: {missing}")
                continue
            figure = self.draw(name)
            written += save_figure(figure, out, f"figure{name}", self.provenance(name, out))
        return written

    def missing(self, name: str) -> str:
        """Why a figure cannot be drawn from these runs; empty if it can."""
        student, teacher = self.run_of(teacher=False), self.run_of(teacher=True)
        if name in ("3", "4") and teacher is None:
            return "it needs a semantic teacher, such as misa train demo:misa leaves beside its run"
        if name == "5" and student is None:
            return "it needs a student's run, such as one of misa train demo:misa"
        if name == "1" and (student is None or teacher is None):
            return "it compares a student with a semantic network; give a run of each"
        if name == "1" and not self.runs[0].source.masks:
            return "the validation images have no masks to compare with"
        return ""

    def show(self, name: str) -> Figure | None:
        """A figure for a notebook; None where it is not wanted or, as `make` has said, cannot be drawn."""
        return self.draw(name) if name in self.wanted and not self.missing(name) else None

    def draw(self, name: str) -> Figure:
        """One figure; drawn once, however often it is asked for."""
        draws: dict[str, Callable[[], Figure]] = {
            "1": self.figure1,
            "3": self.figure3,
            "4": self.figure4,
            "5": self.figure5,
        }
        if name not in self._figures:
            self._figures[name] = draws[name]()
        return self._figures[name]

    def figure1(self) -> Figure:
        """mIoU with instances ignored, and label maps of the chosen images."""
        scores: dict[str, dict[str, float]] = {}
        for supervision, name in (("box", "boxes"), ("mask", "masks")):
            for teacher, kind in ((False, "instances, merged"), (True, "semantic")):
                run = self.run_of(teacher=teacher, supervision=supervision)
                if run is not None and (value := _miou(run)) is not None:
                    scores.setdefault(name, {})[kind] = value
        student, teacher_run = self.run_of(teacher=False), self.run_of(teacher=True)
        assert student is not None, "asked for in missing()"
        assert teacher_run is not None, "asked for in missing()"
        rows = [_label_maps(student, teacher_run, image_id) for image_id in self.shown[:2]]
        return figure1(scores, rows)

    def figure3(self) -> Figure:
        """The teacher's and the student's features of the first chosen image, taken apart."""
        example = self.networks.example(self.shown[0])
        inside = example.box_masks().any(dim=0)
        found = {"teacher S": example.features, "student I, adapted": example.adapted, "student I": example.student}
        rows = {name: (values, inside) for name, values in found.items() if values is not None}
        channel = min(self.channel, *(len(values) - 1 for values, _ in rows.values()))
        distillation = self.networks.experiment.distillation
        options = {} if distillation is None else {"radius": distillation.radius, "scale": distillation.scale}
        return figure3(rows, channel=channel, **options)

    def figure4(self) -> Figure:
        """Affinities from a seed: the two drawn failures where the data is the embedded one, then chosen images."""
        return figure4(self.seeded, knobs=self.knobs)

    @cached_property
    def seeded(self) -> list[tuple[Example, Seed]]:
        """The rows of Figure 4, each with its seed."""
        examples: list[tuple[Example, Seed]] = []
        if self.networks.experiment.data == "demo":
            examples += [(self.networks.scene(named_scene(n), n), _fit(seed, n)) for n, seed in _SCENES.items()]
        for image_id in self.shown:
            example = self.networks.example(image_id)
            if len(example.labels):
                examples.append((example, deepest(example)))
        return examples[:5]

    def figure5(self) -> Figure:
        """Predicted masks of chosen, random and worst images."""
        student = self.run_of(teacher=False)
        assert student is not None, "asked for in missing()"
        groups = {
            "chosen": self.choice.given,
            f"random (seed {self.choice.seed})": self.drawn,
            "worst by AP": self.worst,
        }
        return figure5(
            {name: [_predicted(student, i, self.scores.get(i)) for i in ids] for name, ids in groups.items() if ids}
        )

    @cached_property
    def networks(self) -> Networks:
        """Teacher and student to compute features with: of the student that has both, else of the teacher."""
        students = [r for r in self.runs if not r.is_teacher and r.experiment.teacher]
        run = students[0] if students else self.run_of(teacher=True)
        assert run is not None, "asked for in missing()"
        return open_networks(run.folder)

    @cached_property
    def image_ids(self) -> list[int]:
        """The validation images that were scored."""
        run = self.runs[0]
        ids: list[int] = read_truth(run.source.val.annotations).getImgIds()[: run.experiment.limit]
        unknown = [i for i in self.choice.given if i not in ids]
        if unknown:
            raise UserError(
                f"{run.source.val.annotations} has no image {unknown[0]}; it has {len(ids)}, the first are "
                f"{', '.join(map(str, ids[:5]))}."
            )
        return ids

    @cached_property
    def drawn(self) -> tuple[int, ...]:
        """Images drawn by chance, in the order of their ids."""
        rng = np.random.default_rng(self.choice.seed)
        chosen = rng.permutation(len(self.image_ids))[: self.choice.drawn]
        return tuple(sorted(self.image_ids[i] for i in chosen))

    @property
    def shown(self) -> tuple[int, ...]:
        """The given images, then the drawn ones."""
        return tuple(dict.fromkeys((*self.choice.given, *self.drawn)))

    @cached_property
    def scores(self) -> dict[int, float | None]:
        """The student's AP on each image."""
        student = self.run_of(teacher=False)
        if student is None:
            return {}
        evaluation = matched(
            read_truth(student.source.val.annotations),
            _detections(student),
            images=self.image_ids,
            categories=student.source.classes,
            compare="segm" if student.source.masks else "bbox",
        )
        return image_scores(matches_of(evaluation))

    @property
    def worst(self) -> tuple[int, ...]:
        """The student's worst images, the worst first; equal ones by their id."""
        known = [(value, image_id) for image_id, value in self.scores.items() if value is not None]
        return tuple(image_id for _, image_id in sorted(known)[: self.choice.worst])

    def provenance(self, name: str, out: str | Path) -> dict[str, Any]:
        """What makes this figure again, and what it was made from."""
        choice = self.choice
        command = ["misa", "figures", *self.given_runs, "--out", str(out), "--only", name]
        if choice.given:
            command += ["--images", ",".join(map(str, choice.given))]
        command += ["--random", str(choice.drawn), "--worst", str(choice.worst), "--seed", str(choice.seed)]
        command += ["--channel", str(self.channel), "--semantic-scale", f"{self.knobs.semantic_scale:g}"]
        images: dict[str, Any] = {"chosen": list(choice.given), "random": list(self.drawn)}
        if name == "5":
            images["worst"] = list(self.worst)
        seeds = {"seeds": {example.name: list(seed) for example, seed in self.seeded}} if name == "4" else {}
        return {
            "what": f"Figure {name}",
            "command": shlex.join(command),
            "misa": misa.__version__,
            "commit": _commit(),
            "data": _digest(self.runs[0].source.val.annotations),
            "images": images,
            **seeds,
            "runs": {run.folder.name: _card(run) for run in self.runs},
        }


def factory_from(parameters: FiguresParameters) -> Factory:
    """A factory with the notebook's or the command line's parameters."""
    try:
        given = tuple(int(part) for part in parameters.images.replace(",", " ").split())
    except ValueError as error:
        raise UserError(f"images must be whole numbers with commas between, not {parameters.images!r}.") from error
    return Factory(
        [run for run in (part.strip() for part in parameters.runs.split(",")) if run],
        choice=Choice(given, parameters.random, parameters.worst, parameters.seed),
        knobs=Knobs(semantic_scale=parameters.semantic_scale),
        channel=parameters.channel,
        wanted=parameters.only.replace(",", " ").split(),
    )


def deepest(example: Example) -> Seed:
    """The place furthest inside the largest object, or inside its box where there is no mask: a fair seed."""
    masks = example.coarse_masks()
    whole = masks if masks is not None else example.box_masks()
    largest = whole[int(whole.sum(dim=(1, 2)).argmax())].numpy()
    depth = cv2.distanceTransform(np.pad(largest, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(row), int(column)


def _fit(seed: Seed, name: str) -> Seed:
    scene = named_scene(name)
    assert scene.image.shape[:2] == (128, 128), "the seeds are cells of a 128 x 128 scene at stride 4"
    return seed


def _read(folder: str | Path) -> Trained:
    experiment, source, path, params = opened(folder)
    if read_json(path / "metrics.json") is None:
        raise UserError(f"{path} is not finished; train it to its end first, the same command goes on.")
    return Trained(experiment, source, path, params)


def _with_teachers(runs: list[Trained]) -> list[Trained]:
    """The runs and, after them, the teachers that lie beside their students."""
    found = {run.folder: run for run in runs}
    for run in runs:
        if run.experiment.teacher:
            known = run.params["seed"], run.folder.parent
            beside = teacher_place(run.experiment, *known, data_root=run.params["data_root"])
            if beside not in found and (beside / "metrics.json").is_file():
                found[beside] = _read(beside)
    return list(found.values())


def _card(run: Trained) -> dict[str, Any]:
    """What names a run: its row and hash, seed, weights and the commit it was trained at."""
    environment = read_json(run.folder / "env.json") or {}
    params = read_params(run.folder)
    return {
        "row": params["row"],
        "hash": params["digest"],
        "seed": params["seed"],
        "weights": _digest(last_checkpoint(run.folder)),
        "commit": environment.get("commit"),
    }


def _digest(path: Path) -> str:
    """The first digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _detections(run: Trained) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run.folder / DETECTIONS).read_text())
    return found


def _miou(run: Trained) -> float | None:
    """mIoU of a semantic network, or of a student's instances merged into classes."""
    if run.is_teacher:
        metrics = read_json(run.folder / "metrics.json") or {}
    else:
        metrics = score_merged(run.source, run.folder / DETECTIONS, limit=run.experiment.limit)
    value: float | None = metrics.get("miou")
    return value


def _label_maps(student: Trained, teacher: Trained, image_id: int) -> dict[str, NDArray[np.uint8]]:
    """An image and its label maps: a student's instances merged, a semantic network's, the truth."""
    classes = student.source.classes
    image, record = _image(student, image_id)
    names = {c["id"]: c["name"] for c in json.loads(student.source.val.annotations.read_text())["categories"]}
    mine = [d for d in _detections(student) if d["image_id"] == image_id]
    merged = merge_by_score(
        [rle.decode(d["segmentation"]).astype(bool) for d in mine],
        [classes.index(names[d["category_id"]]) for d in mine],
        [d["score"] for d in mine],
        (record["height"], record["width"]),
        background=len(classes),
        threshold=MERGE_SCORE,
    )
    semantic = read_label_map(teacher.folder / LABEL_MAPS / f"{image_id}.png")
    truth = next(m.make() for m in true_maps(student.source.val, classes) if m.image_id == image_id)
    maps = {"instances, merged": merged, "semantic": semantic, "truth": truth}
    return {"image": image} | {name: class_picture(values, len(classes)) for name, values in maps.items()}


def _predicted(run: Trained, image_id: int, ap: float | None) -> dict[str, Any]:
    """An image with the student's sure masks, the surest first; an object that several classes claim once."""
    image, _ = _image(run, image_id)
    mine = [d for d in _detections(run) if d["image_id"] == image_id and d["score"] >= MERGE_SCORE]
    masks = [rle.decode(d["segmentation"]).astype(bool) for d in surest(mine)]
    stacked = np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool)
    return {"image": image, "masks": stacked, "title": f"{image_id}" + ("" if ap is None else f" · AP {ap:.0f}")}


def _image(run: Trained, image_id: int) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    record = read_truth(run.source.val.annotations).loadImgs([image_id])[0]
    return mmcv.imread(run.source.val.images / record["file_name"], channel_order="rgb"), record
