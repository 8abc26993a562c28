"""Opening an experiment's data: checked once, as the row needs it, and warnings are printed once."""

import json
import shutil

import pytest
from PIL import Image

from misa.data import source
from misa.data.check import annotations as check
from misa.data.formats.coco import DataError
from misa.data.scenes import scenes as synthetic
from misa.data.scenes.scenes import Scenes, write_scenes
from misa.data.source import open_source
from misa.errors import UserError
from misa.experiment import Experiment, Semantic
from misa.rows import find_row

BOX = Experiment(data="coco")


@pytest.fixture
def root(tmp_path):
    return write_scenes(tmp_path / "toy", Scenes(size=48, train=4, val=2, classes=2, objects=(1, 2)))


def edit(root, change, split="train"):
    path = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_rows_that_learn_from_masks_check_them(root):
    edit(root, lambda c: c["annotations"][0].update(segmentation=[[1, 2]]))
    assert open_source(BOX, root).classes
    assert open_source(BOX.but(semantic=Semantic()), root).classes
    for row in (BOX.but(supervision="mask"), BOX.but(supervision="mask", semantic=Semantic())):
        with pytest.raises(DataError, match="annotation 1: segmentation has a polygon"):
            open_source(row, root)


def test_validation_masks_are_checked_before_any_training(root):
    edit(root, lambda c: c["annotations"][0]["segmentation"].update(counts="nonsense"), "val")
    with pytest.raises(DataError, match="segmentation has counts that cannot be decoded"):
        open_source(BOX, root)


def test_the_images_are_counted_after_the_limit(root):
    assert open_source(BOX, root).images == 4
    assert open_source(BOX.but(limit=3), root).images == 3
    assert open_source(BOX.but(limit=9), root).images == 4


def test_evaluation_needs_no_training_split(root):
    classes = open_source(BOX, root).classes
    shutil.rmtree(root / "train2017")
    (root / "annotations/instances_train2017.json").unlink()
    found = open_source(BOX, root, classes=classes[::-1], need_train=False)
    assert (found.classes, found.images) == (classes[::-1], 0)
    assert found.val.images.is_dir()
    with pytest.raises(ValueError, match="needs classes"):
        open_source(BOX, root, need_train=False)
    own = ", ".join(classes)
    with pytest.raises(DataError) as error:
        open_source(BOX, root, classes=("zebra", "ant"), need_train=False)
    expected = (
        f"the run knows the classes zebra, ant, and this data has {own}; rename those that mean the same, or train"
    )
    assert f"{expected} a run on this data." in str(error.value)
    with pytest.raises(DataError) as error:
        open_source(BOX, root, classes=("zebra", classes[0]), need_train=False)
    words = f"has {own}; rename those that mean the same, remove those that the run does not know, or train a run on"
    assert words in str(error.value)
    assert "left out" not in str(error.value)


def test_what_a_run_does_not_know_is_left_out_with_advice(root, capsys):
    classes = open_source(BOX, root).classes
    capsys.readouterr()
    found = open_source(BOX, root, classes=classes[:-1], need_train=False)
    assert found.classes == classes[:-1]
    words = f"any objects of {classes[-1]} are left out, as they are of no class of the run\n"
    assert capsys.readouterr().out == f"data: in the val split {words}"


def test_images_are_read_once_until_something_changes(root, monkeypatch):
    reads = []
    known = check.check_files
    monkeypatch.setattr(check, "check_files", lambda *a, **k: reads.append(a[1].name) or known(*a, **k))
    open_source(BOX, root)
    assert reads == ["train2017", "val2017"]
    open_source(BOX, root)
    open_source(BOX, root, classes=open_source(BOX, root).classes, need_train=False)
    assert reads == ["train2017", "val2017"]
    edit(root, lambda c: c["annotations"].pop())
    open_source(BOX, root)
    assert reads == ["train2017", "val2017", "train2017"]
    next((root / "val2017").iterdir()).unlink()
    with pytest.raises(DataError, match="is missing"):
        open_source(BOX, root)


def test_warnings_are_told_in_one_line_once(root, capsys):
    def change(content):
        content["annotations"][0].update(bbox=[1, 1, 100, 9])
        content["annotations"][1].update(bbox=[1, 1, 0.5, 9])

    edit(root, change)
    edit(root, lambda c: c["categories"].append({"id": 9, "name": "extra"}), "val")
    open_source(BOX, root)
    train, val = capsys.readouterr().out.splitlines()
    expected = "1 box clipped, 1 box thinner than a pixel left out"
    assert train == f"data: in the train split {expected}; `misa check {root}` lists them"
    expected = "any objects of extra are left out, as they are of no class of the training"
    assert val == f"data: in the val split {expected}; `misa check {root}` lists them"
    open_source(BOX.but(supervision="mask"), root)
    assert capsys.readouterr().out == ""


def test_images_too_thin_for_the_rows_resizing_are_refused(root):
    path = next((root / "train2017").iterdir())
    Image.new("RGB", (900, 3)).save(path)

    def change(content):
        (image,) = (i for i in content["images"] if i["file_name"] == path.name)
        image.update(width=900, height=3)
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != image["id"]]

    edit(root, change)
    assert open_source(BOX, root).images == 4
    with pytest.raises(DataError, match="when the long side is shrunk to 192"):
        open_source(BOX.but(augmentation={"long_side": 192}), root)


def test_another_edition_of_the_embedded_data_has_its_own_folder(tmp_path, monkeypatch):
    demo = Experiment(data="demo", scenes=(("size", 48), ("train", 2), ("val", 1)))
    first = open_source(demo, tmp_path).root
    assert open_source(demo, tmp_path).root == first
    monkeypatch.setattr(source, "EDITION", synthetic.EDITION + 1)
    monkeypatch.setattr(synthetic, "EDITION", synthetic.EDITION + 1)
    assert open_source(demo, tmp_path).root != first


def test_a_file_as_place_for_the_embedded_data_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    demo = Experiment(data="demo", scenes=(("size", 48), ("train", 2), ("val", 1)))
    with pytest.raises(DataError, match="file is a file"):
        open_source(demo, tmp_path / "file")


@pytest.mark.parametrize("scenes", [(("trian", 8),), (("train", "8"),), (("train", 0),)])
def test_parameters_of_scenes_that_are_none_are_one_sentence(tmp_path, scenes):
    with pytest.raises(UserError, match=r"^scenes of a row: .*; see misa\.data\.scenes\.scenes\.Scenes\.$"):
        open_source(find_row("demo:box").but(scenes=scenes), tmp_path)
