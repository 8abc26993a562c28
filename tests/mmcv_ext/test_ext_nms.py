"""mmcv's nms and batched_nms on our ops, against loops in double precision."""

import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms, nms
from torch.testing import assert_close


def slow_nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float, offset: int) -> list[int]:
    """Greedy suppression, box by box, by definition."""
    box = boxes.double().tolist()

    def iou(a: list[float], b: list[float]) -> float:
        inter = 1.0
        for low, high in ((0, 2), (1, 3)):
            inter *= max(0.0, min(a[high], b[high]) - max(a[low], b[low]) + offset)
        areas = [(x[2] - x[0] + offset) * (x[3] - x[1] + offset) for x in (a, b)]
        return inter / (sum(areas) - inter)

    kept: list[int] = []
    for i in sorted(range(len(box)), key=lambda i: -float(scores[i])):
        if all(iou(box[i], box[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


def random_boxes(n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    corner = 8 * torch.rand(n, 2, generator=rng)
    size = 1 + 15 * torch.rand(n, 2, generator=rng)
    return torch.cat([corner, corner + size], dim=1), torch.rand(n, generator=rng)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.7])
def test_equals_slow_loops(rng, device, offset, threshold):
    boxes, scores = random_boxes(60, rng)
    dets, kept = nms(boxes.to(device), scores.to(device), threshold, offset)
    expected = slow_nms(boxes, scores, threshold, offset)
    assert 1 < len(expected) < 60
    assert kept.tolist() == expected
    assert kept.dtype == torch.int64
    assert kept.device.type == device.type
    assert_close(dets.cpu(), torch.cat([boxes, scores[:, None]], dim=1)[expected])


def test_offset_makes_the_difference(device):
    """IoU 1/3 by edges (2 of 6 columns), 3/7 when the last pixel counts (3 of 7)."""
    boxes = torch.tensor([[0.0, 0, 4, 9], [2, 0, 6, 9]], device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    assert nms(boxes, scores, 0.4, offset=0)[1].tolist() == [0, 1]
    assert nms(boxes, scores, 0.4, offset=1)[1].tolist() == [0]


def test_an_iou_at_the_threshold_is_kept(device):
    boxes = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]], device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    assert nms(boxes, scores, 0.5)[1].tolist() == [0, 1]
    assert nms(boxes, scores, 0.4999)[1].tolist() == [0]


def test_score_threshold_and_max_num(rng, device):
    boxes, scores = random_boxes(40, rng)
    good = (scores > 0.4).nonzero()[:, 0]
    expected = good[slow_nms(boxes[good], scores[good], 0.3, 0)[:5]].tolist()
    assert nms(boxes.to(device), scores.to(device), 0.3, score_threshold=0.4, max_num=5)[1].tolist() == expected


def test_numpy_in_numpy_out():
    boxes = np.array([[0, 0, 2, 2], [0, 0, 2, 2]], dtype=np.float32)
    dets, kept = nms(boxes, np.array([0.1, 0.2], dtype=np.float32), 0.5)
    assert kept.tolist() == [1]
    assert dets.shape == (1, 5)


def test_half_precision_boxes_with_float_scores(rng, device):
    boxes, scores = random_boxes(30, rng)
    boxes = boxes.half()
    kept = nms(boxes.to(device), scores.to(device), 0.4)[1].tolist()
    assert kept == slow_nms(boxes, scores, 0.4, 0)


def test_no_boxes(device):
    dets, kept = nms(torch.zeros(0, 4, device=device), torch.zeros(0, device=device), 0.5)
    assert dets.shape == (0, 5)
    assert kept.shape == (0,)


@pytest.mark.parametrize("split_thr", [10000, 10])
def test_batched_nms_keeps_classes_apart(rng, device, split_thr):
    """Both modes of batched_nms: offsets between the classes, and one class after the other (`split_thr`)."""
    boxes, scores = random_boxes(50, rng)
    labels = torch.randint(3, (50,), generator=rng)
    expected = []
    for label in range(3):
        here = (labels == label).nonzero()[:, 0]
        expected += here[slow_nms(boxes[here], scores[here], 0.3, 0)].tolist()
    cfg = {"type": "nms", "iou_threshold": 0.3, "split_thr": split_thr}
    dets, kept = batched_nms(boxes.to(device), scores.to(device), labels.to(device), cfg)
    assert kept.tolist() == sorted(expected, key=lambda i: -float(scores[i]))
    assert_close(dets[:, 4].cpu(), scores[kept.cpu()])
