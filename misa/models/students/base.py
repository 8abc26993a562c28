"""MISA's detector: a student and the box objectives that train it (Figure 2)."""

import hashlib
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from misa.data.pipeline import MEAN, STD
from misa.errors import Diverged, NotFinite, UserError, option_name
from misa.experiment import objective_from
from misa.losses.inputs import Positives, SemanticPrior, shrink, union_of_boxes
from misa.models.students.adapter import Adapter
from misa.models.students.batch_means import batch_mean, share, together
from misa.models.students.memory import Memory
from misa.models.students.step_health import gradient_shares, mask_health
from misa.models.teacher.contract import TeacherNetwork
from misa.objectives.base import BoxObjective, Detected, PerBox, Prepared, Step, Term, Truth
from misa.ops.resize import coarse_masks
from misa.ops.transfer import on_host

TRAINING_ONLY = ("adapter.", "memory.")
"""Prefixes of state dict keys that are used in training only."""
SHADOW = "memory.shadow.copy."
"""Prefix of the EMA model's state dict keys."""

WANTED = {
    "shadow": "the EMA model's masks of the same objects",
    "detections": "the EMA model's detections",
    "per_box": "one mask of every box, and the finest map of the neck",
}
"""The `Needs` that not every student serves, in words."""


class StudentOutput(NamedTuple):
    """Output of a student for a batch in training: its masks, its dense feature I (b d h w), and losses of its own.

    repeats: number of predictions per object in `positives`; each is supervised on its own.
    places: from which the EMA model makes its masks of the same objects, in the same order. per_box: where the
    objective needs it.
    """

    positives: Positives
    features: Tensor
    losses: dict[str, Tensor]
    repeats: int = 1
    places: Any = None
    per_box: PerBox | None = None


class BoxMasks(NamedTuple):
    """A student's masks of the known boxes of an image: `probabilities` (n h w) at the size of the dense feature.

    answered: which boxes have a mask (n); the others are 0.
    """

    probabilities: Tensor
    answered: Tensor


class Clock(NamedTuple):
    """Progress of a training: `iteration` of `total` optimizer steps, from 0, and the run's seed."""

    iteration: int = 0
    total: int = 1
    seed: int = 0


