"""Interface of teacher networks, and the metadata in their checkpoints; any network with a classifier can be one."""

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
    """Classes and input normalization of a teacher.

    classes: names of the foreground categories, in the order of `SemanticPrior.saliency_factors`.
    background: row of the classifier for the background.
    mean, std: statistics of RGB, 0..255, by which input images are normalized.
    """

    classes: tuple[str, ...]
    background: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def encoded(self) -> Tensor:
        """JSON as a uint8 tensor, which loaders that expect tensors only accept (such as `weights_only`)."""
        return torch.tensor(list(json.dumps(self._asdict()).encode()), dtype=torch.uint8)

    @classmethod
    def decoded(cls, code: Tensor) -> "TeacherContract":
        """Inverse of `encoded`."""
        values = json.loads(bytes(code.tolist()).decode())
        return cls(tuple(values["classes"]), values["background"], tuple(values["mean"]), tuple(values["std"]))


class SemanticMaps(NamedTuple):
    """Outputs of a teacher for a batch, at stride 4 of its input."""

    features: Tensor  # S (b d h w), before the classifier's dropout
    logits: Tensor  # (b n h w)
    stage_logits: Tensor  # (b n h w), sum of the four stages' class scores, an auxiliary output of SeMask


class TeacherNetwork(nn.Module):
    """Base class of `misa.models.teacher.table.TEACHERS`: trained by `SemanticTeacher`, then attached to a student.

    Its contract is in the state dict; loading a checkpoint with another contract is an error.
    """

    contract: TeacherContract

    def forward(self, images: Tensor) -> SemanticMaps:
        """Return S, logits and stage logits at stride 4 of normalized images (b 3 h w)."""
        raise NotImplementedError

    def prior(self, images: Tensor) -> SemanticPrior:
        """Return S and the foreground rows of K for the losses, without gradient and in eval mode."""
        raise NotImplementedError

    def last_layer(self) -> Classifier:
        """Return the last layer's foreground rows (K), background row and biases, without gradient."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """The contract, for the state dict."""
        return self.contract.encoded()

    def set_extra_state(self, state: Tensor) -> None:
        """Compare a checkpoint's contract with this network's; UserError if they differ."""
        found = TeacherContract.decoded(state)
        for name, ours, theirs in zip(self.contract._fields, self.contract, found, strict=True):
            if ours != theirs:
                raise UserError(
                    f"This teacher checkpoint declares {name} {theirs}, but the network was built for {ours}: "
                    "build it with the checkpoint's own values or train a teacher for these data."
                )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context in which the module is in eval mode; its mode is restored on exit."""
    training = module.training
    if training:
        module.eval()
    try:
        yield
    finally:
        if training:
            module.train()
