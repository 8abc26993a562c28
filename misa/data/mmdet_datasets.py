"""Imports from mmdet's data sets, with the two lines that they print on first import suppressed."""

# ruff: noqa: F401

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
    )
    from mmdet.datasets.transforms import Resize as MMDetResize
    from mmdet.structures.mask import BitmapMasks
