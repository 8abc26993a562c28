"""Draw the paper's Figures 1, 3, 4 and 5 from run folders, with the provenance written into each file."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pycocotools import mask as rle
from torch import Tensor

import misa
from misa.data.label_maps import MOST_CLASSES, read_label_map
from misa.data.scenes.scenes import named_scene
from misa.data.semantic import true_maps
from misa.engine.reports.figure_sources import Choice, Sources, Trained, digest
from misa.engine.runs.checkpoints import last_checkpoint
from misa.engine.runs.record import commits, current_commit, read_params
from misa.engine.runs.samples import stacked_objects, surest
from misa.engine.runs.scores import DETECTIONS, LABEL_MAPS, MERGE_SCORE, merged_map, score_merged
from misa.engine.runs.state import remarks
from misa.errors import UserError, counted
from misa.evaluation.ap import read_truth
from misa.figures.example import Example
from misa.figures.paper import class_picture, figure1, figure3, figure4, figure5
from misa.figures.plots import matched_colors
from misa.figures.provenance import require_own, save_figure
from misa.files import read_json
from misa.ops.seed_affinity import Seed

# Figure 4's two failure modes as embedded scenes, each with a seed (row, column) in a map of 32 x 32.
_SCENES: dict[str, Seed] = {"same_color_neighbors": (14, 8), "two_tone_object": (14, 19)}
_SCENE_MAP = 32
_ROWS = 5  # of Figure 4, unless more images are given


class PaperFigure(NamedTuple):
    """Functions of a figure's sources: draw it, why it cannot be drawn ("" if it can), and the ids of its images."""

    draw: Callable[[Sources], Figure]
    missing: Callable[[Sources], str]
    images: Callable[[Sources], Sequence[int]]


def _figure1(sources: Sources) -> Figure:
    """mIoU, which ignores instance discrimination, and label maps of the chosen images."""
    scores: dict[str, dict[str, float]] = {}
    for supervision, name in (("box", "boxes"), ("mask", "masks")):
        for teacher, kind in ((False, "instances, merged"), (True, "semantic")):
            run = sources.run_of(teacher=teacher, supervision=supervision)
            if run is not None and (value := _miou(run)) is not None:
                scores.setdefault(name, {})[kind] = value
    assert sources.pair is not None, "asked for before"
    rows = [_label_maps(*sources.pair, image_id) for image_id in _images1(sources)]
    return figure1(scores, rows, classes=sources.pair[0].source.classes)


def _images1(sources: Sources) -> Sequence[int]:
    return sources.shown[:2]


def _missing1(sources: Sources) -> str:
    if sources.pair is None:
        return "it compares a student with a semantic network of the same supervision; give a run of each"
    if len(sources.runs[0].source.classes) > MOST_CLASSES:
        return f"label maps hold at most {MOST_CLASSES} classes, and the data has {len(sources.runs[0].source.classes)}"
    return "" if sources.runs[0].source.masks else "the validation images have no masks to compare with"


def _figure3(sources: Sources) -> Figure:
    """Decomposition of the teacher's and the student's features of the first chosen image."""
    inside = sources.example(sources.shown[0]).box_masks().any(dim=0)
    rows = {name: (values, inside) for name, values in _features(sources).items()}
    distillation = sources.networks.experiment.distillation
    options = {} if distillation is None else {"radius": distillation.radius, "scale": distillation.scale}
    return figure3(rows, channel=sources.channel, **options)


def _features(sources: Sources) -> dict[str, Tensor]:
    """The features of Figure 3 (d h w) by name."""
    example = sources.example(sources.shown[0])
    found = {"teacher S": example.features, "student I, adapted": example.adapted, "student I": example.student}
    return {name: values for name, values in found.items() if values is not None}


def _missing3(sources: Sources) -> str:
    if missing := _missing_teacher(sources):
        return missing
    name, values = min(_features(sources).items(), key=lambda found: len(found[1]))
    if sources.channel < len(values):
        return ""
    return f"{name} has {counted(len(values), 'channel')}, from 0 on, and no channel {sources.channel}"


def _missing_teacher(sources: Sources) -> str:
    if sources.of_features is None:
        return "it needs a semantic teacher, such as misa train demo:misa leaves beside its run"
    return ""


def _missing4(sources: Sources) -> str:
    if missing := _missing_teacher(sources):
        return missing
    return "" if seeded(sources) else "none of the chosen images has an object; choose others (images, random, seed)"


