"""The students: one row a framework."""

from collections.abc import Callable
from typing import Any

from misa.experiment import Experiment
from misa.models.students.baselines import boxinst_config, mask_rcnn_config, solo_config
from misa.models.students.condinst import condinst_config
from misa.models.students.mask2former import mask2former_config
from misa.models.students.solov2 import solov2_config
from misa.models.teacher.config import teacher_config

STUDENTS: dict[str, Callable[[Experiment, tuple[str, ...]], dict[str, Any]]] = {
    "solov2": solov2_config,
    "mask2former": mask2former_config,
    "boxinst": boxinst_config,
    "condinst": condinst_config,
    "solo": solo_config,
    "mask_rcnn": mask_rcnn_config,
}


def model_config(experiment: Experiment, classes: tuple[str, ...]) -> dict[str, Any]:
    """The detector of an experiment for the classes of the data, or the semantic teacher."""
    if experiment.semantic is not None:
        return teacher_config(experiment, classes)
    return STUDENTS[experiment.student](experiment, classes)
