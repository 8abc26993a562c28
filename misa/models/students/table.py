"""The students: a row of `misa.experiment.FRAMEWORKS` and an `Implementation` in a file of this folder for each."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from mmengine.config import ConfigDict
from torch import Tensor, nn

from misa.experiment import FRAMEWORKS, Experiment
from misa.models.students.inference import Instances, Student, find_by_mmdet
from misa.models.teacher.config import teacher_config


def no_groups(experiment: Experiment) -> dict[str, dict[str, float]]:
    """Every parameter learns as fast and decays as much as the others."""
    return {}


class Implementation(NamedTuple):
    """The implementation of a student framework, in its file under its name.

    config: the detector of a row for the names of the data's classes, as mmengine values.
    parameter_groups: `custom_keys` of mmengine's optimiser: which parameters learn slower or do not decay.
    dense_feature: I of Eq. 2 (b d h w) from the detector and its maps; None: it has none.
    find: the instances of RGB images; takes score, mask and per_image as `misa.engine.prediction.student.find`.
    find_boxes: the masks of known boxes of an image, each with a label or None, and `mask`; None: the instances that
        are found are matched to the boxes.
    script: the part without decisions as a module that TorchScript can trace, from RGB images (b 3 h w) of 0..255.
    """

    config: Callable[[Experiment, tuple[str, ...]], ConfigDict]
    parameter_groups: Callable[[Experiment], dict[str, dict[str, float]]] = no_groups
    dense_feature: Callable[[Any, tuple[Tensor, ...]], Tensor] | None = None
    find: Callable[..., list[Instances]] = find_by_mmdet
    find_boxes: Callable[..., Instances] | None = None
    script: Callable[[Student], nn.Module] | None = None


def implementation(name: str) -> Implementation:
    """That of the framework of this name."""
    module = importlib.import_module(f"misa.models.students.{FRAMEWORKS[name].module or name}")
    found: Implementation = getattr(module, name)
    return found


def model_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """The detector of an experiment for the classes of the data, or the semantic teacher."""
    if experiment.semantic is not None:
        return teacher_config(experiment, classes)
    return implementation(experiment.student).config(experiment, classes)
