"""Figures show their input, and are saved as vectors with embedded fonts."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from misa.data.scenes.scenes import Scenes, draw_scene
from misa.figures.paper import figure5
from misa.figures.plots import (
    ap_bars,
    box_to_mask,
    class_bars,
    draw_objects,
    grouped_intervals,
    health_curves,
    loss_curves,
    matched_colors,
    precision_recall,
    sample_grid,
    save,
)
from misa.figures.style import COLORS, Picture


@pytest.fixture
def rows():
    scenes = Scenes(size=48, train=3, val=1)
    drawn = [draw_scene(scenes, i) for i in range(3)]
    return [
        {
            "image": scene.image,
            "boxes": scene.boxes,
            "predicted": scene.masks[:1],
            "predicted_labels": ["first 0.90"][: len(scene.masks)],
            "truth": scene.masks,
        }
        for scene in drawn
    ]


def test_box_to_mask_has_a_column_an_image_and_three_rows(rows):
    figure = box_to_mask(rows)
    assert len(figure.axes) == 9
    for ax, row in zip(figure.axes[:3], rows, strict=True):
        painted = ax.images[0].get_array()
        assert painted.shape[0] == painted.shape[1] == 8 * 48  # enlarged, so that boxes cover little
        assert (painted != row["image"].repeat(8, axis=0).repeat(8, axis=1)).any() == bool(len(row["boxes"]))
    assert [ax.get_ylabel() for ax in figure.axes[::3]] == ["annotated boxes", "predicted masks", "true masks"]


def test_without_true_masks_their_line_is_left_out(rows):
    figure = box_to_mask([{**row, "truth": None} for row in rows])
    assert [ax.get_ylabel() for ax in figure.axes[::3]] == ["annotated boxes", "predicted masks"]


def test_an_image_without_objects_is_drawn(rows):
    empty = {**rows[0], "boxes": np.zeros((0, 4)), "predicted": np.zeros((0, 48, 48), bool), "predicted_labels": []}
    figure = box_to_mask([{**empty, "truth": np.zeros((0, 48, 48), bool)}])
    assert (figure.axes[0].images[0].get_array()[::8, ::8] == rows[0]["image"]).all()


def test_a_prediction_has_the_color_of_its_object():
    truth = np.zeros((3, 20, 20), bool)
    truth[0, :10], truth[1, 10:, :10], truth[2, 10:, 10:] = True, True, True
    predicted = np.stack([truth[2], truth[0] | truth[1], np.zeros((20, 20), bool), truth[0]])
    assert matched_colors(predicted, truth) == [2, 1, "gray", 0]
    quarter = np.zeros((1, 20, 20), bool)
    quarter[0, :5, :10] = True  # all of it is in an object, with an IoU of 0.25
    assert matched_colors(quarter, truth) == ["gray"]
    assert matched_colors(predicted[:0], truth) == []
    assert matched_colors(predicted, truth[:0]) == ["gray"] * 4


def test_sample_grid_fills_row_by_row(rows):
    samples = [{"image": row["image"], "boxes": row["boxes"]} for row in rows]
    figure = sample_grid(samples, columns=2)
    assert [len(ax.images) for ax in figure.axes] == [1, 1, 1, 0]
    assert isinstance(sample_grid([]), Figure)


def test_a_class_has_one_color_in_all_images(rows):
    image, boxes = rows[0]["image"], np.array([[2.0, 2, 20, 20], [25, 25, 40, 40]])
    samples = [{"image": image, "boxes": boxes, "labels": names} for names in (["cow", "ant"], ["bee", "cow"])]
    shown = [
        (text.get_text(), text.get_bbox_patch().get_facecolor())
        for ax in sample_grid(samples).axes
        for text in ax.texts
    ]
    assert [name for name, _ in shown] == ["cow", "ant", "bee", "cow"]
    assert len(set(shown)) == len({color for _, color in shown}) == 3
    (given,) = sample_grid([{**samples[0], "colors": [4, 2]}]).axes
    assert [to_hex(text.get_bbox_patch().get_facecolor()) for text in given.texts] == [COLORS[4], COLORS[2]]


def test_colors_that_are_given_are_in_the_legend(rows):
    """Boxes without room for their labels, in the color of their class; not where one class has several colors."""
    boxes = np.array([[4.0 * x, 4 * y, 4 * x + 3, 4 * y + 3] for x in range(12) for y in range(12)])
    n = len(boxes)
    sample = {"image": rows[0]["image"], "boxes": boxes, "labels": ["a long name"] * n}
    for samples, expected in (
        ([{**sample, "colors": [4] * n}], {"a long name": COLORS[4]}),
        ([sample], {"a long name": COLORS[0]}),
        ([{**sample, "colors": [4] * n}, {**sample, "colors": [2] * n}], {}),
    ):
        marks = [mark for legend in sample_grid(samples).legends for mark in legend.get_patches()]
        assert {mark.get_label(): to_hex(mark.get_facecolor()) for mark in marks} == expected


def test_groups_are_drawn_above_and_their_differences_to_the_baseline_below():
    columns = ["row", "group", "mean", "ci", "n", "difference", "difference_ci"]
    nan = float("nan")
    lines = [
        ("baseline", "plain", 20.0, 1.0, 5, nan, nan),
        ("baseline", "camouflage", 10.0, 1.0, 5, nan, nan),
        ("ours", "plain", 21.0, 1.0, 5, 1.0, 0.5),  # without a value for camouflage
        ("unpaired", "plain", 22.0, 1.0, 1, nan, nan),
    ]
    above, below = grouped_intervals(pd.DataFrame(lines, columns=columns)).axes
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["baseline", "ours", "unpaired"]
    assert [tick.get_text() for tick in below.get_xticklabels()] == ["plain", "camouflage"]
    (zero,) = [line for line in below.lines if len(line.get_xdata()) == 2 and set(line.get_ydata()) == {0}]
    ((drawn, *_),) = below.containers
    np.testing.assert_array_equal(np.array(drawn.get_ydata(), float), [1.0, nan])
    assert zero.get_color() not in [container[0].get_color() for container in above.containers]
    assert len(above.containers) == 3
    assert "by mode or size yet" in grouped_intervals(pd.DataFrame(columns=columns)).texts[0].get_text()


def test_loss_curves_show_the_running_mean():
    values = np.arange(10.0)
    (axes,) = loss_curves({"projection": values}, window=4).axes
    raw, smooth = axes.lines
    np.testing.assert_allclose(raw.get_ydata(), values)
    np.testing.assert_allclose(smooth.get_ydata(), [values[i - 3 : i + 1].mean() for i in range(3, 10)])
    np.testing.assert_allclose(smooth.get_xdata(), np.arange(4, 11))
    assert axes.get_yscale() == "log"  # small terms are seen beside large ones


def test_a_legend_covers_no_curve():
    step = np.arange(3)
    names = ("cls", "projection", "global", "local", "distillation")
    shares = {f"gradient_{name}": np.full(3, 0.2) for name in names}
    figures = (
        health_curves({"step": step, "mask_fill": step / 3, "mask_is_box": step / 9, **shares}),
        loss_curves({name: np.ones(9) for name in ("loss", *names)}),
        ap_bars({"masks": {"AP": 30.0, "AP50": 30.0}}),
    )
    for figure in figures:
        FigureCanvasAgg(figure).draw()
        axes = figure.axes[-1]
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    areas, lines = figures[0].axes[-1].collections, figures[1].axes[-1].lines[1::2]
    colors = {line.get_label(): to_hex(line.get_color()) for line in lines}
    assert [to_hex(area.get_facecolor()[0]) for area in areas] == [colors[name] for name in names]


def test_bars_leave_out_what_was_not_measured():
    figure = ap_bars({"masks": {"AP": 12.3, "APl": None}, "as rectangles": {"AP": 4.0, "APl": None}})
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [12.3, 4.0]
    assert [t.get_text() for t in figure.axes[0].texts] == ["12.3", "4.0"]
    assert figure.axes[0].get_xlabel() == "APl: no objects to measure on"


def test_the_axis_of_bars_claims_no_masks_where_boxes_were_scored():
    for scores in ({"boxes": {"AP": 12.3}}, {"masks": {"AP": 12.3}}, {"masks": {"AP": None}}):
        assert ap_bars(scores).axes[0].get_ylabel() == "AP (%)"
    assert ap_bars({"IoU": {"mean": 12.3, "cat": 4.0}}).axes[0].get_ylabel() == "IoU (%)"


def test_saved_as_pdf_with_truetype_fonts_and_as_png(tmp_path, rows):
    save(ap_bars({"masks": {"AP": 1.0}}), tmp_path / "figures", "ap")
    pdf = (tmp_path / "figures" / "ap.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/Type3" not in pdf
    assert (tmp_path / "figures" / "ap.png").read_bytes().startswith(b"\x89PNG")


def test_classes_come_best_first_and_those_without_objects_last():
    scores = {
        "cat": {"AP": 10.0, "objects": 3.0},
        "dog": {"AP": None, "objects": 0.0},
        "cow": {"AP": 30.0, "objects": 7.0},
    }
    (ax,) = class_bars(scores).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cow (7)", "cat (3)", "dog (0)"]
    assert [bar.get_width() for bar in ax.patches] == [30.0, 10.0, 0.0]
    (ax,) = class_bars(scores, most=1).axes
    assert "2 classes further down left out" in ax.get_xlabel()


def test_a_line_for_every_threshold():
    recall = [0.0, 0.5, 1.0]
    (ax,) = precision_recall({"recall": recall, "IoU 0.50": [1.0, 0.8, 0.0], "IoU 0.75": [1.0, 0.2, 0.0]}).axes
    assert [line.get_label() for line in ax.lines] == ["IoU 0.50", "IoU 0.75"]
    assert list(ax.lines[1].get_ydata()) == [1.0, 0.2, 0.0]
    assert "no object" in precision_recall({}).axes[0].texts[0].get_text()


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_labels_stay_in_the_image_and_off_each_other(size):
    image = np.zeros((*size, 3), np.uint8)
    boxes = np.array([[50.0, 2, 64, 20], [50, 2, 63, 21], [0, 40, 10, 60]])
    figure = sample_grid(
        [{"image": image, "boxes": boxes, "labels": ["a class with a name", "another one", "a third"]}]
    )
    FigureCanvasAgg(figure).draw()
    (ax,) = figure.axes
    frame, places = ax.get_window_extent(), [text.get_window_extent() for text in ax.texts]
    plates = [text.get_bbox_patch().get_window_extent() for text in ax.texts]
    assert all(frame.x0 - 1 <= p.x0 and p.x1 <= frame.x1 + 1 and p.y1 <= frame.y1 + 1 for p in places)
    assert not any(plates[i].overlaps(plates[j]) for i in range(3) for j in range(i))


@pytest.mark.parametrize("seed", range(4))
def test_a_label_is_at_its_box_or_left_out_for_the_legend(seed):
    """In a crowd of small boxes: each drawn label touches a box of its class and hides no other label."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(5, 85, (30, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(4, 14, (30, 2))], 1)
    labels = [f"class {i % 5}" for i in range(30)]
    figure = sample_grid([{"image": np.zeros((100, 100, 3), np.uint8), "boxes": boxes, "labels": labels}])
    FigureCanvasAgg(figure).draw()
    (ax,) = figure.axes
    frame, own = ax.get_window_extent(), [text.get_window_extent() for text in ax.texts]
    assert 0 < len(own) < 30
    for text, place in zip(ax.texts, own, strict=True):
        assert frame.x0 - 1 <= place.x0 < place.x1 <= frame.x1 + 1
        assert frame.y0 - 1 <= place.y0 < place.y1 <= frame.y1 + 1
        (x1, y1), (x2, y2) = ax.transData.inverted().transform([(place.x0, place.y1), (place.x1, place.y0)])
        same = boxes[[name == text.get_text() for name in labels]]
        gaps = np.maximum(np.maximum(same[:, 0] - x2, x1 - same[:, 2]), np.maximum(same[:, 1] - y2, y1 - same[:, 3]))
        assert gaps.min() < 3  # of 100 pixels
    assert not any(own[i].overlaps(own[j]) for i in range(len(own)) for j in range(i))
    drawn = [text.get_text() for text in ax.texts]
    (legend,) = figure.legends
    named = {text.get_text(): to_hex(patch.get_facecolor()) for text, patch in zip(
        legend.get_texts(), legend.get_patches(), strict=True)}  # fmt: skip
    assert named == {f"class {i}": COLORS[i] for i in range(5) if drawn.count(f"class {i}") < 6}
    inside = legend.get_window_extent()
    assert figure.bbox.x0 <= inside.x0
    assert inside.x1 <= figure.bbox.x1


