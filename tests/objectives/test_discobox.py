"""DiscoBox: its gate, its EMA copy of the student, and its pseudo masks."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from misa.losses.correspondence import correspondence_loss
from misa.losses.inputs import Batch, Positives
from misa.losses.projection import projection_loss
from misa.losses.pseudo import dice
from misa.objectives.base import PerBox, Ramp, Step
from misa.objectives.discobox import PARTS, Bank, DiscoBox
from misa.ops.bank import Objects, alike, objects_in, put_back
from misa.ops.correspond import match, similarity, transfer
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
    """Returns box masks dilated by one cell, in loops."""
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
    for iteration in range(25):
        opened.append(bool(memory.running < objective.gate))
        objective.update(step._replace(iteration=iteration), memory)
    assert opened.index(True) == 19
    assert_close(memory.running.item(), 2 * 0.9**25, rtol=1e-4, atol=0)


def test_the_gate_shut_is_a_zero_with_a_gradient(rng):
    objective, step = DiscoBox(), given(rng)
    found = losses(objective, step, objective.memory(1, 1))
    assert found["loss_pseudo"] == 0
    found["loss_pseudo"].backward()
    assert step.positives.mask_logits.grad.abs().sum() == 0


def test_the_running_mean_is_of_all_processes(rng):
    """Two processes with one and three instances: both get the joint mean given by `across`."""
    objective, step = DiscoBox(), given(rng)
    projection = projection_loss(step.positives.mask_logits.detach().sigmoid(), step.positives.box_masks, eps=2e-3)
    other = torch.tensor([1.5, 1.0])  # its sum and count
    memory = objective.memory(1, 1)
    objective.update(step._replace(across=lambda own: (own + other) / 2), memory)
    assert_close(memory.running.item(), (1.8 + 0.1 * (projection.sum() + 1.5) / 4).item())


def test_the_running_mean_moves_once_per_optimizer_step(rng):
    """Micro-batches of one and two instances: r as of all three at once, and one gate for the whole step."""
    objective, in_turn, r = DiscoBox(), DiscoBox().memory(1, 1), 0.29
    in_turn.running.fill_(r)
    for iteration in range(3):
        whole, opened = given(rng, n=3), []
        masks = whole.positives.mask_logits.detach().sigmoid()
        r = 0.9 * r + 0.1 * projection_loss(masks, whole.positives.box_masks, eps=2e-3).mean().item()
        for part in (of_some(whole, slice(0, 1)), of_some(whole, slice(1, 3))):
            part = part._replace(iteration=iteration)
            opened.append(bool(losses(objective, part, in_turn)["loss_pseudo"] > 0))
            objective.update(part, in_turn)
        assert opened == [iteration == 0] * 2  # the masks are random: r leaves the gate in the first step
        assert_close(in_turn.running.item(), r)
    assert set(in_turn.state_dict()) == {"running"}


def of_some(step, which):
    """Returns a step with some of its positives."""
    own, theirs = (Positives(*(field[which] for field in each)) for each in (step.positives, step.shadow))
    return step._replace(positives=own, shadow=theirs)


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


# The object bank -----------------------------------------------------------------------------------------------------
BANK = Bank(slots=4, least=3, grid=3, side=6, keys=2, a_step=5)
BANKED = DiscoBox(shadow_start=Ramp(10, 10), bank=BANK)


def with_boxes(rng):
    """Two boxes of class 1 and one of class 0, with the networks' masks of each and their finest maps."""
    h, w = 12, 14
    boxes, things = torch.zeros(2, 3, h, w, dtype=torch.bool)
    boxes[:, 1:11, 2:10] = things[:, 3:9, 4:8] = True
    labels, image = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1])

    def network():
        logits = torch.where(things, 3.5, -4.5) + torch.rand(3, h, w, generator=rng)
        finest = torch.rand(2, 4, 2 * h, 2 * w, generator=rng) + 0.3
        return PerBox(Positives(logits.requires_grad_(), boxes, labels, image, torch.arange(3)), finest)

    student, copy = network(), network()
    step = given(rng, h=h, w=w)._replace(iteration=10, per_box=student, shadow_per_box=copy)
    return step._replace(per_box=student._replace(finest=student.finest.requires_grad_()))


