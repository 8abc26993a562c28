"""Strong color augmentation: the student's view of an image whose EMA teacher sees it unchanged.

Axes: b image · h row · w column.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from misa.ops.affinity import check_finite

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, RGB in 0..255


def strong_view(
    images: Float[Tensor, "b 3 h w"],
    generators: Sequence[torch.Generator],
    *,
    jitter: float = 0.8,
    grey: float = 0.2,
    blur: float = 0.0,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Float[Tensor, "b 3 h w"]:
    """Return normalized images with random color jitter, gray scale and Gaussian blur.

    BoxTeacher (Cheng et al. 2023): with probability `jitter` brightness, contrast and saturation by 0.6 … 1.4 and hue
    by ±0.1 of the circle, in random order; then gray with probability `grey`, and a Gaussian of 3 x 3 pixels with σ of
    0.1 … 2 with probability `blur`. Geometry is unchanged. Every image has its own `generator` (on the CPU), so its
    draws do not depend on the batch. Padding, exactly 0 in a normalized image, stays 0 and does not affect contrast.
    `sizes` are the images' (h, w) without padding; by default they are read from the images, which synchronizes.
    Raises ValueError: the shape is not (b, 3, h, w), or not one generator, or size, per image; NotFinite: NaN or Inf,
    on the CPU only.
    """
    known = len(images) if sizes is None else len(sizes)
    if images.dim() != 4 or images.shape[1] != 3 or not len(generators) == known == len(images):
        raise ValueError(
            "strong_view needs images (b, 3, h, w) and a generator, and a size where sizes are given, for each: "
            f"they are {tuple(images.shape)}, {len(generators)} and {known}."
        )
    check_finite("strong_view: images", images)
    mean, std = _constants(images)
    result = images.clone()
    for b, (image, out, generator) in enumerate(zip(images, result, generators, strict=True)):
        there = (image != 0).any(dim=0)
        h, w = sizes[b] if sizes else (int(there.any(dim=1).sum()), int(there.any(dim=0).sum()))
        plain = ((image[:, :h, :w] * std + mean) / 255).clamp(0, 1)
        changed = _changed(plain, generator, jitter=jitter, grey=grey, blur=blur)
        out[:, :h, :w] = torch.where(there[:h, :w], (changed * 255 - mean) / std, 0)
    return result


def _changed(image: Tensor, generator: torch.Generator, *, jitter: float, grey: float, blur: float) -> Tensor:
    """Augment one image (3 h w) in [0, 1]; draws all random numbers first, so that no probability shifts a draw."""
    decide = torch.rand(3, generator=generator).tolist()
    brightness, contrast, saturation, hue, sigma = torch.rand(5, generator=generator).tolist()
    order = torch.randperm(4, generator=generator).tolist()
    if image.numel() == 0:
        return image
    if decide[0] < jitter:
        for step in order:
            if step == 0:
                image = V.adjust_brightness(image, 0.6 + 0.8 * brightness)
            elif step == 1:
                image = V.adjust_contrast(image, 0.6 + 0.8 * contrast)
            elif step == 2:
                image = V.adjust_saturation(image, 0.6 + 0.8 * saturation)
            else:
                image = V.adjust_hue(image, 0.2 * hue - 0.1)
    if decide[1] < grey:
        image = V.rgb_to_grayscale(image, num_output_channels=3)
    if decide[2] < blur:
        image = V.gaussian_blur(image, [3, 3], [0.1 + 1.9 * sigma] * 2)
    return image


def normalised(pixels: UInt8[Tensor, "... 3 h w"]) -> Float[Tensor, "... 3 h w"]:
    """Return 8-bit RGB images as normalized network inputs."""
    pixels = pixels.float()
    mean, std = _constants(pixels)
    return (pixels - mean) / std


def denormalised(images: Float[Tensor, "... 3 h w"]) -> UInt8[Tensor, "... 3 h w"]:
    """Invert `normalised`, rounded and clamped to 8 bits."""
    images = images.float()
    mean, std = _constants(images)
    return (images * std + mean).round().clamp(0, 255).to(torch.uint8)


def _constants(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the data (3 1 1)."""
    mean, std = (
        torch.tensor(values, dtype=images.dtype).view(3, 1, 1).to(images.device, non_blocking=True)
        for values in (MEAN, STD)
    )
    return mean, std
