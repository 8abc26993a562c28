"""MISA: box-supervised instance segmentation with a semantic prior (IJCAI-24).

Importing this package is light: it loads neither mmdet nor mmcv nor torch. It makes mmcv usable without its compiled
ops (`misa.mmcv_ext`), so import it before mmdet.
"""

from misa.mmcv_ext import install as _install_mmcv_ext

__version__ = "0.1.0"

_install_mmcv_ext()
