"""The seed affinity figure: the content of its tiles, and the cell of a click."""

import dataclasses
import itertools
import math

import cv2
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.text import Text

from misa.figures.affinity import (
    LINES_OF_MAPS,
    Layout,
    affinity_figure,
    category_at,
    field_of,
    profile_figure,
    start_mask,
)
from misa.figures.paper import figure4
from misa.figures.sheet import RasterText, Sheet, Tile, outline
from misa.figures.style import shade, to_png
from misa.figures.widgets import SeedExplorer, factor
from misa.ops.readings import Classifier, Reading, read
from misa.ops.seed_affinity import AffinitySettings


def pixels(figure):
    return cv2.imdecode(np.frombuffer(to_png(figure), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


@pytest.mark.parametrize("teacher", [True, False])
def test_every_map_is_in_its_tile(make_example, teacher):
    example = make_example(teacher=teacher)
    seed, settings = (5, 6), AffinitySettings(semantic_scale=2.0)
    field = field_of(example, 1)
    layout = Layout(*example.size, len(field.kernels), 5, seed)
    drawn = pixels(affinity_figure(example, seed, settings=settings))
    assert drawn.shape[:2] == layout.size[::-1]
    for row, maps in ((1, field.direct(seed, settings)), (2, field.along_tree(seed, settings))):
        for column, kernel in enumerate(field.kernels, 1):
            tile = layout.tile(column, row)
            expected = shade(maps[kernel].numpy())
            for cell in ((0, 0), (11, 15), (1, 14), (10, 1)):  # away from lines and the cross
                x, y = tile.at(cell[0] + 0.5, cell[1] + 0.5)
                np.testing.assert_allclose(drawn[int(y), int(x)], expected[cell], atol=1)


def test_a_click_finds_the_cell_that_is_drawn_there():
    layout = Layout(12, 16, 4, 5, (5, 6))
    for column in range(5):
        for row in range(1, 4):
            for cell in ((0, 0), (11, 15), (4, 9)):
                x, y = layout.tile(column, row).at(cell[0] + 0.5, cell[1] + 0.5)
                assert layout.cell_at(float(x), float(y)) == cell


def test_a_click_into_the_zoomed_window_counts_from_the_seed():
    layout = Layout(12, 16, 1, 5, (5, 6))
    tile = layout.tile(1, 0)
    x, y = tile.at(5.5, 6.5)
    assert layout.cell_at(float(x), float(y)) == (5, 6)
    assert (float(x), float(y)) == (tile.left + tile.width / 2, tile.top + tile.height / 2)
    x, y = tile.at(4.5, 8.5)
    assert layout.cell_at(float(x), float(y)) == (4, 8)


def test_a_click_beside_the_maps_is_none():
    layout = Layout(12, 16, 4, 5, (0, 0))
    assert layout.cell_at(1, 1) is None
    assert layout.cell_at(layout.size[0] - 1, layout.size[1] - 1) is None
    x, y = layout.tile(1, 0).at(-1.5, 0.5)  # in the zoomed tile, but outside the map
    assert layout.cell_at(float(x), float(y)) is None


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (4, 7)])
def test_the_outline_has_one_line_an_open_side(shape):
    mask = np.random.default_rng(1).random(shape) < 0.5
    rows, columns = outline(mask)
    wide = np.pad(mask, 1)
    sides = (wide[1:] != wide[:-1]).sum() + (wide[:, 1:] != wide[:, :-1]).sum()
    assert np.isnan(rows).sum() == np.isnan(columns).sum() == sides


def test_outside_of_a_tile_is_no_cell():
    tile = Tile(10, 20, 40, 30, 3, 4)
    assert tile.cell(10, 20) == (0, 0)
    assert tile.cell(49.9, 49.9) == (2, 3)
    assert tile.cell(9.9, 20) is None
    assert tile.cell(50, 20) is None


