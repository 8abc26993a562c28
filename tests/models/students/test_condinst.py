"""CondInst as a box-supervised student: its dynamic layers in loops, and the rest against mmdet's BoxInst."""

from types import SimpleNamespace

import pytest
import torch
from mmdet.models.dense_heads.condinst_head import CondInstMaskHead
from mmdet.models.utils import relative_coordinate_maps
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine import MessageHub
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch.testing import assert_close
from torchvision.ops import masks_to_boxes

from misa.experiment import TINY, Experiment
from misa.models.students.condinst import BoxCondInstMaskHead, best
from misa.models.students.table import model_config
from misa.objectives.base import Ramp
from misa.objectives.boxinst import BoxInst
from misa.ops.boxes import box_masks

ROW = Experiment(
    student="condinst",
    network=TINY,
    affinity=None,
    objective=BoxInst(ramp=Ramp(0, 100)),
    augmentation=Experiment().augmentation,
)


@pytest.fixture(autouse=True)
def mmdet():
    register_all_modules(init_default_scope=True)
    yield
    DefaultScope._instance_dict.clear()


def build(row, seed=0, **changes):
    config = model_config(row, ("a", "b", "c"))
    for name, value in changes.items():
        config[name].update(value)
    torch.manual_seed(seed)
    model = MODELS.build(config)
    model.init_weights()
    return model.train()


