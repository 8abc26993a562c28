"""Per-step diagnostics: mask fill, degenerate (box-shaped) masks, and each loss's share of the gradient."""

from collections.abc import Mapping

import torch
from torch import Tensor

from misa.losses.inputs import Positives

ALIKE = 0.95  # minimum IoU of a mask with its box to count as box-shaped


def mask_health(positives: Positives) -> dict[str, Tensor]:
    """`mask_fill`: mean of mask area inside the box over box area; `mask_is_box`: share of box-shaped masks.

    Masks are binarized at 0.5. Both are 0 without positives.
    """
    with torch.no_grad():
        masks, boxes = positives.mask_logits > 0, positives.box_masks.bool()
        inside, area = (masks & boxes).sum(dim=(1, 2)), boxes.sum(dim=(1, 2)).clamp(min=1)
        overlap = inside / (masks | boxes).sum(dim=(1, 2)).clamp(min=1)
        count = max(len(masks), 1)
        return {"mask_fill": (inside / area).sum() / count, "mask_is_box": (overlap >= ALIKE).sum() / count}


def gradient_shares(losses: Mapping[str, Tensor], features: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """`gradient_<term>`: each term's share of the sum of gradient norms at the maps shared by all terms.

    `loss_x` and `d0.loss_x` are one term, x. Runs one backward pass per term, up to `features`, and retains the graph
    for the training step. The share of a term without a gradient is 0.
    """
    terms: dict[str, Tensor] = {}
    for name, loss in losses.items():
        term = name.rpartition(".")[2].removeprefix("loss_")
        terms[term] = terms[term] + loss if term in terms else loss
    norms = {}
    for term, loss in terms.items():
        grads: tuple[Tensor | None, ...] = ()
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
        squares = [grad.float().square().sum() for grad in grads if grad is not None]
        norms[term] = torch.stack(squares).sum().sqrt() if squares else torch.zeros_like(loss)
    total = torch.stack(list(norms.values())).sum().clamp(min=1e-12)
    return {f"gradient_{term}": norm / total for term, norm in norms.items()}
