"""L*a*b* against scikit-image, which has the same white and matrix."""

import pytest
import torch
from skimage.color import rgb2lab
from torch.testing import assert_close

from misa.ops.lab import rgb_to_lab


def test_equals_scikit_image(rng):
    images = torch.randint(0, 256, (2, 3, 16, 17), generator=rng)
    images[:, :, 0, :5] = torch.tensor([0, 1, 10, 11, 255])  # both branches of both curves
    expected = torch.stack(
        [torch.from_numpy(rgb2lab(x.permute(1, 2, 0).numpy() / 255)).permute(2, 0, 1) for x in images]
    )
    assert_close(rgb_to_lab(images.double()), expected, atol=1e-3, rtol=0)
    assert_close(rgb_to_lab(images), expected.float(), atol=1e-3, rtol=0)


def test_grey_has_no_color_and_white_is_100():
    grey = torch.arange(0.0, 256).expand(1, 3, 1, 256)
    lightness, *color = rgb_to_lab(grey)[0]
    assert_close(lightness[0, [0, 255]], torch.tensor([0.0, 100.0]), atol=1e-3, rtol=0)
    assert (lightness.diff() > 0).all()
    assert_close(torch.stack(color), torch.zeros(2, 1, 256), atol=0.02, rtol=0)


def test_red_comes_first():
    red = torch.zeros(1, 3, 1, 1)
    red[:, 0] = 255
    assert_close(rgb_to_lab(red).flatten(), torch.tensor([53.24, 80.09, 67.20]), atol=0.02, rtol=0)


def test_gradcheck_and_a_finite_gradient_at_black(rng):
    images = (torch.rand(1, 3, 3, 3, generator=rng, dtype=torch.float64) * 255).requires_grad_()
    assert torch.autograd.gradcheck(rgb_to_lab, (images,))
    black = torch.zeros(1, 3, 1, 1, requires_grad=True)
    rgb_to_lab(black).sum().backward()
    assert black.grad.isfinite().all()


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 4, 4), torch.full((1, 3, 2, 2), -1.0), torch.full((1, 3, 2, 2), 256.0)]
)
def test_says_what_it_needs(images):
    with pytest.raises(ValueError, match="rgb_to_lab needs"):
        rgb_to_lab(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(rng, device, dtype):
    images = torch.randint(0, 256, (1, 3, 16, 17), generator=rng).to(device)
    expected = rgb_to_lab(images)
    with torch.autocast(device.type, dtype=dtype):
        assert torch.equal(rgb_to_lab(images), expected)
