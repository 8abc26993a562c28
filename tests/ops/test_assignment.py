"""Balanced assignment, Gumbel sampling and greedy boxes against loops and known properties."""

import math

import pytest
import torch
from torch.testing import assert_close

from misa.ops.assignment import balanced, greedy_boxes, hard_assignment


def slow_balanced(scores, epsilon, rounds):
    """The published order: exp, normalise the total, then rows and columns alternately."""
    q, p = scores.shape
    shares = [[math.exp(v / epsilon) for v in row] for row in scores.tolist()]
    total = sum(map(sum, shares))
    shares = [[v / total for v in row] for row in shares]
    for _ in range(rounds):
        shares = [[v / sum(row) / q for v in row] for row in shares]
        columns = [sum(row[j] for row in shares) for j in range(p)]
        shares = [[v / columns[j] / p for j, v in enumerate(row)] for row in shares]
    return torch.tensor(shares, dtype=torch.float64) * p


@pytest.mark.parametrize("rounds", [1, 3])
def test_shares_equal_the_loop(rng, device, rounds):
    scores = torch.rand(4, 7, generator=rng, dtype=torch.float64)
    assert_close(balanced(scores.to(device), rounds=rounds).cpu(), slow_balanced(scores, 0.05, rounds))


def test_every_pixel_has_one_share_and_prototypes_come_nearer_to_equal(rng):
    scores = torch.rand(10, 50, generator=rng, dtype=torch.float64)
    scores[0] += 0.5
    apart = []
    for rounds in (1, 2, 3, 10, 200):
        shares = balanced(scores, rounds=rounds)
        assert_close(shares.sum(dim=0), torch.ones(50, dtype=torch.float64))
        apart.append((shares.sum(dim=1) - 5).abs().max().item())
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 0.05


def test_equal_scores_are_uniform_and_large_ones_finite():
    assert_close(balanced(torch.full((10, 6), 0.3)), torch.full((10, 6), 0.1))
    assert balanced(torch.tensor([[100.0, 0.0], [0.0, -100.0]])).isfinite().all()
    assert balanced(torch.zeros(3, 0)).shape == (3, 0)


def test_the_official_draw_is_nearly_random():
    """An assignment of 1 among ten is drawn with probability e / (e + 9) = 0.232."""
    shares = torch.zeros(10, 100_000)
    shares[3] = 1
    drawn = hard_assignment(shares, generator=torch.Generator().manual_seed(0))
    assert abs((drawn == 3).double().mean().item() - math.e / (math.e + 9)) < 0.005
    assert torch.equal(drawn, hard_assignment(shares, generator=torch.Generator().manual_seed(0)))
    assert (hard_assignment(shares, form="intended") == 3).all()


def slow_greedy(boxes, scores, truth, least):
    def iou(a, b):
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        both = width * height
        return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)

    taken = [-1] * len(truth)
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        free = [(iou(boxes[i], t), -g) for g, t in enumerate(truth) if taken[g] < 0]
        if free and max(free)[0] >= least:
            taken[-max(free)[1]] = i
    return taken


def test_greedy_equals_the_loop(rng):
    for _ in range(20):
        corner, size = torch.rand(2, 12, 2, generator=rng) * 20
        boxes = torch.cat([corner, corner + 5 + size], dim=1)
        scores = torch.rand(8, generator=rng)
        expected = slow_greedy(boxes[:8].tolist(), scores.tolist(), boxes[8:].tolist(), 0.3)
        assert greedy_boxes(boxes[:8], scores, boxes[8:], iou=0.3).tolist() == expected


def test_greedy_by_score_one_each_from_the_threshold_on():
    truth = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 25, 10], [20, 0, 24, 10]])
    assert greedy_boxes(boxes, torch.tensor([0.9, 0.8, 0.7, 0.95]), truth).tolist() == [0, 2]  # IoU 0.5 is enough
    assert greedy_boxes(boxes[3:], torch.tensor([0.9]), truth).tolist() == [-1, -1]  # 0.4 is not


@pytest.mark.parametrize(("m", "g"), [(0, 2), (2, 0), (0, 0)])
def test_nobody_on_one_side(m, g):
    assert greedy_boxes(torch.zeros(m, 4), torch.zeros(m), torch.zeros(g, 4)).tolist() == [-1] * g


def test_says_what_it_needs():
    with pytest.raises(ValueError, match="balanced needs scores"):
        balanced(torch.zeros(3))
    with pytest.raises(ValueError, match="forms"):
        hard_assignment(torch.zeros(2, 2), form="random")
    with pytest.raises(ValueError, match="greedy_boxes needs"):
        greedy_boxes(torch.zeros(2, 4), torch.zeros(3), torch.zeros(1, 4))
