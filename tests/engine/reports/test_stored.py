"""Stored scores belong to the current rows, and are shown only beside runs on the same scenes."""

import types

import pytest

from misa.engine.reports.stored import STORED, stored_beside
from misa.rows import find_row


@pytest.mark.parametrize("row", STORED)
def test_a_stored_row_is_still_that_row(row):
    """If this fails, the row has changed: train it again and store its scores."""
    assert STORED[row].digest == find_row(row).digest()
    assert row in STORED[row].provenance(row)
    assert STORED[row].segm["AP50"] > STORED[row].segm["AP"] > 0


@pytest.mark.parametrize(
    ("row", "smoke", "beside"),
    [
        ("demo:misa", False, {"demo:box"}),
        ("demo:mask", False, {"demo:box"}),
        ("demo:box", False, set()),  # itself
        ("demo:polarmask", False, set()),  # another student
        ("demo:boxinst", False, set()),
        ("demo:long", False, {"demo:long_box"}),  # trained as long
        ("demo:misa", True, set()),
        ("demo:mask2former_misa", False, set()),  # scored on more scenes
        ("teacher:demo", False, set()),
        ("coco_mini:box", False, set()),
    ],
)
def test_only_what_is_scored_on_the_same_scenes_and_trained_as_long(row, smoke, beside):
    experiment = find_row(row).smoke() if smoke else find_row(row)
    assert set(stored_beside(types.SimpleNamespace(experiment=experiment))) == beside


def test_nothing_is_stored_for_another_network():
    wider = find_row("demo:misa").but(network={"head_channels": 96})
    assert stored_beside(types.SimpleNamespace(experiment=wider)) == {}


def test_nothing_is_stored_for_another_length():
    shorter = find_row("demo:misa").but(schedule={"epochs": 3})
    assert stored_beside(types.SimpleNamespace(experiment=shorter)) == {}
