"""Semantic teachers: the trainable ones, one file each, and torchvision's."""

from collections.abc import Callable
from typing import Any

from mmengine.config import ConfigDict
from mmengine.registry import MODELS

from misa.errors import UserError, did_you_mean
from misa.experiment import TORCHVISION, Experiment
from misa.models.teacher.contract import TeacherNetwork
from misa.models.teacher.semask import semask_config
from misa.models.teacher.torchvision import feature_channels, named_teacher
from misa.rows import teacher_row

TEACHERS: dict[str, Callable[[Experiment, tuple[str, ...]], dict[str, Any]]] = {"semask": semask_config}
"""By the name in `Semantic.network`: function that returns a `TeacherNetwork`'s config for a row and its classes."""


def network_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """The network's config for a teacher's row; UserError if its `Semantic.network` is unknown."""
    assert experiment.semantic is not None
    name = experiment.semantic.network
    if name not in TEACHERS:
        hint = did_you_mean(name, TEACHERS) or f"; choose one of {', '.join(TEACHERS)}."
        raise UserError(f"there is no semantic teacher {name!r}{hint}")
    return ConfigDict(TEACHERS[name](experiment, classes))


def build_teacher(experiment: Experiment, classes: tuple[str, ...]) -> TeacherNetwork:
    """Build the network of a teacher's row, initialized for training."""
    network: TeacherNetwork = MODELS.build(network_config(experiment, classes))
    return network


def teacher_channels(experiment: Experiment) -> int:
    """The channels of S of a student's teacher."""
    if experiment.trains_teacher:
        return teacher_row(experiment).network.feature_channels
    return feature_channels(experiment.teacher.removeprefix(TORCHVISION))


def untrained_teacher(experiment: Experiment, classes: tuple[str, ...]) -> TeacherNetwork:
    """Build a student's teacher with random weights, to measure time and memory."""
    if experiment.trains_teacher:
        return build_teacher(teacher_row(experiment).but(network={"pretrained": False}), classes)
    name = experiment.teacher.removeprefix(TORCHVISION).partition(":")[0]
    return named_teacher(name, weights=None, classes=classes)
