"""mmengine config of an `Experiment`'s semantic teacher."""

from pathlib import Path
from typing import Any

from mmengine.config import ConfigDict

from misa.data.label_maps import MOST_CLASSES
from misa.data.pipeline import MEAN, STD
from misa.errors import UserError
from misa.experiment import Experiment
from misa.losses.semantic import VOID, SemanticTerms
from misa.models.host import Preprocessor
from misa.models.teacher.table import network_config
from misa.models.teacher.training import SemanticTeacher


def from_boxes(experiment: Experiment) -> bool:
    """Whether the teacher is trained by box objectives, without label maps."""
    return (
        experiment.semantic is not None
        and experiment.supervision == "box"
        and experiment.semantic.labels == "objectives"
    )


def teacher_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """Config of the `SemanticTeacher` of a teacher's row: network and losses."""
    assert experiment.semantic is not None
    semantic = experiment.semantic
    if len(classes) > MOST_CLASSES:
        raise UserError(f"a semantic teacher takes at most {MOST_CLASSES} classes, the data has {len(classes)}.")
    objectives = None
    if from_boxes(experiment):
        objectives = SemanticTerms(
            semantic.outside_weight,
            semantic.class_weight,
            experiment.projection_weight,
            semantic.sure_weight,
            experiment.affinity,
        )
    values: dict[str, Any] = {
        "type": SemanticTeacher,
        "data_preprocessor": {
            "type": Preprocessor,
            "mean": MEAN,
            "std": STD,
            "bgr_to_rgb": True,
            "pad_mask": False,
            "pad_seg": True,
            "seg_pad_value": VOID,
            "pad_size_divisor": 32,
        },
        "network": network_config(experiment, classes),
        "objectives": objectives,
        "stage_weight": semantic.stage_weight,
        "loss_stride": semantic.loss_stride,
    }
    return ConfigDict(values)


def label_folder(experiment: Experiment, folder: Path) -> Path | None:
    """Folder of a run's label maps; None if it needs none."""
    return None if experiment.semantic is None or from_boxes(experiment) else folder / "labels"
