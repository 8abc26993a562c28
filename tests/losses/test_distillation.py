"""Oracle: Eq. 3–6 typed out in float64, one region and one image at a time, with torch.fft."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import misa.losses.distillation
from misa.losses.distillation import distillation_loss, in_units_of_spread
from tests.helpers import nothing_may_wait

B, D, H, W = 2, 3, 14, 17


def banded(features, radius, scale, *, high):
    h, w = features.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(features), dim=(-2, -1))
    for i in range(h):
        for j in range(w):
            inside = (i - h // 2) ** 2 + (j - w // 2) ** 2 <= radius**2
            spectrum[..., i, j] *= scale if inside == high else 1
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real


def slow_loss(student, teacher, box_mask, valid, *, radius=3.0, scale=0.2, bg=6.0, fg=10.0, frequency=True, space=True):
    """The four rows of Table 4 as pairs (weight, region, band)."""
    everywhere = torch.ones_like(box_mask)
    background = (bg, ~box_mask if space else everywhere, "low" if frequency else "full")
    foreground = (fg, box_mask if space else everywhere, "high" if frequency else "full")
    terms = [background, foreground] if frequency or space else [((bg + fg) / 2, everywhere, "full")]
    total = torch.zeros((), dtype=torch.float64)
    for weight, region, band in terms:
        s, i = teacher.double(), student.double()
        if band != "full":
            s, i = (banded(x, radius, scale, high=band == "high") for x in (s, i))
        error, count = torch.zeros((), dtype=torch.float64), 0
        for b, y, x in (region & valid)[:, 0].nonzero().tolist():
            error = error + ((s[b, :, y, x] - i[b, :, y, x]) ** 2).sum()
            count += 1
        if count:
            total = total + weight / (2 * count) * error
    return total


@pytest.fixture
def batch(rng):
    student, teacher = (torch.randn(B, D, H, W, generator=rng, dtype=torch.float64) for _ in range(2))
    box_mask = torch.zeros(B, 1, H, W, dtype=torch.bool)
    box_mask[0, :, 2:9, 3:12] = True
    box_mask[1, :, 0:3, 10:] = True
    valid = torch.ones(B, 1, H, W, dtype=torch.bool)
    valid[1, :, 11:] = False
    valid[1, :, :, 15:] = False
    return student, teacher, box_mask, valid


@pytest.mark.parametrize("transform", ["auto", "pruned", "fft"])
@pytest.mark.parametrize("frequency", [True, False])
@pytest.mark.parametrize("space", [True, False])
def test_every_row_of_table_4_equals_its_literal_form(batch, device, frequency, space, transform):
    student, teacher, box_mask, valid = batch
    student.requires_grad_()
    expected = slow_loss(student, teacher, box_mask, valid, frequency=frequency, space=space)
    (slope,) = torch.autograd.grad(expected, student)
    there = student.detach().to(device).requires_grad_()
    rest = [x.to(device) for x in (teacher, box_mask, valid)]
    found = distillation_loss(
        there, *rest[:2], radius=3.0, frequency=frequency, space=space, valid=rest[2], transform=transform
    )
    found.backward()
    assert_close(found.cpu(), expected.detach(), rtol=1e-10, atol=0)
    assert_close(there.grad.cpu(), slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("radius", [0.0, 2.0, 7.5, 50.0])
@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0])
def test_radius_and_scale_reach_the_filter(batch, radius, scale):
    student, teacher, box_mask, valid = batch
    found = distillation_loss(student, teacher, box_mask, radius=radius, scale=scale, bg_weight=2, fg_weight=3)
    everywhere = torch.ones_like(valid)
    expected = slow_loss(student, teacher, box_mask, everywhere, radius=radius, scale=scale, bg=2, fg=3)
    assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_defaults_are_the_papers(batch):
    student, teacher, box_mask, _ = batch
    student, teacher, box_mask = (
        x.repeat_interleave(3, -1).repeat_interleave(3, -2) for x in (student, teacher, box_mask)
    )
    expected = slow_loss(student, teacher, box_mask, torch.ones_like(box_mask), radius=10, scale=0.2, bg=6, fg=10)
    assert_close(distillation_loss(student, teacher, box_mask), expected, rtol=1e-10, atol=0)


def test_float32_agrees_with_float64(batch):
    student, teacher, box_mask, valid = batch
    exact = distillation_loss(student, teacher, box_mask, radius=3, valid=valid)
    single = distillation_loss(student.float(), teacher.float(), box_mask, radius=3, valid=valid)
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("block", [1, 200, 500, 10**9])
def test_the_size_of_a_block_does_not_matter(batch, monkeypatch, block):
    student, teacher, box_mask, _ = batch
    expected = slow_loss(student, teacher, box_mask, torch.ones_like(box_mask))
    monkeypatch.setattr(misa.losses.distillation, "BLOCK", block)
    assert_close(distillation_loss(student, teacher, box_mask, radius=3), expected, rtol=1e-10, atol=0)


def test_pixels_are_counted_over_the_batch_not_the_image(rng):
    # Only the first image has an error; the background of the second one still dilutes it.
    teacher = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    student = teacher.clone()
    student[0] = 1
    no_box = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    found = distillation_loss(student, teacher, no_box, radius=10, bg_weight=6)
    assert_close(found.item(), 6 / (2 * 32) * 16)


def test_channels_are_summed(batch):
    student, teacher, box_mask, _ = batch
    whole = distillation_loss(student, teacher, box_mask, radius=3)
    parts = sum(distillation_loss(student[:, [d]], teacher[:, [d]], box_mask, radius=3) for d in range(D))
    assert_close(whole, parts)


@pytest.mark.parametrize("frequency", [True, False])
@pytest.mark.parametrize("fill", [True, False])
def test_an_empty_region_contributes_nothing(batch, frequency, fill):
    student, teacher, _, valid = batch
    student.requires_grad_()
    mask = torch.full_like(valid, fill)
    loss = distillation_loss(student, teacher, mask, radius=3, frequency=frequency)
    kept = {"bg_weight": 0.0} if fill else {"fg_weight": 0.0}
    assert_close(loss, distillation_loss(student, teacher, mask, radius=3, frequency=frequency, **kept))
    loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("frequency", [True, False])
@pytest.mark.parametrize("space", [True, False])
def test_nothing_valid_is_zero_with_zero_gradient(batch, frequency, space):
    student, teacher, box_mask, valid = batch
    student.requires_grad_()
    nowhere = torch.zeros_like(valid)
    loss = distillation_loss(student, teacher, box_mask, radius=3, valid=nowhere, frequency=frequency, space=space)
    loss.backward()
    assert loss == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("frequency", [True, False])
@pytest.mark.parametrize("space", [True, False])
@pytest.mark.parametrize("transform", ["pruned", "fft"])
def test_gradcheck(rng, frequency, space, transform):
    student = torch.randn(2, 2, 5, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 5, 6, generator=rng, dtype=torch.float64)
    box_mask = torch.rand(2, 1, 5, 6, generator=rng) < 0.4
    valid = torch.rand(2, 1, 5, 6, generator=rng) < 0.8
    options = {"radius": 1.5, "valid": valid, "frequency": frequency, "space": space, "transform": transform}
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, teacher, box_mask, **options), (student,))


@pytest.mark.parametrize("frequency", [True, False])
@pytest.mark.parametrize("space", [True, False])
def test_no_gradient_reaches_the_teacher(batch, frequency, space):
    student, teacher, box_mask, _ = batch
    teacher.requires_grad_()
    student.requires_grad_()
    distillation_loss(student, teacher, box_mask, radius=3, frequency=frequency, space=space).backward()
    assert teacher.grad is None


@given(seed=st.integers(0, 999), h=st.integers(1, 12), w=st.integers(1, 12), radius=st.floats(0, 9))
@settings(max_examples=40, deadline=None)
def test_flips_and_equal_features(seed, h, w, radius):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, 2, h, w, generator=generator, dtype=torch.float64) for _ in range(2))
    box_mask = torch.rand(2, 1, h, w, generator=generator) < 0.5
    loss = distillation_loss(student, teacher, box_mask, radius=radius)
    flipped = distillation_loss(*(x.flip(-1) for x in (student, teacher, box_mask)), radius=radius)
    assert_close(loss, flipped, rtol=1e-9, atol=1e-12)
    assert_close(loss, distillation_loss(teacher, student, box_mask, radius=radius))
    assert_close(4 * loss, distillation_loss(2 * student, 2 * teacher, box_mask, radius=radius))
    assert distillation_loss(student, student, box_mask, radius=radius) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_compute_in_float32(batch, device, dtype):
    student, teacher, box_mask, _ = (x.to(device) for x in batch)
    half = student.to(dtype).requires_grad_()
    expected = distillation_loss(half.detach().float(), teacher.to(dtype).float(), box_mask, radius=3)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = distillation_loss(half, teacher.to(dtype), box_mask, radius=3)
        found.backward()
    assert found.dtype == torch.float32
    assert torch.equal(found.detach(), expected)
    assert half.grad.dtype == dtype


def test_autocast_does_not_reach_the_backward_pass(batch, device):
    student, teacher, box_mask, _ = (x.to(device) for x in batch)
    slopes = []
    for enabled in (False, True):
        leaf = student.float().requires_grad_()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            distillation_loss(leaf, teacher.float(), box_mask, radius=3).backward()
        slopes.append(leaf.grad)
    assert torch.equal(*slopes)


@pytest.mark.gpu
@pytest.mark.parametrize("transform", ["pruned", "fft"])
def test_nothing_waits_for_the_device(batch, transform):
    student, teacher, box_mask, valid = (x.cuda() for x in batch)
    student.requires_grad_()
    distillation_loss(student, teacher, box_mask, radius=3, valid=valid, transform=transform).backward()  # fills caches
    with nothing_may_wait():
        distillation_loss(student, teacher, box_mask, radius=3, valid=valid, transform=transform).backward()


def test_waiting_is_allowed_again_whatever_was_raised(monkeypatch):
    """Setting the mode warns, which is an error here; it once left the mode on for all later tests."""
    modes = []

    def as_torch_does(mode):
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", as_torch_does)
    with pytest.raises(RuntimeError, match="waits: error"), nothing_may_wait():
        raise RuntimeError(f"waits: {modes[-1]}")
    assert modes == ["error", "default"]


def wrong(**change):
    features = torch.zeros(1, 3, 8, 8)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    return {"student": features, "teacher": features, "box_mask": mask} | change


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (wrong(teacher=torch.zeros(1, 4, 8, 8)), r"student is \(1, 3, 8, 8\), teacher is \(1, 4, 8, 8\).*Adapter"),
        (wrong(student=torch.zeros(3, 8, 8)), "teacher without its first axis like student"),
        ({name: value[0, 0] for name, value in wrong().items()}, r"shape \(b, d, h, w\)"),
        (wrong(box_mask=torch.zeros(1, 8, 8, dtype=torch.bool)), "box_mask"),
        (wrong(box_mask=torch.zeros(1, 1, 8, 8)), "box_mask as bool"),
        (wrong(valid=torch.zeros(1, 1, 8, 9, dtype=torch.bool)), "valid"),
        (wrong(radius=-1.0), "radius"),
        (wrong(scale=2.0), "scale"),
        (wrong(bg_weight=-1.0), "bg_weight"),
        (wrong(fg_weight=float("nan")), "fg_weight"),
        (wrong(transform="dct"), "transform"),
        (wrong(student=torch.full((1, 3, 8, 8), torch.nan)), "student hold NaN"),
        (wrong(teacher=torch.full((1, 3, 8, 8), torch.inf)), "teacher hold NaN"),
        (wrong(teacher=torch.full((1, 3, 8, 8), 1e30)), "overflows"),
    ],
)
def test_wrong_input_is_one_clear_sentence(arguments, words):
    with pytest.raises(ValueError, match=words):
        distillation_loss(**arguments)


def test_units_of_spread_do_not_depend_on_the_teachers_scale_or_width():
    rng = torch.Generator().manual_seed(0)
    s = torch.randn(2, 6, 5, 7, generator=rng) + torch.arange(6.0)[:, None, None]
    valid = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    valid[1, :, 3:] = False
    unit = in_units_of_spread(s, valid)
    entries = s.double().permute(1, 0, 2, 3)[:, valid[:, 0]].numpy()
    spread = np.sqrt(((entries - entries.mean(axis=1, keepdims=True)) ** 2).mean())
    assert_close(unit, (s.double() / (spread * np.sqrt(6))).float())
    assert_close(in_units_of_spread(100 * s, valid), unit)
    padded = torch.where(valid, s, 1e3)
    assert_close(in_units_of_spread(padded, valid)[0], unit[0])
    # twice as many channels of the same kind: the same loss
    box = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    box[..., 1:3, 2:5] = True
    one, two = (distillation_loss(torch.zeros_like(x), in_units_of_spread(x), box) for x in (s, torch.cat([s, s], 1)))
    assert_close(one, two)


def test_a_constant_teacher_has_no_spread_to_divide_by():
    s = torch.full((1, 3, 4, 4), 2.5)
    assert_close(in_units_of_spread(s), s)