def test_an_image_that_ends_within_a_cell_ends_there_on_its_tile(make_example):
    """Its maps are drawn over whole cells; without its size in cells the image would be stretched over them."""
    sheet, white = Sheet(60, 60), 255
    sheet.put_image(Tile(10, 20, 40, 30, 3, 4), np.zeros((5, 17, 3), np.uint8), (2.5, 4.25))
    drawn = np.argwhere((sheet.pixels != white).any(-1))
    assert (drawn.min(0).tolist(), drawn.max(0).tolist()) == ([20, 10], [44, 49])  # two and a half rows, four columns
    ramp = np.arange(17, dtype=np.uint8)[None, :, None].repeat(5, 0).repeat(3, 2)
    sheet.put_image(Tile(10, 20, 40, 30, 3, 4), ramp, (2.5, 4.25))
    assert sheet.pixels[20, [10, 49], 0].tolist() == [0, 15], "the last of 17 columns is beyond the map"
    tile = Layout(12, 16, 4, 5, (4, 5)).tile(0, 0)
    corner = round(tile.top + tile.height) - 2, round(tile.left) + 1
    for resized, ended in (((46, 63), True), (None, False)):  # of 48 x 64 in whole cells
        example = dataclasses.replace(make_example(), resized=resized)
        assert (pixels(affinity_figure(example, (4, 5)))[corner].min() == white) == ended
    example = dataclasses.replace(example, resized=(46, 63))
    axes = profile_figure(example, (4, 5)).axes[0]
    assert axes.images[0].get_extent() == [0, 15.75, 11.5, 0]
    drawn = figure4([(example, (4, 5))]).axes[0].images[0]
    assert drawn.get_extent() == [-0.5, 15.25, 11, -0.5]


def test_the_category_follows_the_smallest_box(example):
    assert category_at(example, (5, 6)) == 1
    assert category_at(example, (0, 0)) == 0
    assert example.box_at((5, 6)) == 0
    assert example.box_at((0, 0)) is None


def test_start_masks(example):
    assert float(start_mask(example, (5, 6), "seed").sum()) == 5
    assert torch.equal(start_mask(example, (5, 6), "box").bool(), example.box_masks()[0])
    blob = start_mask(example, (5, 6), "blob")
    assert bool((blob[~example.box_masks()[0]] == 0).all())
    assert float(blob.max()) > 0.9
    assert float(start_mask(example, (0, 0), "box").sum()) == 3  # no box there: a disc, cut by the corner


def test_profile_shows_every_kernel_along_the_row(example):
    settings = AffinitySettings(semantic_scale=2.0)
    figure = profile_figure(example, (5, 6), settings=settings)
    field = field_of(example, 1)
    direct, tree = field.direct((5, 6), settings), field.along_tree((5, 6), settings)
    for axes, maps in zip(figure.axes[1:], (direct, tree), strict=True):
        for line, kernel in zip(axes.lines, field.kernels, strict=False):
            np.testing.assert_allclose(line.get_ydata(), maps[kernel][5].numpy())


def test_the_explorer_redraws_on_a_slider_and_on_a_click(example, make_example):
    panel = SeedExplorer([example, make_example(7, 9)], seed=(5, 6), settings=AffinitySettings(semantic_scale=2.0))
    pictures = [panel.picture.value]
    lines = ("window", "pixels", "mask")
    drawn = affinity_figure(example, (5, 6), settings=AffinitySettings(semantic_scale=2.0), lines=lines, side=88)
    assert pictures[0] == to_png(drawn)
    assert panel.picture.layout.width == f"{int(drawn.bbox.width)}px"  # not stretched
    panel.controls["balance"].value = 2.5
    pictures.append(panel.picture.value)
    x, y = panel.sheet().tile(2, 1).at(1.5, 13.5)
    panel.click(float(x), float(y))
    assert (panel.controls["row"].value, panel.controls["column"].value) == (1, 13)
    pictures.append(panel.picture.value)
    panel.controls["label"].value = 0
    pictures.append(panel.picture.value)
    panel.controls["image"].value = panel.controls["image"].options[1]
    pictures.append(panel.picture.value)
    assert len(set(pictures)) == len(pictures)
    assert panel.controls["column"].max == 8
    before = panel.values()
    assert panel.click(1, 1) is None
    assert panel.values() == before


def test_an_image_of_fewer_classes_follows_one_of_more(example, make_example):
    """As a photograph of one's own after the embedded scenes, whose fourth class is shown."""
    colors = dataclasses.replace(make_example(20, 9, teacher=False), classes=("cat",), labels=(0,), name="cat")
    other = dataclasses.replace(make_example(7, 9), classes=("dog",), labels=(0,), name="dog")
    panel = SeedExplorer([example, colors, other], seed=(5, 15))
    panel.controls["label"].value = 1
    for name, shown in (("2: cat", colors), ("3: dog", other), ("1: two tones", example)):
        panel.controls["image"].value = name
        alone = SeedExplorer([shown])
        assert panel.picture.value == alone.picture.value
        assert panel.values() | {"image": None} == alone.values() | {"image": None}
        assert panel.controls["label"].options == alone.controls["label"].options


