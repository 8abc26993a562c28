"""Diagnostics of a monitored step against plain loops; monitoring changes nothing."""

import pytest
import torch
from torch import nn

from misa.losses.inputs import Positives
from misa.models.students.step_health import gradient_shares, mask_health


def test_fill_and_boxes_against_a_loop():
    rng = torch.Generator().manual_seed(0)
    boxes = torch.zeros(4, 9, 11, dtype=torch.bool)
    for i, (y, x, h, w) in enumerate([(0, 0, 4, 5), (2, 3, 6, 6), (8, 10, 1, 1), (1, 1, 7, 8)]):
        boxes[i, y : y + h, x : x + w] = True
    logits = torch.randn(4, 9, 11, generator=rng)
    logits[1] = torch.where(boxes[1], 3.0, -3.0)  # exactly its box
    fill, alike = [], []
    for mask, box in zip(logits.sigmoid() > 0.5, boxes, strict=True):
        pixels = [(bool(m), bool(b)) for m, b in zip(mask.flatten(), box.flatten(), strict=True)]
        inside = sum(m and b for m, b in pixels)
        fill.append(inside / sum(b for _, b in pixels))
        alike.append(inside / max(1, sum(m or b for m, b in pixels)) >= 0.95)
    found = mask_health(Positives(logits, boxes, *(torch.zeros(4, dtype=torch.long) for _ in range(3))))
    assert float(found["mask_fill"]) == pytest.approx(sum(fill) / 4)
    assert float(found["mask_is_box"]) == pytest.approx(sum(alike) / 4)
    assert sum(alike) >= 1


def test_no_positives_are_no_news():
    empty = Positives(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4), *torch.zeros(3, 0))
    assert {name: float(value) for name, value in mask_health(empty).items()} == {"mask_fill": 0, "mask_is_box": 0}


def test_shares_are_those_of_separate_backward_passes():
    torch.manual_seed(0)
    net = nn.Linear(3, 5)
    x = torch.randn(4, 3)
    maps = (net(x), net(2 * x))
    losses = {
        "loss_a": maps[0].square().sum(),
        "loss_b": (maps[0] * maps[1]).sum(),
        "d0.loss_a": 3 * maps[1].sum(),
        "loss_far": torch.zeros(1, requires_grad=True).sum(),  # independent of all maps
        "loss_fixed": torch.ones(()),  # without a graph
    }
    shares = gradient_shares(losses, maps)
    assert not any("loss" in name for name in shares)  # mmengine would add such names to the loss
    norms = {}
    for name, terms in {"a": ("loss_a", "d0.loss_a"), "b": ("loss_b",)}.items():
        for kept in maps:
            kept.retain_grad()
            kept.grad = None
        sum(losses[term] for term in terms).backward(retain_graph=True)
        norms[name] = torch.cat([kept.grad.flatten() for kept in maps if kept.grad is not None]).norm()
    total = sum(norms.values())
    assert float(shares["gradient_far"]) == float(shares["gradient_fixed"]) == 0
    for name, norm in norms.items():
        assert float(shares[f"gradient_{name}"]) == pytest.approx(float(norm / total), rel=1e-5)
