"""What an objective is handed at every step, what it answers, and how it is asked.

Axes: b image · n instance (positive) · g ground-truth box · d channel · h row · w column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from misa.experiment import Objective

if TYPE_CHECKING:  # rows name objectives, and a table of rows loads without torch
    import torch
    from mmengine.structures import InstanceData
    from torch import Tensor, nn

    from misa.losses.inputs import Batch, Positives, SemanticPrior
    from misa.ops.readings import Classifier


@dataclass(frozen=True)
class Ramp:
    """A factor that rises from 0 at `start` to 1 at `end`, in training steps or in parts of the run.

    >>> Ramp(0, 0.5, of="run").at(iteration=10, total=40)
    0.5
    >>> Ramp(100, 100).at(iteration=99, total=1000), Ramp(100, 100).at(iteration=100, total=1000)
    (0.0, 1.0)
    """

    start: float = 0.0
    end: float = 0.0
    of: Literal["steps", "run"] = "steps"

    def at(self, iteration: int, total: int) -> float:
        """The factor before step `iteration` (from 0) of `total`."""
        unit = 1.0 if self.of == "steps" else float(max(total, 1))
        start, end = self.start * unit, self.end * unit
        if iteration < start:
            return 0.0
        return 1.0 if iteration >= end else (iteration - start) / (end - start)


class Term(NamedTuple):
    """A weighted loss (a scalar), and what its mean is over.

    per: "instances" or "box pixels", or a number (a scalar) of other things: the mean over this process's own, which
        becomes its part of the mean over all processes', times the predictions that an object has; "batch": taken over
        the whole batch already (`Step.across`).
    """

    loss: Tensor
    per: Literal["instances", "box pixels", "batch"] | Tensor = "instances"


class Truth(NamedTuple):
    """The ground truth of a batch: boxes (g 4: x1 y1 x2 y2 in pixels of the padded input), `labels` and `image` (g).

    All on the host. pasted: which objects an objective has pasted (g); None where it has pasted none.
    """

    boxes: Tensor
    labels: Tensor
    image: Tensor
    pasted: Tensor | None = None


class Detected(NamedTuple):
    """What a network detects in an image: boxes (m 4), scores (m), mask probabilities (m h w) at the size of I."""

    boxes: Tensor
    scores: Tensor
    masks: Tensor


class PerBox(NamedTuple):
    """One mask of every box of a batch (`positives`, in the boxes' order), and the neck's finest map (b c h w)."""

    positives: Positives
    finest: Tensor


class Prepared(NamedTuple):
    """What the networks see: `images` (b 3 h w, normalised and padded) and the instances in them are the student's.

    `seen` is what the colors, the shadow and the teacher see: the images themselves, or a weaker view of them.

    Besides `bboxes` and `labels` the instances of all images may have `within` (n h w, on the device, in pixels of the
    images), which stands for the boxes' own areas in the losses, and `pasted` (n, on the host).
    """

    images: Tensor
    instances: list[InstanceData]
    seen: Tensor


def _own(values: Tensor) -> Tensor:
    """The mean over the processes where there is one."""
    return values


def _alone(values: Tensor) -> Tensor:
    """The rows of all processes where there is one."""
    return values[None]


class Step(NamedTuple):
    """One training step as an objective sees it; what `Needs` does not ask for is None.

    iteration, total: steps of the optimiser, from 0.
    positives: the student's masks, in float32; `positives.instance` says which box of `truth` each stands for.
    batch: the images at the size of the masks, normalised, and which pixels are no padding.
    features: the dense feature I (b d h w); adapted: I behind FSD's adapter.
    union: B of Eq. 5 (b 1 h w): where any box is. known (b 1 h w): where the boxes say what is there: not in a crowd.
    prior: S at the size of the masks, and K. classifier: the whole last layer, K with its bias and the background.
    colors: the images at the size of the masks, RGB of 0..255.
    shadow, shadow_features: the same as positives and features of the copy that follows the student, without gradient;
        as many, in the same order. detections: what it detects in each image. None before it has begun.
    structure: the learned map (b c h w).
    seen: the images (b 3 h w, normalised) as the shadow sees them, at their own size.
    per_box, shadow_per_box: one mask of every box, the student's and, once it has begun, the copy's.
    generators: a random generator an image, on the CPU: the same draws in a resumed run and in any number of processes.
    across: the mean of a tensor over the processes of the training. together: a tensor of one shape in all processes,
        stacked in their order; process p of q has the images p, p + q, … of the batch.
    """

    positives: Positives
    batch: Batch
    iteration: int = 0
    total: int = 1
    features: Tensor | None = None
    adapted: Tensor | None = None
    union: Tensor | None = None
    known: Tensor | None = None
    truth: Truth | None = None
    prior: SemanticPrior | None = None
    classifier: Classifier | None = None
    colors: Tensor | None = None
    shadow: Positives | None = None
    shadow_features: Tensor | None = None
    detections: list[Detected] | None = None
    structure: Tensor | None = None
    seen: Tensor | None = None
    per_box: PerBox | None = None
    shadow_per_box: PerBox | None = None
    generators: Sequence[torch.Generator] = ()
    across: Callable[[Tensor], Tensor] = _own
    together: Callable[[Tensor], Tensor] = _alone

    def ramp(self, ramp: Ramp) -> float:
        """The ramp's factor at this step."""
        return ramp.at(self.iteration, self.total)


@dataclass(frozen=True)
class BoxObjective(Objective):
    """What learns from boxes alone; `needs` says what a step must hold.

    An objective keeps no counter and no tensor: constants are its fields, where the run is comes with the step, and
    what it remembers is in the module of `memory`, which is saved and resumed with the student and left out of an
    exported one.
    """

    def memory(self, classes: int, channels: int) -> nn.Module | None:
        """What is remembered from step to step, as buffers or parameters.

        `channels` are those of I, or with `Needs(per_box=True)` those of the finest map. Every process must come to the
        same buffers: use `Step.across` or `Step.together` for what is computed from a part of the batch.

        What has no fixed shape is no buffer: an attribute `on_host` with `state` and `restore` (`PictureQueue`) is
        saved and resumed as well. Each process has its own, and after a resume the first one's.
        """
        return None

    def shadow_momentum(self, iteration: int, total: int) -> float:
        """How much of itself the shadow keeps before this step: 0 makes it a copy of the student.

        1 leaves it, and nothing is asked of it. At the first step of the run it is a copy in any case.
        """
        raise NotImplementedError

    def prepare(
        self,
        images: Tensor,
        instances: list[InstanceData],
        memory: nn.Module | None,
        generators: Sequence[torch.Generator],
    ) -> Prepared:
        """Before the networks run: images (b 3 h w), and `bboxes` and `labels` of each. The identity by default.

        Each image's size without padding is its instances' `img_shape` (h, w).
        """
        return Prepared(images, instances, images)

    def losses(self, step: Step, memory: nn.Module | None) -> dict[str, Term]:
        """The weighted terms, by names that begin with `loss_`; without positives zeros with a gradient."""
        raise NotImplementedError

    def update(self, step: Step, memory: nn.Module | None) -> None:
        """After the losses, without gradient: change the memory. Nothing by default."""
