"""A small example without a network: an object of two tones, and features that separate the object."""

import numpy as np
import pytest
import torch

from misa.figures.example import Example


def make(height=12, width=16, *, teacher=True, stride=4):
    rng = np.random.default_rng(0)
    mask = np.zeros((height * stride, width * stride), bool)
    mask[2 * stride : 9 * stride, 3 * stride : 12 * stride] = True
    image = np.where(mask[..., None], (180, 90, 60), (60, 90, 120)).astype(np.uint8)
    image[:, : 7 * stride] //= 2  # a shadow across the object
    coarse = torch.from_numpy(mask[::stride, ::stride].copy()).float()
    colors = torch.from_numpy(image[::stride, ::stride].copy()).permute(2, 0, 1).float() / 58 - 2
    noise = torch.from_numpy(rng.normal(0, 0.05, (4, height, width))).float()
    return Example(
        name="two tones",
        image=image,
        boxes=np.array([[3.0, 2, 12, 9]]) * stride,
        labels=(1,),
        classes=("disc", "block"),
        masks=mask[None],
        colors=colors,
        features=torch.stack([coarse, 1 - coarse, coarse, torch.zeros_like(coarse)]) + noise if teacher else None,
        saliency_factors=torch.tensor([[0.0, 1, 0, 1], [2.0, 0, 1, 0]]) if teacher else None,
        student=torch.stack([coarse, 0.5 * coarse]) + noise[:2] if teacher else None,
        adapted=torch.stack([coarse, 1 - coarse, coarse, torch.zeros_like(coarse)]) + noise.flip(2)
        if teacher
        else None,
    )


@pytest.fixture
def make_example():
    return make


@pytest.fixture
def example():
    return make()
