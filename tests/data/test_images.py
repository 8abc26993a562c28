"""Which files are predicted on, and the messages for the others."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from misa.data.check.image_files import size_of
from misa.data.images import find_inputs, read_image
from misa.evaluation.miou import miou
from misa.files import atomic_write


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (200, 100, 50)).save(path)
    return path


def names(*paths: Path, out: Path | None = None) -> tuple[list[str], dict[str, str]]:
    failed: dict[str, str] = {}
    return [item.name for item in find_inputs(paths, out=out, failed=failed)], failed


def test_results_are_never_read(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "results" / "masks" / "a.png")
    assert names(tmp_path, out=tmp_path / "results") == (["a"], {})
    assert len(names(tmp_path)[0]) == 2
    for card in ("predict.json", "done.jsonl"):
        (tmp_path / "results" / card).write_text("{}")
    assert names(tmp_path, out=tmp_path / "other") == (["a"], {}), "nor those of another prediction"


def test_links_keep_their_name_and_broken_ones_are_told(tmp_path: Path) -> None:
    target = draw(tmp_path / "store" / "0001.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cat.png").symlink_to(target)
    (tmp_path / "in" / "dog.png").symlink_to(target)
    (tmp_path / "in" / "folder").symlink_to(target.parent)
    (tmp_path / "in" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found, failed = names(tmp_path / "in")
    assert found == ["cat", "dog", "folder/0001"]
    (message,) = failed.values()
    assert message.startswith(f"the link {tmp_path / 'in' / 'gone.png'} leads nowhere")
    assert [item.path.name for item in find_inputs([tmp_path / "in"])] == ["cat.png", "dog.png", "0001.png"]


def test_other_kinds_are_told(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg").rename(tmp_path / "a.jfif")
    for name in ("b.gif", "c.heic", "d.GIF", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    found, failed = names(tmp_path)
    assert found == ["a"]
    assert list(failed.values()) == [
        f"left out of {tmp_path}: 3 files of other kinds (.gif, .heic); convert them to PNG or JPEG."
    ]
    skipped: dict[Path, None] = {}
    find_inputs([tmp_path, tmp_path, tmp_path / "a.jfif"], skipped=skipped)
    assert list(skipped) == [tmp_path / "notes.txt"]


def test_a_video_beside_a_folder_of_its_name(tmp_path: Path) -> None:
    draw(tmp_path / "clip" / "000000.jpg")
    code = cv2.VideoWriter_fourcc(*"mp4v")  # type: ignore[attr-defined]
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), code, 5, (64, 48))
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    assert names(tmp_path, tmp_path / "clip.mp4")[0] == ["clip/000000", "clip.mp4"]


def test_16_bits_are_told(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "dark.png"), np.full((6, 8), 600, np.uint16))
    said: list[str] = []
    read_image(tmp_path / "dark.png", say=said.append)
    assert "has 16 bits a channel, of which the upper 8 are read" in said[0]
    read_image(draw(tmp_path / "plain.png"), say=said.append)
    assert len(said) == 1


def test_very_large_images_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = draw(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    assert read_image(path).shape == (6, 8, 3)


def test_the_longest_names_are_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 125 + ".jpg")
    with atomic_write(path) as partial:
        partial.write_text("x")
    assert os.listdir(tmp_path) == [path.name]


def test_a_class_called_background_is_a_class() -> None:
    truth = np.array([[0, 0, 1, 1]], np.uint8)
    scores = miou([(truth, np.array([[0, 1, 1, 1]], np.uint8))], ["background"])
    assert scores["iou"]["background"] == 50
    assert scores["iou"]["background (no object)"] == pytest.approx(200 / 3)
    assert scores["miou"] == pytest.approx(np.mean(list(scores["iou"].values())))


def test_pillows_limit_of_pixels_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger images are inspected, also by many threads at once; other code keeps the limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (90, 60)).save(tmp_path / "large.png")
    (tmp_path / "none.png").write_bytes(b"no image")
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(size_of, [tmp_path / "large.png", tmp_path / "none.png"] * 50))
    assert sizes == [(90, 60), None] * 50
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "large.png").load()
