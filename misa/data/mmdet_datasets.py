"""What we use of mmdet's data sets. They print two lines when they are first imported; a library should be silent."""

import contextlib
import io

with contextlib.redirect_stdout(io.StringIO()):
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.api_wrappers import COCO
    from mmdet.datasets.transforms import (
        FilterAnnotations,
        LoadAnnotations,
        PackDetInputs,
        RandomCrop,
        RandomFlip,
        Resize,
    )

__all__ = [
    "COCO",
    "CocoDataset",
    "FilterAnnotations",
    "LoadAnnotations",
    "PackDetInputs",
    "RandomCrop",
    "RandomFlip",
    "Resize",
]
