"""BoxTeacher: the assignment of detections to boxes, its confidence, and the two terms in loops."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from misa.losses.inputs import Batch, Positives
from misa.objectives.base import Detected, Ramp, Step, Truth
from misa.objectives.boxinst import BoxInst
from misa.objectives.boxteacher import BoxTeacher

H = W = 12
BOXES = [[4.0, 4, 28, 28], [20, 20, 44, 44], [8, 8, 40, 40]]  # two in the first image, one in the second; stride 4
IMAGE = [0, 0, 1]


def cells(box):
    x1, y1, x2, y2 = (int(v) // 4 for v in box)
    mask = torch.zeros(H, W, dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return mask


@pytest.fixture
def step(rng):
    """Two locations of each of the first two boxes, one of the third."""
    instance = torch.tensor([0, 0, 1, 1, 2])
    logits = torch.randn(5, H, W, generator=rng).requires_grad_()
    positives = Positives(
        logits, torch.stack([cells(BOXES[g]) for g in instance]), torch.zeros(5).long(), torch.tensor(IMAGE)[instance],
        instance,
    )  # fmt: skip
    detections = [
        Detected(  # the first overlaps box 0 well, the second overlaps it better with a lower score, the third no box
            torch.tensor([[4.0, 4, 28, 36], [4, 4, 28, 28], [40, 0, 48, 8]]),
            torch.tensor([0.9, 0.3, 0.8]),
            torch.rand(3, H, W, generator=rng),
        ),
        Detected(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, H, W)),
    ]
    return Step(
        positives,
        Batch(torch.randn(2, 3, H, W, generator=rng), torch.ones(2, H, W, dtype=torch.bool)),
        iteration=25,
        total=100,
        truth=Truth(torch.tensor(BOXES), torch.zeros(3).long(), torch.tensor(IMAGE)),
        colors=255 * torch.rand(2, 3, H, W, generator=rng),
        detections=detections,
    )


OBJECTIVE = BoxTeacher(ramp=Ramp(0, 100), pseudo_ramp=Ramp(0, 50), bottom_rows=0)


def test_the_surer_detection_has_the_first_choice_and_a_box_one_detection(step):
    target, confidence = OBJECTIVE.pseudo_masks(step)
    found = step.detections[0]
    sure = found.masks[0] > 0.5
    quality = float(found.masks[0][sure].mean())
    for n in (0, 1):
        assert (target[n] == sure).all()
        assert confidence[n] == pytest.approx(math.sqrt(math.sqrt(0.9) * quality), rel=1e-5)
    assert confidence[2:].tolist() == [0, 0, 0]  # no detection overlaps box 1, and box 2's image has no detection
    assert not target[2:].any()


def test_the_confidence_of_a_known_case(step):
    """Class score times centre-ness 0.64, so a detection score of 0.8, and quality 0.9 give a confidence of 0.897."""
    mask = torch.where(cells(BOXES[2]), 0.9, 0.3)
    found = [step.detections[1], Detected(torch.tensor(BOXES[2:]), torch.tensor([0.8]), mask[None])]
    target, confidence = OBJECTIVE.pseudo_masks(step._replace(detections=found))
    assert confidence.tolist() == pytest.approx([0, 0, 0, 0, 0.897], abs=5e-4)
    assert torch.equal(target[4], cells(BOXES[2]))


@pytest.mark.parametrize("bottom_rows", [0, 6])
def test_the_terms_equal_the_loop(step, bottom_rows):
    """Of the 12 rows the box with a detection has 1 to 6, so that its lowest pairs reach the last 6."""
    terms = replace(OBJECTIVE, bottom_rows=bottom_rows).losses(step)
    target, confidence = OBJECTIVE.pseudo_masks(step)
    p = step.positives.mask_logits.detach().sigmoid().double()
    pixels = affinity = 0.0
    for n in range(5):
        y = (target[n] & step.positives.box_masks[n]).double()
        dice = 1 - 2 * (p[n] * y).sum() / ((p[n] ** 2).sum() + (y**2).sum() + 1e-5)
        pixels += float(confidence[n] * dice)
        errors = []
        for a in range(H):
            for b in range(W):
                if not step.positives.box_masks[n, a, b]:
                    continue
                for da in (-2, 0, 2):
                    for db in (-2, 0, 2):
                        k, m = a + da, b + db
                        inside = 0 <= k < H - bottom_rows and 0 <= m < W
                        if (da, db) == (0, 0) or not inside or y[a, b] != y[k, m]:
                            continue
                        same = p[n, a, b] * p[n, k, m] + (1 - p[n, a, b]) * (1 - p[n, k, m])
                        errors.append(-math.log(same))
        affinity += float(confidence[n]) * sum(errors) / max(len(errors), 1)
    count = 2  # instances whose box has a pseudo mask
    assert terms["loss_pixels"].loss.item() == pytest.approx(0.5 * 0.5 * pixels / count, rel=1e-5)
    assert terms["loss_affinity"].loss.item() == pytest.approx(0.5 * 0.1 * affinity / count, rel=1e-4)
    assert terms["loss_pixels"].per == terms["loss_affinity"].per == count
    plain = BoxInst(ramp=Ramp(0, 100), bottom_rows=bottom_rows).losses(step)
    for name, term in plain.items():
        assert_close(terms[name].loss, term.loss)


def test_a_perfect_mask_costs_nothing_and_no_detection_no_more(step):
    target, _ = OBJECTIVE.pseudo_masks(step)
    exact = 40.0 * ((target & step.positives.box_masks).float() - 0.5)
    positives = step.positives._replace(mask_logits=exact.requires_grad_())
    terms = OBJECTIVE.losses(step._replace(positives=positives))
    assert terms["loss_pixels"].loss.item() == pytest.approx(0, abs=1e-6)
    assert terms["loss_affinity"].loss.item() == pytest.approx(0, abs=1e-6)
    nothing = [Detected(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, H, W))] * 2
    terms = OBJECTIVE.losses(step._replace(detections=nothing))
    assert terms["loss_pixels"].loss == terms["loss_affinity"].loss == 0
    (terms["loss_pixels"].loss + terms["loss_affinity"].loss).backward()
    assert step.positives.mask_logits.grad.abs().sum() == 0


def test_both_terms_wait_for_their_ramp(step):
    early = OBJECTIVE.losses(step._replace(iteration=0))
    assert early["loss_pixels"].loss == early["loss_affinity"].loss == early["loss_pairs"].loss == 0


def test_colors_are_those_of_the_plain_image_and_the_student_sees_another(rng):
    images = torch.randn(2, 3, 8, 8, generator=rng)
    images[1, :, 6:] = 0  # padding
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    prepared = OBJECTIVE.prepare(images, [], None, generators)
    assert prepared.weak_view is images
    assert not torch.equal(prepared.images, images)
    assert (prepared.images[1, :, 6:] == 0).all()
    again = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert torch.equal(OBJECTIVE.prepare(images, [], None, again).images, prepared.images)


def test_the_copy_is_the_mean_of_the_students_so_far(rng):
    seen = torch.randn(500, generator=rng, dtype=torch.float64)
    copy = 0.0
    for t, weight in enumerate(seen.tolist()):
        momentum = OBJECTIVE.shadow_momentum(t, 1000)
        copy = momentum * copy + (1 - momentum) * weight
        assert copy == pytest.approx(float(seen[: t + 1].mean()), abs=1e-12)
    assert OBJECTIVE.shadow_momentum(5000, 10000) == 0.999


def test_without_instances_every_term_is_a_finite_zero(step):
    none = Positives(
        torch.zeros(0, H, W, requires_grad=True), torch.zeros(0, H, W, dtype=torch.bool),
        *(torch.zeros(0).long() for _ in range(3)),
    )  # fmt: skip
    terms = OBJECTIVE.losses(step._replace(positives=none))
    assert [term.loss.item() for term in terms.values()] == [0, 0, 0, 0]
    sum(term.loss for term in terms.values()).backward()