def banked(step, times=1):
    memory = BANKED.memory(3, 4)
    memory.running.fill_(0.1)
    for iteration in range(times):
        BANKED.update(step._replace(iteration=iteration), memory)
        memory.running.fill_(0.1)
    return memory


def test_the_bank_holds_large_objects_as_the_copy_sees_them(rng):
    step = with_boxes(rng)
    memory = banked(step)
    assert memory.filled.tolist() == [1, 2, 0]
    finest, (logits, boxes, _, image, _) = step.shadow_per_box.finest, step.shadow_per_box.positives
    expected = objects_in(finest, logits.sigmoid(), boxes, image, grid=3, side=6)
    for slot, box in ((0, 1), (4, 0), (5, 2)):
        assert_close(memory.features[slot].float(), expected.features[box], atol=1e-3, rtol=0)
        assert_close(memory.masks[slot].float(), expected.masks[box].detach(), atol=1e-3, rtol=0)
        assert_close(memory.aspect[slot], torch.tensor(8 / 10))
    empty = [slot for slot in range(13) if slot not in (0, 4, 5)]
    assert not memory.features[empty].any()
    assert not memory.aspect[empty].any()
    small = dataclasses.replace(BANKED, bank=dataclasses.replace(BANK, least=8))  # the boxes are 8 x 10 cells
    memory = small.memory(3, 4)
    memory.running.fill_(0.1)
    small.update(step, memory)
    assert memory.filled.tolist() == [0, 0, 0]


def test_nothing_enters_or_leaves_a_bank_that_is_shut(rng):
    step = with_boxes(rng)
    memory = banked(step)
    before = {name: value.clone() for name, value in memory.state_dict().items()}
    memory.running.fill_(0.25)  # pseudo masks are used, the bank is not
    found = losses(BANKED, step, memory)
    assert found["loss_pseudo"] > 0
    assert found["loss_transfer"] == 0
    assert found["loss_match"] == 0
    BANKED.update(step, memory)
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items() if name != "running")


def slow_terms(step, memory):
    """Both terms box by box in float64, with functions that are tested against loops elsewhere."""
    own, theirs = step.per_box.positives, step.shadow_per_box.positives
    masks = own.mask_logits.detach().double().sigmoid()
    found = objects_in(step.per_box.finest.detach().double(), masks, own.box_masks, own.image, grid=3, side=6)
    transferred, matched = [], []
    for g, label in enumerate(own.labels.tolist()):
        message, slots = torch.zeros(1, 2, 6, 6, dtype=torch.float64), range(4 * label, 4 * label + 4)
        rows = Objects(*(getattr(memory, name)[list(slots)].double() for name in PARTS))
        hits = alike(Objects(*(part[g] for part in found)), rows).nonzero().flatten().tolist()[:2]
        if len(hits) == 2:
            cosines = similarity(found.features[g], rows.features[hits])
            plan = match(cosines)
            matched.append(correspondence_loss(cosines, plan))
            message = transfer(plan, cosines, found.masks[g], rows.masks[hits])[None]
        box = own.box_masks[g : g + 1]
        kernel = window_kernel(step.batch.images.double())
        mean = (masks[g : g + 1] + theirs.mask_logits[g : g + 1].double().sigmoid()) / 2
        target = mean_field(mean, box, kernel, [int(own.image[g])], message=put_back(message, box))
        transferred.append(dice(masks[g : g + 1] * dilated(box), target.double(), 2e-3))
    return torch.cat(transferred).mean(), torch.stack(matched).mean(), len(matched)


