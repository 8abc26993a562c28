"""Box2Mask's local consistency against loops, and properties of an average over colors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from misa.losses.consistency import consistency_kernel, local_consistency
from misa.ops.neighbors import window_offsets


def slow_kernel(image, dilation, sharpness):
    c, h, w = image.shape
    out = torch.zeros(8, h, w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            places = [
                (min(max(y + dy, 0), h - 1), min(max(x + dx, 0), w - 1)) for dy, dx in window_offsets(3, dilation)
            ]
            logits = [0.0] * 8
            for channel in range(c):
                around = [image[channel, i, j].item() for i, j in places]
                mean = sum(around) / 8
                spread = math.sqrt(sum((v - mean) ** 2 for v in around) / 7)
                for k, value in enumerate(around):
                    logits[k] -= ((value - image[channel, y, x].item()) / (spread + 1e-8) / sharpness) ** 2 / c
            powers = [math.exp(v - max(logits)) for v in logits]
            out[:, y, x] = torch.tensor(powers, dtype=torch.float64) / sum(powers)
    return out


def slow_step(mask, kernel, dilation):
    h, w = mask.shape
    out = torch.zeros_like(mask)
    for k, (dy, dx) in enumerate(window_offsets(3, dilation)):
        for y in range(h):
            for x in range(w):
                out[y, x] += kernel[k, y, x] * mask[min(max(y + dy, 0), h - 1), min(max(x + dx, 0), w - 1)]
    return out


@pytest.mark.parametrize(("h", "w"), [(7, 8), (3, 3), (1, 5)])
@pytest.mark.parametrize("steps", [1, 3])
def test_equals_the_loop(rng, device, h, w, steps):
    images = torch.rand(2, 3, h, w, generator=rng, dtype=torch.float64)
    masks = torch.rand(3, h, w, generator=rng, dtype=torch.float64)
    boxes = torch.rand(3, h, w, generator=rng) > 0.4
    image = torch.tensor([1, 0, 1])
    kernel = consistency_kernel(images.to(device))
    expected = torch.stack([slow_kernel(x, 2, 0.3) for x in images])
    assert_close(kernel.cpu(), expected)
    total = 0.0
    for mask, box, i in zip(masks, boxes, image, strict=True):
        smooth = mask
        for _ in range(steps):
            smooth = slow_step(smooth, expected[i], 2)
        total += ((smooth - mask).abs() * box).sum()
    got = local_consistency(masks.to(device), boxes.to(device), kernel, image.to(device), steps=steps)
    assert_close(got.cpu(), total / boxes.sum())


@pytest.mark.parametrize("steps", [1, 4])
def test_padding_has_no_say(rng, device, steps):
    """Two images of different sizes, padded to the larger one: as each alone; nothing is learned in the padding."""
    sizes, big = ((9, 12), (14, 7)), (14, 12)
    alone = [torch.rand(1, 3, *size, generator=rng, dtype=torch.float64) for size in sizes]
    masks = [torch.rand(1, *size, generator=rng, dtype=torch.float64) for size in sizes]
    boxes = [torch.ones(1, *size, dtype=torch.bool) for size in sizes]

    def padded(maps, value):
        missing = [(0, big[1] - x.shape[-1], 0, big[0] - x.shape[-2]) for x in maps]
        return torch.cat([F.pad(x, m, value=value) for x, m in zip(maps, missing, strict=True)])

    valid, index = padded(boxes, False).to(device), torch.arange(2)
    kernel = consistency_kernel(padded(alone, 0.9).to(device), valid=valid)
    whole_batch = padded(masks, 0.3).to(device).requires_grad_()
    found = local_consistency(whole_batch, valid, kernel, index, steps=steps, valid=valid)
    parts = [
        local_consistency(m, b, consistency_kernel(i), index[:1], steps=steps) * b.sum()
        for i, m, b in zip(alone, masks, boxes, strict=True)
    ]
    assert_close(found.cpu().detach(), sum(parts) / valid.cpu().sum())
    found.backward()
    assert (whole_batch.grad[~valid] == 0).all()
    assert (whole_batch.grad[valid] != 0).any()


def test_weights_sum_to_one_and_a_flat_image_weighs_all_alike(rng):
    assert_close(consistency_kernel(torch.rand(1, 3, 9, 9, generator=rng)).sum(dim=1), torch.ones(1, 9, 9))
    assert_close(consistency_kernel(torch.full((1, 3, 6, 6), 0.4)), torch.full((1, 8, 6, 6), 1 / 8))


def test_a_pixel_alone_among_equal_neighbors_is_finite():
    image = torch.zeros(1, 3, 9, 9)
    image[0, 0, 4, 4] = 1
    assert_close(consistency_kernel(image)[0, :, 4, 4], torch.full((8,), 1 / 8))


def whole(masks):
    return torch.ones_like(masks, dtype=torch.bool)


def test_a_constant_mask_costs_nothing(rng):
    kernel, masks = consistency_kernel(torch.rand(1, 3, 8, 8, generator=rng)), torch.full((1, 8, 8), 0.7)
    value = local_consistency(masks, whole(masks), kernel, torch.zeros(1, dtype=torch.long), steps=10)
    assert_close(value.item(), 0.0, atol=1e-6, rtol=0)


def test_a_bump_stays_on_its_parity():
    """The offsets are even: after one step the bump at (15, 15) has spread to odd rows and columns only."""
    masks = torch.zeros(1, 31, 31)
    masks[0, 15, 15] = 1
    kernel = consistency_kernel(torch.zeros(1, 3, 31, 31))
    image = torch.zeros(1, dtype=torch.long)
    for rows in (0, 1):
        for columns in (0, 1):
            box = torch.zeros(1, 31, 31, dtype=torch.bool)
            box[0, rows::2, columns::2] = True
            value = local_consistency(masks, box, kernel, image, steps=3)
            assert (value > 0) == (rows == columns == 1)


def test_an_edge_between_two_colors_stays():
    image = torch.zeros(1, 3, 12, 12)
    image[..., 6:] = 1
    masks = image[:, 0]
    value = local_consistency(masks, whole(masks), consistency_kernel(image), torch.zeros(1, dtype=torch.long), steps=1)
    blurred = local_consistency(
        masks, whole(masks), consistency_kernel(0 * image), torch.zeros(1, dtype=torch.long), steps=1
    )
    assert value < 0.01 * blurred


def test_one_ratio_over_all_boxes():
    """A checkerboard of the dilation's size differs from its average by 1/2 in a flat image, a constant by 0."""
    masks = torch.zeros(2, 30, 30)
    masks[0] = ((torch.arange(30)[:, None] // 2 + torch.arange(30) // 2) % 2).float()
    boxes = torch.zeros(2, 30, 30, dtype=torch.bool)
    boxes[0, 10:20, 10:20] = True
    boxes[1] = True
    kernel = consistency_kernel(torch.zeros(1, 3, 30, 30))
    value = local_consistency(masks, boxes, kernel, torch.zeros(2, dtype=torch.long), steps=1)
    assert_close(value.item(), 0.5 * 100 / 1000)


def test_gradcheck_and_no_gradient_from_afar(rng):
    kernel = consistency_kernel(torch.rand(1, 3, 6, 7, generator=rng, dtype=torch.float64))
    masks = torch.rand(2, 6, 7, generator=rng, dtype=torch.float64).requires_grad_()
    boxes = torch.zeros(2, 6, 7, dtype=torch.bool)
    boxes[:, 1:3, 1:3] = True
    image = torch.zeros(2, dtype=torch.long)
    assert torch.autograd.gradcheck(lambda p: local_consistency(p, boxes, kernel, image, steps=2), (masks,))
    local_consistency(masks, boxes, kernel, image, steps=1).backward()
    assert (masks.grad[:, :, 5:] == 0).all()  # more than two pixels from the box
    assert (masks.grad[:, 1:3, 3:5] != 0).any()  # the average's own side


def test_ten_steps_are_not_one(rng):
    kernel, masks = consistency_kernel(torch.rand(1, 3, 8, 8, generator=rng)), torch.rand(1, 8, 8, generator=rng)
    one, ten = (local_consistency(masks, whole(masks), kernel, torch.tensor([0]), steps=s) for s in (1, 10))
    assert abs(one - ten) > 1e-3


def test_no_instances():
    masks = torch.zeros(0, 4, 4, requires_grad=True)
    kernel = consistency_kernel(torch.zeros(1, 3, 4, 4))
    value = local_consistency(masks, whole(masks), kernel, torch.zeros(0, dtype=torch.long), steps=1)
    value.backward()
    assert value == 0


def test_says_what_it_needs():
    x, image = torch.zeros(1, 4, 4), torch.zeros(1, dtype=torch.long)
    kernel = consistency_kernel(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="one step"):
        local_consistency(x, x, kernel, image, steps=0)
    with pytest.raises(ValueError, match="local_consistency needs masks"):
        local_consistency(x, x, kernel[..., :3], image, steps=1)
    with pytest.raises(ValueError, match="consistency_kernel needs"):
        consistency_kernel(torch.zeros(3, 4, 4))
