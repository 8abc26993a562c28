"""SIM's copy-paste augmentation (Li et al. 2023): objects of earlier images, cut out by their predicted masks.

Runs on the host, where boxes must be known. Axes: g object of a picture · k pasted object · n object of the target
image · H row · W column, in pixels · h row · w column of masks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from misa.ops.boxes import box_masks, extents


class Picture(NamedTuple):
    """An image (RGB) and its detections: mask probabilities, boxes in pixels, labels. On the host."""

    pixels: UInt8[Tensor, "3 H W"]
    masks: Float[Tensor, "g h w"]
    boxes: Float[Tensor, "g 4"]
    labels: Int[Tensor, " g"]


class PictureQueue:
    """A queue of the last `size` pictures; masks are stored in half precision."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"PictureQueue holds one picture or more: size is {size}.")
        self.size = size
        self.pictures: list[Picture] = []

    @property
    def full(self) -> bool:
        """Whether the queue holds `size` pictures."""
        return len(self.pictures) == self.size

    def put(self, picture: Picture, *, sure: float) -> None:
        """Append the picture's objects with a pixel above `sure`, if any, and drop the oldest picture beyond `size`."""
        picture = picture._replace(masks=picture.masks.half())  # rounded first, as `cut_out` will see them
        some = (scores(picture, sure=sure) > 0).nonzero().flatten()
        if len(some):
            kept = (picture.masks[some], picture.boxes[some], picture.labels[some])
            self.pictures = [*self.pictures, Picture(picture.pixels, *kept)][-self.size :]

    def state(self) -> list[list[Tensor]]:
        """Return the queue's tensors for a checkpoint."""
        return [[part.clone() for part in picture] for picture in self.pictures]

    def restore(self, state: Sequence[Sequence[Tensor]]) -> None:
        """Restore the queue from `state`."""
        self.pictures = [Picture(*(part.cpu() for part in picture)) for picture in state]


def scores(picture: Picture, *, sure: float) -> Float[Tensor, " g"]:
    """Return each mask's mean over its pixels above `sure` within the box (denominator plus one).

    Computed at the size of the masks; the published code computes it at the image's.
    """
    stride = picture.pixels.shape[-1] / picture.masks.shape[-1]
    masks = picture.masks.float()
    there = (masks > sure) & box_masks(picture.boxes / stride, *masks.shape[1:])
    return (masks * there).sum(dim=(1, 2)) / (there.sum(dim=(1, 2)) + 1)


def cut_out(
    picture: Picture, size: tuple[int, int], generator: torch.Generator, *, sure: float
) -> tuple[Int[Tensor, " k"], Bool[Tensor, "k H W"]]:
    """Sample a few of a picture's objects; return labels and masks on a canvas of `size` (H, W) with the same origin.

    min(max(objects // 2, 1), 3) are drawn with replacement in proportion to their cubed `scores`. A mask holds the
    pixels of the box where the probabilities, resized bilinearly to the picture, are above `sure`. Objects entirely
    off the canvas are dropped.
    """
    count = min(max(len(picture.labels) // 2, 1), 3)
    weights = scores(picture, sure=sure) ** 3
    chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
    h, w = picture.pixels.shape[1:]
    stretched = F.interpolate(picture.masks[chosen].float()[:, None], size=(h, w), mode="bilinear")[:, 0]
    masks = onto((stretched > sure) & box_masks(picture.boxes[chosen], h, w), size)
    some = masks.any(dim=2).any(dim=1)
    return picture.labels[chosen][some], masks[some]


def onto(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop maps (... H W) to `size`, or pad them with 0, at the bottom and right."""
    return F.pad(maps, (0, size[1] - maps.shape[-1], 0, size[0] - maps.shape[-2]))


def uncovered(
    boxes: Float[Tensor, "n 4"], covered: Bool[Tensor, "H W"]
) -> tuple[Float[Tensor, "m 4"], Int[Tensor, " m"]]:
    """Return the bounding boxes of each box's uncovered part, and their indices; fully covered boxes are dropped.

    Boxes without a covered pixel are unchanged.
    """
    there = box_masks(boxes, *covered.shape)
    left = there & ~covered
    hit = (there & covered).flatten(1).any(dim=1)
    shrunk = boxes.clone()
    shrunk[hit] = extents(left[hit].to(boxes.dtype))
    alive = left.flatten(1).any(dim=1).nonzero().flatten()
    return shrunk[alive], alive
