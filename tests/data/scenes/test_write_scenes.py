"""Embedded scenes on disk: an ordinary COCO-layout folder, written completely or not at all."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from misa.data.check.annotations import require_usable
from misa.data.formats.coco import DataError, find_layout
from misa.data.scenes import scenes as synthetic
from misa.data.scenes.scenes import Scenes, draw_scene, write_scenes

SCENES = Scenes(size=(64, 80), train=6, val=3, seed=5)


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    return write_scenes(module_path / "demo", SCENES)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def test_the_folder_passes_our_own_check(folder: Path) -> None:
    layout = find_layout(folder)
    for split in (layout.train, layout.val):
        report = require_usable(*split, classes=SCENES.names, verify_images="open", purpose="eval")
        assert not report.problems
    assert report.images == 3


@pytest.mark.parametrize("split", ["train", "val"])
def test_pycocotools_reads_back_what_was_drawn(folder: Path, split: synthetic.Split) -> None:
    coco = COCO(folder / "annotations" / f"instances_{split}2017.json")
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(SCENES.names)
    for index, image in enumerate(coco.loadImgs(coco.getImgIds())):
        scene = draw_scene(SCENES, index, split)
        assert (image["height"], image["width"]) == (64, 80)
        pixels = cv2.imread(str(folder / f"{split}2017" / image["file_name"]))
        assert np.array_equal(pixels[..., ::-1], scene.image)
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert [a["category_id"] - 1 for a in annotations] == scene.labels.tolist()
        assert [a["mode"] for a in annotations] == list(scene.modes)
        for annotation, mask, box in zip(annotations, scene.masks, scene.boxes, strict=True):
            assert np.array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum()
            assert annotation["iscrowd"] == 0
            x, y, w, h = annotation["bbox"]
            assert [x, y, x + w, y + h] == box.tolist()


def test_the_same_settings_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = contents(write_scenes(tmp_path / "again", SCENES))
    assert {k: v[1] for k, v in again.items()} == {k: v[1] for k, v in contents(folder).items()}


def test_an_equal_folder_is_reused_untouched(folder: Path) -> None:
    before = contents(folder)
    assert write_scenes(folder, SCENES) == folder
    assert contents(folder) == before


def test_other_scenes_are_refused_and_nothing_is_touched(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(DataError) as error:
        write_scenes(folder, replace(SCENES, seed=6))
    assert "seed 5 there, 6 asked" in str(error.value)
    assert str(folder) in str(error.value)
    assert "another folder" in str(error.value)
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["demo"]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds something else than embedded data"):
        write_scenes(tmp_path, SCENES)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(DataError, match="is a file, not a folder"):
        write_scenes(tmp_path / "thesis.tex", SCENES)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/demo \(.*file is a file\); give a folder that you can write to\.$"):
        write_scenes(tmp_path / "file" / "demo", SCENES)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere")

    monkeypatch.setattr(synthetic.tempfile, "mkdtemp", refuse)
    with pytest.raises(DataError, match=r"cannot be written to .*demo \(Permission denied\)"):
        write_scenes(tmp_path / "demo", SCENES)


@pytest.mark.parametrize("card", ["[]", "{}", '{"scenes": 3}', "{"])
def test_a_strange_card_is_refused(tmp_path: Path, card: str) -> None:
    (tmp_path / "scenes.json").write_text(card)
    with pytest.raises(DataError):
        write_scenes(tmp_path, SCENES)


def test_a_folder_with_lost_images_is_named(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "demo", SCENES)
    (folder / "train2017" / "000000000002.png").unlink()
    with pytest.raises(DataError, match="is incomplete: train2017 has 5 of 6 images"):
        write_scenes(folder, SCENES)


def test_an_older_edition_is_not_taken_for_this_one(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "demo", SCENES)
    card = json.loads((folder / "scenes.json").read_text())
    (folder / "scenes.json").write_text(json.dumps({**card, "edition": 0}))
    with pytest.raises(DataError, match="drawn by edition 0"):
        write_scenes(folder, SCENES)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert (write_scenes(tmp_path / "demo", SCENES) / "scenes.json").is_file()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        if args[1] == 4:
            raise KeyboardInterrupt
        return draw_scene(*args)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(synthetic, "draw_scene", stop)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "demo", SCENES)
    assert not list(tmp_path.iterdir())


def test_whoever_finishes_second_takes_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "demo"
    others: list[Path] = []

    def overtaken(*args: object) -> object:
        if not others:
            others.append(target)
            monkeypatch.setattr(synthetic, "draw_scene", draw_scene)
            write_scenes(target, SCENES)
        return draw_scene(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(synthetic, "draw_scene", overtaken)
    assert write_scenes(target, SCENES) == target
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]
