"""The report of `misa data coco` on a folder."""

import json

import pytest

from misa.cli import main
from misa.data.formats.coco2017 import look_at_coco
from misa.errors import UserError


def write_list(root, name, files):
    (root / "annotations").mkdir(exist_ok=True)
    rows = [{"id": i, "file_name": file} for i, file in enumerate(files)]
    (root / "annotations" / name).write_text(json.dumps({"images": rows}))


def test_lists_and_images_are_counted(tmp_path, capsys):
    write_list(tmp_path, "instances_train2017.json", ["a.jpg", "b.jpg", "c.jpg"])
    write_list(tmp_path, "instances_val2017.json", ["d.jpg"])
    for folder, name in (("train2017", "a.jpg"), ("train2017", "b.jpg"), ("images/val2017", "d.jpg")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).touch()
    train, val, test = look_at_coco(tmp_path)
    assert (train.listed, train.found, train.whole) == (3, 2, False)
    assert (val.listed, val.found) == (1, 1)
    assert test.listed is None
    assert main(["data", "coco", str(tmp_path)]) == 2
    text = capsys.readouterr().out
    assert "3 images listed (COCO 2017 has 118,287); 1 of them are not in" in text
    assert "no " in text.splitlines()[2]


def test_a_folder_and_a_list_that_are_none_are_told(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        look_at_coco(tmp_path / "absent")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(UserError, match="is not a COCO list"):
        look_at_coco(tmp_path)
