"""Per-step diagnostics: how masks fill their boxes, masks that are boxes, and each loss's gradient share."""

from collections.abc import Mapping

import torch
from torch import Tensor

from misa.losses.inputs import Positives

ALIKE = 0.95  # a mask with this IoU with its box, or more, is just the box


def mask_health(positives: Positives) -> dict[str, Tensor]:
    """`mask_fill`: mask area inside the box over box area, mean; `mask_is_box`: share of masks that are their box.

    Masks at probability 0.5. Both are 0 without positives.
    """
    with torch.no_grad():
        masks, boxes = positives.mask_logits > 0, positives.box_masks.bool()
        inside, area = (masks & boxes).sum(dim=(1, 2)), boxes.sum(dim=(1, 2)).clamp(min=1)
        overlap = inside / (masks | boxes).sum(dim=(1, 2)).clamp(min=1)
        count = max(len(masks), 1)
        return {"mask_fill": (inside / area).sum() / count, "mask_is_box": (overlap >= ALIKE).sum() / count}


def gradient_shares(losses: Mapping[str, Tensor], features: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """`gradient_<term>`: each term's share of the sum of gradient norms at the maps that all of them come from.

    `loss_x` and `d0.loss_x` are one term, x. One backward pass a term, as far as `features`; the graph stays for the
    step's own.
    """
    terms: dict[str, Tensor] = {}
    for name, loss in losses.items():
        term = name.rpartition(".")[2].removeprefix("loss_")
        terms[term] = terms[term] + loss if term in terms else loss
    norms = {}
    for term, loss in terms.items():
        grads = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
        squares = [grad.float().square().sum() for grad in grads if grad is not None]
        norms[term] = torch.stack(squares).sum().sqrt() if squares else torch.zeros_like(loss)
    total = torch.stack(list(norms.values())).sum().clamp(min=1e-12)
    return {f"gradient_{term}": norm / total for term, norm in norms.items()}
