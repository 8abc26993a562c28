"""Common parts of the students' mmengine configs: mmdet's files, preprocessor, backbone, box objectives."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import mmdet
from mmdet.models.data_preprocessors import BatchFixedSizePad
from mmengine.config import Config, ConfigDict

from misa.data.pipeline import MEAN, STD
from misa.experiment import Experiment, Network
from misa.models.backbones import backbone_of, backbone_row
from misa.models.host import Preprocessor
from misa.models.teacher.table import teacher_channels
from misa.objectives.misa import objective_of


def mmdet_model(file: str, detector: type, experiment: Experiment) -> ConfigDict:
    """Load the model of a config file installed with mmdet, and set the experiment's preprocessor, backbone and neck.

    Its types are strings, which mmdet resolves; the model and its preprocessor, which mmengine builds, need classes.
    """
    model, network = copy.deepcopy(mmdet_file(file)), experiment.network
    model.type, model.data_preprocessor, model.backbone = detector, preprocessor(experiment), backbone_of(network)
    if "neck" in model:
        model.neck.update(in_channels=stage_widths(network), out_channels=network.neck_channels)
    return model


@cache
def mmdet_file(file: str) -> ConfigDict:
    """The file as installed, without mmengine's search of the index of all models, which reads a hundred YAML files."""
    model: ConfigDict = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / file).model
    return model


def preprocessor(experiment: Experiment) -> dict[str, Any]:
    """Normalization and padding to multiples of 32; with large-scale jittering, to the whole square."""
    masks, augmentation = experiment.supervision == "mask", experiment.augmentation
    side = -(-augmentation.crop // 32) * 32
    square = {"type": BatchFixedSizePad, "size": (side, side), "pad_mask": masks}
    return {
        "type": Preprocessor,
        "mean": MEAN,
        "std": STD,
        "bgr_to_rgb": True,
        "pad_mask": masks,
        "pad_size_divisor": 32,
        **({"batch_augments": [square]} if augmentation.jitter else {}),
    }


def stage_widths(network: Network) -> list[int]:
    """The channels of the backbone's four stages."""
    return backbone_row(network.backbone).widths(network.base_channels)


def objectives(experiment: Experiment, classes: int) -> dict[str, Any]:
    """The keyword arguments of `BoxSupervised`."""
    arguments: dict[str, Any] = {
        "objective": objective_of(experiment),
        "classes": classes,
        "from_shadow": experiment.inference.from_shadow,
    }
    if experiment.teacher:
        arguments["teacher_channels"] = teacher_channels(experiment)
    return arguments
