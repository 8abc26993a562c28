"""Frequency-space distillation, FSD (§3.2, Eq. 3, 5, 6): the student's dense feature learns from the teacher's.

Axes: b image · d channel · h row · w column. S is the teacher's feature, I the student's after its adapter.

The filter is linear, so S' − I' = filter(S − I), and each pixel uses one band, set by whether it is inside a box. With
the low pass L of `misa.ops.frequency`, x = I − S and per-pixel constants a, c the loss is Σ weight · (a x + c L x)²
and its gradient 2 (a y + L(c y)) with y = weight · (a x + c L x): one low pass forward, one backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from misa.errors import NotFinite
from misa.ops.affinity import promote
from misa.ops.axes import single
from misa.ops.frequency import Transform, check_band, disc_filter, is_finite

# Values filtered at a time on a CPU, so that they stay in its cache (1 MB of float32); three times faster at d = 256.
BLOCK = 2**18


@single(student=4, teacher=4, box_mask=4, valid=4)
def distillation_loss(
    student: Float[Tensor, "b d h w"],
    teacher: Float[Tensor, "b d h w"],
    box_mask: Bool[Tensor, "b 1 h w"],
    *,
    radius: float = 10.0,
    scale: float = 0.2,
    bg_weight: float = 6.0,
    fg_weight: float = 10.0,
    frequency: bool = True,
    space: bool = True,
    valid: Bool[Tensor, "b 1 h w"] | None = None,
    plain_weight: float | None = None,
    transform: Transform = "auto",
    across: Callable[[Tensor], Tensor] = lambda pixels: pixels,
) -> Float[Tensor, ""]:
    """Return L_trans (Eq. 6): squared differences of the low band outside the boxes and the high band inside them.

    Sums over channels and divides by 2 · pixels of the region in the batch, as Eq. 6 prints it; an empty region
    contributes 0. `box_mask` is the union of an image's boxes. `valid` excludes padding from both regions and from
    their counts; the filter still sees the whole map. No gradient reaches `teacher`. `transform` as in `high_pass`.

    `frequency` and `space` are the rows of Table 4, which the paper does not spell out. We read them as
      both        bg_weight · low band outside + fg_weight · high band inside: Eq. 6
      frequency   bg_weight · low band + fg_weight · high band, both over all pixels
      space       bg_weight · features outside + fg_weight · features inside, not filtered
      neither     `plain_weight` · features over all pixels, not filtered; by default the mean of the other two weights

    `across` is applied to every pixel count. In distributed training, where gradients are averaged, the mean over all
    ranks makes the result the loss of the whole batch.

    Computes in float32 for half precision and under autocast. Raises ValueError on shapes, types or ranges that do
    not fit, and on the CPU NotFinite, a ValueError, on NaN or Inf; on CUDA it does not synchronize with the host.
    """
    _check(student, teacher, box_mask, valid)
    check_band("distillation_loss", radius, scale)
    plain_weight = (bg_weight + fg_weight) / 2 if plain_weight is None else plain_weight
    if not all(0 <= weight < float("inf") for weight in (bg_weight, fg_weight, plain_weight)):
        raise ValueError(
            "distillation_loss needs finite weights of zero or more: "
            f"bg_weight is {bg_weight}, fg_weight {fg_weight}, plain_weight {plain_weight}."
        )
    with torch.autocast(student.device.type, enabled=False):
        i, s = promote(student), promote(teacher.detach())
        everywhere = torch.ones_like(box_mask) if valid is None else valid
        outside, inside = everywhere & ~box_mask, everywhere & box_mask
        h, w = i.shape[-2:]
        kind = torch.promote_types(i.dtype, s.dtype)
        low = disc_filter(h, w, radius, transform=transform, dtype=kind, device=i.device)
        one = torch.ones((), dtype=kind, device=i.device)
        if frequency and space:
            a, c = torch.where(box_mask, one, scale), torch.where(box_mask, scale - one, 1 - scale)
            weight = _share(outside, bg_weight, kind, across) + _share(inside, fg_weight, kind, across)
            loss = _FilteredSquares.apply(i, s, a, c, weight, low)
        elif frequency:
            loss = _FilteredSquares.apply(
                i, s, one * scale, one * (1 - scale), _share(everywhere, bg_weight, kind, across), low
            )
            loss = loss + _FilteredSquares.apply(
                i, s, one, scale - one, _share(everywhere, fg_weight, kind, across), low
            )
        elif space:
            loss = _squares(i, s, _share(outside, bg_weight, kind, across) + _share(inside, fg_weight, kind, across))
        else:
            loss = _squares(i, s, _share(everywhere, plain_weight, kind, across))
    if not is_finite(loss):
        wrong = [n for n, v in (("student", student), ("teacher", teacher)) if not v.isfinite().all()]
        where = f"{' and '.join(wrong)} hold NaN or Inf" if wrong else "the squared difference overflows"
        raise NotFinite(f"distillation_loss is not finite: {where}.")
    return loss


def in_units_of_spread(
    features: Float[Tensor, "b d h w"],
    valid: Bool[Tensor, "b 1 h w"] | None = None,
    *,
    across: Callable[[Tensor], Tensor] = lambda pixels: pixels,
) -> Float[Tensor, "b d h w"]:
    """Return S / (√d · σ), σ the standard deviation of the batch's valid entries around each channel's mean.

    With such a target `distillation_loss` is a mean over channels in units of σ, independent of the teacher's scale and
    width; the paper fixes neither, nor a weight (Eq. 6). Channel means are kept: the adapter has a bias. A constant S
    is returned unchanged. `across` as in `distillation_loss`.
    """
    features = promote(features)
    return features / spread_unit(features, valid, across=across)


def spread_unit(
    features: Float[Tensor, "b d h w"],
    valid: Bool[Tensor, "b 1 h w"] | None = None,
    *,
    across: Callable[[Tensor], Tensor] = lambda pixels: pixels,
) -> Float[Tensor, ""]:
    """Return √d · σ, the divisor of `in_units_of_spread`; 1 for a constant S."""
    features = promote(features)
    weight = torch.ones_like(features[:, :1]) if valid is None else valid.to(features.dtype)
    count = across(weight.sum()).clamp(min=1e-3)
    mean = across((features * weight).sum(dim=(0, 2, 3), keepdim=True)) / count
    variance = across(((features - mean).square() * weight).sum()) / count
    return torch.where(variance > 0, variance, 1).sqrt()


def _share(
    region: Bool[Tensor, "b 1 h w"], weight: float, dtype: torch.dtype, across: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b 1 h w"]:
    """Return weight / (2 · pixels of the region in the batch) on the region, 0 elsewhere."""
    return region * (weight / (2 * across(region.sum().to(dtype)).clamp(min=1e-3)))


def _squares(i: Tensor, s: Tensor, weight: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    return ((i - s).square().sum(dim=1, keepdim=True) * weight).sum()


class _FilteredSquares(torch.autograd.Function):
    """Σ weight · (a x + c L x)² for x = i − s, a few channels at a time; only `i` gets a gradient.

    Saves one map of the feature's size for the backward pass. a and c are scalars or (b 1 h w).
    """

    @staticmethod
    def forward(
        ctx: Any,
        i: Float[Tensor, "b d h w"],
        s: Float[Tensor, "b d h w"],
        a: Tensor,
        c: Tensor,
        weight: Float[Tensor, "b 1 h w"],
        low: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, ""]:
        banded = torch.empty_like(i, dtype=weight.dtype)
        energy = torch.zeros_like(weight)
        for block in _blocks(i):
            x = i[:, block] - s[:, block]
            passed = low(x)
            x.mul_(a).addcmul_(passed, c)
            banded[:, block] = x
            energy += torch.mul(x, x, out=passed).sum(dim=1, keepdim=True)
        ctx.save_for_backward(banded, a, c, weight)
        ctx.low, ctx.kind = low, i.dtype
        return (energy * weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        banded, a, c, weight = ctx.saved_tensors
        with torch.autocast(banded.device.type, enabled=False):
            slope = 2 * grad * weight
            plain, filtered = slope * a, slope * c
            result = torch.empty_like(banded, dtype=ctx.kind)
            for block in _blocks(banded):
                y = banded[:, block]
                result[:, block] = ctx.low(y * filtered).addcmul_(y, plain)
        return result, None, None, None, None, None


def _blocks(features: Float[Tensor, "b d h w"]) -> list[slice]:
    b, d, h, w = features.shape
    step = d if features.device.type != "cpu" else max(1, BLOCK // max(1, b * h * w))
    return [slice(first, first + step) for first in range(0, d, step)] if d else []


def _check(student: Tensor, teacher: Tensor, box_mask: Tensor, valid: Tensor | None) -> None:
    if student.dim() != 4 or 0 in student.shape[-2:]:
        raise ValueError(f"distillation_loss needs features of shape (b, d, h, w): student is {tuple(student.shape)}.")
    if student.shape != teacher.shape:
        raise ValueError(
            "distillation_loss compares features bin by bin, so both need one shape: "
            f"student is {tuple(student.shape)}, teacher is {tuple(teacher.shape)}. "
            "Pass the student through misa.models.students.adapter.Adapter first."
        )
    b, _, h, w = student.shape
    for name, mask in (("box_mask", box_mask), ("valid", valid)):
        if mask is not None and (tuple(mask.shape) != (b, 1, h, w) or mask.dtype != torch.bool):
            raise ValueError(
                f"distillation_loss needs {name} as bool of shape {(b, 1, h, w)}: "
                f"it is {mask.dtype} of shape {tuple(mask.shape)}."
            )
