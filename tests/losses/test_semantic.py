"""Oracles: the objectives pixel by pixel in plain loops, PyTorch's own cross-entropy, invariances."""

import math

import pytest
import torch
from torch.testing import assert_close

from misa.experiment import Affinity
from misa.losses.inputs import Batch
from misa.losses.semantic import (
    Boxes,
    SemanticTerms,
    allowed_classes,
    label_map_loss,
    outside_loss,
    semantic_objectives,
    sure_loss,
)

H, W = 6, 8


def box(top, left, bottom, right):
    mask = torch.zeros(H, W, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.fixture
def boxes():
    """Two overlapping boxes of class 1 and one of class 0 in image 0, one of class 0 in image 1."""
    masks = torch.stack([box(0, 0, 3, 4), box(1, 2, 5, 6), box(2, 3, 6, 7), box(1, 1, 3, 3)])
    return Boxes(masks, torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 0, 1]))


@pytest.fixture
def batch(rng):
    valid = torch.ones(2, H, W, dtype=torch.bool)
    valid[1, :, 6:] = False
    return Batch(torch.randn(2, 3, H, W, generator=rng), valid)


@pytest.fixture
def logits(rng):
    return torch.randn(2, 3, H, W, generator=rng)


def rows_of(background):
    return [row for row in range(3) if row != background]


@pytest.mark.parametrize("background", [0, 1, 2])
def test_the_terms_against_loops(logits, boxes, batch, background):
    terms = SemanticTerms(outside_weight=2.0, class_weight=4.0)
    losses = semantic_objectives(logits, boxes, batch, terms, background=background)
    rows, p = rows_of(background), logits.double().softmax(dim=1)
    outside, inside = [], []
    for b in range(2):
        for y in range(H):
            for x in range(W):
                here = zip(boxes.masks, boxes.labels, boxes.image, strict=True)
                classes = {rows[int(c)] for m, c, i in here if i == b and m[y, x]}
                if not batch.valid[b, y, x]:
                    continue
                if classes:
                    share = sum(float(p[b, e, y, x]) for e in classes) / (1 - float(p[b, background, y, x]))
                    inside.append(-math.log(share))
                else:
                    outside.append(-math.log(float(p[b, background, y, x])))
    assert_close(losses["loss_outside"], torch.tensor(2 * sum(outside) / len(outside)).float())
    assert_close(losses["loss_class"], torch.tensor(4 * sum(inside) / len(inside)).float())

    projections = []
    for m, c, i in zip(boxes.masks, boxes.labels, boxes.image, strict=True):
        q = p[i, rows[int(c)]] * m
        error = 0.0
        for axis in (0, 1):
            a, target = q.amax(dim=axis), m.double().amax(dim=axis)
            error += 1 - 2 * (a * target).sum() / (a.square().sum() + target.square().sum() + 1e-5)
        projections.append(error)
    assert_close(losses["loss_projection"], (3 * sum(projections) / len(projections)).float())


def test_outside_all_boxes_it_is_the_cross_entropy_to_the_background(logits, batch):
    nothing = Boxes(torch.zeros(0, H, W, dtype=torch.bool), torch.zeros(0).long(), torch.zeros(0).long())
    allowed = allowed_classes(nothing, (H, W), images=2, classes=3, background=2)
    target = torch.full((2, H, W), 2)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")[batch.valid].mean()
    assert_close(outside_loss(logits, allowed, batch.valid, 2), expected)


def test_boxes_of_one_class_see_each_others_pixels(logits, boxes, batch, monkeypatch):
    """The pairwise term gets q inside any box of the class, and only there."""
    seen = {}

    def record(masks, box_masks, images, image_index, **options):
        seen.update(masks=masks, box_masks=box_masks, options=options)
        return {"loss_global": masks.sum() * 0}

    monkeypatch.setattr("misa.losses.semantic.pairwise_loss", record)
    semantic_objectives(logits, boxes, batch, SemanticTerms(affinity=Affinity(window=3)), background=2)
    union = boxes.masks[0] | boxes.masks[1]
    assert_close(seen["masks"][0], logits.softmax(dim=1)[0, 1] * union)
    assert_close(seen["masks"][1], seen["masks"][0])
    assert torch.equal(seen["box_masks"], boxes.masks)
    assert seen["options"]["affinity"].window == 3


