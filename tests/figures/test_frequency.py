"""The frequency figure: its bands equal those of the losses, and its panel redraws."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from traitlets import TraitError

from misa.errors import UserError
from misa.figures.frequency import MASK_COLUMNS, at_work, centered, frequency_figure, maps_of, mask_figure
from misa.figures.sheet import RasterText
from misa.figures.style import SIGNED, shade, to_png
from misa.figures.widgets import FrequencyExplorer
from misa.losses.distillation import distillation_loss
from misa.ops.frequency import fourier_mask


def test_bands_are_what_the_loss_compares(rng):
    """Eq. 6 from the figure's bands of both networks."""
    teacher, student = (x - x.mean() for x in torch.randn(2, 9, 10, generator=rng))
    inside = torch.rand(9, 10, generator=rng) < 0.4
    options = {"radius": 2.0, "scale": 0.3}
    s, i = (centered(x, inside, **options)[0] for x in (teacher, student))
    low = (s["low, outside"] - i["low, outside"]).square().sum() / (2 * (~inside).sum())
    high = (s["high, in boxes"] - i["high, in boxes"]).square().sum() / (2 * inside.sum())
    loss = distillation_loss(student[None, None], teacher[None, None], inside[None, None], **options)
    assert_close(6 * low + 10 * high, loss)


def test_a_row_for_each_map(example, make_example):
    assert list(maps_of(example)) == ["teacher S", "student I, adapted", "student I"]
    assert list(maps_of(make_example(teacher=False))) == ["brightness", "colors"]
    inside = example.box_masks().any(dim=0)
    words = [word.text for word in frequency_figure(maps_of(example), inside, radius=3).findobj(RasterText)]
    assert {"teacher S", "student I", "low, outside"} <= set(words)


@pytest.mark.parametrize("size", [(3, 48), (8, 120), (1, 40), (100, 6)])
def test_a_very_wide_or_tall_map_is_drawn(rng, size):
    frequency_figure({"brightness": torch.randn(1, *size, generator=rng)}, torch.ones(size, dtype=torch.bool), radius=1)


def test_a_channel_that_a_map_lacks_is_a_sentence(example):
    """The notebook's parameter may be any number: the student's feature has fewer channels than the teacher's here."""
    maps, inside = maps_of(example), example.box_masks().any(dim=0)
    assert [len(values) for values in maps.values()] == [4, 4, 2]
    with pytest.raises(UserError, match="student I has 2 channels, from 0 on, and no channel 2"):
        frequency_figure(maps, inside, channel=2)


def test_the_explorer_redraws(example, make_example):
    panel = FrequencyExplorer([example, make_example(9, 9), make_example(11, 7, teacher=False)], channel=7, radius=3)
    last = len(example.features) - 1
    assert panel.controls["channel"].value == panel.controls["channel"].max == min(last, 7)
    inside = example.box_masks().any(dim=0)
    name = f"{example.name}   teacher S, channel {last}"
    expected = mask_figure(example.image, example.features[last], inside, radius=3.0, scale=0.2, name=name)
    assert panel.picture.value == to_png(expected)
    pictures = {bytes(panel.picture.value)}
    images = panel.controls["image"].options
    for key, value in (
        ("radius", 5.5),
        ("scale", 0.5),
        ("channel", 0),
        ("feature", "student I"),
        ("image", images[1]),
        ("image", images[2]),
    ):
        panel.controls[key].value = value
        pictures.add(bytes(panel.picture.value))
    assert len(pictures) == 7
    assert panel.controls["feature"].options == ("brightness", "colors")  # without networks
    assert panel.controls["channel"].disabled
    before = panel.picture.value
    panel.controls["channel"].value = 1  # brightness has one channel
    assert panel.picture.value == before
    panel.controls["feature"].value = "colors"
    assert (panel.controls["channel"].max, panel.controls["channel"].disabled) == (2, False)
    panel.controls["radius"].value = 2.0
    assert bytes(panel.picture.value) not in pictures


