"""The strong augmentation: seeded, without geometric changes, and independent of padding."""

import pytest
import torch
from torch.testing import assert_close

from misa.ops.strong import MEAN, STD, strong_view


def normalised(colors):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (colors - mean) / std


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def colors(images):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return images * std + mean


def test_seeded_and_image_by_image(rng):
    images = normalised(torch.randint(0, 256, (2, 3, 12, 10), generator=rng).float())
    both = strong_view(images, seeded(1, 2))
    assert torch.equal(both, strong_view(images, seeded(1, 2)))
    assert torch.equal(both[1:], strong_view(images[1:], seeded(2)))
    assert not torch.equal(both, strong_view(images, seeded(1, 3)))
    assert not torch.equal(both, images)


def test_nothing_asked_for_is_nothing_done(rng):
    images = normalised(torch.randint(0, 256, (1, 3, 12, 10), generator=rng).float())
    assert_close(strong_view(images, seeded(0), jitter=0, grey=0), images, atol=1e-5, rtol=1e-5)


def test_grey_is_grey_and_in_range(rng):
    images = normalised(torch.randint(0, 256, (3, 3, 12, 10), generator=rng).float())
    seen = colors(strong_view(images, seeded(0, 1, 2), grey=1.0))
    assert_close(seen[:, 0], seen[:, 1], atol=1e-2, rtol=0)
    assert_close(seen[:, 0], seen[:, 2], atol=1e-2, rtol=0)
    assert seen.min() >= -0.01
    assert seen.max() <= 255.01


def test_geometry_stays():
    """A pixel of another color stays in place, and the rest keeps one color."""
    image = torch.full((1, 3, 9, 9), 100.0)
    image[0, :, 3, 5] = torch.tensor([220.0, 30, 40])
    seen = strong_view(normalised(image), seeded(4), jitter=1.0, grey=0.0)
    rest = torch.ones(9, 9, dtype=torch.bool)
    rest[3, 5] = False
    assert seen[0][:, rest].std(dim=1).max() < 1e-5
    assert (seen[0, :, 3, 5] - seen[0, :, 0, 0]).abs().max() > 0.1


def test_padding_stays_and_has_no_part(rng):
    plain = normalised(torch.randint(0, 256, (1, 3, 12, 10), generator=rng).float())
    padded = torch.zeros(1, 3, 16, 16)
    padded[..., :12, :10] = plain
    seen = strong_view(padded, seeded(7), jitter=1.0)
    assert_close(seen[..., :12, :10], strong_view(plain, seeded(7), jitter=1.0))
    assert torch.equal(strong_view(padded, seeded(7), jitter=1.0, sizes=[(12, 10)]), seen)
    assert (seen[..., 12:, :] == 0).all()
    assert (seen[..., 10:] == 0).all()
    assert torch.equal(strong_view(torch.zeros(1, 3, 4, 4), seeded(0)), torch.zeros(1, 3, 4, 4))


def test_the_shares_of_what_happens():
    """200 draws: 80 % jittered, 20 % grey, 30 % blurred, each independent of the others."""
    image = torch.full((1, 3, 5, 5), 90.0)
    image[0, 0] += 50
    image[0, :, 2, 2] += 60
    plain = normalised(image)
    jittered = grey = blurred = 0
    for seed in range(200):
        jittered += not torch.allclose(strong_view(plain, seeded(seed), grey=0), plain, atol=1e-4)
        seen = colors(strong_view(plain, seeded(seed), jitter=0, blur=0.3))[0]
        grey += bool((seen[0] - seen[1]).abs().max() < 0.1)
        blurred += bool((seen[:, 2, 2] - seen[:, 0, 0]).max() < 59.9)
    assert abs(jittered - 160) < 20
    assert abs(grey - 40) < 20
    assert abs(blurred - 60) < 25


def test_says_what_it_needs():
    with pytest.raises(ValueError, match="for each"):
        strong_view(torch.zeros(2, 3, 4, 4), seeded(0))
    with pytest.raises(ValueError, match="2 and 1"):
        strong_view(torch.zeros(2, 3, 4, 4), seeded(0, 1), sizes=[(4, 4)])
