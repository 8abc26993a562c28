"""Real mmdet models on our ops: a training step and a prediction, on the code paths for CPU and CUDA.

mmdet and mmcv choose the path by `is_cuda` alone, so the CUDA path is run here by patching `is_cuda` of every tensor.
It must give the same losses and gradients.
"""

import contextlib
import copy
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

with contextlib.redirect_stdout(io.StringIO()):
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmdet.utils import register_all_modules
from mmcv.ops import multi_scale_deform_attn
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData

OPS = [
    *("nms", "sigmoid_focal_loss_forward", "sigmoid_focal_loss_backward", "ms_deform_attn_forward"),
    *("ms_deform_attn_backward", "roi_align_forward", "roi_align_backward"),
]
CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"


def shrink_mask2former(cfg: Config, channels: list[int]) -> None:
    cfg.backbone.frozen_stages = -1
    head = cfg.panoptic_head
    head.update(in_channels=channels, feat_channels=64, out_channels=64, num_queries=10)
    head.update(num_things_classes=3, num_stuff_classes=0)
    head.loss_cls.class_weight = [1.0] * 3 + [0.1]
    layer = head.pixel_decoder.encoder.layer_cfg
    layer.self_attn_cfg.update(embed_dims=64, num_heads=4)
    layer.ffn_cfg.update(embed_dims=64, feedforward_channels=64)
    head.pixel_decoder.encoder.num_layers = 2
    head.pixel_decoder.positional_encoding.num_feats = 32
    head.positional_encoding.num_feats = 32
    decoder = head.transformer_decoder
    decoder.num_layers = 3
    for attention in (decoder.layer_cfg.self_attn_cfg, decoder.layer_cfg.cross_attn_cfg):
        attention.update(embed_dims=64, num_heads=4)
        attention.pop("dropout")  # former name of attn_drop; 0 in both
    decoder.layer_cfg.ffn_cfg.update(embed_dims=64, feedforward_channels=64)
    cfg.panoptic_fusion_head.update(num_things_classes=3, num_stuff_classes=0)
    cfg.test_cfg.update(panoptic_on=False, max_per_image=10)
    cfg.data_preprocessor.batch_augments = None


def build(name: str) -> torch.nn.Module:
    """Build a small model from mmdet's own config: ResNet-18 from scratch, 64 channels, 3 classes."""
    register_all_modules(init_default_scope=True)
    cfg = Config.fromfile(CONFIGS / name).model
    cfg.backbone.update(depth=18, init_cfg=None)
    channels = [64, 128, 256, 512]
    if cfg.type == "Mask2Former":
        shrink_mask2former(cfg, channels)
    else:
        cfg.neck.update(in_channels=channels, out_channels=64)
    if cfg.type == "SOLOv2":
        cfg.mask_head.update(num_classes=3, in_channels=64, feat_channels=32, stacked_convs=1)
        cfg.mask_head.mask_feature_head.update(feat_channels=32, out_channels=32)
    if cfg.type == "BoxInst":
        cfg.bbox_head.update(num_classes=3, in_channels=64, feat_channels=64, stacked_convs=1)
        cfg.mask_head.mask_feature_head.update(in_channels=64, feat_channels=32)
    if cfg.type == "MaskRCNN":
        cfg.rpn_head.update(in_channels=64, feat_channels=64)
        roi = cfg.roi_head
        roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = 64
        roi.bbox_head.update(num_classes=3, in_channels=64, fc_out_channels=64)
        roi.mask_head.update(num_classes=3, in_channels=64, conv_out_channels=32, num_convs=1)
        cfg.test_cfg.rpn.nms_pre = 50
        cfg.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)
    elif cfg.type != "Mask2Former":
        cfg.test_cfg.update(score_thr=0.0, filter_thr=0.0, nms_pre=20, max_per_img=5)  # untrained scores are low
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    return model


