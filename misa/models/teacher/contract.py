"""What a teacher's checkpoint declares about itself, so that any network with a classifier can be one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from misa.errors import UserError
from misa.losses.inputs import SemanticPrior
from misa.ops.readings import Classifier


class TeacherContract(NamedTuple):
    """How to feed a teacher and how to read it.

    classes: names of the foreground categories, in the order of `SemanticPrior.saliency_factors`.
    background: row of the classifier for the background.
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


class SemanticMaps(NamedTuple):
    """What a teacher sees in a batch, at stride 4 of its input."""

    features: Tensor  # S (b d h w), before the classifier's dropout
    logits: Tensor  # (b n h w)
    stage_logits: Tensor  # (b n h w), the four stages' class scores summed: SeMask weighs their loss by 0.4


class TeacherNetwork(nn.Module):
    """A network of `misa.models.teacher.table.TEACHERS`: trained by `SemanticTeacher`, then frozen beside a student.

    Its contract travels in the state dict; loading refuses a checkpoint that declares another.
    """

    contract: TeacherContract

    def forward(self, images: Tensor) -> SemanticMaps:
        """S, logits and logits of the stages at stride 4 of normalised images (b 3 h w)."""
        raise NotImplementedError

    def prior(self, images: Tensor) -> SemanticPrior:
        """S and the foreground rows of K for the losses, without gradient and as in evaluation."""
        raise NotImplementedError

    def last_layer(self) -> Classifier:
        """K and its bias, without gradient; the background's row apart."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """The contract, for the state dict."""
        return self.contract.encoded()

    def set_extra_state(self, state: Tensor) -> None:
        """Compare a checkpoint's contract with this network's; raises UserError where they differ."""
        found = TeacherContract.decoded(state)
        for name, ours, theirs in zip(self.contract._fields, self.contract, found, strict=True):
            if ours != theirs:
                raise UserError(
                    f"This teacher checkpoint declares {name} {theirs}, but the network was built for {ours}: "
                    "build it with the checkpoint's own values or train a teacher for these data."
                )


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
