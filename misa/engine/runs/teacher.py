"""Load a semantic teacher as a frozen network: a trained one, or torchvision's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from misa.data.pipeline import MEAN, STD
from misa.engine.runs.checkpoints import last_checkpoint, read_checkpoint
from misa.engine.runs.record import teacher_weights
from misa.errors import UserError
from misa.experiment import TORCHVISION, Experiment
from misa.models.teacher.contract import TeacherContract, TeacherNetwork
from misa.models.teacher.table import build_teacher
from misa.models.teacher.torchvision import TorchvisionTeacher, named_teacher

_PREFIX = "network."


class TeacherCard(Hook):
    """Stores the row's values in every checkpoint, so that the teacher can be built from one file."""

    def __init__(self, experiment: dict[str, Any]) -> None:
        self.experiment = json.dumps(experiment)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the row's values."""
        checkpoint["experiment"] = self.experiment


def load_teacher(path: str | Path, *, classes: Sequence[str] | None = None) -> TeacherNetwork:
    """Load the frozen network of a teacher's run folder or checkpoint, or torchvision's; `.prior(images)` is S and K.

    Only weights are loaded; no code in the file is executed. `classes` are the student's: the teacher must know exactly
    these (torchvision's at least one), K has their order. Images are normalized as by `misa.data.pipeline`.
    Raises UserError: no teacher there, or one for other data.
    """
    if str(path).startswith(TORCHVISION):
        return named_teacher(str(path).removeprefix(TORCHVISION), classes=classes)
    path = Path(path).expanduser()
    if path.is_dir():
        path = last_checkpoint(path)
    checkpoint = read_checkpoint(path)
    card, weights = checkpoint.get("experiment"), checkpoint["state_dict"]
    if not isinstance(card, str) or f"{_PREFIX}_extra_state" not in weights:
        raise UserError(f"{path} is not a checkpoint of a semantic teacher; give one of a row such as teacher:demo.")
    contract = TeacherContract.decoded(weights[f"{_PREFIX}_extra_state"])
    _check_contract(path, contract, classes)
    experiment = Experiment.from_values(json.loads(card))
    network = build_teacher(experiment.but(network={"pretrained": False}), contract.classes)
    network.load_state_dict({k.removeprefix(_PREFIX): v for k, v in weights.items() if k.startswith(_PREFIX)})
    if classes is not None and tuple(classes) != contract.classes:
        _reorder(network, tuple(classes), path)
    return network.eval().requires_grad_(False)


def _reorder(network: TeacherNetwork, classes: tuple[str, ...], path: Path) -> None:
    """Put K and the contract in the order of `classes`, by their names; the rows of the classifier stay."""
    order = [network.contract.classes.index(name) for name in classes]
    factors, rows = network.last_layer().factors, getattr(network, "foreground", None)
    if isinstance(rows, Tensor):
        network.foreground = rows[order]
    if not torch.equal(network.last_layer().factors, factors[order]):
        raise UserError(
            f"the teacher {path} knows the student's classes in another order, and a {type(network).__name__} cannot "
            f"be brought into the student's, {', '.join(classes)}: its K does not follow `foreground`, the rows of its "
            "classifier; train a teacher on the same data."
        )
    network.contract = network.contract._replace(classes=classes)


def ready_teacher(experiment: Experiment, classes: Sequence[str] | None = None) -> TorchvisionTeacher:
    """Build the torchvision network of a row; in a smoke run with random weights, to avoid the download.

    Raises UserError: as `named_teacher`.
    """
    name = experiment.teacher.removeprefix(TORCHVISION)
    return named_teacher(name, weights=None if _untrained(experiment) else "default", classes=classes)


def teacher_line(experiment: Experiment, teacher: TorchvisionTeacher) -> str:
    """Line for the log about a row's torchvision network: the classes it knows, and whether its weights are random."""
    random = "; random weights in a smoke run; a real run downloads them" if _untrained(experiment) else ""
    return f"{experiment.teacher}: {teacher.matches}{random}"


def _untrained(experiment: Experiment) -> bool:
    return experiment.limit is not None and teacher_weights(experiment) is None


def _check_contract(path: Path, contract: TeacherContract, classes: Sequence[str] | None) -> None:
    if classes is not None and sorted(classes) != sorted(contract.classes):
        raise UserError(
            f"the teacher {path} knows the classes {', '.join(contract.classes)}, the student's data has "
            f"{', '.join(classes)}; they must be the same, in any order: train a teacher on the same data."
        )
    if contract.mean != MEAN or contract.std != STD:
        raise UserError(
            f"the teacher {path} expects images normalized by {contract.mean} and {contract.std}, "
            f"the student's are by {MEAN} and {STD}; train a teacher with this version."
        )
