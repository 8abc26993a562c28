"""MISA: box-supervised instance segmentation with a semantic prior (IJCAI-24).

Importing this package is light: it loads neither mmdet nor mmcv.
"""

__version__ = "0.1.0"
