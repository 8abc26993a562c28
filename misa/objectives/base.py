"""Interface of box objectives: their base class, the inputs of a training step and the losses they return.

Axes: b image · n instance (positive) · g ground-truth box · d channel · h row · w column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from misa.experiment import Objective

if TYPE_CHECKING:  # rows import objectives, and a table of rows must load without torch
    import torch
    from mmengine.structures import InstanceData
    from torch import Tensor, nn

    from misa.losses.inputs import Batch, Positives, SemanticPrior
    from misa.ops.readings import Classifier


@dataclass(frozen=True)
class Ramp:
    """A factor that rises linearly from 0 at `start` to 1 at `end`, in training steps or in fractions of the run.

    >>> Ramp(0, 0.5, of="run").at(iteration=10, total=40)
    0.5
    >>> Ramp(100, 100).at(iteration=99, total=1000), Ramp(100, 100).at(iteration=100, total=1000)
    (0.0, 1.0)
    """

    start: float = 0.0
    end: float = 0.0
    of: Literal["steps", "run"] = "steps"

    def at(self, iteration: int, total: int) -> float:
        """The factor at step `iteration` (counted from 0) of `total`."""
        unit = 1.0 if self.of == "steps" else float(max(total, 1))
        start, end = self.start * unit, self.end * unit
        if iteration < start:
            return 0.0
        return 1.0 if iteration >= end else (iteration - start) / (end - start)


class Term(NamedTuple):
    """A weighted loss (a scalar), and the count by which it is averaged over processes.

    per: "instances", "box pixels" or a count of other items (a scalar): the loss is a mean over this process's items,
        and is converted to its part of the mean over all processes' items, times the predictions per object; "batch":
        the loss is already a mean over the whole batch (`Step.across`).
    once: the loss is of masks that an object has once (`Step.per_box`): not times the predictions per object.
    """

    loss: Tensor
    per: Literal["instances", "box pixels", "batch"] | Tensor = "instances"
    once: bool = False


class Truth(NamedTuple):
    """The ground truth of a batch: boxes (g 4: x1 y1 x2 y2 in pixels of the padded input), `labels` and `image` (g).

    All on the host. pasted: which objects were pasted by the objective (g, bool), or None.
    """

    boxes: Tensor
    labels: Tensor
    image: Tensor
    pasted: Tensor | None = None


class Detected(NamedTuple):
    """Detections in an image: boxes (m 4), scores (m), mask probabilities (m h w) at the size of I."""

    boxes: Tensor
    scores: Tensor
    masks: Tensor


class PerBox(NamedTuple):
    """One mask per box of a batch (`positives`, in the order of the boxes), and the neck's finest map (b c h w)."""

    positives: Positives
    finest: Tensor


class Prepared(NamedTuple):
    """Inputs of the networks: the student's `images` (b 3 h w, normalized and padded) and the instances in them.

    `weak_view` are the images for the colors, the EMA model and the teacher: the same ones or a weaker augmentation.

    Besides `bboxes` and `labels` the instances of all images may have `within` (n h w, on the device, at the size of
    the images), which replaces the boxes' area in the losses, and `pasted` (n, on the host).
    """

    images: Tensor
    instances: list[InstanceData]
    weak_view: Tensor


class Step(NamedTuple):
    """Inputs of an objective in one training step; those that `Needs` does not request are None.

    iteration, total: step of the optimizer, from 0, and their number.
    positives: the student's masks, in float32; `positives.instance` is each mask's index into the boxes of `truth`.
    repeats: number of predictions per object in the positives (Mask2Former: one per decoder layer and the first).
    batch: the normalized images at the size of the masks, and which pixels are not padding.
    features: the dense feature I (b d h w); adapted: I after FSD's adapter.
    union: B of Eq. 5 (b 1 h w), the union of the boxes. known (b 1 h w): where the content is known, outside crowds.
    prior: S at the size of the masks, and K. classifier: the whole last layer: K, the background's row and the bias.
    colors: the images at the size of the masks, RGB, 0..255.
    shadow, shadow_features: the EMA model's positives and features, without gradient; the positives are of the same
        objects in the same order. detections: the EMA model's, per image. None before it has started.
    structure: the learned map (b c h w).
    weak_view: the images (b 3 h w, normalized) as the EMA model sees them, at full resolution.
    per_box, shadow_per_box: one mask per box, the student's and, once it has started, the EMA model's.
    generators: one random generator per image, on the CPU, whose draws depend neither on a resume nor on world size.
    across: mean of a tensor over the processes (all-reduce). together: stacks the processes' tensors, of equal shape,
        in the order of ranks (all-gather); rank p of q has the images p, p + q, … of the batch.
    """

    positives: Positives
    batch: Batch
    iteration: int = 0
    total: int = 1
    features: Tensor | None = None
    adapted: Tensor | None = None
    union: Tensor | None = None
    known: Tensor | None = None
    repeats: int = 1
    truth: Truth | None = None
    prior: SemanticPrior | None = None
    classifier: Classifier | None = None
    colors: Tensor | None = None
    shadow: Positives | None = None
    shadow_features: Tensor | None = None
    detections: list[Detected] | None = None
    structure: Tensor | None = None
    weak_view: Tensor | None = None
    per_box: PerBox | None = None
    shadow_per_box: PerBox | None = None
    generators: Sequence[torch.Generator] = ()
    across: Callable[[Tensor], Tensor] = lambda values: values  # of one process
    together: Callable[[Tensor], Tensor] = lambda values: values[None]

    def ramp(self, ramp: Ramp) -> float:
        """The ramp's factor at this step."""
        return ramp.at(self.iteration, self.total)


@dataclass(frozen=True)
class BoxObjective(Objective):
    """Base class of losses that supervise masks by boxes alone; `needs` lists the inputs of `Step` that they use.

    An objective is stateless: its fields are constants, the progress of the run comes with the step, and tensors kept
    between steps are in the module of `memory`, which is saved and resumed with the student but not exported.
    """

    def memory(self, classes: int, channels: int) -> nn.Module | None:
        """Return a module whose buffers or parameters are kept between steps, or None.

        `channels` are those of I, or with `Needs(per_box=True)` those of the finest map. Buffers must stay equal in all
        processes: use `Step.across` or `Step.together` for what is computed from a part of the batch.

        State without a fixed shape goes into an attribute `on_host` with `state` and `restore` (see `PictureQueue`),
        which is saved and resumed too. It may differ between processes; a resume loads rank 0's into all.
        """
        return None

    def shadow_momentum(self, iteration: int, total: int) -> float:
        """EMA momentum before this step: 0 copies the student.

        At 1 the EMA model is neither updated nor evaluated. The first step of a run always copies the student.
        """
        raise NotImplementedError

    def prepare(
        self,
        images: Tensor,
        instances: list[InstanceData],
        memory: nn.Module | None,
        generators: Sequence[torch.Generator],
    ) -> Prepared:
        """Augment images (b 3 h w) with `bboxes` and `labels` each before the forward pass; a no-op by default.

        `img_shape` of the instances is their image's size (h, w) without padding.
        """
        return Prepared(images, instances, images)

    def losses(self, step: Step, memory: nn.Module | None) -> dict[str, Term]:
        """Return the weighted terms by names that begin with `loss_`; without positives, zeros that have a gradient."""
        raise NotImplementedError

    def update(self, step: Step, memory: nn.Module | None) -> None:
        """Update the memory in place after the losses, without gradient; a no-op by default."""
