"""Mask2Former's pixel decoder with the sizes of its maps on the host.

mmdet keeps them on the device and reads them back in every layer, a dozen synchronizations in each step. Operations and
results equal mmdet's bit for bit.

Axes: b image · d channel · h row · w column · q query (all pixels of all levels, concatenated).
"""

from typing import Any

import torch
import torch.nn.functional as F
from mmcv.ops.multi_scale_deform_attn import (
    MultiScaleDeformableAttention,
    MultiScaleDeformableAttnFunction,
    ext_module,
    multi_scale_deformable_attn_pytorch,
)
from mmdet.models.layers import MSDeformAttnPixelDecoder
from torch import Tensor


class HostSizedAttention(MultiScaleDeformableAttention):
    """mmcv's deformable attention with `spatial_shapes` (levels 2) on the host."""

    def forward(
        self, query: Tensor, *, query_pos: Tensor, reference_points: Tensor, spatial_shapes: Tensor, **_: Any
    ) -> Tensor:
        """Return the attended query (b q d); `reference_points` (b q levels 2) are x y in 0..1. No padding mask."""
        b, q, _d = query.shape
        positioned = query + query_pos
        value = self.value_proj(query).view(b, q, self.num_heads, -1)
        samples = (b, q, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(positioned).view(*samples, 2)
        weights = self.attention_weights(positioned).view(b, q, self.num_heads, -1).softmax(-1).view(samples)
        sides = spatial_shapes.flip(1).to(query.device, non_blocking=True)
        locations = reference_points[:, :, None, :, None] + offsets / sides[:, None]
        if value.is_cuda and value.dtype != torch.bfloat16:  # mmcv's rule
            starts = spatial_shapes.prod(1).cumsum(0) - spatial_shapes.prod(1)
            where: tuple[Tensor, ...] = (spatial_shapes, starts)
            if not getattr(ext_module, "HOST_SHAPES", False):  # mmcv's compiled op
                where = tuple(each.to(value.device, non_blocking=True) for each in where)
            mixed = MultiScaleDeformableAttnFunction.apply(value, *where, locations, weights, self.im2col_step)
        else:
            mixed = multi_scale_deformable_attn_pytorch(value, spatial_shapes, locations, weights)
        attended: Tensor = self.dropout(self.output_proj(mixed)) + query
        return attended


class PixelDecoder(MSDeformAttnPixelDecoder):
    """mmdet's pixel decoder without synchronization with the host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for layer in self.encoder.layers:
            layer.self_attn.__class__ = HostSizedAttention  # the layer's attention class cannot be configured

    def forward(self, feats: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """Return the finest map (b d h w) and the maps of the encoder's levels, coarsest first."""
        b, levels = feats[0].shape[0], range(self.num_encoder_levels)
        sizes = [tuple(feats[self.num_input_levels - 1 - i].shape[-2:]) for i in levels]
        queries, positions, points = [], [], []
        for i, (h, w) in enumerate(sizes):
            level = self.num_input_levels - 1 - i
            feature = feats[level]
            queries.append(self.input_convs[i](feature).flatten(2).permute(0, 2, 1))
            nothing = feature.new_zeros((b, h, w), dtype=torch.bool)
            position = self.level_encoding.weight[i].view(1, -1, 1, 1) + self.postional_encoding(nothing)
            positions.append(position.flatten(2).permute(0, 2, 1))
            grid = self.point_generator.single_level_grid_priors((h, w), level, device=feature.device)
            pixels = torch.tensor([[w, h]]) * self.strides[level]
            points.append(grid / pixels.to(feature.device, non_blocking=True))
        memory = self.encoder(
            query=torch.cat(queries, dim=1),
            query_pos=torch.cat(positions, dim=1),
            key_padding_mask=None,
            spatial_shapes=torch.tensor(sizes),
            level_start_index=None,
            valid_ratios=None,
            reference_points=torch.cat(points)[None, :, None].repeat(b, 1, len(sizes), 1),
        ).permute(0, 2, 1)
        parts = memory.split([h * w for h, w in sizes], dim=-1)
        maps = [part.reshape(b, -1, *size) for part, size in zip(parts, sizes, strict=True)]
        for i in reversed(range(self.num_input_levels - self.num_encoder_levels)):
            finer = self.lateral_convs[i](feats[i])
            stretched = F.interpolate(maps[-1], size=finer.shape[-2:], mode="bilinear", align_corners=False)
            maps.append(self.output_convs[i](finer + stretched))
        return self.mask_feature(maps[-1]), maps[: self.num_outs]
