"""Dense outputs to instances: equal to mmdet's head, but upsampled part by part."""

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import SOLOV2Head
from mmengine.config import ConfigDict
from torch.testing import assert_close

from misa.models.students.solov2_decode import (
    cell_masks,
    decode,
    dense_outputs,
    each_image,
    enlarge,
    enlargement,
    peaks,
)

GRIDS, STRIDES = (7, 5), (8, 16)


def outputs(rng, *, classes=3, channels=6, h=12, w=17, batch=1):
    kernels = [torch.randn(batch, channels, g, g, generator=rng) for g in GRIDS]
    scores = [torch.randn(batch, classes, g, g, generator=rng) for g in GRIDS]
    smooth = F.interpolate(torch.randn(batch, channels, 4, 5, generator=rng), size=(h, w), mode="bicubic")
    return kernels, scores, smooth


def head(**test_cfg):
    return SOLOV2Head(
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        num_grids=list(GRIDS),
        strides=list(STRIDES),
        scale_ranges=((1, 64), (32, 512)),
        mask_feature_head=ConfigDict(
            feat_channels=8, start_level=0, end_level=1, out_channels=6, mask_stride=4, in_channels=8
        ),
        norm_cfg={"type": "GN", "num_groups": 4},
        loss_mask=ConfigDict(type="mmdet.DiceLoss", use_sigmoid=True),
        loss_cls=ConfigDict(type="mmdet.FocalLoss", use_sigmoid=True),
        test_cfg=ConfigDict(kernel="gaussian", sigma=2.0, **test_cfg),
    ).eval()


@pytest.mark.parametrize("original", [(37, 60), (300, 451), (40, 66)])
def test_the_same_instances_as_mmdets_head(rng, original):
    resized = (40, 66)  # of a padded input of 48 x 68
    raw = outputs(rng)
    limits = {"candidates": 20, "per_image": 8}
    cfg = {"score_thr": 0.3, "mask_thr": 0.6, "filter_thr": 0.05, "nms_pre": 20, "max_per_img": 8}
    (theirs,) = head(**cfg).predict_by_feat(
        [k.clone() for k in raw[0]],
        [s.clone() for s in raw[1]],
        raw[2],
        [{"img_shape": resized, "ori_shape": original}],
    )
    (dense,) = each_image(dense_outputs(raw))
    found = decode(dense, grids=GRIDS, strides=STRIDES, score=0.3, keep=0.05, mask=0.6, **limits)
    assert len(found.scores) == 8
    assert_close(found.scores, theirs.scores)
    assert torch.equal(found.labels, theirs.labels)
    by = enlargement((12, 17), stride=4, resized=resized, original=original, like=found.masks)
    for part, mask in zip(enlarge(found.masks, by, 0.6), theirs.masks, strict=True):
        whole = torch.zeros(original, dtype=torch.bool)
        h, w = part.pixels.shape
        whole[part.top : part.top + h, part.left : part.left + w] = torch.from_numpy(part.pixels)
        differing = (whole ^ mask).sum().item()
        assert differing <= 1e-4 * mask.numel(), "rounding at the threshold only"
        if part.pixels.size:
            assert part.pixels[0].any()
            assert part.pixels[-1].any()
            assert part.pixels[:, 0].any()
            assert part.pixels[:, -1].any()


def test_a_batch_is_its_images(rng):
    raw = outputs(rng, batch=3)
    for b, dense in enumerate(each_image(dense_outputs(raw))):
        one_image = [k[b : b + 1] for k in raw[0]], [s[b : b + 1] for s in raw[1]], raw[2][b : b + 1]
        (alone,) = each_image(dense_outputs(one_image))
        for one, other in zip(dense, alone, strict=True):
            assert_close(one, other)


def test_peaks_are_the_local_maxima(rng):
    scores = torch.rand(sum(g * g for g in GRIDS), 2, generator=rng)
    kept = peaks(scores, GRIDS)
    start = 0
    for grid in GRIDS:
        for row in range(grid):
            for column in range(grid):
                for c in range(2):
                    here = scores[start + row * grid + column, c]
                    before = [
                        scores[start + y * grid + x, c]
                        for y, x in ((row - 1, column), (row, column - 1), (row - 1, column - 1))
                        if y >= 0 and x >= 0
                    ]
                    expected = here if all(here >= other for other in before) else 0
                    assert kept[start + row * grid + column, c] == expected
        start += grid * grid


def test_nothing_above_the_score_is_no_instance(rng):
    (dense,) = each_image(dense_outputs(outputs(rng)))
    found = decode(dense, grids=GRIDS, strides=STRIDES, score=1.0, keep=0.0, mask=0.5, candidates=5, per_image=5)
    assert found.scores.shape == (0,)
    assert found.masks.shape[0] == 0


def test_an_untrained_network_does_not_fill_the_memory():
    grids = (60,)
    raw = ([torch.randn(1, 4, 60, 60)], [torch.full((1, 2, 60, 60), 4.0)], torch.randn(1, 4, 30, 30))
    (dense,) = each_image(dense_outputs(raw))
    found = decode(dense, grids=grids, strides=(8,), score=0.1, keep=0.0, mask=0.5, candidates=50, per_image=300)
    assert len(found.scores) == 50


def test_a_masks_logit_is_its_kernel_at_every_pixel(rng):
    (dense,) = each_image(dense_outputs(outputs(rng)))
    mask = cell_masks(dense, torch.tensor([3]))[0]
    expected = torch.stack([(dense.kernels[3] * dense.features[:, y, x]).sum() for y in range(12) for x in range(17)])
    assert_close(mask, expected.reshape(12, 17).sigmoid())
