"""SIM's copy-paste (Li et al. 2023): objects of earlier images, cut out by the masks that a network made of them.

All of it on the host, where boxes must be known. Axes: g object of a picture · k pasted object · n object of the image
that is pasted into · H row · W column, in pixels · h row · w column of masks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from misa.ops.boxes import box_masks, extents


class Picture(NamedTuple):
    """An image (RGB) and what was found in it: mask probabilities, boxes in pixels, labels. On the host."""

    pixels: UInt8[Tensor, "3 H W"]
    masks: Float[Tensor, "g h w"]
    boxes: Float[Tensor, "g 4"]
    labels: Int[Tensor, " g"]


class PictureQueue:
    """The last `size` pictures; masks are kept in half precision."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"PictureQueue holds one picture or more: size is {size}.")
        self.size = size
        self.pictures: list[Picture] = []

    @property
    def full(self) -> bool:
        """Whether as many pictures are there as it can hold."""
        return len(self.pictures) == self.size

    def put(self, picture: Picture, *, sure: float) -> None:
        """Add a picture, the oldest goes; without the objects of which no pixel is above `sure`, if any are left."""
        some = (scores(picture, sure=sure) > 0).nonzero().flatten()
        if len(some):
            kept = (picture.masks[some].half(), picture.boxes[some], picture.labels[some])
            self.pictures = [*self.pictures, Picture(picture.pixels, *kept)][-self.size :]

    def state(self) -> list[list[Tensor]]:
        """What a checkpoint keeps."""
        return [[part.clone() for part in picture] for picture in self.pictures]

    def restore(self, state: Sequence[Sequence[Tensor]]) -> None:
        """Take over what `state` gave."""
        self.pictures = [Picture(*(part.cpu() for part in picture)) for picture in state]


def scores(picture: Picture, *, sure: float) -> Float[Tensor, " g"]:
    """The mean of each mask over its pixels above `sure` within the box (one pixel more in the denominator).

    At the size of the masks; the published code has it at the image's.
    """
    stride = picture.pixels.shape[-1] / picture.masks.shape[-1]
    masks = picture.masks.float()
    there = (masks > sure) & box_masks(picture.boxes / stride, *masks.shape[1:])
    return (masks * there).sum(dim=(1, 2)) / (there.sum(dim=(1, 2)) + 1)


def cut_out(
    picture: Picture, size: tuple[int, int], generator: torch.Generator, *, sure: float
) -> tuple[Int[Tensor, " k"], Bool[Tensor, "k H W"]]:
    """Labels and masks of a few of a picture's objects, on a canvas of `size` (H, W) with the same origin.

    min(max(objects // 2, 1), 3) are drawn by the cubes of their `scores`, one perhaps several times. A mask is where
    the probabilities, stretched bilinearly to the picture's size, are above `sure` in the box. Objects of which nothing
    is on the canvas are left out.
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
    """Maps (... H W) cut to `size`, or padded with 0, at the lower right."""
    return F.pad(maps, (0, size[1] - maps.shape[-1], 0, size[0] - maps.shape[-2]))


def uncovered(
    boxes: Float[Tensor, "n 4"], covered: Bool[Tensor, "H W"]
) -> tuple[Float[Tensor, "m 4"], Int[Tensor, " m"]]:
    """The boxes around what something leaves of each box, and whose they are; a box that is covered whole is left out.

    A box of which nothing is covered stays as it is.
    """
    there = box_masks(boxes, *covered.shape)
    left = there & ~covered
    hit = (there & covered).flatten(1).any(dim=1)
    shrunk = boxes.clone()
    shrunk[hit] = extents(left[hit].to(boxes.dtype))
    alive = left.flatten(1).any(dim=1).nonzero().flatten()
    return shrunk[alive], alive
