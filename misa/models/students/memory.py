"""State that a student keeps between training steps; left out of an exported student."""

import copy
from typing import Any

import torch
from torch import nn

from misa.objectives.base import BoxObjective


class Shadow(nn.Module):
    """A copy of the student that follows it by a moving average (mean teacher, Tarvainen and Valpola 2017).

    It gets no gradient and is always in evaluation: it normalises by the statistics that it copied.

    student: as it is built, before it has an adapter or a memory.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.copy: Any = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Shadow":
        """Stays in evaluation."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        """w' = momentum · w' + (1 − momentum) · w for the parameters; buffers are copied."""
        theirs = dict(student.named_parameters())
        for name, own in self.copy.named_parameters():
            if momentum == 0:
                own.copy_(theirs[name])
            else:
                own.lerp_(theirs[name], 1 - momentum)
        buffers = dict(student.named_buffers())
        for name, own in self.copy.named_buffers():
            own.copy_(buffers[name])


class Memory(nn.Module):
    """The state of an objective between steps; each part exists where the objective asks for it.

    own: what the objective itself remembers. shadow: the copy that follows the student. structure: a map that is
    learned from the dense feature of `channels`.
    """

    def __init__(self, student: nn.Module, objective: BoxObjective, *, classes: int, channels: int) -> None:
        super().__init__()
        needs = objective.needs
        self.own = objective.memory(classes, student.neck.out_channels if needs.per_box else channels)  # type: ignore
        self.shadow = Shadow(student) if needs.shadow or needs.detections else None
        self.structure = nn.Conv2d(channels, needs.structure, 3, padding=1) if needs.structure else None
        if self.structure is not None:
            nn.init.normal_(self.structure.weight, std=0.01)
            nn.init.zeros_(self.structure.bias)  # type: ignore[arg-type]