def test_the_masks_and_bands_are_the_equations(rng):
    """The tiles of the panel against Eq. 3-5 computed wave by wave."""
    values = torch.randn(8, 10, generator=rng)
    box = torch.zeros(8, 10, dtype=torch.bool)
    box[2:6, 3:8] = True
    high, low = at_work(values, box, 2.0, 0.25)
    alpha = fourier_mask(8, 10, radius=2.0, scale=0.25)
    spectrum = torch.fft.fftshift(torch.fft.fft2(values))
    band = torch.fft.ifft2(torch.fft.ifftshift(spectrum * alpha)).real - 0.25 * values.mean()
    reach = float((values - values.mean()).abs().max())
    np.testing.assert_allclose(
        high["band"].astype(int), shade(band.numpy(), -reach, reach, colors=SIGNED).astype(int), atol=2
    )
    assert (high["mask α"] == shade(alpha.numpy(), colors="gray")).all()
    nothing = shade(np.zeros((1, 1)), -1, 1, colors=SIGNED)[0, 0]
    assert (high["kept by Eq. 5"][~box.numpy()] == nothing).all()
    assert (low["kept by Eq. 5"][box.numpy()] == nothing).all()
    assert (low["mask α"].astype(int) + high["mask α"] >= 255).all()


def test_the_axis_of_the_masks_ends_at_the_farthest_wave():
    """Of a map of 64 x 96 it is 57.7 bins from DC, beyond a radius of 50."""
    values, box = torch.rand(1, 64, 96), torch.ones(64, 96, dtype=torch.bool)
    figure = mask_figure(np.zeros((64, 96, 3), np.uint8), values[0], box, radius=50.0, scale=0.2)
    ticks = [float(word.text) for word in figure.findobj(RasterText) if word.text.isdecimal()]
    assert 45 <= max(ticks) <= 57


def test_the_map_that_is_drawn_is_the_one_that_is_chosen(example, make_example):
    """Also after an image that has other maps."""
    other = replace(make_example(9, 9), features=None)
    panel = FrequencyExplorer([example, other])
    controls, images = panel.controls, panel.controls["image"].options
    names = list(maps_of(example))
    both = next(name for name in names[1:] if name in maps_of(other))
    for feature, image in ((both, 1), (both, 0), (names[0], 1), (list(maps_of(other))[-1], 0)):
        if feature in controls["feature"].options:
            controls["feature"].value = feature
        controls["image"].value = images[image]
        assert panel.picture.value == to_png(panel._figure(**panel.values()))
        shown = (example, other)[image]
        assert controls["feature"].value in maps_of(shown)
        if feature == both:
            assert controls["feature"].value == both


def test_a_wrong_value_leaves_the_panel_at_work(example):
    panel = FrequencyExplorer([example])
    with pytest.raises(TraitError):
        panel.put(feature="none")
    before = panel.picture.value
    panel.controls["radius"].value -= 1
    assert panel.picture.value != before


def test_controls_fit_the_image_and_remember_what_was_chosen(example, make_example):
    """Maps of 12 x 16 reach 10 bins from DC, of 40 x 40 28.3; an image without a student has no map of one."""
    other = replace(make_example(40, 40), student=None, adapted=None, features=None)
    panel = FrequencyExplorer([example, other], radius=9.0)
    controls, images = panel.controls, panel.controls["image"].options
    controls["feature"].value = "student I, adapted"
    controls["channel"].value = 3
    assert controls["radius"].max == 10
    controls["image"].value = images[1]
    assert controls["radius"].max == 28.5
    assert (controls["feature"].value, controls["channel"].value) == ("brightness", 3)
    assert controls["channel"].disabled
    controls["feature"].value = "colors"
    assert controls["channel"].value == 2
    controls["radius"].value = 25
    controls["image"].value = images[0]
    assert (controls["radius"].value, controls["channel"].value) == (10, 3)
    controls["feature"].value = "student I, adapted"
    controls["image"].value = images[1]
    assert controls["radius"].value == 25
    controls["image"].value = images[0]
    assert controls["feature"].value == "student I, adapted"
    assert panel.picture.value == to_png(panel._figure(**panel.values()))


@pytest.mark.parametrize("size", [(64, 36), (72, 8), (8, 67), (1, 90), (90, 1)])
def test_names_do_not_overlap_and_the_chart_is_beside_the_image(rng, size):
    values = torch.rand(*size, generator=rng)
    figure = mask_figure(np.zeros((*size, 3), np.uint8), values, torch.ones(size, dtype=torch.bool), radius=1.0)
    at = {word.text: word.place for word in figure.findobj(RasterText)}
    titles = [at[title][0] for title in MASK_COLUMNS]
    assert min(np.diff(titles)) >= 74
    assert abs(at["high pass"][1] - at["low pass"][1]) >= 52
    assert at["α, high pass"][0] - at["θ"][0] > 200
    assert at["θ"][0] > titles[0] + 30
    assert max(x for x, _ in at.values()) < figure.bbox.width - 40
