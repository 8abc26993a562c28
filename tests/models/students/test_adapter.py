import pytest
import torch
from torch.testing import assert_close

from misa.losses.distillation import distillation_loss
from misa.models.students.adapter import Adapter


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Disable TF32: otherwise a GPU's convolutions round to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_it_is_two_layers_of_the_literal_formula(rng, device):
    adapter = Adapter(3, 4).to(device)
    features = torch.randn(2, 3, 5, 6, generator=rng).to(device)
    align, first, second = adapter.adaptation, adapter.projector[0], adapter.projector[2]
    aligned = torch.einsum("ed,bdhw->behw", align.weight[:, :, 0, 0], features) + align.bias[:, None, None]

    def three_by_three(x, layer):
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        taps = [
            torch.einsum("ed,bdhw->behw", layer.weight[:, :, i, j], padded[..., i : i + 5, j : j + 6])
            for i in range(3)
            for j in range(3)
        ]
        return sum(taps) + layer.bias[:, None, None]

    expected = three_by_three(three_by_three(aligned, first).clamp(min=0), second)
    assert_close(adapter(features), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("student", "teacher"), [(3, 8), (8, 3), (4, 4)])
def test_channels_become_the_teachers_and_everything_learns(rng, student, teacher):
    adapter = Adapter(student, teacher)
    features = torch.randn(1, student, 24, 31, generator=rng, requires_grad=True)
    prior = torch.randn(1, teacher, 24, 31, generator=rng)
    box_mask = torch.zeros(1, 1, 24, 31, dtype=torch.bool)
    box_mask[..., 3:15, 4:20] = True
    distillation_loss(adapter(features), prior, box_mask, radius=4).backward()
    assert features.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_wrong_channels_are_one_clear_sentence():
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\)"):
        Adapter(3, 4)(torch.zeros(1, 4, 5, 5))
    with pytest.raises(ValueError, match="one channel or more"):
        Adapter(0, 4)
