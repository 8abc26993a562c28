"""Load a trained student, and predict with it in images in memory."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from misa.engine.runs.checkpoints import (
    fill,
    last_checkpoint,
    predicting,
    read_checkpoint,
    record_of,
    require_fit,
    weights_digest,
)
from misa.engine.runs.state import warn
from misa.errors import UserError, counted
from misa.experiment import Experiment
from misa.models.students.inference import Image, Instances, Student
from misa.models.students.table import implementation, model_config, skeleton

__all__ = ["Image", "Instances", "Student", "find", "load_student"]


def load_student(path: str | Path, *, device: str = "auto") -> Student:
    """Load the student of a run folder, of one of its checkpoints, or of a file made by `misa export`.

    Only weights are loaded: no code in the file is executed, and no teacher is needed. device: "cpu", "cuda", "cuda:1",
    or "auto" for a GPU if there is one.
    Raises UserError: no student there, or no such device.
    """
    place = choose_device(device)
    warnings.filterwarnings("ignore", message=".*torch.meshgrid.*")
    path = Path(path).expanduser()
    folder = path.resolve() if os.path.isdir(path) else None
    path = (path if folder is None else last_checkpoint(path)).resolve()
    checkpoint = read_checkpoint(path)
    experiment, classes = _card(path, checkpoint)
    if experiment.semantic is not None:
        raise UserError(f"{path} is a semantic teacher; predictions are a student's, of a row such as demo:box.")
    weights = predicting(checkpoint["state_dict"], from_shadow=experiment.inference.from_shadow)
    model = build_student(experiment, classes, path=path, weights=weights)
    if folder is not None:  # a user who names a checkpoint knows that it may be an early one
        warn(folder, experiment, checkpoint=path)
    return Student(model.to(place), experiment, classes, path, weights_digest(weights))


def choose_device(name: str) -> torch.device:
    """Return the torch device of that name; UserError if there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:  # TypeError: None
        raise UserError(f"{name!r} is not a device; give cpu, cuda, cuda:1, or auto.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported; give cpu, cuda, cuda:1, or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = counted(torch.cuda.device_count(), "CUDA device")
        raise UserError(f"device {name!r} is not there: torch finds {found}; use cpu.")
    return device


def for_inference(experiment: Experiment) -> Experiment:
    """Return the row without what only training needs: loss terms, teacher, pretrained weights."""
    network = {"pretrained": False, "frozen_stages": -1}
    terms: dict[str, Any] = {"affinity": None, "distillation": None, "objective": None, "teacher": "", "start": ""}
    # If the EMA model predicts, its weights replace the student's there.
    return experiment.but(**terms, expected=None, network=network, inference={"from_shadow": False})


def build_student(
    experiment: Experiment, classes: tuple[str, ...], *, path: Path, weights: dict[str, Tensor]
) -> nn.Module:
    """Build the student's network with these weights, in eval mode; UserError if they do not fit."""
    try:
        config = model_config(for_inference(experiment), classes)
        empty = skeleton(config)  # an untrusted file may name any size: allocate nothing yet
    except OSError:  # a full disk is not the checkpoint's fault: mmengine copies mmdet's files before it reads them
        raise
    except Exception as error:  # mmdet and torch raise many kinds for invalid values
        raise UserError(f"{path} names no network that can be built ({error!r}); export it again.") from error
    require_fit(empty, weights, path)
    model: nn.Module = MODELS.build(config)
    fill(model, weights, path)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def find(
    student: Student,
    images: Sequence[Image],
    *,
    score: float = 0.3,
    mask: float | None = None,
    per_image: int | None = None,
) -> list[Instances]:
    """Predict instances in RGB images (h w 3, 0..255).

    score: score threshold; mask: binarization threshold of the masks, for SOLOv2 only (default: the row's); per_image:
    maximum number of instances per image (default: the row's). Only images of equal input size are batched: padding
    others would shift the network's grid. Not for several threads with one student at a time.
    Raises UserError: `mask` is given for another student.
    """
    require_mask_threshold(student, mask)
    kind = implementation(student.experiment.student)
    return kind.find(student, images, score=score, mask=mask, per_image=per_image)


def require_mask_threshold(student: Student, mask: float | None) -> None:
    """Raise UserError if a threshold of the masks is given for a student whose masks are cut at a fixed one."""
    if mask is not None and implementation(student.experiment.student).mask_threshold != "any":
        raise UserError(f"mask is a threshold of solov2 students; {student.path} is a {student.experiment.student}.")


def _card(path: Path, checkpoint: dict[str, Any]) -> tuple[Experiment, tuple[str, ...]]:
    """Read a checkpoint's row and classes, from its card or from its run folder."""
    try:
        if (values := record_of(path, checkpoint)) is not None:
            classes, experiment = values["classes"], Experiment.from_values(values["experiment"])
        elif "experiment" in checkpoint:  # a teacher's
            raise UserError(f"{path} is a semantic teacher; predictions are a student's, of a row such as demo:box.")
        else:
            raise UserError(
                f"{path} does not say what network it is of, and no run folder is around it; give the run folder, or "
                "a file made by misa export."
            )
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = str(error).rstrip(".")
        raise UserError(f"{path} was made by another version of misa ({reason}); export it again.") from error
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) and name for name in classes):
        raise UserError(f"{path} names no classes; export it again.")
    return experiment, tuple(classes)