class BoxSupervised(nn.Module):
    """Mixin that trains a detector from boxes alone, with or without a semantic teacher.

    objective: its loss, also as plain values (as in a run's config.py).
    classes: number of classes of the data.
    teacher_channels: channels of the teacher's dense feature S; required for FSD's adapter.
    from_shadow: predict with the EMA model instead of the student.

    The teacher is attached but not registered: it is not in the state dict or `parameters()`, nor used in inference.
    """

    teacher: TeacherNetwork | None = None
    memory: Memory | None
    clock = Clock()
    from_shadow = False  # of a copy, too, which is made before
    lacks: ClassVar[dict[str, str]] = {
        "shadow": "its `training_output` takes no places",
        "detections": "it has no `detect`",
        "per_box": "its `training_output` gives none",
    }
    """The `Needs` that a student cannot serve, with the reasons; by default all beyond `training_output`."""
    _maps: tuple[Tensor, ...] | None = None

    def __init__(
        self,
        *args: Any,
        objective: BoxObjective | dict[str, Any],
        classes: int,
        teacher_channels: int | None = None,
        from_shadow: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        value = objective_from(objective) if isinstance(objective, dict) else objective
        assert isinstance(value, BoxObjective)
        for need, reason in self.lacks.items():
            if getattr(value.needs, need):
                raise UserError(
                    f"the objective {value.kind}, as this row has it, needs {WANTED[need]}; a {type(self).__name__} "
                    f"cannot serve that: {reason}. Choose another student."
                )
        self.objective = value
        # Does not advance the random numbers of the student's weights, so that rows of one seed start equal.
        with torch.random.fork_rng(devices=[]):
            if value.needs.adapter:
                assert teacher_channels is not None, "FSD needs the teacher's number of channels"
                self.adapter = Adapter(self.feature_channels(), teacher_channels)
            memory = Memory(self, value, classes=classes, channels=self.feature_channels())
        self.memory = memory if any(memory.children()) else None
        self.from_shadow = from_shadow

    watched = False  # whether the next step also returns its diagnostics

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the detector's maps (b d h w); they are kept for diagnostics while `watched`."""
        maps: tuple[Tensor, ...] = super().extract_feat(batch_inputs)  # type: ignore[misc]
        self._maps = maps if self.watched and self.training else None
        return maps

    def feature_channels(self) -> int:
        """The channels of the dense feature I."""
        raise NotImplementedError

    def finest_channels(self) -> int:
        """The channels of the neck's finest map (`PerBox`); by default those of I."""
        return self.feature_channels()

    def dense_feature(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Compute I of Eq. 2 (b d h w) from the detector's maps."""
        raise NotImplementedError

    def training_output(self, images: Tensor, instances: list[InstanceData], places: Any = None) -> StudentOutput:
        """Run the student on a batch (b 3 h w) with `bboxes` and `labels` of each image.

        With the `places` of another output of the same instances, the positives correspond to that one's.
        """
        raise NotImplementedError

    def detect(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Detected]:
        """Detect in each image of a batch (b 3 h w), as at test time; `sizes` (h, w) are without padding."""
        raise NotImplementedError

    @property
    def predicting(self) -> "BoxSupervised":
        """The network that predicts: with `from_shadow` the EMA model, otherwise this one."""
        if self.from_shadow and self.memory is not None and self.memory.shadow is not None:
            shadow: BoxSupervised = self.memory.shadow.copy
            return shadow
        return self

    def predict(self, batch_inputs: Tensor, batch_data_samples: Any, rescale: bool = True, **_: Any) -> Any:
        """mmdet's predictions of the network `predicting`."""
        if self.predicting is not self:
            return self.predicting.predict(batch_inputs, batch_data_samples, rescale=rescale)
        return super().predict(batch_inputs, batch_data_samples, rescale=rescale)  # type: ignore[misc]

    def masks_of_boxes(self, images: Tensor, instances: list[InstanceData]) -> list[BoxMasks]:
        """Predict masks of known `bboxes` and `labels` of each image of a batch (b 3 h w), assigned as in training."""
        raise NotImplementedError

    def attach(self, teacher: TeacherNetwork) -> None:
        """Attach a frozen teacher, moved to the student's device."""
        frozen = teacher.eval().requires_grad_(False).to(next(self.parameters()).device)
        object.__setattr__(self, "teacher", frozen)  # bypasses nn.Module, which would register it as a submodule

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample], **_: Any) -> dict[str, Tensor]:
        """Return the named losses of a batch (b 3 h w), computed in float32; ground-truth masks are not read.

        In distributed training each process returns its part, such that the mean of all parts is the batch's loss.
        Raises Diverged: a loss is NaN or infinite. Checked only on the CPU; on a GPU `NaNGuard` checks asynchronously.
        """
        try:
            return self._losses(batch_inputs, batch_data_samples)
        except NotFinite as error:
            fix = f"Lower the learning rate or the weight of that loss, in another {option_name('work_dir')}."
            raise Diverged(f"{error} {fix}") from error

    def begin_step(self, clock: Clock) -> None:
        """Set the training's progress and update the EMA model; called before each optimizer step."""
        self.clock = clock
        if self.memory is not None and self.memory.shadow is not None:
            first = clock.iteration == 0
            momentum = 0.0 if first else self.objective.shadow_momentum(clock.iteration, clock.total)
            self.memory.shadow.follow(self, momentum)

    def _losses(self, images: Tensor, samples: list[DetDataSample]) -> dict[str, Tensor]:
        own = None if self.memory is None else self.memory.own
        generators = [generator_of(self.clock, sample) for sample in samples]
        given = [sample.gt_instances for sample in samples]
        for own_instances, sample in zip(given, samples, strict=True):
            own_instances.set_metainfo({"img_shape": tuple(sample.img_shape[:2])})
        prepared = self.objective.prepare(images, given, own, generators)
        own_part = self.training_output(prepared.images, prepared.instances)
        positives, features, losses = _within(own_part.positives, prepared), own_part.features, own_part.losses
        if images.device.type == "cpu" and not positives.mask_logits.isfinite().all():  # elsewhere it would synchronize
            raise Diverged(
                f"the masks became NaN or infinite; lower the learning rate, in another {option_name('work_dir')}."
            )
        step = self._step(prepared, positives, features, samples)
        repeats = own_part.repeats
        step = step._replace(generators=generators, per_box=_float(own_part.per_box), repeats=repeats)
        step = step._replace(**self._of_shadow(prepared, own_part.places, samples))
        with torch.autocast(features.device.type, enabled=False):
            terms = self.objective.losses(step, own)
            with torch.no_grad():
                self.objective.update(step, own)
        losses |= {name: _part(term, 1 if term.once else repeats, positives) for name, term in terms.items()}
        if self._maps is not None:
            losses |= mask_health(positives) | gradient_shares(losses, self._maps)
            self._maps = None
        return losses

    def _step(self, prepared: Prepared, positives: Positives, features: Tensor, samples: list[DetDataSample]) -> Step:
        """Collect the inputs that the objective needs of this batch."""
        needs, memory = self.objective.needs, self.memory
        size = (features.shape[-2], features.shape[-1])
        stride = prepared.images.shape[-2] // size[0]
        boxes = [truth.bboxes for truth in prepared.instances]
        union = union_of_boxes(boxes, features, stride)
        # Inside a crowd's box neither foreground nor background is known.
        known = union | ~union_of_boxes([_crowds(sample) for sample in samples], features, stride)
        return Step(
            positives._replace(mask_logits=positives.mask_logits.float()),
            shrink(prepared.images, [sample.img_shape for sample in samples], union),
            iteration=self.clock.iteration,
            total=self.clock.total,
            features=features,
            adapted=self.adapter(features) if needs.adapter else None,
            union=union,
            known=known,
            truth=_truth(prepared.instances),
            prior=self._prior(prepared.weak_view, size) if needs.prior else None,
            classifier=self.teacher.last_layer() if needs.prior and self.teacher is not None else None,
            colors=pooled_colors(prepared.weak_view, size) if needs.colors else None,
            weak_view=prepared.weak_view,
            structure=None if memory is None or memory.structure is None else memory.structure(features),
            across=batch_mean,
            together=together,
        )

    @torch.no_grad()
    def _of_shadow(self, prepared: Prepared, places: Any, samples: list[DetDataSample]) -> dict[str, Any]:
        """The fields of a step that the EMA model computes; none before it has started."""
        needs, shadow = self.objective.needs, None if self.memory is None else self.memory.shadow
        if shadow is None or self.objective.shadow_momentum(self.clock.iteration, self.clock.total) == 1:
            return {}
        fields: dict[str, Any] = {}
        if needs.shadow:
            found = shadow.copy.training_output(prepared.weak_view, prepared.instances, places)
            masks = found.positives.mask_logits.float()
            fields |= {"shadow": found.positives._replace(mask_logits=masks), "shadow_features": found.features}
            fields |= {"shadow_per_box": _float(found.per_box)}
        if needs.detections:
            fields["detections"] = shadow.copy.detect(prepared.weak_view, [sample.img_shape[:2] for sample in samples])
        return fields

    def _prior(self, images: Tensor, size: tuple[int, int]) -> SemanticPrior:
        """Return S at the size of the masks and K, without gradient."""
        if self.teacher is None:
            raise RuntimeError("this student learns from a semantic teacher: attach one before training.")
        features, factors = self.teacher.prior(images)
        if features.shape[-2:] != size:
            features = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
        return SemanticPrior(features, factors)


