"""State of a student between training steps; not exported."""

import copy
from typing import Any

import torch
from torch import nn

from misa.objectives.base import BoxObjective


class Shadow(nn.Module):
    """EMA model of the student (mean teacher, Tarvainen and Valpola 2017).

    It has no gradient and stays in eval mode: its BatchNorm uses the student's running statistics.

    student: the student before an adapter or a memory is added.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.copy: Any = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Shadow":
        """A no-op: the EMA model stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        """Update parameters by w' = momentum · w' + (1 − momentum) · w and copy buffers."""
        theirs = dict(student.named_parameters())
        for name, own in self.copy.named_parameters():
            if momentum == 0:
                own.copy_(theirs[name])
            else:
                own.lerp_(theirs[name], 1 - momentum)
        self.take_buffers(student)

    @torch.no_grad()
    def take_buffers(self, student: nn.Module) -> None:
        """Copy buffers, such as BatchNorm's running statistics."""
        buffers = dict(student.named_buffers())
        for name, own in self.copy.named_buffers():
            own.copy_(buffers[name])


class Memory(nn.Module):
    """State of an objective between steps; each part is None unless the objective needs it.

    own: `BoxObjective.memory`. shadow: the EMA model. structure: convolution that predicts the structure map from the
    dense feature of `channels`.
    """

    def __init__(self, student: Any, objective: BoxObjective, *, classes: int, channels: int) -> None:
        super().__init__()
        needs = objective.needs
        self.own = objective.memory(classes, student.finest_channels() if needs.per_box else channels)
        self.shadow = Shadow(student) if needs.shadow or needs.detections else None
        self.structure = nn.Conv2d(channels, needs.structure, 3, padding=1) if needs.structure else None
        if self.structure is not None:
            nn.init.normal_(self.structure.weight, std=0.01)
            nn.init.zeros_(self.structure.bias)  # type: ignore[arg-type]