def test_boxes_with_room_for_their_labels_need_no_legend():
    boxes = np.array([[10.0, 20, 50, 60], [60, 60, 90, 90]])
    figure = sample_grid([{"image": np.zeros((100, 100, 3), np.uint8), "boxes": boxes, "labels": ["cat", "dog"]}])
    assert [text.get_text() for text in figure.axes[0].texts] == ["cat", "dog"]
    assert not figure.legends


@pytest.mark.parametrize("name", ["$x_1$", "$", "a$b$c", r"$\frac{$", r"back\slash $ $"])
def test_a_dollar_in_a_name_begins_no_formula(name, tmp_path):
    """In titles, labels on images, legends and along axes; matplotlib would raise, or typeset the text between them."""
    image = np.zeros((20, 30, 3), np.uint8)
    grid = sample_grid(
        [{"image": image, "boxes": np.array([[2.0, 3, 9, 9]]), "labels": [name], "title": name}], title=name
    )
    bars = class_bars({name: {"AP": 3.0, "objects": 2.0}})
    groups = ap_bars({name: {"AP": 3.0, name: None}})
    for i, figure in enumerate((grid, bars, groups)):
        save(figure, tmp_path, f"figure{i}")
        texts = [text for text in figure.findobj(Text) if name in text.get_text()]
        assert texts
        assert not any(text.get_parse_math() for text in texts)


