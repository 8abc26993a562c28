"""A small data set on disk, and a helper that corrupts it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SMALL: dict[str, list[dict[str, Any]]] = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
        {"id": 8, "file_name": "b.png", "width": 32, "height": 32},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
    "annotations": [
        {"id": 11, "image_id": 7, "category_id": 1, "bbox": [2.0, 3.0, 10.0, 12.5]},
        {"id": 12, "image_id": 7, "category_id": 3, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        {"id": 13, "image_id": 8, "category_id": 3, "bbox": [30, 30, 2, 2], "iscrowd": 0},
    ],
}

Spoil = Callable[..., tuple[Path, Path]]


@pytest.fixture
def spoil(tmp_path: Path) -> Spoil:
    """Write the small data set after `change(data)`; returns annotation file and image folder."""

    def write(change: Callable[[dict[str, Any]], object] = lambda data: None) -> tuple[Path, Path]:
        data = json.loads(json.dumps(SMALL))
        change(data)
        folder = tmp_path / "train2017"
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels[:30]).save(folder / "a.jpg")
        Image.fromarray(pixels[:, :32]).save(folder / "b.png")
        file = tmp_path / "instances_train2017.json"
        file.write_text(json.dumps(data))
        return file, folder

    return write