def batch(rng, boxes=([[8, 16, 72, 80], [60, 4, 124, 60]], [[20, 20, 100, 120]]), size=128):
    samples = []
    for image, own in enumerate(boxes):
        sample = DetDataSample(
            metainfo={
                "img_shape": (size, size),
                "batch_input_shape": (size, size),
                "pad_shape": (size, size),
                "ori_shape": (size, size),
                "scale_factor": (1.0, 1.0),
                "img_id": image,
            }
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(own, dtype=torch.float32).view(-1, 4), labels=torch.arange(len(own)) % 3
        )
        samples.append(sample)
    pixels = torch.rand(len(boxes), 3, size // 32, size // 32, generator=rng) * 255
    return [torch.nn.functional.interpolate(x[None], size=(size, size))[0] for x in pixels], samples


def slow_masks(features, params, points, strides, channels):
    """For every pixel of every instance: relative coordinates and features through the instance's three layers."""
    n, (c, h, w) = len(params), features.shape
    widths = [(c + 2, channels), (channels, channels), (channels, 1)]
    out = torch.zeros(n, h, w)
    for i in range(n):
        at, layers = 0, []
        for into, outof in widths:
            layers.append(params[i, at : at + into * outof].view(outof, into))
            at += into * outof
        for layer, (_, outof) in enumerate(widths):
            layers[layer] = (layers[layer], params[i, at : at + outof])
            at += outof
        for y in range(h):
            for x in range(w):
                place = (points[i] - torch.tensor([8.0 * x + 4, 8.0 * y + 4])) / (8 * strides[i])
                value = torch.cat([place, features[:, y, x]])
                for layer, (weight, bias) in enumerate(layers):
                    value = weight @ value + bias
                    value = value.relu() if layer < 2 else value
                out[i, y, x] = value
    return out


def test_the_dynamic_layers_equal_the_loop(rng):
    head = build(ROW).mask_head
    assert head.num_params == 233
    features = torch.randn(16, 3, 4, generator=rng)
    info = InstanceData(
        param_preds=torch.randn(5, 233, generator=rng),
        points=torch.rand(5, 2, generator=rng) * 32,
        strides=torch.tensor([8.0, 8, 16, 32, 8]),
    )
    head.mask_feat_stride, stride = head.mask_out_stride, head.mask_feat_stride  # no upsampling
    found = head.forward_single(features, info)[0]
    head.mask_feat_stride = stride
    assert_close(found, slow_masks(features, info.param_preds, info.points, info.strides, 8), atol=1e-4, rtol=1e-4)


def test_equals_mmdets_boxinst_on_equal_weights(rng):
    """With as many dynamic channels as mask features, as mmdet requires."""
    row = ROW.but(student="boxinst", objective=None)
    theirs = build(row)
    ours = build(ROW, bbox_head={"num_params": 593}, mask_head={"feat_channels": 16})
    assert isinstance(ours.mask_head, BoxCondInstMaskHead)
    ours.load_state_dict(theirs.state_dict())
    images, samples = batch(rng)
    MessageHub.get_instance("train")
    MessageHub.get_current_instance().update_info("iter", 30)
    expected = theirs(**theirs.data_preprocessor({"inputs": images, "data_samples": samples}, True), mode="loss")
    images, samples = batch(torch.Generator().manual_seed(0))
    ours.clock = ours.clock._replace(iteration=30, total=100)
    found = ours(**ours.data_preprocessor({"inputs": images, "data_samples": samples}, True), mode="loss")
    assert found["loss_pairs"] > 0
    for name, other in (
        ("loss_cls", "loss_cls"),
        ("loss_bbox", "loss_bbox"),
        ("loss_centerness", "loss_centerness"),
        ("loss_projection", "loss_mask_project"),
    ):
        assert_close(found[name], expected[other])
    # mmdet's ramp ends after 10,000 steps, the row's after 100.
    assert_close(found["loss_pairs"], expected["loss_mask_pairwise"] * (30 / 100) / (30 / 10000), rtol=1e-3, atol=0)


def test_positives_belong_to_their_boxes(rng):
    model = build(ROW)
    images, samples = batch(rng)
    data = model.data_preprocessor({"inputs": images, "data_samples": samples}, True)
    instances = [sample.gt_instances for sample in data["data_samples"]]
    positives, features, losses, repeats, *_ = model.training_output(data["inputs"], instances)
    assert repeats == 1
    assert features.shape == (2, 16, 32, 32)
    assert positives.mask_logits.shape == positives.box_masks.shape == (len(positives.image), 32, 32)
    assert set(positives.instance.tolist()) == {0, 1, 2}
    assert positives.image.tolist() == [0 if i < 2 else 1 for i in positives.instance.tolist()]
    assert positives.labels.tolist() == [[0, 1, 0][i] for i in positives.instance.tolist()]
    box = positives.box_masks[positives.instance == 1][0]
    assert box[1:15, 15:31].all()
    assert box.sum() == 14 * 16
    assert set(losses) == {"loss_cls", "loss_bbox", "loss_centerness"}
    for found, own in zip(model.masks_of_boxes(data["inputs"], instances), instances, strict=True):
        assert found.probabilities.shape == (len(own.bboxes), 32, 32)
        assert found.answered.all()


@pytest.mark.parametrize("boxes", [([], [[20, 20, 100, 120]]), ([], []), ([[37, 37, 43, 43]],)])
@pytest.mark.parametrize("watched", [False, True])
def test_images_without_locations_are_finite(rng, boxes, watched):
    """Without boxes, or with one that contains no location: also when the shares of the gradient are measured."""
    model = build(ROW)
    model.watched = watched
    images, samples = batch(rng, boxes)
    found = model(**model.data_preprocessor({"inputs": images, "data_samples": samples}, True), mode="loss")
    assert all(value.requires_grad for name, value in found.items() if "loss" in name)
    sum(value for name, value in found.items() if "loss" in name).backward()
    assert all(value.isfinite() for value in found.values())
    assert all(value.grad is not None for value in model.mask_head.parameters())
    if boxes[-1] != [[20, 20, 100, 120]]:
        assert found["loss_projection"] == found["loss_pairs"] == 0


def test_its_own_losses_are_of_float32_under_autocast(rng):
    model, seen = build(ROW), []
    for name in ("loss_cls", "loss_centerness"):
        getattr(model.bbox_head, name).register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    images, samples = batch(rng)
    data = model.data_preprocessor({"inputs": images, "data_samples": samples}, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**data, mode="loss")
    assert seen == [torch.float32] * 2


def test_the_best_locations_of_every_box(rng):
    owner = torch.tensor([0] * 7 + [2] * 2 + [1] * 5)[torch.randperm(14, generator=rng)]
    score = torch.rand(14, generator=rng)
    for at_most, each in ((9, 3), (2, 1), (64, 21)):
        expected = set()
        for one in range(3):
            mine = [i for i in range(14) if owner[i] == one]
            expected |= set(sorted(mine, key=lambda i: -score[i])[:each])
        number, whose = best(owner, score, at_most)
        assert set(number.tolist()) == expected
        assert torch.equal(owner[number], whose)
    assert [len(x) for x in best(owner[:0], score[:0], 64)] == [0, 0]


def test_relative_coordinates_point_from_the_pixel_to_the_location():
    """Which the loop above assumes."""
    found = relative_coordinate_maps(
        torch.tensor([[4.0, 4.0], [12.0, 4.0]]), torch.tensor([[20.0, 4.0]]), torch.tensor([8.0]), 8, (1, 2)
    )
    assert_close(found, torch.tensor([[[[0.25, 0.125]], [[0.0, 0.0]]]]))


def test_masks_are_where_the_losses_have_them(rng):
    """A box rasterized into cells, as for the losses, is enlarged about its own center; mmdet's is half a pixel off."""
    low = torch.rand(200, 2, generator=rng) * 80 + 20
    boxes = torch.cat([low, low + torch.rand(200, 2, generator=rng) * 60 + 30], dim=1)
    logits = torch.where(box_masks(boxes, 64, 64, stride=4), 12.0, -12.0)
    head = SimpleNamespace(mask_out_stride=4, test_cfg=ConfigDict(mask_thr=0.5))
    meta = {"scale_factor": (0.5, 0.5), "img_shape": (256, 256), "ori_shape": (512, 512)}
    off = {}
    for kind in (BoxCondInstMaskHead, CondInstMaskHead):
        for rescale in (False, True):
            given = boxes.clone()
            found = kind._predict_by_feat_single(head, logits, given, meta, rescale).bool()
            assert found.shape == (200, *meta["ori_shape" if rescale else "img_shape"])
            assert_close(given, boxes * 2 if rescale else boxes)
            centers = masks_to_boxes(found).add(torch.tensor([0, 0, 1, 1])).reshape(-1, 2, 2).mean(dim=1)
            away = centers - given.reshape(-1, 2, 2).mean(dim=1)
            off[kind, rescale] = (away.mean(dim=0) / (2 if rescale else 1)).abs().max().item()
    assert off[BoxCondInstMaskHead, False] < 0.15 > off[BoxCondInstMaskHead, True]
    assert off[CondInstMaskHead, False] > 0.35 < off[CondInstMaskHead, True]
