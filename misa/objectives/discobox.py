"""DiscoBox (Lan et al. 2021): self-training on masks refined by ten iterations of a mean field on the image's colors.

L = L_projection + [r < 0.3] · dice(p · dilate(B), y) [+ with an object bank, [r < 0.2] · (L_transfer + L_match)].
y is the mean of the student's and its EMA model's mask, refined within the box ("structured teacher"); the gate on r, a
running mean of L_projection, enables the term once masks fill their boxes. Constants are the published code's.

The bank holds the EMA model's objects of earlier steps. One mask of every box, with SOLOv2 that of the cell of
its center, is compared with those of its class; where enough are alike, cells of both are matched. L_match asks the
features to be alike where they are matched: as coded a softmax of a softmax, which teaches next to nothing
(`misa.losses.correspondence`). The matched objects' masks vote in a second mean field, whose result supervises these
masks by a dice loss with a hundredth of the gradient (L_transfer). The published configuration of VOC with ResNet-101
has no bank.

Different from the published code: objects enter the bank at the end of a step, there one by one, so that a box is also
compared with earlier boxes of its own batch; all processes share one bank, so that the result does not depend on their
number; in the published code each has its own. The mean field's image is resized by the centers of pixels, as for all
losses here, not by their corners (`align_corners`).

Axes: g box · k similar object of the bank · i, j cells of their feature grids · h row · w column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from misa.experiment import Needs
from misa.objectives.base import BoxObjective, PerBox, Ramp, Step, Term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from misa.ops.bank import Objects


PARTS = ("features", "masks", "aspect")  # the bank's buffers


@dataclass(frozen=True)
class Bank:
    """Constants of the object bank and of the matching.

    slots: capacity per class; the newest objects are kept. least: an object must be wider and higher, in mask pixels.
    a_step: maximum number of objects that a process adds per step, with gradient accumulation per micro-batch. grid,
    side: resolution of an object's features and mask. keys: bank objects matched with a box; with fewer similar ones
    it is skipped. form: see `misa.losses.correspondence`. share: weight of their votes in the mean field. gradient:
    factor on L_transfer's.

    80 classes and 256 channels take 0.21 GB, on the device and in every checkpoint.
    """

    slots: int = 100
    least: int = 32
    a_step: int = 32
    grid: int = 7
    side: int = 28
    keys: int = 5
    gate: float = 0.2
    weight: float = 1.0
    form: Literal["official", "intended"] = "official"
    share: float = 0.01
    gradient: float = 0.01

    def __post_init__(self) -> None:
        if not 1 <= self.keys <= self.slots or min(self.grid, self.side, self.a_step) < 1:
            raise ValueError(f"Bank needs 1 <= keys <= slots, and grid, side and a_step of 1 or more: it is {self}.")


@dataclass(frozen=True)
class DiscoBox(BoxObjective):
    """Weights, the gate, and the EMA model of the student.

    gate: running mean of the projection loss below which the pseudo masks are used.
    momentum: of the EMA, from the end of `shadow_start` on; before, the student's own masks are used. The published
        code restarts it at every resume; here it is in the checkpoint.
    bank: constants of the object bank; None disables it.
    """

    projection_weight: float = 1.0
    pseudo_weight: float = 1.0
    gate: float = 0.3
    momentum: float = 0.999
    shadow_start: Ramp = field(default_factory=lambda: Ramp(13000, 13000))
    steps: int = 10
    theta_color: float = 0.5  # in normalized colors
    eps: float = 2e-3  # of all dice losses
    bank: Bank | None = field(default=None, metadata={"later": True})

    @property
    def described(self) -> str:
        """With or without the bank."""
        return "DiscoBox" if self.bank is None else "DiscoBox with object bank"

    @property
    def needs(self) -> Needs:
        """The EMA model's masks; with a bank one mask per box."""
        return Needs(shadow=True, per_box=self.bank is not None)

    def memory(self, classes: int, channels: int) -> nn.Module:
        """`running`, the running mean of the projection loss, initially 2; with a bank its objects and their counts.

        Objects are stored in half precision in row label · slots + slot; the last row takes discarded writes.
        """
        import torch

        memory = torch.nn.Module()
        memory.register_buffer("running", torch.tensor(2.0))
        # Of the optimizer step of `update`, in which there may be several micro-batches; saved is only between steps.
        memory.register_buffer("before", torch.tensor(2.0), persistent=False)
        memory.register_buffer("sums", torch.zeros(2), persistent=False)
        memory.iteration = -1  # type: ignore[assignment]
        if (bank := self.bank) is not None:
            rows, half = classes * bank.slots + 1, torch.float16
            memory.register_buffer("features", torch.zeros(rows, channels, bank.grid, bank.grid, dtype=half))
            memory.register_buffer("masks", torch.zeros(rows, bank.side, bank.side, dtype=half))
            memory.register_buffer("aspect", torch.zeros(rows))
            memory.register_buffer("filled", torch.zeros(classes, dtype=torch.long))
        return memory

    def shadow_momentum(self, iteration: int, total: int) -> float:
        """1 before the start, 0 at it (a copy of the student), then `momentum`."""
        begun, before = (self.shadow_start.at(i, total) == 1 for i in (iteration, iteration - 1))
        return (self.momentum if before else 0.0) if begun else 1.0

    def losses(self, step: Step, memory: nn.Module | None = None) -> dict[str, Term]:
        """`loss_projection` and `loss_pseudo`, means over instances; with a bank `loss_transfer` and `loss_match`.

        The last two are means over boxes and over boxes with enough similar objects. All but the first are 0 while
        their gate is closed.
        """
        from misa.losses.projection import projection_loss

        masks, boxes = step.positives.mask_logits.sigmoid(), step.positives.box_masks
        count = max(len(masks), 1)
        projection = projection_loss(masks, boxes, eps=self.eps)
        terms = {
            "loss_projection": Term(self.projection_weight * projection.sum() / count),
            "loss_pseudo": Term(0 * masks.sum()),
        }
        if memory is None:
            return terms
        pseudo = _where(_before(memory, step) < self.gate, lambda: self._pseudo(step), 0 * masks.sum())
        terms["loss_pseudo"] = Term(self.pseudo_weight * pseudo / count)
        return terms if self.bank is None else terms | self._bank_terms(step, memory, self.bank)

    def _pseudo(self, step: Step) -> Tensor:
        """Sum of the dice losses between the masks and the refined mean of both networks' masks."""
        from misa.ops.meanfield import mean_field

        own, masks = step.positives, step.positives.mask_logits.sigmoid()
        theirs = None if step.shadow is None else step.shadow.mask_logits
        refined = mean_field(
            self._mean(step, masks, theirs), own.box_masks, self._kernel(step), own.image.tolist(), steps=self.steps
        )
        return self._dice(masks, own.box_masks, refined)

    def _mean(self, step: Step, masks: Tensor, theirs: Tensor | None) -> Tensor:
        """Mean of the student's masks and the EMA model's (`theirs`, n h w, logits); before its start the former."""
        if step.ramp(self.shadow_start) < 1:
            return masks.detach()
        assert theirs is not None
        return (masks.detach() + theirs.sigmoid()) / 2

    def _kernel(self, step: Step) -> Tensor:
        from misa.ops.meanfield import window_kernel

        return window_kernel(step.batch.images, valid=step.batch.valid, theta_color=self.theta_color)

    def _dice(self, masks: Tensor, boxes: Tensor, refined: Tensor) -> Tensor:
        """Sum of the dice losses between the masks, within their boxes dilated by one pixel, and the refined ones."""
        import torch

        from misa.losses.pseudo import dice

        around = torch.nn.functional.max_pool2d(boxes.to(masks.dtype)[:, None], 3, stride=1, padding=1)[:, 0]
        return dice(masks * around, refined.to(masks.dtype), self.eps).sum()

    def _bank_terms(self, step: Step, memory: nn.Module, bank: Bank) -> dict[str, Term]:
        assert step.per_box is not None
        masks = step.per_box.positives.mask_logits.sigmoid()
        nothing = (0 * masks.sum()).expand(3)
        transfer, match, used = _where(
            self._opened(step, memory, bank), lambda: self._matched(step, masks, memory, bank), nothing
        )
        used, every = used.detach(), masks.new_full((), len(masks))
        return {
            "loss_transfer": Term(self.pseudo_weight * transfer / max(len(masks), 1), every, once=True),
            "loss_match": Term(bank.weight * match / used.clamp(min=1), used, once=True),
        }

    def _opened(self, step: Step, memory: nn.Module, bank: Bank) -> Tensor:
        return _before(memory, step) < min(self.gate, bank.gate)

    def _matched(self, step: Step, masks: Tensor, memory: nn.Module, bank: Bank) -> Tensor:
        """Sums of L_transfer and L_match, and the number of boxes with enough similar objects (3)."""
        import torch

        from misa.losses.correspondence import correspondence_loss
        from misa.ops.bank import objects_in, put_back
        from misa.ops.correspond import match, similarity, transfer
        from misa.ops.meanfield import mean_field

        assert step.per_box is not None
        own, theirs = step.per_box.positives, step.shadow_per_box
        found = objects_in(
            step.per_box.finest, masks.detach(), own.box_masks, own.image, grid=bank.grid, side=bank.side
        )
        keys, used = self._alike(found, own.labels, memory, bank)
        message = masks.new_zeros(len(masks), 2, bank.side, bank.side)
        total = 0 * masks.sum()
        # Unused boxes are skipped on the CPU only: elsewhere the test would synchronize with the host.
        some = used.nonzero().flatten().tolist() if used.device.type == "cpu" else list(range(len(masks)))
        cosines = [similarity(found.features[g], keys.features[g]) for g in some]
        plans = match(torch.cat(cosines).detach()).split(bank.keys) if some else ()
        for g, cosine, plan in zip(some, cosines, plans, strict=True):
            message[g] = used[g] * transfer(plan, cosine.detach(), found.masks[g], keys.masks[g])
            total = total + used[g] * correspondence_loss(cosine, plan, form=bank.form)
        refined = mean_field(
            self._mean(step, masks, None if theirs is None else theirs.positives.mask_logits),
            own.box_masks,
            self._kernel(step),
            own.image.tolist(),
            steps=self.steps,
            message=put_back(message, own.box_masks),
            share=bank.share,
        )
        second = self._dice(masks, own.box_masks, refined)
        second = bank.gradient * second + (1 - bank.gradient) * second.detach()
        return torch.stack([second, total, used.sum().to(total.dtype)])

    @staticmethod
    def _alike(found: Objects, labels: Tensor, memory: nn.Module, bank: Bank) -> tuple[Objects, Tensor]:
        """For every box `keys` objects of its class (g k …), and whether that many are similar enough (g)."""
        import torch

        from misa.ops.bank import Objects, alike, first

        rows = Objects(*(memory.get_buffer(name) for name in PARTS))
        chosen, used = [], []
        for g, label in enumerate(labels.tolist()):
            here = slice(label * bank.slots, (label + 1) * bank.slots)
            own = Objects(*(part[g].detach() for part in found))
            place, enough = first(alike(own, Objects(*(part[here].float() for part in rows))), bank.keys)
            chosen.append(label * bank.slots + place)
            used.append(enough)
        if not chosen:
            return Objects(*(part[:0, None].float() for part in rows)), rows.aspect.new_zeros(0, dtype=torch.bool)
        places = torch.stack(chosen)
        return Objects(*(part[places].float() for part in rows)), torch.stack(used)

    def update(self, step: Step, memory: nn.Module | None) -> None:
        """Add objects to the bank if its gate is open; then r ← 0.9 r + 0.1 L_projection, a mean over all instances.

        The mean is over an optimizer step: with gradient accumulation r changes once for all micro-batches.
        """
        import torch

        from misa.losses.projection import projection_loss

        assert memory is not None
        if self.bank is not None:
            self._keep(step, memory, self.bank)
        projection = projection_loss(step.positives.mask_logits.sigmoid(), step.positives.box_masks, eps=self.eps)
        before, sums = _before(memory, step), memory.get_buffer("sums")
        if memory.iteration != step.iteration:
            memory.get_buffer("before").copy_(before)
            sums.zero_()
            memory.iteration = step.iteration  # type: ignore[assignment]
        total, count = sums.add_(step.across(torch.stack([projection.sum(), projection.new_full((), len(projection))])))
        memory.get_buffer("running").copy_(torch.where(count > 0, 0.9 * before + 0.1 * total / count, before))

    def _keep(self, step: Step, memory: nn.Module, bank: Bank) -> None:
        """Store all processes' large objects as the EMA model sees them, in the order of the batch."""
        import torch

        from misa.ops.bank import objects_in, ring_slots
        from misa.ops.boxes import extents

        opened = self._opened(step, memory, bank)
        if opened.device.type == "cpu" and not opened:
            return
        seen = step.shadow_per_box or step.per_box
        assert isinstance(seen, PerBox)
        own = seen.positives
        objects = objects_in(
            seen.finest, own.mask_logits.sigmoid(), own.box_masks, own.image, grid=bank.grid, side=bank.side
        )
        x1, y1, x2, y2 = extents(own.box_masks.float()).unbind(dim=1)
        large = (x2 - x1 > bank.least) & (y2 - y1 > bank.least) & opened
        host = torch.stack([own.labels, own.image]).to(large.device, non_blocking=True)
        rows = [
            *(part.float().flatten(1) for part in objects[:2]),
            *(each[:, None] for each in (objects.aspect, *host)),
        ]
        # Equal shapes in all processes: the kept rows first, then truncated or zero-padded to `a_step`.
        packed = torch.cat([large[:, None].float(), *(each.float() for each in rows)], dim=1)
        packed = packed[(~large).to(torch.uint8).argsort(stable=True)[: bank.a_step]]
        packed = torch.cat([packed, packed.new_zeros(bank.a_step - len(packed), packed.shape[1])])
        every = step.together(packed)
        image = every[..., -1] * len(every) + torch.arange(len(every), device=every.device)[:, None]
        every = every.flatten(0, 1)[image.flatten().argsort(stable=True)]
        keep, features, masks, aspect, labels, _ = every.split([1, *(each.shape[1] for each in rows)], dim=1)
        filled = memory.get_buffer("filled")
        slots, total = ring_slots(labels[:, 0].long(), keep[:, 0] > 0, filled, bank.slots)
        filled.copy_(total)
        for name, values in zip(PARTS, (features, masks, aspect[:, 0]), strict=True):
            kept = memory.get_buffer(name)
            kept[slots] = values.view(-1, *kept.shape[1:]).to(kept.dtype)
            kept[-1] = 0


def _before(memory: nn.Module, step: Step) -> Tensor:
    """r before this optimizer step, by which its gates are set, the same for all its micro-batches."""
    return memory.get_buffer("before" if memory.iteration == step.iteration else "running")


def _where(opened: Tensor, compute: Callable[[], Tensor], otherwise: Tensor) -> Tensor:
    """Return compute() if `opened` (a scalar), else `otherwise`; on the CPU `compute` is called only if needed."""
    import torch

    if opened.device.type != "cpu":  # a branch would synchronize with the host
        return torch.where(opened, compute(), otherwise)
    return compute() if opened else otherwise