def _within(positives: Positives, prepared: Prepared) -> Positives:
    """Replace the box masks by `within` of the instances, unless that is empty at the masks' size."""
    if any("within" not in own for own in prepared.instances):
        return positives
    cells = (positives.mask_logits.shape[-2], positives.mask_logits.shape[-1])
    size, stride = (prepared.images.shape[-2], prepared.images.shape[-1]), prepared.images.shape[-1] // cells[1]
    every = torch.cat([coarse_masks(own.within, size, cells, stride=stride) for own in prepared.instances])
    own = every[positives.instance.to(every.device, non_blocking=True)]
    some = own.flatten(1).any(dim=1)[:, None, None]
    return positives._replace(box_masks=torch.where(some, own, positives.box_masks))


def _float(found: PerBox | None) -> PerBox | None:
    """Cast to float32."""
    if found is None:
        return None
    return PerBox(found.positives._replace(mask_logits=found.positives.mask_logits.float()), found.finest.float())


def _crowds(sample: DetDataSample) -> Tensor:
    """Boxes of crowds (n, 4), groups of objects without individual annotations."""
    boxes: Tensor = sample.ignored_instances.bboxes if "ignored_instances" in sample else sample.gt_instances.bboxes[:0]
    return boxes


def _part(term: Term, repeats: int, positives: Positives) -> Tensor:
    """Return this process's part of a term, whose mean is over the items (`Term.per`) of all processes."""
    count: Tensor | float
    if isinstance(term.per, Tensor):
        count = term.per
    elif term.per == "batch":
        return term.loss
    else:
        count = positives.box_masks.sum() if term.per == "box pixels" else len(positives.image)
    return repeats * term.loss * share(count, positives.mask_logits.device)


def _truth(instances: list[InstanceData]) -> Truth:
    boxes, labels = ([on_host(own[name]) for own in instances] for name in ("bboxes", "labels"))
    image = torch.cat([torch.full_like(own, b) for b, own in enumerate(labels)])
    pasted = torch.cat([own.pasted for own in instances]) if all("pasted" in own for own in instances) else None
    return Truth(torch.cat(boxes), torch.cat(labels), image, pasted)


def pooled_colors(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Denormalize images and average-pool them to `size` (h, w); RGB, 0..255, before pooling in whole numbers again."""
    mean, std = (torch.tensor(values).view(3, 1, 1).to(images.device, non_blocking=True) for values in (MEAN, STD))
    return F.adaptive_avg_pool2d((images * std + mean).round(), size)


def generator_of(clock: Clock, sample: DetDataSample) -> torch.Generator:
    """Random generator of an image at a step, the same in any process."""
    key = f"{clock.seed} {clock.iteration} {sample.get('img_id', 0)}"
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
