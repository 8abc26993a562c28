"""Boxes as masks and cells: against loops, and against mmdet's own assignment."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from misa.ops.boxes import box_masks, centre_cells, positive_cells

corner = st.floats(0, 60, allow_nan=False, width=32)
side = st.floats(0.5, 64, allow_nan=False, width=32)


def slow_box_mask(box, h, w, stride):
    """One box in loops: cells whose centre is inside, else the cell at the box's centre."""
    x1, y1, x2, y2 = (v / stride for v in box)
    mask = np.zeros((h, w), dtype=bool)
    rows = [r for r in range(h) if y1 <= r + 0.5 < y2] or [min(max(int(np.floor((y1 + y2) / 2)), 0), h - 1)]
    columns = [c for c in range(w) if x1 <= c + 0.5 < x2] or [min(max(int(np.floor((x1 + x2) / 2)), 0), w - 1)]
    for r in rows:
        for c in columns:
            mask[r, c] = True
    return mask


@given(x=corner, y=corner, bw=side, bh=side, stride=st.sampled_from([1, 4]))
def test_box_masks_equal_the_loop(x, y, bw, bh, stride):
    box = torch.tensor([x, y, x + bw, y + bh])
    got = box_masks(box[None], 16, 19, stride=stride)[0]
    assert np.array_equal(got.numpy(), slow_box_mask((box.double() / 1).tolist(), 16, 19, stride))


def test_a_cell_whose_centre_is_on_the_far_edge_is_outside(device):
    """Boxes that share an edge share no cell."""
    masks = box_masks(torch.tensor([[0.5, 0, 2.5, 4], [2.5, 0, 4.5, 4]], device=device), 4, 6)
    assert masks[:, 0].int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]


def test_a_one_pixel_box_keeps_one_cell(device):
    masks = box_masks(torch.tensor([[5.0, 9.0, 6.0, 10.0]], device=device), 8, 8, stride=4)
    assert masks.sum() == 1
    assert masks[0, 2, 1]


def test_no_boxes_make_no_masks(device):
    assert box_masks(torch.zeros(0, 4, device=device), 3, 5).shape == (0, 3, 5)
    instance, cell = positive_cells(torch.zeros(0, 4, device=device), (64, 64), 8, (1, 100))
    assert len(instance) == len(cell) == 0


@pytest.mark.parametrize("grid", [5, 12, 16])
def test_cells_equal_mmdets_assignment(rng, grid):
    """mmdet finds the centre as the centre of mass of a mask; for a box's own mask that is the box's centre."""
    from mmdet.models.dense_heads import SOLOV2Head
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    h, w = 96, 128
    corners = torch.randint(0, 64, (12, 2), generator=rng).float()
    # With odd sides the centre of mass is at a pixel, where both definitions round equally.
    sides = torch.randint(4, 31, (12, 2), generator=rng).float() * 2 + 1
    boxes = torch.cat([corners, torch.minimum(corners + sides, torch.tensor([w - 1.0, h - 1.0]))], dim=1)
    bitmaps = np.zeros((len(boxes), h, w), dtype=np.uint8)
    for bitmap, (x1, y1, x2, y2) in zip(bitmaps, boxes.int().tolist(), strict=True):
        bitmap[y1 : y2 + 1, x1 : x2 + 1] = 1  # both ends, so that the mean pixel is the box's centre
    head = SOLOV2Head.__new__(SOLOV2Head)
    torch.nn.Module.__init__(head)
    head.scale_ranges, head.num_grids, head.num_classes, head.pos_scale, head.mask_stride = (
        ((1, 40),),
        [grid],
        3,
        0.2,
        4,
    )
    truth = InstanceData(
        bboxes=boxes, labels=torch.zeros(len(boxes), dtype=torch.long), masks=BitmapMasks(bitmaps, h, w)
    )
    *_, cells = head._get_targets_single(truth, featmap_sizes=(h // 4, w // 4))
    _, ours = positive_cells(boxes, (h, w), grid, (1, 40))
    assert sorted(ours.tolist()) == sorted(cells[0])


def test_only_boxes_in_the_scale_range_fire():
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 40, 40]])
    instance, _ = positive_cells(boxes, (64, 64), 8, (10, 50))
    assert set(instance.tolist()) == {1}


def test_a_box_fires_in_at_most_nine_cells_around_its_centre():
    instance, cell = positive_cells(torch.tensor([[0.0, 0, 64, 64]]), (64, 64), 32, (1, 100), shrink=1.0)
    rows, columns = cell // 32, cell % 32
    assert len(instance) == 9
    assert_close((rows.float().mean(), columns.float().mean()), (torch.tensor(16.0), torch.tensor(16.0)))


def test_a_box_has_one_cell_on_the_nearest_level():
    """In loops; a box of 40 pixels is nearest in ratio to the level of 48 to 192, to which it is not assigned."""
    grids, ranges, size = (40, 36, 24), ((1, 96), (48, 192), (96, 384)), (200, 320)
    boxes = torch.tensor([[10, 20, 50, 60], [0, 0, 12, 9], [30.5, 10, 310, 190], [300, 180, 320, 200.0]])
    found = centre_cells(boxes, size, grids, ranges).tolist()
    for box, place in zip(boxes.tolist(), found, strict=True):
        x1, y1, x2, y2 = box
        side = ((x2 - x1) * (y2 - y1)) ** 0.5
        apart = [abs(math.log(side / (low * high) ** 0.5)) for low, high in ranges]
        level = apart.index(min(apart))
        row, column = (int(c / s * grids[level]) for c, s in (((y1 + y2) / 2, size[0]), ((x1 + x2) / 2, size[1])))
        assert place == sum(grid * grid for grid in grids[:level]) + row * grids[level] + column
    assert found[0] >= 40 * 40
    assert len(positive_cells(boxes[:1], size, grids[1], ranges[1])[0]) == 0
    assert centre_cells(boxes[:0], size, grids, ranges).shape == (0,)
