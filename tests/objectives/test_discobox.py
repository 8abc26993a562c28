"""DiscoBox: its gate, its copy of the student, and what the pseudo masks are made of."""

import pytest
import torch
from torch.testing import assert_close

from misa.losses.inputs import Batch, Positives
from misa.losses.projection import projection_loss
from misa.losses.pseudo import dice
from misa.objectives.base import Ramp, Step
from misa.objectives.discobox import DiscoBox
from misa.ops.meanfield import mean_field, window_kernel


def given(rng, n=3, h=9, w=10):
    boxes = torch.zeros(n, h, w, dtype=torch.bool)
    boxes[:, 2:6, 1:7] = True
    image = torch.tensor([0, 1, 1])[:n]

    def positives():
        logits = torch.randn(n, h, w, generator=rng)
        return Positives(logits.requires_grad_(), boxes, torch.zeros(n).long(), image, torch.arange(n))

    batch = Batch(torch.randn(2, 3, h, w, generator=rng), torch.ones(2, h, w, dtype=torch.bool))
    shadow = positives()
    return Step(positives(), batch, total=100, shadow=shadow._replace(mask_logits=shadow.mask_logits.detach()))


def open_gate(objective):
    memory = objective.memory(1, 1)
    memory.running.fill_(0.1)
    return memory


def losses(objective, step, memory):
    return {name: term.loss for name, term in objective.losses(step, memory).items()}


def dilated(boxes):
    """The box and one cell around it, in loops."""
    out = boxes.clone()
    n, h, w = boxes.shape
    for i in range(n):
        for y in range(h):
            for x in range(w):
                out[i, y, x] = boxes[i, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].any()
    return out


@pytest.mark.parametrize("started", [False, True])
def test_the_pseudo_masks_are_of_both_networks_once_the_copy_follows(rng, started):
    objective, step = DiscoBox(shadow_start=Ramp(10, 10)), given(rng)._replace(iteration=10 if started else 9)
    found = losses(objective, step, open_gate(objective))
    masks, boxes = step.positives.mask_logits.sigmoid(), step.positives.box_masks
    mean = (masks + step.shadow.mask_logits.sigmoid()) / 2 if started else masks
    target = mean_field(mean.detach(), boxes, window_kernel(step.batch.images), [0, 1, 1])
    expected = dice(masks * dilated(boxes), target.float(), 2e-3).mean()
    assert_close(found["loss_pseudo"], expected)
    assert_close(found["loss_projection"], projection_loss(masks, boxes, eps=2e-3).mean())


def test_nothing_outside_the_dilated_box_learns_from_the_pseudo_masks(rng):
    objective, step = DiscoBox(), given(rng)
    losses(objective, step, open_gate(objective))["loss_pseudo"].backward()
    moved = step.positives.mask_logits.grad != 0
    assert not moved[~dilated(step.positives.box_masks)].any()
    assert moved[step.positives.box_masks].any()


def test_the_gate_opens_at_the_20th_step_of_perfect_masks():
    """r after k steps of loss 0 is 2 · 0.9^k: 0.3002 at k = 18, 0.270 at k = 19."""
    boxes = torch.zeros(1, 9, 9, dtype=torch.bool)
    boxes[:, 2:7, 2:7] = True
    positives = Positives(200 * (boxes.float() - 0.5), boxes, *(torch.zeros(1).long() for _ in range(3)))
    step = Step(positives, Batch(torch.zeros(1, 3, 9, 9), torch.ones(1, 9, 9, dtype=torch.bool)))
    objective = DiscoBox(eps=0.0)
    memory, opened = objective.memory(1, 1), []
    for _ in range(25):
        opened.append(bool(memory.running < objective.gate))
        objective.update(step, memory)
    assert opened.index(True) == 19
    assert_close(memory.running.item(), 2 * 0.9**25, rtol=1e-4, atol=0)


def test_the_gate_shut_is_a_zero_with_a_gradient(rng):
    objective, step = DiscoBox(), given(rng)
    found = losses(objective, step, objective.memory(1, 1))
    assert found["loss_pseudo"] == 0
    found["loss_pseudo"].backward()
    assert step.positives.mask_logits.grad.abs().sum() == 0


def test_the_running_mean_is_of_all_processes(rng):
    """Two processes with one and three instances: each sees the mean of the two as `across` gives it."""
    objective, step = DiscoBox(), given(rng)
    projection = projection_loss(step.positives.mask_logits.detach().sigmoid(), step.positives.box_masks, eps=2e-3)
    other = torch.tensor([1.5, 1.0])  # its sum and count
    memory = objective.memory(1, 1)
    objective.update(step._replace(across=lambda own: (own + other) / 2), memory)
    assert_close(memory.running.item(), (1.8 + 0.1 * (projection.sum() + 1.5) / 4).item())


def test_the_copy_begins_once_and_follows():
    objective = DiscoBox(shadow_start=Ramp(0.2, 0.2, of="run"), momentum=0.99)
    found = [objective.shadow_momentum(i, 100) for i in range(18, 24)]
    assert found == [1.0, 1.0, 0.0, 0.99, 0.99, 0.99]


def test_without_positives_every_term_is_a_zero_with_a_gradient(rng):
    objective, step = DiscoBox(), given(rng, n=0)
    memory = open_gate(objective)
    found = losses(objective, step, memory)
    sum(found.values()).backward()
    assert [value.item() for value in found.values()] == [0, 0]
    objective.update(step, memory)
    assert_close(memory.running.item(), 0.1)
