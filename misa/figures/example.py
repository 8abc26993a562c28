"""One image with all inputs of the losses, as shown in notebooks and figures.

Axes: n instance · c category · d channel · h row · w column of the map at stride 4 · H, W of the image itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from misa.ops.boxes import box_masks
from misa.ops.readings import Reading
from misa.ops.resize import coarse_masks

STRIDE = 4
"""Pixels of the resized image per cell of the maps, as in the losses."""


@dataclass(frozen=True)
class Example:
    """An image, its boxes, and its maps at the resolution of the losses.

    image (H W 3): uint8 RGB; boxes (n 4): xyxy in its pixels; labels (n): indices into `classes`; masks (n H W):
    ground truth for comparison, or None. colors (3 h w): V, the normalized image. features S (d h w) and
    saliency_factors K (c d): the teacher's, None without one. student I (e h w): the student's dense feature, and
    adapted (d h w): the same after the adapter of FSD, times the unit in which S was learned; None without. reading:
    S^c of Eq. 11 as values (e h w) and factors (c e), if a run does not use S and K directly. resized: height and width
    of the image that the networks see, without padding, in pixels of which a cell has `STRIDE`; None: those of the
    maps' cells.
    """

    name: str
    image: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    masks: NDArray[np.bool_] | None
    colors: Float[Tensor, "3 h w"]
    features: Float[Tensor, "d h w"] | None = None
    saliency_factors: Float[Tensor, "c d"] | None = None
    student: Float[Tensor, "e h w"] | None = None
    adapted: Float[Tensor, "d h w"] | None = None
    reading: Reading | None = None
    resized: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the maps."""
        return self.colors.shape[-2], self.colors.shape[-1]

    @property
    def stride(self) -> tuple[float, float]:
        """Pixels of the image per row and column of the maps."""
        rows, columns = self.cells
        return self.image.shape[0] / rows, self.image.shape[1] / columns

    @property
    def cells(self) -> tuple[float, float]:
        """Height and width of the image in cells: within half a cell of the maps', unless those are a single cell."""
        height, width = self._seen
        return height / STRIDE, width / STRIDE

    @property
    def _seen(self) -> tuple[int, int]:
        return self.resized or (self.size[0] * STRIDE, self.size[1] * STRIDE)

    def box_masks(self) -> Bool[Tensor, "n h w"]:
        """Box masks on the map, as in training: a cell is inside if its center is; no box is empty."""
        down, across = self.stride
        boxes = torch.as_tensor(self.boxes, dtype=torch.float32).reshape(-1, 4)
        return box_masks(boxes / torch.tensor([across, down, across, down]), *self.size)

    def middle(self) -> tuple[int, int]:
        """The cell (row, column) in the middle of the first box, or of the map if there are no boxes."""
        h, w = self.size
        if not len(self.boxes):
            return h // 2, w // 2
        rows, columns = self.box_masks()[0].nonzero(as_tuple=True)
        return int(rows.float().mean()), int(columns.float().mean())

    def box_at(self, seed: Sequence[int]) -> int | None:
        """Returns the index of the smallest box that contains a cell (row, column) of the map, or None."""
        owner = int(self.owners()[seed[0], seed[1]])
        return owner if owner >= 0 else None

    def owners(self) -> Int[Tensor, "h w"]:
        """The index of the smallest box that contains each cell of the map, -1 where none does."""
        inside = self.box_masks()
        if not len(inside):
            return torch.full(self.size, -1)
        cells = inside.sum(dim=(1, 2), keepdim=True).expand_as(inside)
        smallest = cells.masked_fill(~inside, self.size[0] * self.size[1] + 1).argmin(dim=0)
        return smallest.masked_fill(~inside.any(dim=0), -1)

    def coarse_masks(self) -> Bool[Tensor, "n h w"] | None:
        """Ground-truth masks on the map, see `misa.ops.resize.coarse_masks`; None without ground truth."""
        return self._coarse

    @cached_property
    def _coarse(self) -> Tensor | None:
        """Computed once: a panel's figure needs them several times at every move of a slider."""
        if self.masks is None:
            return None
        return coarse_masks(torch.as_tensor(self.masks), self._seen, self.size, stride=STRIDE)
