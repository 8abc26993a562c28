"""A trained semantic teacher as a frozen network, and its score."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner
from numpy.typing import NDArray
from pycocotools import mask as rle

from misa.data.labels import merge_by_score, read_label_map
from misa.data.pipeline import MEAN, STD
from misa.data.semantic import true_maps
from misa.data.source import Source
from misa.engine.checkpoints import last_checkpoint, read_checkpoint
from misa.engine.teacher_config import network_arguments
from misa.errors import UserError
from misa.evaluation.miou import miou
from misa.experiment import Experiment
from misa.models._contract import TeacherContract
from misa.models.semask import SeMask

LABEL_MAPS = "predictions/val"
MERGE_SCORE = 0.3
"""Instances that score less are left out when they are merged into a label map (Figure 1)."""
_PREFIX = "network."


class TeacherCard(Hook):
    """Puts the row's values into every checkpoint, so that one file is enough to build the teacher again."""

    def __init__(self, experiment: dict[str, Any]) -> None:
        self.experiment = json.dumps(experiment)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Called by mmengine."""
        checkpoint["experiment"] = self.experiment


def load_teacher(path: str | Path, *, classes: Sequence[str] | None = None) -> SeMask:
    """The frozen SeMask of a teacher's run folder or checkpoint: `.prior(images)` gives S and K.

    Weights only are loaded, nothing in the file is executed. `classes` are the student's, in its order; the teacher
    must know exactly these, and expect images normalised as `misa.data.pipeline` does.

    Raises:
        UserError: no teacher there, or one for other data.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = last_checkpoint(path)
    checkpoint = read_checkpoint(path)
    card, weights = checkpoint.get("experiment"), checkpoint["state_dict"]
    if not isinstance(card, str) or f"{_PREFIX}_extra_state" not in weights:
        raise UserError(f"{path} is no semantic teacher's checkpoint; give one of a row such as teacher:demo.")
    contract = TeacherContract.decoded(weights[f"{_PREFIX}_extra_state"])
    _check_contract(path, contract, classes)
    experiment = Experiment.from_values(json.loads(card))
    network = SeMask(**network_arguments(experiment.but(network={"pretrained": False}), contract.classes))
    network.load_state_dict({k.removeprefix(_PREFIX): v for k, v in weights.items() if k.startswith(_PREFIX)})
    return network.eval().requires_grad_(False)


def _check_contract(path: Path, contract: TeacherContract, classes: Sequence[str] | None) -> None:
    if classes is not None and tuple(classes) != contract.classes:
        raise UserError(
            f"the teacher {path} knows the classes {', '.join(contract.classes)}, the student's data has "
            f"{', '.join(classes)}; train a teacher on the same data."
        )
    if contract.mean != MEAN or contract.std != STD:
        raise UserError(
            f"the teacher {path} expects images normalised by {contract.mean} and {contract.std}, "
            f"the student's are by {MEAN} and {STD}; train a teacher with this version."
        )


def score_label_maps(source: Source, folder: Path, *, limit: int | None = None) -> dict[str, Any]:
    """mIoU of the predicted label maps in `folder` on the validation data (see `true_maps` for the truth)."""
    pairs = (
        (m.make(), read_label_map(folder / f"{m.image_id}.png"))
        for m in true_maps(source.val, source.classes, limit=limit)
    )
    return miou(pairs, source.classes)


def score_merged(
    source: Source, detections: Path, *, limit: int | None = None, threshold: float = MERGE_SCORE
) -> dict[str, Any]:
    """mIoU of instances merged into label maps, instance discrimination ignored (Figure 1).

    Detections of `threshold` or more are painted from the lowest score to the highest, each with its class; what no
    mask covers is background.
    """
    categories = {c["id"]: c["name"] for c in json.loads(source.val.annotations.read_text())["categories"]}
    found: dict[int, list[dict[str, Any]]] = {}
    for detection in json.loads(detections.read_text()):
        found.setdefault(detection["image_id"], []).append(detection)

    def pairs() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        for true in true_maps(source.val, source.classes, limit=limit):
            truth = true.make()
            mine = [d for d in found.get(true.image_id, []) if d["score"] >= threshold]
            yield (
                truth,
                merge_by_score(
                    [rle.decode(d["segmentation"]).astype(bool) for d in mine],
                    [source.classes.index(categories[d["category_id"]]) for d in mine],
                    [d["score"] for d in mine],
                    (truth.shape[0], truth.shape[1]),
                    background=len(source.classes),
                    threshold=threshold,
                ),
            )

    return {**miou(pairs(), source.classes), "merged_from_score": threshold}