@pytest.mark.parametrize("background", [0, 1, 2])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_sure_answers_against_loops(logits, boxes, batch, background, threshold):
    rows, p = rows_of(background), logits.double().softmax(dim=1)
    losses = []
    for b in range(2):
        for y in range(H):
            for x in range(W):
                here = zip(boxes.masks, boxes.labels, boxes.image, strict=True)
                classes = {rows[int(c)] for m, c, i in here if i == b and m[y, x]}
                if not classes or not batch.valid[b, y, x]:
                    continue
                may = {e: float(p[b, e, y, x]) for e in classes | {background}}
                answer = max(may, key=may.__getitem__)
                if may[answer] > threshold * sum(may.values()):
                    losses.append(-math.log(may[answer]))
    allowed = allowed_classes(boxes, (H, W), images=2, classes=3, background=background)
    assert 0 < len(losses) < int((batch.valid & (allowed.sum(dim=1) > 1)).sum())
    result = sure_loss(logits, allowed, batch.valid, threshold)
    assert_close(result.double(), torch.tensor(sum(losses) / len(losses), dtype=torch.float64), rtol=1e-5, atol=1e-6)
    both = semantic_objectives(logits, boxes, batch, SemanticTerms(sure_weight=2.0), background=background)
    if threshold == 0.7:
        assert_close(both["loss_sure"], 2 * result)


def test_the_right_answer_costs_next_to_nothing(batch):
    boxes = Boxes(box(1, 2, 5, 6)[None], torch.tensor([0]), torch.tensor([0]))
    answer = torch.zeros(2, 3, H, W)
    answer[:, 2] = 12.0
    answer[0, 0, 1:5, 2:6] = 24.0
    losses = semantic_objectives(answer, boxes, batch, SemanticTerms(), background=2)
    assert sum(losses.values()) < 1e-3


def test_in_a_box_classes_move_against_each_other_and_not_against_the_background(batch):
    boxes = Boxes(box(1, 2, 5, 6)[None], torch.tensor([0]), torch.tensor([0]))
    logits = torch.zeros(2, 3, H, W, requires_grad=True)
    semantic_objectives(logits, boxes, batch, SemanticTerms(), background=2)["loss_class"].backward()
    inside = boxes.masks[0]
    assert (logits.grad[0, 0][inside] < 0).all()
    assert (logits.grad[0, 1][inside] > 0).all()
    assert (logits.grad[0, 2] == 0).all()
    assert (logits.grad[0, :, ~inside] == 0).all()
    assert (logits.grad[1] == 0).all()


def test_padding_is_in_no_loss(boxes, batch):
    logits = torch.zeros(2, 3, H, W, requires_grad=True)
    losses = semantic_objectives(logits, boxes, batch, SemanticTerms(), background=2)
    (losses["loss_outside"] + losses["loss_class"]).backward()
    assert (logits.grad[1, :, :, 6:] == 0).all()


def test_no_boxes_give_zeros_with_a_gradient(batch):
    logits = torch.zeros(2, 3, H, W, requires_grad=True)
    nothing = Boxes(torch.zeros(0, H, W, dtype=torch.bool), torch.zeros(0).long(), torch.zeros(0).long())
    terms = SemanticTerms(sure_weight=1.0, affinity=Affinity())
    losses = semantic_objectives(logits, nothing, batch, terms, background=2)
    assert {name for name, value in losses.items() if value == 0} == {
        "loss_sure",
        "loss_class",
        "loss_projection",
        "loss_global",
        "loss_local",
    }
    sum(losses.values()).backward()
    assert logits.grad.isfinite().all()


def test_huge_scores_stay_finite(boxes, batch):
    logits = torch.full((2, 3, H, W), -3e4)
    logits[:, 1] = 3e4
    logits.requires_grad_()
    losses = semantic_objectives(logits, boxes, batch, SemanticTerms(sure_weight=1.0), background=2)
    sum(losses.values()).backward()
    assert logits.grad.isfinite().all()


def test_logits_of_another_size_are_named(boxes, batch):
    with pytest.raises(ValueError, match="semantic_objectives needs logits"):
        semantic_objectives(torch.zeros(2, 3, H, W + 1), boxes, batch, SemanticTerms(), background=2)


def test_label_maps_against_pytorch(logits, rng):
    labels = torch.randint(0, 3, (2, H, W), generator=rng)
    assert_close(label_map_loss(logits, labels), torch.nn.functional.cross_entropy(logits, labels))


def test_void_is_left_out(logits, rng):
    labels = torch.randint(0, 3, (2, H, W), generator=rng)
    void = labels.clone()
    void[:, :, 4:] = 255
    left = torch.nn.functional.cross_entropy(logits[..., :4], labels[..., :4])
    assert_close(label_map_loss(logits, void), left)
    assert label_map_loss(logits, torch.full_like(labels, 255)) == 0


def test_label_maps_are_compared_at_their_own_resolution(logits):
    labels = torch.zeros(2, 4 * H, 4 * W).long()
    fine = torch.nn.functional.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    assert_close(label_map_loss(logits, labels), torch.nn.functional.cross_entropy(fine, labels))
