"""MISA's detector: a student and the box objectives that train it (Figure 2)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from misa.errors import Diverged, NotFinite
from misa.losses.distillation import distillation_loss, in_units_of_spread
from misa.losses.inputs import Positives, SemanticPrior, _shrink, union_of_boxes
from misa.losses.total import box_objectives
from misa.models.students.adapter import Adapter
from misa.models.students.batch_means import batch_mean, share
from misa.models.students.step_health import gradient_shares, mask_health
from misa.models.teacher.semask import SeMask
from misa.ops.readings import read


class Handover(NamedTuple):
    """What a student hands over of a batch: its masks, its dense feature I (b d h w), and losses of its own.

    repeats: how many predictions of every object `positives` holds; each is supervised on its own.
    """

    positives: Positives
    features: Tensor
    losses: dict[str, Tensor]
    repeats: int = 1


class BoxMasks(NamedTuple):
    """A student's masks of the known boxes of an image.

    probabilities (n h w) at the size of the dense feature, 0 where `answered` (n) says that nothing stands for a box.
    """

    probabilities: Tensor
    answered: Tensor


class BoxSupervised(nn.Module):
    """A student trained from boxes alone, with or without a semantic teacher beside it: mixed into a detector.

    projection_weight, affinity: the arguments of `box_objectives`.
    distillation: the arguments of `distillation_loss`, a `weight` and a `unit`, "raw" or "spread" (S in units of its
        standard deviation); None leaves FSD out.
    reading: how the teacher's prior joins the affinity (SEPA), the arguments of `misa.ops.readings.read`; None: not.
    teacher_channels: of the teacher's dense feature S; needed for the adapter of FSD.

    The teacher is attached, not owned: it is no part of the state dict, of `parameters()` or of inference.
    """

    teacher: SeMask | None = None
    _maps: tuple[Tensor, ...] | None = None

    def __init__(
        self,
        *args: Any,
        projection_weight: float,
        affinity: Mapping[str, Any] | None,
        distillation: Mapping[str, Any] | None = None,
        reading: Mapping[str, Any] | None = None,
        teacher_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.projection_weight = projection_weight
        self.affinity = affinity
        self.distillation = None if distillation is None else dict(distillation)
        self.reading = reading
        if self.distillation is not None:
            assert teacher_channels is not None, "FSD needs the teacher's number of channels"
            # The student's own weights are drawn as without an adapter, so that rows of one seed start alike.
            with torch.random.fork_rng(devices=[]):
                self.adapter = Adapter(self.feature_channels(), teacher_channels)

    watched = False  # whether the next step tells its health as well

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """The detector's maps (b d h w), kept while the step is watched."""
        maps: tuple[Tensor, ...] = super().extract_feat(batch_inputs)  # type: ignore[misc]
        self._maps = maps if self.watched and self.training else None
        return maps

    def feature_channels(self) -> int:
        """The channels of the dense feature I."""
        raise NotImplementedError

    def dense_feature(self, maps: tuple[Tensor, ...]) -> Tensor:
        """I of Eq. 2 (b d h w) from the detector's maps."""
        raise NotImplementedError

    def handover(self, images: Tensor, instances: list[InstanceData]) -> Handover:
        """The student's part of a batch (b 3 h w) with `bboxes` and `labels` of each image."""
        raise NotImplementedError

    def masks_of_boxes(self, images: Tensor, instances: list[InstanceData]) -> list[BoxMasks]:
        """The masks of the known `bboxes` and `labels` of each image of a batch (b 3 h w), matched as in training."""
        raise NotImplementedError

    def attach(self, teacher: SeMask) -> None:
        """Put a frozen teacher beside the student, on its device."""
        frozen = teacher.eval().requires_grad_(False).to(next(self.parameters()).device)
        object.__setattr__(self, "teacher", frozen)  # past nn.Module, which would make it a part of this one

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample], **_: Any) -> dict[str, Tensor]:
        """The named losses of a batch (b 3 h w); no ground-truth mask is read. In float32 behind the networks.

        Where several processes share the batch, each returns its part, such that their mean is the loss of the whole.

        Raises:
            Diverged: a loss is no number; on the CPU only, elsewhere the training watches its losses.
        """
        try:
            return self._losses(batch_inputs, batch_data_samples)
        except NotFinite as error:
            cure = "Lower the learning rate or the weight of that loss, in another work_dir."
            raise Diverged(f"{error} {cure}") from error

    def _losses(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample]) -> dict[str, Tensor]:
        instances = [sample.gt_instances for sample in batch_data_samples]
        positives, features, losses, repeats = self.handover(batch_inputs, instances)
        if batch_inputs.device.type == "cpu" and not positives.mask_logits.isfinite().all():  # elsewhere it would wait
            raise Diverged("the masks became NaN or infinite; lower the learning rate, in another work_dir.")
        shapes = [sample.img_shape for sample in batch_data_samples]
        size = (features.shape[-2], features.shape[-1])
        stride = batch_inputs.shape[-2] // size[0]
        union = union_of_boxes([truth.bboxes for truth in instances], features, stride)
        batch = _shrink(batch_inputs, shapes, union)
        prior = self._prior(batch_inputs, size)
        with torch.autocast(features.device.type, enabled=False):
            affinity, semantic = self._read(prior, batch.valid)
            terms = box_objectives(
                positives._replace(mask_logits=positives.mask_logits.float()),
                batch,
                projection_weight=self.projection_weight,
                affinity=affinity,
                prior=semantic,
            )
        losses |= {name: repeats * term * self._share(name, positives) for name, term in terms.items()}
        if self.distillation is not None:
            assert prior is not None
            options = dict(self.distillation)
            weight, unit = options.pop("weight"), options.pop("unit", "raw")
            valid = batch.valid[:, None]
            # A crowd's box says neither what is in it nor that nothing is.
            told = union | ~union_of_boxes([_crowds(sample) for sample in batch_data_samples], features, stride)
            target = prior.features if unit == "raw" else in_units_of_spread(prior.features, valid, across=batch_mean)
            error = distillation_loss(
                self.adapter(features), target, union, valid=valid & told, across=batch_mean, **options
            )
            losses["loss_distillation"] = weight * error
        if self._maps is not None:
            losses |= mask_health(positives) | gradient_shares(losses, self._maps)
            self._maps = None
        return losses

    def _share(self, name: str, positives: Positives) -> Tensor | float:
        """This process's part of a term whose mean is over all processes' instances, or over their boxes' area."""
        ratio = name != "loss_projection" and self.affinity is not None and self.affinity["reduction"] == "box_ratio"
        count = positives.box_masks.sum() if ratio else len(positives.image)
        return share(count, positives.mask_logits.device)

    def _read(
        self, prior: SemanticPrior | None, valid: Tensor
    ) -> tuple[Mapping[str, Any] | None, SemanticPrior | None]:
        """The arguments of the pairwise loss and what it compares of the teacher (Eq. 11)."""
        if self.reading is None or prior is None or self.affinity is None:
            return self.affinity, None
        assert self.teacher is not None
        values, factors, sigma = read(prior.features, self.teacher.last_layer(), valid=valid, **self.reading)
        return {**self.affinity, "semantic_sigma": sigma}, SemanticPrior(values, factors)

    def _prior(self, images: Tensor, size: tuple[int, int]) -> SemanticPrior | None:
        """S at the size of the masks and K, without gradient; None where no term asks for them."""
        if self.distillation is None and self.reading is None:
            return None
        if self.teacher is None:
            raise RuntimeError("this student learns from a semantic teacher: attach one before training.")
        features, factors = self.teacher.prior(images)
        if features.shape[-2:] != size:
            features = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
        return SemanticPrior(features, factors)


def _crowds(sample: DetDataSample) -> Tensor:
    """Boxes of several objects at once (n, 4), of which the data says no more."""
    boxes: Tensor = sample.ignored_instances.bboxes if "ignored_instances" in sample else sample.gt_instances.bboxes[:0]
    return boxes
