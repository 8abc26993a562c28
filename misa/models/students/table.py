"""Implementations of the students in `misa.experiment.FRAMEWORKS`, one file of this folder each."""

import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from misa.experiment import FRAMEWORKS, Experiment
from misa.models.students.inference import Instances, Student, find_by_mmdet
from misa.models.teacher.config import teacher_config


class Implementation(NamedTuple):
    """Implementation of a student framework, a variable of that name in its file.

    config: returns the detector's mmengine config for a row and the names of the data's classes.
    parameter_groups: returns `custom_keys` of mmengine's optimizer: parameters with another learning rate or decay.
    dense_feature: computes I of Eq. 2 (b d h w) from the detector and its maps; None if it has none.
    find: predicts in RGB images; takes score, mask and per_image as `misa.engine.prediction.student.find`.
    find_boxes: predicts masks of known boxes of an image, each with a label or None, given `mask`; None: predicted
        instances are matched to the boxes.
    mask_threshold: the probability at which masks are cut: "any" is given with a call, by default the row's
        `Inference.mask`; "row": always the row's; "half": always 0.5.
    script: returns the part without data-dependent control flow, traceable by TorchScript, from RGB images (b 3 h w),
        0..255.
    """

    config: Callable[[Experiment, tuple[str, ...]], ConfigDict]
    parameter_groups: Callable[[Experiment], dict[str, dict[str, float]]] = lambda _: {}  # the same for all
    dense_feature: Callable[[Any, tuple[Tensor, ...]], Tensor] | None = None
    find: Callable[..., list[Instances]] = find_by_mmdet
    find_boxes: Callable[..., Instances] | None = None
    mask_threshold: Literal["any", "row", "half"] = "row"
    script: Callable[[Student], nn.Module] | None = None


def implementation(name: str) -> Implementation:
    """Import and return the implementation of a framework."""
    module = importlib.import_module(f"misa.models.students.{FRAMEWORKS[name].module or name}")
    found: Implementation = getattr(module, name)
    return found


def model_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """Config of an experiment's detector, or of its semantic teacher, for the classes of the data."""
    if experiment.semantic is not None:
        return teacher_config(experiment, classes)
    return implementation(experiment.student).config(experiment, classes)


def skeleton(config: ConfigDict) -> nn.Module:
    """Build a network on the meta device, which allocates nothing; raises what mmdet and torch do for wrong values."""
    with torch.device("meta"), _NumbersOnCPU():
        model: nn.Module = MODELS.build(config)
    return model


class _NumbersOnCPU(TorchFunctionMode):
    """Creates torch.linspace on the CPU despite the meta device: mmdet's Swin reads its stochastic depth rates."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)
