"""The example folder of boxes passes `misa check`, and never overwrites anything else."""

import pytest

from misa.data.formats.coco import DataError
from misa.data.formats.convert import open_layout, read_boxes
from misa.data.scenes.boxfolder import write_box_folder
from misa.data.scenes.scenes import Scenes, draw_scene
from misa.engine.reports.checkup import check_data


def test_the_table_holds_the_boxes_of_the_scenes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_box_folder(tmp_path / "example", images=12, seed=3)
    found = read_boxes(root / "boxes.csv")
    scenes = Scenes(train=12, seed=3)
    for index in range(12):
        boxes, labels = found[f"picture{index + 1:03}.png"]
        scene = draw_scene(scenes, index)
        assert boxes == scene.boxes.tolist()
        assert labels == [scenes.names[label] for label in scene.labels]
    assert open_layout(root).val.annotations.is_file()
    report = str(check_data(root))
    # By the hash of the names one of the twelve images is for validation.
    assert "(train split): 11 images (0 without objects)" in report
    assert "(val split): 1 image (0 without objects)" in report
    assert "not listed" not in report  # neither the images of the other split nor the table


def test_it_is_drawn_once_and_over_nothing_else(tmp_path):
    root = write_box_folder(tmp_path / "example", images=3)
    before = (root / "boxes.csv").stat().st_mtime_ns
    assert write_box_folder(root, images=3) == root
    assert (root / "boxes.csv").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="not this example of 4 images; name another folder"):
        write_box_folder(root, images=4)
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="name another folder"):
        write_box_folder(tmp_path / "mine", images=3)
