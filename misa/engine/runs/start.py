"""A training that begins with the weights of another run (`Experiment.start`)."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from misa.engine.runs.checkpoints import last_checkpoint, predicting, read_checkpoint, record_of, weights_digest
from misa.engine.runs.record import start_place
from misa.engine.runs.state import remarks
from misa.errors import UserError, option_name
from misa.experiment import Experiment, Schedule
from misa.files import missing, read_json, shorter
from misa.models.students.base import TRAINING_ONLY
from misa.models.students.table import model_config, skeleton
from misa.models.teacher.contract import TeacherContract

# A teacher's classes and normalization are stored with its weights.
_STATE = "_extra_state"
# A teacher is one network with a backbone of its own.
_TEACHER, _BACKBONES = "network.", ("backbone.", "network.backbone.")


class Start(NamedTuple):
    """What a network begins with: a checkpoint, the hash of its weights, and its own parameters that begin anew.

    remarks: why a run folder is not to be trusted; none of a checkpoint, which may be meant to be an early one.
    """

    path: Path
    digest: str
    anew: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in self.anew))
        more = [f"{len(modules) - 4} more layers"] * (len(modules) > 4)
        but = f", but for {', '.join(modules[:4] + more)}" if modules else ""
        return f"begins with the weights of {shorter(self.path)} ({self.digest}){but}"


def start_file(start: str, seed: int = 0) -> Path:
    """The checkpoint that `Experiment.start` names, the last one of a run folder; UserError if there is none."""
    path = start_place(start, seed)
    if not path.exists():
        raise UserError(missing(Path(shorter(path)), "run folder or checkpoint", "give one made by misa train"))
    # Without links, since its record is in the folder above the file's.
    return (last_checkpoint(path) if path.is_dir() else path).resolve()


def find_start(experiment: Experiment, classes: Sequence[str], seed: int = 0) -> Start:
    """The start of a row whose data has these classes, for a run of this seed.

    Parameters of another shape begin anew. If the start was trained on other classes, or on these in another order, so
    do those of the layers that depend on the number of classes; a checkpoint without a record is assumed to be of
    these. Raises UserError: no checkpoint there, or one of another network: a teacher's for a student or the other way
    round, or one whose backbone does not fit.
    """
    path = start_file(experiment.start, seed)
    there, known, run = _read(path)
    own, of_classes = _shapes(experiment, classes)
    if (teacher := _is_teacher(own)) != _is_teacher(there):
        mismatch = (
            f"is not a teacher's checkpoint (no weight is named {_TEACHER}…) and the row is a teacher"
            if teacher
            else "is a teacher's checkpoint and the row is a student"
        )
        raise UserError(f"{path} {mismatch}; begin with a network of the same kind.")
    fitting = [name for name, shape in own.items() if name in there and tuple(there[name].shape) == shape]
    lost = [name for name in own if name not in fitting]
    # A ResNet-101 has all names and shapes of a ResNet-50, too, and more blocks.
    extra = [name for name in there if name.startswith(_BACKBONES) and name not in own]
    if (wrong := next((name for name in lost + extra if name.startswith(_BACKBONES)), None)) or not fitting:
        raise UserError(
            f"{path} is a checkpoint of another network: {wrong or 'nothing'} "
            f"{'has another shape, or only one of them has it' if wrong else 'fits'}; a training begins with the "
            "weights of a row with the same backbone."
        )
    if known is not None and known != list(classes):
        lost = [name for name in own if name in lost or name in of_classes]
    folder = start_place(experiment.start, seed)
    found = () if run is None or not folder.is_dir() else remarks(folder, run, checkpoint=path)
    return Start(path, weights_digest(there), tuple(lost), tuple(found))


def begin(model: nn.Module, start: Start) -> None:
    """Load the weights of a start, but for those that begin anew.

    The state of an objective, such as its EMA model, and FSD's adapter begin anew, too; the start's weights are those
    that its scores are of, the EMA model's where that predicts. UserError if the file has changed since `find_start`:
    a teacher may have been trained in between.
    """
    weights = _read(start.path)[0]
    if (now := weights_digest(weights)) != start.digest:
        raise UserError(
            f"the weights in {start.path} have changed since this training was prepared ({start.digest} then, {now} "
            "now); run the same again to begin with those of now, or restore the file before."
        )
    own = set(model.state_dict()) - set(start.anew)
    model.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=False)


def warn_changed_start(experiment: Experiment, folder: Path, seed: int) -> None:
    """Print a warning to standard error if the start of a finished run has changed since; one that is gone is none."""
    try:
        began = (read_json(folder / "env.json") or {}).get("start")
        if not experiment.start or began is None:
            return
        path = start_file(experiment.start, seed)
        now = weights_digest(_read(path)[0])
    except UserError:  # the run's own results do not need it
        return
    if now != began:
        print(
            f"warning: the weights in {shorter(path)} have changed since the run in {folder} began with them ({began} "
            f"then, {now} now); train it again in another {option_name('work_dir')} to begin with those of now.",
            file=sys.stderr,
            flush=True,
        )


def _read(path: Path) -> tuple[dict[str, Tensor], list[str] | None, Experiment | None]:
    """The weights of the network that a checkpoint predicts with, and its classes and the run's length if known."""
    checkpoint = read_checkpoint(path)
    weights = checkpoint["state_dict"]
    try:
        record = record_of(path, checkpoint) or {}
        known, values = record.get("classes"), record.get("experiment", {})
        # No more of the row is read: its other fields may be of another version.
        run = Experiment(limit=values.get("limit"), schedule=Schedule(values["schedule"]["epochs"])) if values else None
        if known is None and (states := [value for name, value in weights.items() if name.endswith(_STATE)]):
            known = list(TeacherContract.decoded(states[0]).classes)
        weights = predicting(weights, from_shadow=bool(values.get("inference", {}).get("from_shadow")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} was made by another version of misa ({error}); begin with another run.") from error
    return {name: value for name, value in weights.items() if _is_weight(name, value)}, known, run


def _is_teacher(names: Iterable[str]) -> bool:
    return any(name.startswith(_TEACHER) for name in names)


def _is_weight(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and not name.startswith(TRAINING_ONLY) and not name.endswith(_STATE)


def _shapes(experiment: Experiment, classes: Sequence[str]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes of the weights of a row's network, and the names of those that another number of classes changes."""
    plain = experiment.but(network={"pretrained": False})
    networks = (skeleton(model_config(plain, names)) for names in (tuple(classes), (*classes, "one more")))
    own, other = (
        {name: tuple(value.shape) for name, value in network.state_dict().items() if _is_weight(name, value)}
        for network in networks
    )
    return own, {name for name, shape in own.items() if other.get(name) != shape}