def seeded(sources: Sources) -> list[tuple[Example, Seed]]:
    """The images of Figure 4, each with its seed: of the embedded data the two failure modes, then chosen ones."""
    examples: list[tuple[Example, Seed]] = []
    if sources.networks.experiment.data == "demo":
        for name, (row, column) in _SCENES.items():
            example = sources.networks.scene(named_scene(name), name)
            h, w = example.size
            examples.append((example, (row * h // _SCENE_MAP, column * w // _SCENE_MAP)))
    return examples + [(sources.example(key), deepest(sources.example(key))) for key in _images4(sources)]


def _images4(sources: Sources) -> list[int]:
    """The chosen images with an object: all that are given, and drawn ones up to five rows."""
    scenes = len(_SCENES) if sources.networks.experiment.data == "demo" else 0
    found = [key for key in sources.shown if len(sources.example(key).labels)]
    return found[: max(_ROWS - scenes, sum(key in sources.choice.given for key in found))]


def _figure4(sources: Sources) -> Figure:
    """Affinities of a seed in the embedded scenes and the chosen images."""
    return figure4(seeded(sources), settings=sources.affinity_settings, trained=sources.trains_sepa)


def _figure5(sources: Sources) -> Figure:
    """Predicted masks of chosen, random and worst images."""
    choice, student = sources.choice, sources.student
    groups = {"chosen": choice.given, f"random (seed {choice.seed})": sources.drawn, "worst by AP": sources.worst}
    return figure5(
        {name: [_predicted(student, i, sources.scores.get(i)) for i in ids] for name, ids in groups.items() if ids}
    )


def _missing5(sources: Sources) -> str:
    return (
        "it needs a student's run, such as one of misa train demo:misa" if sources.run_of(teacher=False) is None else ""
    )


FIGURES: dict[str, PaperFigure] = {
    "1": PaperFigure(_figure1, _missing1, _images1),
    "3": PaperFigure(_figure3, _missing3, lambda found: found.shown[:1]),
    "4": PaperFigure(_figure4, _missing4, _images4),
    "5": PaperFigure(_figure5, _missing5, lambda found: (*found.shown, *found.worst)),
}


class Factory:
    """Draws the wanted figures from runs, each once.

    A student's teacher is found beside it. Figure 1 shows those of its four networks that are given; Figures 3 and 4
    require a teacher; Figure 5 a student. `data_root`: the runs' data, if it has moved since.
    Raises UserError: no run folder, an unfinished run, runs on different data, or an unknown figure.
    """

    def __init__(
        self,
        runs: Sequence[str | Path],
        *,
        choice: Choice | None = None,
        changes: Mapping[str, Any] | None = None,
        channel: int | None = None,
        wanted: Sequence[str] = tuple(FIGURES),
        data_root: str | Path | None = None,
    ) -> None:
        self.sources = Sources.of(runs, data_root=data_root, choice=choice, changes=changes, channel=channel)
        self.given_runs = tuple(str(run) for run in runs)
        self.wanted = tuple(wanted)
        if unknown := [name for name in wanted if name not in FIGURES]:
            raise UserError(f"there is no figure {unknown[0]!r}; the figures are {', '.join(FIGURES)}.")
        self._figures: dict[str, Figure] = {}

    def make(self, out: str | Path = "") -> list[Path]:
        """Draw and write the wanted figures; print a line for each that the runs do not suffice for.

        out: the folder; if empty, a folder named after the first run in runs/figures.
        Raises UserError: `out` holds figures of other runs, or files of their names that misa did not make.
        """
        folder = Path(out).expanduser() if out else Path("runs/figures") / self.sources.runs[0].folder.name
        require_own(folder, {run.folder.name: _card(run) for run in self.sources.runs})
        written: list[Path] = []
        for name in self.wanted:
            missing = FIGURES[name].missing(self.sources)
            if missing:
                print(f"figure {name} is left out: {missing}")
                continue
            written += save_figure(self.draw(name), folder, f"figure{name}", self.provenance(name, out))
        return written

    def show(self, name: str) -> Figure | None:
        """Return a figure for a notebook; None if it is not wanted or, as reported by `make`, cannot be drawn."""
        return self.draw(name) if name in self.wanted and not FIGURES[name].missing(self.sources) else None

    def draw(self, name: str) -> Figure:
        """Draw a figure, or return it from the cache."""
        if name not in self._figures:
            self._figures[name] = FIGURES[name].draw(self.sources)
        return self._figures[name]

    def provenance(self, name: str, out: str | Path) -> dict[str, Any]:
        """Provenance of a figure: the command that reproduces it, and its sources."""
        sources, choice = self.sources, self.sources.choice
        command = ["misa", "figures", *self.given_runs, *(["--out", str(out)] if str(out) else []), "--only", name]
        if choice.given:
            command += ["--images", ",".join(map(str, choice.given))]
        command += ["--random", str(choice.drawn), "--worst", str(choice.worst), "--seed", str(choice.seed)]
        command += ["--channel", str(sources.channel)]
        for field, value in sources.changes.items():
            command += [f"--{field.replace('_', '-')}", str(value)]
        command += [] if sources.data_root is None else ["--data-root", str(sources.data_root)]
        shown = set(FIGURES[name].images(sources))
        groups = {"chosen": choice.given, "random": sources.drawn}
        images = {group: [key for key in keys if key in shown] for group, keys in groups.items()}
        if name == "5":
            images["worst"] = list(sources.worst)
        smoke = {"beware": warnings} if (warnings := self.warnings()) else {}
        seeds = {example.name: list(seed) for example, seed in seeded(sources)} if name == "4" else {}
        return {
            "what": f"Figure {name}",
            "command": shlex.join(command),
            "misa": misa.__version__,
            "commit": current_commit(),
            "data": digest(sources.runs[0].source.val.annotations),
            "images": images,
            **({"seeds": seeds, "affinity": vars(sources.affinity_settings)} if name == "4" else {}),
            **smoke,
            "runs": {run.folder.name: _card(run) for run in sources.runs},
        }

    def warnings(self) -> list[str]:
        """Reasons to distrust these figures, such as smoke runs."""
        return [line for run in self.sources.runs for line in remarks(run.folder, run.experiment)]


def deepest(example: Example) -> Seed:
    """The pixel with the largest distance to the border of the largest object, or of its box without a mask.

    Only pixels whose smallest box is the object's count (`Example.box_at`), since the figure shows that box's object.
    If none of them is half as deep as the object is, the next largest object is taken; if no object has such a pixel,
    the largest one that has any.
    """
    boxes, masks, owners = example.box_masks(), example.coarse_masks(), example.owners()
    whole = boxes if masks is None else torch.where(masks.any(dim=(1, 2), keepdim=True), masks, boxes)
    least: list[Seed] = []
    for n in whole.sum(dim=(1, 2)).argsort(descending=True, stable=True).tolist():
        depth = cv2.distanceTransform(np.pad(whole[n].numpy(), 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
        own = np.where((owners == n).numpy(), depth, 0)
        row, column = (int(place) for place in np.unravel_index(int(own.argmax()), own.shape))
        if own[row, column] > 0 and own[row, column] >= depth.max() / 2:
            return row, column
        least += [(row, column)] if own[row, column] > 0 else []
    return least[0] if least else example.middle()


def _card(run: Trained) -> dict[str, Any]:
    """Identifies a run: row, hash, seed, weights, and the commit that it was trained at, or several if resumed."""
    at = commits(run.folder)
    params = read_params(run.folder)
    return {
        "row": params["row"],
        "hash": params["digest"],
        "seed": params["seed"],
        "weights": digest(last_checkpoint(run.folder)),
        "commit": at[0] if len(at) == 1 else at,
    }


def _miou(run: Trained) -> float | None:
    """mIoU of a semantic network, or of a student's instances merged into classes."""
    if run.is_teacher:
        metrics = read_json(run.folder / "metrics.json") or {}
    else:
        metrics = score_merged(run.source, run.folder / DETECTIONS, limit=run.experiment.limit)
    value: float | None = metrics.get("miou")
    return value


def _label_maps(student: Trained, teacher: Trained, image_id: int) -> dict[str, NDArray[np.uint8]]:
    """An image and its label maps: a student's merged instances, a semantic network's, the ground truth."""
    classes = student.source.classes
    image, record = student.image(image_id)
    names = {c["id"]: c["name"] for c in json.loads(student.source.val.annotations.read_text())["categories"]}
    mine = [d for d in student.detections() if d["image_id"] == image_id]
    merged = merged_map(mine, names, classes, (record["height"], record["width"]))
    semantic = read_label_map(teacher.folder / LABEL_MAPS / f"{image_id}.png")
    truth = next(m.make() for m in true_maps(student.source.val, classes) if m.image_id == image_id)
    maps = {"instances, merged": merged, "semantic": semantic, "truth": truth}
    return {"image": image} | {name: class_picture(values, len(classes)) for name, values in maps.items()}


def _predicted(run: Trained, image_id: int, ap: float | None) -> dict[str, Any]:
    """An image with the student's masks above the score threshold, by decreasing score, in their objects' colors.

    An object detected as several classes is shown once. `truth`: ground-truth masks, None if the data has none.
    """
    image, _ = run.image(image_id)
    mine = [d for d in run.detections() if d["image_id"] == image_id and d["score"] >= MERGE_SCORE]
    masks = [rle.decode(d["segmentation"]).astype(bool) for d in surest(mine)]
    stacked = np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool)
    truth = None
    if run.source.masks:
        truth = stacked_objects(read_truth(run.source.val.annotations), run.source.classes, image_id)
    return {
        "image": image,
        "masks": stacked,
        "truth": truth,
        "colors": None if truth is None else matched_colors(stacked, truth),
        "title": f"{image_id}" + ("" if ap is None else f" · AP {ap:.0f}"),
    }
