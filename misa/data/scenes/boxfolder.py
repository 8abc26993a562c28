"""An example of a typical user's data: a folder of images and a table of boxes, no masks."""

import csv
import os
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np

from misa.data.formats.coco import DataError
from misa.data.scenes.scenes import Scenes, draw_scene

_TABLE = "boxes.csv"


def write_box_folder(root: str | os.PathLike[str], *, images: int = 160, seed: int = 0) -> Path:
    """Draw embedded scenes as root/*.png and root/boxes.csv (image, xmin, ymin, xmax, ymax, label); returns root.

    A folder that holds the table and as many images is left unchanged. DataError if it holds anything else.
    """
    root = Path(root)
    if root.exists():
        there = len(list(root.glob("*.png"))) if (root / _TABLE).is_file() else -1
        if there != images:
            raise DataError(f"{root} is there already and not this example of {images} images; name another folder.")
        return root
    scenes = Scenes(train=images, seed=seed)
    root.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        with (beside / _TABLE).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("image", "xmin", "ymin", "xmax", "ymax", "label"))
            for index in range(images):
                scene, name = draw_scene(scenes, index), f"picture{index + 1:03}.png"
                cv2.imwrite(str(beside / name), np.ascontiguousarray(scene.image[..., ::-1]))
                for box, label in zip(scene.boxes, scene.labels, strict=True):
                    table.writerow((name, *(int(side) for side in box), scenes.names[label]))
        beside.chmod(0o755)
        beside.rename(root)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return root