def test_the_panel_begins_with_the_settings_it_is_given(example):
    """Those of a run or of the notebook may lie beyond the sliders' usual ranges."""
    settings = AffinitySettings(0.02, 2.0, 60.0, 8.0, window=13, steps=300, form="product")
    panel = SeedExplorer([example], settings=settings)
    shown = {name: panel.values()[name] for name in vars(settings)}
    assert shown == pytest.approx(vars(settings))


def test_a_click_into_a_box_chooses_its_category(example):
    panel = SeedExplorer([example], seed=(0, 0))
    assert panel.controls["label"].value == 0
    x, y = panel.sheet().tile(0, 1).at(5.5, 6.5)
    panel.click(float(x), float(y))
    assert panel.controls["label"].value == 1
    first = SeedExplorer([example])  # a panel without a seed begins in the first box
    assert (first.controls["row"].value, first.controls["column"].value) == example.middle() != (6, 8)


@pytest.mark.parametrize("lines", [("pixels", "mask"), ("window", "pixels", "mask"), ("pixels",), LINES_OF_MAPS])
def test_every_choice_of_rows_is_drawn_and_can_be_clicked(example, lines):
    layout = Layout(12, 16, 4, 5, (5, 6), lines, 104)
    figure = affinity_figure(example, (5, 6), lines=lines, side=104)
    assert (int(figure.bbox.width), int(figure.bbox.height)) == layout.size
    for row, line in enumerate(lines):
        tile = layout.tile(3, row)
        cell = layout.cell_at(*(float(v) for v in tile.at(5.5, 6.5)))
        assert cell == (5, 6), line


def test_the_panel_fits_a_small_screen(make_example):
    """On a screen of 1280 x 720 JupyterLab leaves a notebook cell about 846 x 600 pixels."""
    for size, teacher in itertools.product([(32, 32), (64, 96), (96, 64), (20, 120)], (True, False)):
        panel = SeedExplorer([make_example(*size, teacher=teacher)])
        for _, lines in panel.controls["lines"].options:
            panel.controls["lines"].value = lines
            width, height = panel.sheet().size
            assert 520 <= width <= 846 - 266
            assert height <= 560
            tile = panel.sheet().tile(1, 1)  # as large as possible
            assert width > 540 or height > 530, (size, lines, tile)


def test_controls_without_effect_are_gray(example, make_example):
    panel = SeedExplorer([example, make_example(7, 9, teacher=False)], seed=(5, 6))

    def gray():
        return [name for name, control in panel.controls.items() if control.disabled]

    assert gray() == ["tree_bandwidth"]
    before = panel.picture.value
    panel.put(tree_bandwidth=0.5)
    assert panel.picture.value == before
    panel.controls["lines"].value = ("pixels", "tree", "mask")
    assert not gray()
    before = panel.picture.value
    panel.put(tree_bandwidth=0.2)
    assert panel.picture.value != before
    panel.controls["reach"].value = "global"
    assert gray() == ["window", "steps"]
    before = panel.picture.value
    panel.put(window=3, steps=7)
    assert panel.picture.value == before
    panel.controls["lines"].value = ("window", "pixels", "mask")
    assert gray() == ["steps"]
    panel.controls["reach"].value = "local"
    panel.controls["image"].value = panel.controls["image"].options[1]
    assert gray() == ["label", "tree_bandwidth", "semantic_scale", "balance", "form"]
    before = panel.picture.value
    panel.put(semantic_scale=3.0, balance=2.0)
    assert panel.picture.value == before


