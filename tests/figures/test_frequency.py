"""The frequency figure: its bands are the package's, its panel redraws."""

import torch
from torch.testing import assert_close

from misa.figures.frequency import bands, frequency_figure, maps_of
from misa.figures.sheet import Word
from misa.figures.style import to_png
from misa.figures.widgets import FrequencyExplorer
from misa.losses.distillation import distillation_loss


def test_bands_are_what_the_loss_compares(rng):
    """Eq. 6 from the figure's bands of both networks."""
    teacher, student = torch.randn(2, 9, 10, generator=rng)
    inside = torch.rand(9, 10, generator=rng) < 0.4
    options = {"radius": 2.0, "scale": 0.3}
    s, i = bands(teacher, inside, **options), bands(student, inside, **options)
    low = (s["low, outside"] - i["low, outside"]).square().sum() / (2 * (~inside).sum())
    high = (s["high, in boxes"] - i["high, in boxes"]).square().sum() / (2 * inside.sum())
    loss = distillation_loss(student[None, None], teacher[None, None], inside[None, None], **options)
    assert_close(6 * low + 10 * high, loss)


def test_a_row_for_each_map(example, make_example):
    assert list(maps_of(example)) == ["teacher S", "student I, adapted", "student I"]
    assert list(maps_of(make_example(teacher=False))) == ["colors"]
    inside = example.box_masks().any(dim=0)
    words = [word.text for word in frequency_figure(maps_of(example), inside, radius=3).findobj(Word)]
    assert {"teacher S", "student I", "low, outside"} <= set(words)


def test_the_explorer_redraws(example, make_example):
    panel = FrequencyExplorer([example, make_example(9, 9)], channel=7, radius=3)
    assert panel.controls["channel"].value == panel.controls["channel"].max == 1  # the student has two channels
    inside = example.box_masks().any(dim=0)
    expected = frequency_figure(maps_of(example), inside, channel=1, radius=3.0, scale=0.2)
    assert panel.picture.value == to_png(expected)
    pictures = {panel.picture.value}
    for name, value in (("radius", 5.5), ("scale", 0.5), ("channel", 0), ("image", panel.controls["image"].options[1])):
        panel.controls[name].value = value
        pictures.add(panel.picture.value)
    assert len(pictures) == 5
