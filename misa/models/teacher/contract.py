"""What a teacher's checkpoint declares about itself, so that any network with a classifier can be one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class TeacherContract(NamedTuple):
    """How to feed a teacher and how to read it.

    classes: names of the foreground categories, in the order of `SemanticPrior.saliency_factors`.
    background: row of the classifier that stands for "none of them".
    mean, std: of the input's three channels, RGB of 0..255; images come in normalised by them.
    """

    classes: tuple[str, ...]
    background: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def encoded(self) -> Tensor:
        """As bytes in a tensor: checkpoint readers that expect tensors only, and weights-only ones, take it."""
        return torch.tensor(list(json.dumps(self._asdict()).encode()), dtype=torch.uint8)

    @classmethod
    def decoded(cls, code: Tensor) -> "TeacherContract":
        """The contract that `encoded` wrote."""
        values = json.loads(bytes(code.tolist()).decode())
        return cls(tuple(values["classes"]), values["background"], tuple(values["mean"]), tuple(values["std"]))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode inside, in its own mode again after; a module in evaluation is left alone."""
    training = module.training
    if training:
        module.eval()
    try:
        yield
    finally:
        if training:
            module.train()