def test_saliency_is_read_as_the_run_reads_it(example):
    """Eq. 12 on the class probability of Eq. 1, and one step of Eq. 14 with the product, by hand."""
    rest = Classifier(
        example.saliency_factors, torch.tensor([0.5, 0, 0, 1.0]), torch.tensor([0.1, -0.2]), torch.ones(())
    )
    reading = read(example.features[None], rest, values="probability")
    read_so = dataclasses.replace(example, reading=Reading(reading.values[0], *reading[1:]))
    seed, settings = (5, 6), AffinitySettings(semantic_scale=0.3, form="product", window=3, steps=1)
    field = field_of(read_so, 1)
    logits = [(k[:, None, None] * example.features).sum(0) for k in (*rest.factors, rest.background)]
    share = torch.stack([a + b for a, b in zip(logits, (*rest.bias, rest.background_bias), strict=True)]).softmax(0)[1]
    z = (share - share.mean()) / share.std(correction=0)
    saliency = torch.exp(-(((z - z[seed]) / 0.3) ** 2))
    color = torch.exp(-((example.colors - example.colors[:, 5:6, 6:7]).square().sum(0) / 0.15**2))
    weights = color * saliency**0.7
    found = field.direct(seed, settings)
    torch.testing.assert_close(found["saliency"], saliency)
    torch.testing.assert_close(found["enhanced"], weights)
    start = torch.rand(12, 16, generator=torch.Generator().manual_seed(0))
    near = weights[4:7, 5:8]
    expected = (near * start[4:7, 5:8]).sum() / near.sum()
    torch.testing.assert_close(field.masks(start, settings)["enhanced"][seed], expected)
    plain = field_of(example, 1).direct(seed, settings)
    torch.testing.assert_close(found["feature"], plain["feature"])
    assert not torch.allclose(found["saliency"], plain["saliency"])
    scaled = dataclasses.replace(example, reading=Reading(2 * example.features, example.saliency_factors, "image"))
    torch.testing.assert_close(field_of(scaled, 1).direct(seed, settings)["saliency"], plain["saliency"])


@pytest.mark.parametrize("value", [8.0, 0.15, 0.4, 1e-3, 7.3])
def test_a_slider_over_powers_of_ten_has_its_value_among_its_steps(value):
    """The browser shows the nearest step, counted from the lower end."""
    slider = factor("scale", value, -3, 1)
    assert slider.value == pytest.approx(value)
    steps = (math.log10(value) - slider.min) / slider.step
    assert steps == pytest.approx(round(steps), abs=1e-6)
    assert slider.min <= -3 + 1e-9
    assert slider.max == pytest.approx(max(1, math.log10(value)))


def test_the_line_below_is_of_what_is_drawn_above(example):
    """The affinity along the tree if the tree is drawn, else that to every pixel."""
    settings = AffinitySettings(semantic_scale=2.0, tree_bandwidth=0.5)
    words = {
        lines: {
            word.text for word in affinity_figure(example, (5, 6), settings=settings, lines=lines).findobj(RasterText)
        }
        for lines in (("pixels", "mask"), ("pixels", "tree"))
    }
    assert any("affinity to every pixel" in word for word in words["pixels", "mask"])
    assert any("affinity along the tree" in word for word in words["pixels", "tree"])


def test_a_long_name_loses_its_middle(example):
    figure = affinity_figure(dataclasses.replace(example, name="a" * 60 + "z"), (5, 6))
    (title,) = [text.get_text() for text in figure.findobj(Text) if "seed at cell (5, 6) of 12 x 16" in text.get_text()]
    assert title.startswith("aaa")
    assert "…" in title
    assert "z " in title


@pytest.mark.parametrize("size", [(12, 16), (28, 16), (72, 8), (8, 67)])
@pytest.mark.parametrize("lines", [LINES_OF_MAPS, ("pixels", "mask")])
def test_names_of_rows_columns_and_image_have_their_place(make_example, size, lines):
    """In the panel, on portraits and panoramas too; a long name leaves the category in sight."""
    example = dataclasses.replace(make_example(), name="IMG_20240613_154233_HDR_of_a_holiday")
    maps = {name: torch.rand(3 if name == "colors" else 4, *size) for name in ("colors", "features")}
    example = dataclasses.replace(example, **maps, resized=None, masks=None)
    side = Layout.of_panel(size, 4, 5, (1, 1), lines).side
    figure = affinity_figure(example, (1, 1), lines=lines, side=side)
    width, renderer = figure.bbox.width, RendererAgg(*(int(v) for v in figure.bbox.size), 100)
    (title,) = [text for text in figure.findobj(Text) if "c = " in text.get_text()]
    assert title.get_window_extent(renderer).x1 <= width
    words = sorted(figure.findobj(RasterText), key=lambda word: -word.place[1])  # kernels are named in the legend, too
    at = {word.text.replace("\n", " "): word.place for word in words}
    columns = [at[name][0] for name in ("color A", "feature Aᶠ", "saliency Aᶜ", "SEPA Âᶜ")]
    assert min(np.diff(columns)) >= 66
    rows = [at[name][1] for name in ("to every pixel", "mask, 20 steps")]
    assert rows[1] - rows[0] >= 46