def test_the_terms_of_the_bank_equal_each_box_on_its_own(rng):
    """Class 1 has two objects in the bank and uses it, class 0 has one and does not."""
    step = with_boxes(rng)
    memory = banked(step)
    transferred, matched, used = slow_terms(step, memory)
    terms = BANKED.losses(step, memory)
    assert used == 2
    assert_close(terms["loss_transfer"].loss.double(), transferred, atol=1e-5, rtol=0)
    assert_close(terms["loss_match"].loss.double(), matched, atol=1e-4, rtol=0)
    assert (terms["loss_transfer"].per, terms["loss_match"].per) == (3, 2)
    assert slow_terms(step, banked(step, times=2))[2] == 3


def test_a_box_with_one_object_too_few_is_not_used(rng):
    step = with_boxes(rng)
    memory = banked(step, times=3)  # class 1: six objects through four slots, class 0: three
    assert memory.filled.tolist() == [3, 6, 0]
    assert BANKED.losses(step, memory)["loss_match"].per == 3
    memory.aspect[1:4] = 0  # of class 0 one is left
    assert BANKED.losses(step, memory)["loss_match"].per == 2


def test_the_second_masks_learn_a_hundredth(rng):
    step = with_boxes(rng)
    memory = banked(step)
    whole = dataclasses.replace(BANKED, bank=dataclasses.replace(BANK, gradient=1.0))
    logits, grads, values = step.per_box.positives.mask_logits, [], []
    for objective in (BANKED, whole):
        value = losses(objective, step, memory)["loss_transfer"]
        grads.append(torch.autograd.grad(value, logits)[0])
        values.append(value.detach())
    assert_close(values[0], values[1])
    assert_close(grads[0], 0.01 * grads[1])
    assert grads[1].abs().sum() > 0


def test_matches_teach_the_features_alone(rng):
    step = with_boxes(rng)
    memory = banked(step)
    found = losses(dataclasses.replace(BANKED, bank=dataclasses.replace(BANK, form="intended")), step, memory)
    finest, logits = step.per_box.finest, step.per_box.positives.mask_logits
    grad = torch.autograd.grad(found["loss_match"], finest, retain_graph=True)[0]
    assert grad.abs().sum() > 0
    assert torch.autograd.grad(found["loss_match"], logits)[0].abs().sum() == 0


def test_two_processes_fill_one_bank(rng):
    """Image 0 in one and image 1 in the other: both get the rows of both images, in the order of the batch."""
    step = with_boxes(rng)
    expected = banked(step)
    packed = {}

    def part(rows, image):
        """Returns the step of one process."""

        def cut(seen):
            kept = [x[rows] for x in seen.positives]
            kept[3] = torch.zeros(len(rows), dtype=torch.long)
            return PerBox(Positives(*kept), seen.finest[image : image + 1])

        return step._replace(per_box=cut(step.per_box), shadow_per_box=cut(step.shadow_per_box))

    for process, (rows, image) in enumerate((([0], 0), ([1, 2], 1))):
        own = part(rows, image)
        banked(own._replace(together=lambda value, p=process: packed.setdefault(p, value)[None]))
    memory = banked(part([0], 0)._replace(together=lambda value: torch.stack([packed[0], packed[1]])))
    assert all(torch.equal(value, memory.state_dict()[name]) for name, value in expected.state_dict().items())


def test_without_boxes_the_bank_gives_zeros_with_a_gradient(rng):
    def none(seen):
        return PerBox(Positives(*(part[:0] for part in seen.positives)), seen.finest)

    step = with_boxes(rng)
    memory = banked(step)
    empty = step._replace(per_box=none(step.per_box), shadow_per_box=none(step.shadow_per_box))
    found = losses(BANKED, empty, memory)
    assert found["loss_transfer"] == 0
    assert found["loss_match"] == 0
    (found["loss_transfer"] + found["loss_match"]).backward()
    filled = memory.filled.clone()
    BANKED.update(empty, memory)
    assert torch.equal(memory.filled, filled)


@pytest.mark.parametrize("wrong", [{"keys": 101}, {"keys": 0}, {"grid": 0}])
def test_a_bank_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="1 <= keys <= slots"):
        Bank(**wrong)
