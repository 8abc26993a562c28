"""The digest of a data set depends on its annotations and not on its location."""

import hashlib
import json
import shutil

import pytest

from misa.data.digest import data_digests, digest_of
from misa.data.formats.convert import open_layout
from tests.data.formats.test_convert import FORMS, TRUTH, draw, xml


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def digests(root):
    layout = open_layout(root)
    return data_digests(layout.train, layout.val)


@pytest.mark.parametrize("form", FORMS)
def test_a_converted_data_set_keeps_its_digest_where_it_moves(form, tmp_path):
    root = FORMS[form](tmp_path / "mine")
    before = digests(root)
    assert set(before) == {"train", "val"}
    shutil.move(root, tmp_path / "other" / "place")
    assert digests(tmp_path / "other" / "place") == before


def test_one_box_makes_another_digest_of_its_split_alone(tmp_path):
    root = FORMS["voc"](tmp_path / "mine")
    before = digests(root)
    (root / "Annotations/a.xml").write_text(xml("a", (40, 30), [("cat", (2, 3, 12, 16)), ("dog", (0, 0, 40, 30))]))
    after = digests(root)
    assert after["train"] != before["train"]
    assert after["val"] == before["val"]


def test_a_json_in_its_own_layout_is_hashed_as_it_lies(tmp_path):
    path = tmp_path / "instances_train2017.json"
    path.write_text('{"images": []}')
    assert digest_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text('{"images": [] }')
    assert digest_of(path) == hashlib.sha256(path.read_bytes()).hexdigest(), "not the one from before"


def test_a_settled_json_keeps_its_digest_where_it_moves(tmp_path):
    """String ids are normalised in a copy, which holds the path of the original."""
    root = tmp_path / "mine"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        draw(root / f"{split}2017")
        images = [{"id": n, "file_name": f"{n}.jpg", "width": w, "height": h} for n, (w, h), _ in TRUTH]
        rows = [{"id": "1", "image_id": "a", "category_id": "7", "bbox": [1, 1, 5, 5]}]
        tables = {"images": images, "annotations": rows, "categories": [{"id": "7", "name": "cat"}]}
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(tables))
    before = digests(root)
    assert open_layout(root).train.annotations.parent.parent.parent == tmp_path / "cache" / "misa"
    shutil.move(root, tmp_path / "other")
    assert digests(tmp_path / "other") == before
