"""Metrics of mmengine's test loop that write predictions at the original image size to files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.structures.mask import encode_mask_results
from mmengine.evaluator import BaseMetric
from PIL import Image

from misa.files import atomic_write


class Detections(BaseMetric):
    """Writes COCO results (masks as RLE) to one JSON file, from which scores are computed.

    Detections of a class that the annotations lack are left out: there is no id for them. path: the output file.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = Path(path)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Append the detections of a batch, one list per image."""
        categories = self.dataset_meta["category_ids"]
        for sample in data_samples:
            found = sample["pred_instances"]
            masks = encode_mask_results(found["masks"].cpu().numpy())
            rows = zip(found["labels"].tolist(), found["scores"].tolist(), masks, strict=True)
            self.results.append(
                [
                    {
                        "image_id": sample["img_id"],
                        "category_id": categories[int(label)],
                        "score": score,
                        "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
                    }
                    for label, score, mask in rows
                    if categories[int(label)] is not None
                ]
            )

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Write the file; return the number of detections."""
        detections = [detection for image in results for detection in image]
        with atomic_write(self.path) as partial:
            partial.write_text(json.dumps(detections))
        return {"detections": len(detections)}


class LabelMaps(BaseMetric):
    """Writes the class of every pixel as one 8-bit PNG per image, named by its id; scores are computed from these.

    path: the output folder.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = Path(path)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Write the label maps of a batch."""
        self.path.mkdir(parents=True, exist_ok=True)
        for sample in data_samples:
            labels = sample["pred_sem_seg"]["sem_seg"][0].cpu().numpy().astype(np.uint8)
            Image.fromarray(labels).save(self.path / f"{sample['img_id']}.png")
            self.results.append(sample["img_id"])

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Return the number of images written."""
        return {"images": len(results)}