def test_logarithmic_axes_keep_their_numbers(tmp_path):
    figure = Picture()
    axes = figure.subplots()
    axes.plot([1, 2], [1, 1000])
    axes.set_yscale("log")
    figure.savefig(tmp_path / "a.png")
    assert all(text.get_parse_math() for text in figure.findobj(Text) if "mathdefault" in text.get_text())
    assert any("mathdefault" in text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("left", [0, 20, 40, 56, 63, 70, 90, 110])
@pytest.mark.parametrize("width", [12, 40])
def test_labels_stay_within_a_small_picture(left, width):
    """As wide as a column of a grid, with the longest label of the demo, wherever its object is."""
    figure = Picture(figsize=(1.75, 1.8), layout="constrained")
    axes = figure.subplots()
    masks = np.zeros((1, 128, 128), bool)
    masks[0, 40:60, left : left + width] = True
    draw_objects(axes, np.zeros((128, 128, 3), np.uint8), masks=masks, labels=["mottled blob 0.46"])
    figure.canvas.draw()
    (text,) = axes.texts
    label, picture = text.get_window_extent(), axes.get_window_extent()
    assert picture.x0 - 3 <= label.x0
    assert label.x1 <= picture.x1 + 3


def test_labels_are_as_large_as_all_of_them_have_room_for():
    axes = Picture(figsize=(1.75, 1.75)).subplots(1, 2)
    image = np.zeros((128, 128, 3), np.uint8)
    few = np.array([[10.0, 40, 60, 90]])
    crowd = np.array([[10.0 + 30 * i, 40 + 12 * k, 38 + 30 * i, 50 + 12 * k] for i in range(4) for k in range(5)])
    assert draw_objects(axes[0], image, boxes=few, labels=["cat"]) == []
    draw_objects(axes[1], image, boxes=crowd, labels=["person"] * len(crowd))
    assert [text.get_fontsize() for text in axes[0].texts] == [7]
    assert {text.get_fontsize() for text in axes[1].texts} == {5}


def test_images_of_a_row_begin_at_one_height():
    images = [np.zeros((*size, 3), np.uint8) for size in ((60, 40), (30, 60))]
    samples = [{"image": image, "masks": np.zeros((0, *image.shape[:2]), bool), "title": "7"} for image in images]
    figure = figure5({"chosen": samples}, columns=2)
    FigureCanvasAgg(figure).draw()
    tall, wide = (axes.get_window_extent() for axes in figure.axes)
    assert tall.y1 == pytest.approx(wide.y1, abs=1)
    assert tall.height > 2 * wide.height


def test_a_single_recorded_step_is_drawn():
    """As after a smoke run: the gradient's shares as areas, the step at a whole tick."""
    one = {name: np.array([value]) for name, value in (("gradient_cls", 0.25), ("gradient_global", 0.75))}
    left, right = health_curves(
        {"step": np.array([1.0]), "mask_fill": one["gradient_cls"], "mask_is_box": one["gradient_cls"], **one}
    ).axes
    heights = [area.get_datalim(right.transData).y1 for area in right.collections]
    assert heights == [25, 100]
    assert all(area.get_datalim(right.transData).width > 0 for area in right.collections)
    assert {float(tick) for tick in left.get_xticks()} <= {0.0, 1.0, 2.0}