def scene() -> dict[str, Any]:
    """Two images of 96 x 128 pixels with two and one boxes, in the form of a data loader's batch."""
    rng = np.random.default_rng(0)
    samples = []
    for boxes in ([[8, 8, 60, 56], [70, 20, 120, 90]], [[20, 10, 100, 80]]):
        masks = np.zeros((len(boxes), 96, 128), dtype=np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = 1
        meta = dict.fromkeys(("img_shape", "ori_shape", "batch_input_shape", "pad_shape"), (96, 128))
        sample = DetDataSample(metainfo={**meta, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float),
            labels=torch.arange(len(boxes)),
            masks=BitmapMasks(masks, 96, 128),
        )
        samples.append(sample)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 96, 128), dtype=np.uint8)) for _ in samples]
    return {"inputs": images, "data_samples": samples}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of each op."""
    counter: Counter[str] = Counter()
    ext = multi_scale_deform_attn.ext_module

    def counted(name: str) -> Any:
        op = getattr(ext, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counter[name] += 1
            return op(*args, **kwargs)

        return call

    for name in OPS:
        monkeypatch.setattr(ext, name, counted(name))
    return counter


@pytest.fixture
def iteration() -> Iterator[None]:
    """Set the iteration in mmengine's message hub, which BoxInst's loss reads."""
    hub = MessageHub.get_current_instance()
    hub.update_info("iter", 1)
    yield
    hub.pop_info("iter")


@contextlib.contextmanager
def claiming_cuda(claim: bool) -> Iterator[None]:
    """Within the block every tensor reports `is_cuda`, if `claim`."""
    with pytest.MonkeyPatch.context() as patch:
        if claim:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(multi_scale_deform_attn, "IS_CUDA_AVAILABLE", True)
        yield


def train_step(model: torch.nn.Module, claim: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns losses and gradients of one step."""
    model.train()
    model.zero_grad()
    torch.manual_seed(1)  # Mask2Former samples points
    data = model.data_preprocessor(copy.deepcopy(scene()), True)
    with claiming_cuda(claim):
        total, losses = model.parse_losses(model(**data, mode="loss"))
        total.backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def predict(model: torch.nn.Module, claim: bool) -> list[InstanceData]:
    model.eval()
    data = model.data_preprocessor(copy.deepcopy(scene()), False)
    with torch.no_grad(), claiming_cuda(claim):
        return [sample.pred_instances for sample in model(**data, mode="predict")]


@pytest.mark.parametrize(
    ("name", "on_cpu", "on_cuda"),
    [
        (
            "solov2/solov2_r50_fpn_1x_coco.py",
            {},
            {"sigmoid_focal_loss_forward": 1, "sigmoid_focal_loss_backward": 1},
        ),
        (
            "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
            {},
            {"ms_deform_attn_forward": 2 + 2, "ms_deform_attn_backward": 2},
        ),
        (
            "boxinst/boxinst_r50_fpn_ms-90k_coco.py",
            {"nms": 2},
            {"nms": 2, "sigmoid_focal_loss_forward": 1, "sigmoid_focal_loss_backward": 1},
        ),
    ],
    ids=["solov2", "mask2former", "boxinst"],
)
@pytest.mark.usefixtures("iteration")
def test_a_model_trains_and_predicts_alike_on_both_branches(name, on_cpu, on_cuda, calls):
    model = build(name)
    losses, gradients = train_step(model, claim=False)
    predictions = predict(model, claim=False)
    assert calls == on_cpu
    calls.clear()
    claimed_losses, claimed_gradients = train_step(model, claim=True)
    claimed_predictions = predict(model, claim=True)
    assert calls == on_cuda

    assert losses["loss"].isfinite()
    assert len(gradients) > 30
    assert_close(claimed_losses, losses, atol=1e-4, rtol=1e-4)
    assert_close(claimed_gradients, gradients, atol=1e-3, rtol=1e-3)
    assert len(predictions) == 2
    for ours, claimed in zip(predictions, claimed_predictions, strict=True):
        assert 0 < len(ours) <= 10
        assert ours.masks.shape[1:] == (96, 128)
        assert_close(claimed.scores, ours.scores, atol=1e-4, rtol=1e-4)


def test_mask_rcnn_trains_and_predicts(calls):
    """Not a student of misa, but it needs roi_align, in its extractors and to crop its mask targets."""
    model = build("mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py")
    losses, gradients = train_step(model, claim=False)
    predictions = predict(model, claim=False)
    assert set(calls) == {"nms", "roi_align_forward", "roi_align_backward"}
    assert losses["loss"].isfinite()
    assert gradients["neck.fpn_convs.0.conv.weight"].abs().sum() > 0
    assert [len(instances) for instances in predictions] == [5, 5]
