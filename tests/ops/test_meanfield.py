"""DiscoBox's mean field against the published form in loops, and the effect of colors, boxes and padding."""

import math

import pytest
import torch
from torch.testing import assert_close

from misa.ops.meanfield import TAPS, mean_field, window_kernel


def slow_kernel(image):
    d, h, w = image.shape
    out = torch.zeros(9, h, w, dtype=torch.float64)
    for k, (dy, dx) in enumerate(TAPS):
        for y in range(h):
            for x in range(w):
                if 0 <= y + dy < h and 0 <= x + dx < w:
                    color = sum((image[c, y, x].item() - image[c, y + dy, x + dx].item()) ** 2 for c in range(d))
                    out[k, y, x] = 2 * math.exp(-color / (2 * 0.5**2) - (dy * dy + dx * dx) / (2 * 30**2))
    return out


def slow_field(mask, box, kernel, steps, message=None):
    """The published form: products of 0.9 and 0.1 for both labels, floor, normalise, binarise."""
    h, w = mask.shape
    q = [[0.9 if mask[y, x] * box[y, x] > 0.5 else 0.1 for x in range(w)] for y in range(h)]
    for _ in range(steps):
        new = [[0.1] * w for _ in range(h)]
        for y in range(h):
            for x in range(w):
                both = []
                for label in (0, 1):
                    energy = 0.0
                    for k, (dy, dx) in enumerate(TAPS):
                        if 0 <= y + dy < h and 0 <= x + dx < w:
                            p = q[y + dy][x + dx]
                            energy -= kernel[k, y, x].item() * math.log(p if label else 1 - p)
                    term = 0.0 if message is None else 0.01 * message[label, y, x].item()
                    both.append(math.exp(-energy) + term)
                both[1] *= float(box[y, x])
                background, thing = (v + 1e-6 for v in both)
                new[y][x] = 0.9 if thing / (thing + background) > 0.5 else 0.1
        q = new
    return torch.tensor(q) > 0.5


def case(rng, n=3, h=9, w=8):
    images = torch.rand(2, 3, h, w, generator=rng, dtype=torch.float64)
    masks = torch.rand(n, h, w, generator=rng, dtype=torch.float64)
    boxes = torch.zeros(n, h, w, dtype=torch.bool)
    boxes[:, 1 : h - 1, 1:w] = True
    return images, masks, boxes


def test_equals_the_published_form_in_loops(rng, device):
    images, masks, boxes = case(rng)
    kernel = window_kernel(images)
    assert_close(kernel, torch.stack([slow_kernel(x) for x in images]))
    for steps in (0, 1, 4):
        got = mean_field(masks.to(device), boxes.to(device), kernel.to(device), [1, 0, 1], steps=steps).cpu()
        expected = [slow_field(m, b, kernel[i], steps) for m, b, i in zip(masks, boxes, (1, 0, 1), strict=True)]
        assert torch.equal(got, torch.stack(expected))
    assert not torch.equal(got, (masks > 0.5) & boxes)  # the field has an effect


def test_messages_from_other_images(rng):
    images, masks, boxes = case(rng)
    kernel = 0.05 * window_kernel(images)  # so that the neighbors do not dominate the message
    message = torch.rand(3, 2, 9, 8, generator=rng, dtype=torch.float64) * 20
    got = mean_field(masks, boxes, kernel, [0, 1, 1], steps=3, message=message)
    expected = [slow_field(m, b, kernel[i], 3, s) for m, b, i, s in zip(masks, boxes, (0, 1, 1), message, strict=True)]
    assert torch.equal(got, torch.stack(expected))
    assert not torch.equal(got, mean_field(masks, boxes, kernel, [0, 1, 1], steps=3))


def test_no_message_is_a_message_of_nothing(rng):
    images, masks, boxes = case(rng)
    kernel = window_kernel(images)
    plain = mean_field(masks, boxes, kernel, [0, 1, 1])
    assert torch.equal(plain, mean_field(masks, boxes, kernel, [0, 1, 1], message=torch.zeros(3, 2, 9, 8)))


def two_colors(h=12, w=12):
    image = torch.zeros(1, 3, h, w)
    image[..., 4:8, 4:9] = 3
    return image, image[:, 0] > 0


def test_a_region_of_one_color_is_a_fixed_point():
    image, region = two_colors()
    assert torch.equal(mean_field(region.float(), torch.ones_like(region), window_kernel(image), [0]), region)


def test_a_wrong_pixel_in_a_flat_region_is_repaired_at_once():
    image, region = two_colors()
    masks = region.float()
    masks[0, 5, 6], masks[0, 1, 1] = 0, 1
    assert torch.equal(mean_field(masks, torch.ones_like(region), window_kernel(image), [0], steps=1), region)


def test_the_weight_of_a_color_step():
    """w falls from 2 to 1 at a color distance of 0.5 sqrt(2 log 2) = 0.589."""
    image = torch.zeros(1, 3, 1, 2, dtype=torch.float64)
    image[0, 0, 0, 1] = 0.5 * math.sqrt(2 * math.log(2))
    kernel = window_kernel(image)
    assert_close(kernel[0, 5, 0, 0].item(), math.exp(-1 / 1800))
    assert_close(kernel[0, 0, 0, 0].item(), 2.0)
    assert_close(kernel, window_kernel(image + 5))


def test_nothing_outside_the_box_and_no_gradient(rng):
    images, masks, boxes = case(rng)
    result = mean_field(masks.requires_grad_(), boxes, window_kernel(images), [0, 0, 1])
    assert not (result & ~boxes).any()
    assert not result.requires_grad


def test_commutes_with_a_flip(rng):
    images, masks, boxes = case(rng)
    plain = mean_field(masks, boxes, window_kernel(images), [0, 1, 0])
    flipped = mean_field(masks.flip(-1), boxes.flip(-1), window_kernel(images.flip(-1)), [0, 1, 0])
    assert torch.equal(flipped.flip(-1), plain)


def test_padding_does_not_vote(rng):
    images, masks, _ = case(rng)
    valid = torch.zeros(2, 9, 8, dtype=torch.bool)
    valid[:, :6, :5] = True
    boxes = valid[[0, 1, 0]]
    kernel = window_kernel(torch.where(valid[:, None], images, 0.5), valid=valid)
    cropped = mean_field(masks[:, :6, :5], boxes[:, :6, :5], window_kernel(images[..., :6, :5]), [0, 1, 0])
    assert torch.equal(mean_field(masks, boxes, kernel, [0, 1, 0])[:, :6, :5], cropped)


def test_no_masks():
    kernel = window_kernel(torch.zeros(1, 3, 4, 4))
    assert mean_field(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4).bool(), kernel, []).shape == (0, 4, 4)


def test_says_what_it_needs():
    kernel, x = window_kernel(torch.zeros(1, 3, 4, 4)), torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match="image of each"):
        mean_field(x, x.bool(), kernel, [])
    with pytest.raises(ValueError, match="mean_field needs masks"):
        mean_field(x, x.bool(), kernel[..., :3], [0])
    with pytest.raises(ValueError, match="positive constants"):
        window_kernel(torch.zeros(1, 3, 4, 4), theta_color=0)
