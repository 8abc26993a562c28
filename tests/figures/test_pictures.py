"""Four small figures against stored images, so that a change of their appearance is noticed.

MISA_NEW_PICTURES=1 python -m pytest tests/figures/test_pictures.py updates them; view them before committing.
"""

import dataclasses
import os
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.testing.compare import compare_images

from misa.figures.affinity import affinity_figure
from misa.figures.frequency import frequency_figure, maps_of
from misa.figures.paper import figure3, figure4, figure5
from misa.figures.style import PRINT
from misa.ops.seed_affinity import AffinitySettings

STORED = Path(__file__).parent / "pictures"


def seed(example):
    return affinity_figure(example, (5, 6), settings=AffinitySettings(semantic_scale=2.0, tree_bandwidth=0.5))


def frequency(example):
    return frequency_figure(maps_of(example), example.box_masks().any(dim=0), radius=3.0)


def third(example):
    inside = example.box_masks().any(dim=0)
    return figure3(
        {"teacher S": (example.features, inside), "student I": (example.student, inside)}, radius=3.0, channel=0
    )


def fourth(example):
    return figure4([(example, (5, 6))], settings=AffinitySettings(semantic_scale=2.0))


def fifth(example):
    sample = {"image": example.image, "masks": example.masks, "title": "7 · AP 50"}
    return figure5({"chosen": [sample, sample], "worst by AP": [sample]}, columns=3)


@pytest.mark.parametrize("draw", [seed, frequency, third, fourth, fifth], ids=lambda draw: draw.__name__)
def test_looks_as_stored(example, tmp_path, draw):
    stored, drawn = STORED / f"{draw.__name__}.png", tmp_path / f"{draw.__name__}.png"
    with matplotlib.rc_context(PRINT):
        draw(example).savefig(drawn, dpi=80)
    if os.environ.get("MISA_NEW_PICTURES"):
        STORED.mkdir(exist_ok=True)
        shutil.copy(drawn, stored)
    # Root mean square of the gray levels: another font rendering is below 3, an added line, map or label above.
    difference = compare_images(str(stored), str(drawn), tol=3.0)
    assert difference is None, difference


def test_a_changed_map_is_seen(example, tmp_path):
    """The tolerance is small enough to reject another image."""
    drawn = tmp_path / "fourth.png"
    with matplotlib.rc_context(PRINT):
        figure4([(example, (5, 6))], settings=AffinitySettings(semantic_scale=1.0)).savefig(drawn, dpi=80)
    assert compare_images(str(STORED / "fourth.png"), str(drawn), tol=3.0) is not None
    assert (
        np.asarray(matplotlib.image.imread(drawn)).shape
        == np.asarray(matplotlib.image.imread(STORED / "fourth.png")).shape
    )


def test_figure_4_has_a_column_of_truth_only_if_an_image_has_masks(example):
    bare = dataclasses.replace(example, masks=None)
    titles = [axes.get_title() for axes in figure4([(bare, (5, 6))]).axes]
    assert "image" in titles
    assert "truth" not in titles
    *tiles, _ = figure4([(example, (5, 6)), (bare, (5, 6))]).axes  # the last is the color bar
    assert [axes.get_title() for axes in tiles].count("truth") == 1
    assert [axes for axes in tiles if not axes.images] == tiles[-1:]
    assert [text.get_text() for axes in tiles for text in axes.texts] == ["no truth"]
