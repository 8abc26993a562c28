"""Matches between objects against loops, and for identical, shifted and empty objects."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from misa.losses.correspondence import correspondence_loss
from misa.ops.correspond import match, similarity, transfer


def features(rng, m, s=4, c=6):
    query = torch.rand(c, s, s, generator=rng, dtype=torch.float64)
    return query, torch.rand(m, c, s, s, generator=rng, dtype=torch.float64)


def slow_match(cosines, side, reach, steps):
    cells = [(y, x) for y in range(side) for x in range(side)]
    place = {cell: i for i, cell in enumerate(cells)}
    n = len(cells)
    plan = [
        [cosines[i, j].item() if max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= reach else 0.0 for j, b in enumerate(cells)]
        for i, a in enumerate(cells)
    ]
    for _ in range(steps):
        votes = [[0.0] * n for _ in range(n)]
        for i, a in enumerate(cells):
            for j, b in enumerate(cells):
                heard = [
                    plan[place[a[0] + dy, a[1] + dx]][place[b[0] + dy, b[1] + dx]]
                    for dy in (-1, 0, 1)
                    for dx in (-1, 0, 1)
                    if (a[0] + dy, a[1] + dx) in place and (b[0] + dy, b[1] + dx) in place
                ]
                votes[i][j] = sum(heard) / len(heard)
        votes = [[v / (sum(row) + 1e-4) for v in row] for row in votes]
        plan = [[cosines[i, j].item() + votes[i][j] for j in range(n)] for i in range(n)]
        plan = [[v / (sum(row) + 1e-4) for v in row] for row in plan]
    return torch.tensor(plan, dtype=torch.float64)


def test_plans_equal_the_loop(rng, device):
    query, keys = features(rng, 3)
    cosines = similarity(query.to(device), keys.to(device))
    a, b = query.flatten(1).T, keys.flatten(2).transpose(1, 2)
    assert_close(cosines.cpu(), F.cosine_similarity(a[None, :, None], b[:, None], dim=3), atol=1e-5, rtol=1e-5)
    expected = torch.stack([slow_match(x, 4, 1, 3) for x in cosines.cpu()])
    assert_close(match(cosines, reach=1, steps=3).cpu(), expected)


def test_identical_objects_match_cell_by_cell(rng):
    query, _ = features(rng, 1, s=7, c=32)
    query = query - query.mean() + 0.1
    cosines = similarity(query.clamp(min=0), query.clamp(min=0)[None])
    assert torch.equal(match(cosines).argmax(dim=2)[0], torch.arange(49))


def test_the_official_loss_hardly_moves_and_the_intended_one_does(rng):
    query, keys = features(rng, 5, s=7, c=64)
    same = similarity(query, query[None])
    for cosines in (same, similarity(query, keys), torch.zeros(1, 49, 49)):
        assert 3.858 <= correspondence_loss(cosines, match(cosines)).item() <= 3.905
    eye = torch.eye(49)[None]
    value = correspondence_loss(eye, eye, form="intended").item()
    assert_close(value, math.log(1 + 48 * math.exp(-1 / 0.07)), atol=1e-6, rtol=0)


def test_the_loss_equals_the_loop_and_gradcheck(rng):
    query, keys = features(rng, 2, s=3)
    cosines = similarity(query, keys)
    plan = torch.rand(2, 9, 9, generator=rng, dtype=torch.float64)
    total = {"official": 0.0, "intended": 0.0}
    for c, t in zip(cosines.tolist(), plan.tolist(), strict=True):
        for row, target in zip(c, t, strict=True):
            j = target.index(max(target))
            once = [math.exp(v) / sum(map(math.exp, row)) for v in row]
            total["official"] += math.log(sum(map(math.exp, once))) - once[j]
            total["intended"] += math.log(sum(math.exp(v / 0.07) for v in row)) - row[j] / 0.07
    for form, value in total.items():
        assert_close(correspondence_loss(cosines, plan, form=form).item(), value / 18)
        inputs = (query.requires_grad_(), keys.requires_grad_())
        assert torch.autograd.gradcheck(
            lambda q, k, f=form: correspondence_loss(similarity(q, k), plan, form=f), inputs
        )


def slow_transfer(plan, cosines, own, masks):
    m, n = plan.shape[:2]
    side, u = round(n**0.5), own.shape[0]

    def stretch(line):
        return F.interpolate(line.view(1, 1, side, side), size=(u, u), mode="bilinear", align_corners=False).flatten()

    said = torch.zeros(2, u * u, dtype=plan.dtype)
    for key in range(m):
        rows = plan[key] * cosines[key].softmax(dim=1)
        rows = rows / (rows.sum(dim=1, keepdim=True) + 1e-5)
        wide = torch.stack([stretch(row) for row in rows])
        full = torch.stack([stretch(wide[:, j]) for j in range(u * u)], dim=1) * n / (u * u)
        for label, (a, b) in enumerate(((1 - own, 1 - masks[key]), (own, masks[key]))):
            for i in range(u * u):
                for j in range(u * u):
                    if a.flatten()[i] * b.flatten()[j] > 0.5:
                        said[label, i] += full[i, j] * b.flatten()[j].clamp(0.1, 0.9) / m
    return said.view(2, u, u)


def test_transfer_equals_the_loop(rng):
    query, keys = features(rng, 2, s=3)
    cosines = similarity(query, keys)
    own, *masks = torch.rand(3, 6, 6, generator=rng, dtype=torch.float64) ** 0.3
    plan = match(cosines)
    assert_close(
        transfer(plan, cosines, own, torch.stack(masks)), slow_transfer(plan, cosines, own, torch.stack(masks))
    )


def test_no_keys_and_what_is_needed(rng):
    query, keys = features(rng, 2)
    query.requires_grad_()
    nothing = similarity(query, keys[:0])
    correspondence_loss(nothing, match(nothing)).backward()
    assert query.grad.abs().sum() == 0
    with pytest.raises(ValueError, match="similarity needs"):
        similarity(query, keys[:, :3])
    with pytest.raises(ValueError, match="square grids"):
        match(torch.zeros(1, 5, 5))
    with pytest.raises(ValueError, match="transfer needs"):
        transfer(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), torch.zeros(6, 6), torch.zeros(1, 5, 5))
    with pytest.raises(ValueError, match="forms"):
        correspondence_loss(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), form="plain")
