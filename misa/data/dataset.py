"""COCO-layout folders as data sets for training and evaluation.

Training from boxes reads boxes and labels only: masks and mask areas are dropped while loading. The augmentation of a
sample depends on (seed, epoch, index) alone, not on the number of workers, so a resumed run repeats it exactly.
"""

import contextlib
import io
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from misa.data.formats.plain import plain_annotation
from misa.data.mmdet_datasets import COCO, CocoDataset


class OrderedCOCO(COCO):
    """COCO reader that prints nothing and returns category ids in the order of the requested class names.

    mmdet keeps the order of the file: two files that list the classes in another order would swap labels.
    """

    def __init__(self, annotation_file: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(annotation_file)

    def get_cat_ids(self, cat_names: Sequence[str] = (), sup_names: Any = (), cat_ids: Any = ()) -> list[int | None]:
        """Returns the category ids of `cat_names`, in their order; None for one that the file lacks."""
        ids = {category["name"]: category["id"] for category in self.dataset["categories"]}
        return [ids.get(name) for name in cat_names]


class CocoImages(CocoDataset):
    """A COCO annotation file and its image folder.

    masks: keep `segmentation`; off for box-supervised training, where it is never read. seed: seed of the random
    augmentation.
    """

    COCOAPI = OrderedCOCO

    def __init__(self, *args: Any, masks: bool, seed: int = 0, **kwargs: Any) -> None:
        self.masks = masks
        self.seed = seed
        self.epoch = 0  # set by the engine before each epoch
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Returns the images of the file; adds the category ids to the meta information, for writing results."""
        images: list[dict[str, Any]] = super().load_data_list()
        self._metainfo["category_ids"] = tuple(self.cat_ids)
        return images

    def parse_data_info(self, raw_data_info: dict[str, Any]) -> dict[str, Any]:
        """Returns one image and its objects; without masks, the area is that of the box.

        mmdet silently drops objects without area and those marked `ignore`. Areas are therefore those of the masks
        or boxes, and `ignore` becomes `iscrowd`, as the data check counts it.
        """
        image, rows = raw_data_info["raw_img_info"], raw_data_info["raw_ann_info"]
        annotations = [dict(row) if self.masks else _only_box(row) for row in rows]
        for annotation in annotations:
            plain_annotation(annotation, (image["width"], image["height"]), areas=self.masks)
            annotation.pop("ignore", None)
        raw_data_info = {**raw_data_info, "raw_ann_info": annotations}
        info: dict[str, Any] = super().parse_data_info(raw_data_info)
        if self.data_prefix.get("seg"):  # named by id: file names may be absolute, or differ only in the suffix
            info["seg_map_path"] = str(Path(self.data_prefix["seg"]) / f"{info['img_id']}.png")
        return info

    def prepare_data(self, idx: int) -> Any:
        """Returns the transformed sample, which depends on (seed, epoch, idx) alone."""
        if self.test_mode:
            return super().prepare_data(idx)
        with _seeded(self.seed, self.epoch, idx):
            return super().prepare_data(idx)


def _only_box(annotation: dict[str, Any]) -> dict[str, Any]:
    x, y, w, h = annotation["bbox"]
    kept: dict[str, Any] = {
        key: annotation[key] for key in ("id", "image_id", "category_id", "iscrowd", "ignore") if key in annotation
    }
    return {**kept, "bbox": [x, y, w, h], "area": w * h}


@contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Seed the global random generators, which mmcv draws from, by `key`; restore their state afterwards."""
    state = random.getstate(), np.random.get_state()  # noqa: NPY002
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])  # noqa: NPY002
