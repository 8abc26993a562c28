"""mmengine config of an `Experiment`'s optimizer: weight decay, learning rates and precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import (
    AmpOptimWrapper,
    CosineAnnealingLR,
    DefaultOptimWrapperConstructor,
    LinearLR,
    MultiStepLR,
    OptimWrapper,
)
from torch import nn
from torch.optim import SGD, AdamW

from misa.experiment import Experiment, Schedule
from misa.models.students.table import implementation


class _Clipped(OptimWrapper):
    """Clips gradients without reading their norm, for whose log mmengine synchronizes with the host at every step."""

    def _clip_grad(self) -> None:
        every = [p for group in self.optimizer.param_groups for p in group["params"]]
        # error_if_nonfinite would synchronize too; `NaNGuard` checks the losses instead.
        torch.nn.utils.clip_grad_norm_([p for p in every if p.grad is not None], **self.clip_grad_kwargs)


class Float32(_Clipped):
    """Networks in float32."""


class Float16(_Clipped, AmpOptimWrapper):
    """Networks in float16 with gradient scaling; the scaler checks at every step whether gradients are finite."""


class BFloat16(_Clipped):
    """Networks in bfloat16 on any device, without gradient scaling; mmengine's wrapper requires a GPU."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of the forward pass, used by mmengine."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield


class SlowBackbone(DefaultOptimWrapperConstructor):
    """Multiplies the learning rate of all parameters of a submodule "backbone" by `backbone_lr`; decay is unchanged.

    `custom_keys` could do so too, but `norm_decay_mult` is not applied to parameters that match one.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        options = dict(paramwise_cfg or {})
        self.backbone_lr = options.pop("backbone_lr")
        super().__init__(optim_wrapper_cfg, options)

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", **kwargs: Any) -> None:
        """Called by mmengine for the whole network (with an empty prefix) and, recursively, every submodule."""
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return
        slow = {id(p) for name, p in module.named_parameters() if "backbone" in name.split(".")}
        for group in params:
            if all(id(p) in slow for p in group["params"]):
                group["lr"] = group.get("lr", self.base_lr) * self.backbone_lr


WRAPPERS: dict[str, dict[str, Any]] = {
    "float32": {"type": Float32},
    "bfloat16": {"type": BFloat16},
    "float16": {"type": Float16, "dtype": "float16"},
}


def optimizer_config(experiment: Experiment, *, accumulate: int = 1) -> dict[str, Any]:
    """Config of the optimizer wrapper; gradients are accumulated over `accumulate` micro-batches."""
    schedule = experiment.schedule
    optimizer = {"type": AdamW, "lr": schedule.lr, "weight_decay": schedule.weight_decay}
    if schedule.optimizer == "sgd":
        optimizer |= {"type": SGD, "momentum": 0.9}
    keys = {} if experiment.semantic is not None else implementation(experiment.student).parameter_groups(experiment)
    paramwise: dict[str, Any] = {
        **({} if schedule.norm_decay else {"norm_decay_mult": 0.0}),
        **({"custom_keys": keys} if keys else {}),
    }
    constructor = {}
    if schedule.backbone_lr != 1 and "backbone" not in keys:
        constructor, paramwise = {"constructor": SlowBackbone}, paramwise | {"backbone_lr": schedule.backbone_lr}
    return {
        **WRAPPERS[schedule.precision],
        "optimizer": optimizer,
        "clip_grad": {"max_norm": schedule.clip, "norm_type": 2},
        "paramwise_cfg": paramwise,
        **constructor,
        **({"accumulative_counts": accumulate} if accumulate > 1 else {}),
    }


def schedule_faults(schedule: Schedule, steps: int) -> list[str]:
    """What of the learning rate's schedule lies beyond the end of the training; `steps`: optimizer steps per epoch."""
    total, faults = schedule.epochs * steps, []
    if schedule.warmup > total:
        faults.append(
            f"the warm-up of {schedule.warmup} steps does not end within the {total} of this training, so that the "
            f"learning rate stays below {schedule.lr:g}; take a row with a shorter one (schedule's warmup)"
        )
    if schedule.decay == "step" and any(m >= schedule.epochs for m in schedule.milestones):
        epochs = ", ".join(map(str, dict.fromkeys(schedule.milestones)))
        faults.append(f"the learning rate was to fall after epoch {epochs}, and this training has {schedule.epochs}")
    return faults


def learning_rates(schedule: Schedule, steps: int) -> list[dict[str, Any]]:
    """Configs of warm-up and decay; `steps`: optimizer steps per epoch."""
    if schedule.decay == "cosine":
        last = schedule.epochs * steps
        decay = {"type": CosineAnnealingLR, "T_max": last, "end": last, "by_epoch": False}
    else:
        decay = {"type": MultiStepLR, "milestones": list(schedule.milestones), "gamma": 0.1, "by_epoch": True}
    warmup = {"type": LinearLR, "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": schedule.warmup}
    return [*([warmup] if schedule.warmup > 1 else []), decay]
