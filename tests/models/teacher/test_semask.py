"""Oracles: attention as loops over windows and tokens in float64, mmdet's own backbones, S · K + bias by einsum."""

import io
import math

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_checkpoint, save_checkpoint
from mmengine.structures import PixelData
from torch.testing import assert_close

from misa.data.pipeline import MEAN, STD
from misa.errors import UserError
from misa.models.backbones import (
    BACKBONES,
    RESNETS,
    SWINS,
    backbone_config,
    build_backbone,
    run_stages,
    stage_channels,
)
from misa.models.teacher.attention import SemanticAttention
from misa.models.teacher.contract import SemanticMaps
from misa.models.teacher.semask import SeMask, stage_windows
from misa.models.teacher.training import SemanticTeacher

CLASSES = ("disc", "bar", "star")
SMALL = {"name": "resnet18", "base_channels": 8, "pretrained": False}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Disable TF32: otherwise a GPU's convolutions round to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def tiny_semask(name="resnet18", **options):
    return SeMask(tiny_backbone(name), CLASSES, **{"channels": 16, **options})


def tiny_backbone(name, pretrained=False):
    config = backbone_config(name, base_channels=8, pretrained=pretrained, drop_path=0.0)
    return config | ({"embed_dims": 12, "depths": (1, 2, 1, 1)} if name.startswith("swin") else {})


def scramble(module, seed=0):
    """Randomise weights, gammas and statistics away from their special initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator).to(value)
                value.copy_(noise.abs() + 0.5 if "running_var" in name else value + 0.2 * noise)
    return module


@pytest.fixture
def images(rng):
    return torch.randn(2, 3, 64, 96, generator=rng)


# ---- the attention block


def slow_attention(block, x):
    """The block in loops: LayerNorm, windows of a zero-padded map, softmax without scale, residual."""
    w8 = {name: value.detach().double().cpu().numpy() for name, value in block.named_parameters()}
    x = x.detach().double().cpu().numpy()
    b, d, h, w = x.shape
    y = np.zeros((b, h, w, d))
    for image in range(b):
        for i in range(h):
            for j in range(w):
                token = x[image, :, i, j]
                centered = token - token.mean()
                normed = centered / math.sqrt((centered**2).mean() + 1e-5)
                y[image, i, j] = normed * w8["norm.weight"] + w8["norm.bias"]
    rows, columns = (h, w) if block.window is None else (block.window, block.window)
    n = w8["query.bias"].shape[0]
    out, scores = np.zeros_like(x), np.zeros((b, n, h, w))
    for image in range(b):
        for top in range(0, h, rows):
            for left in range(0, w, columns):
                cells = [(i, j) for i in range(top, top + rows) for j in range(left, left + columns)]
                tokens = [y[image, i, j] if i < h and j < w else np.zeros(d) for i, j in cells]
                q, k, v = (
                    [w8[f"{part}.weight"] @ t + w8[f"{part}.bias"] for t in tokens]
                    for part in ("query", "key", "value")
                )
                for index, (i, j) in enumerate(cells):
                    if i >= h or j >= w:
                        continue
                    scores[image, :, i, j] = q[index]
                    weights = [math.exp(float(q[index] @ other)) for other in k]
                    mixed = sum(a * value for a, value in zip(weights, v, strict=True)) / sum(weights)
                    update = w8["project.weight"] @ mixed + w8["project.bias"]
                    base = x[image, :, i, j] if block.residual == "input" else y[image, i, j]
                    out[image, :, i, j] = base + w8["gamma"][0] * update
    return torch.from_numpy(out), torch.from_numpy(scores)


@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("residual", ["input", "norm"])
@pytest.mark.parametrize("size", [(6, 6), (5, 8), (1, 4)])
def test_attention_equals_the_loop(rng, device, window, residual, size):
    block = scramble(SemanticAttention(6, 4, window=window, residual=residual)).eval().to(device)
    x = torch.randn(2, 6, *size, generator=rng).to(device)
    out, scores = block(x)
    expected, expected_scores = slow_attention(block, x)
    assert_close(out.double().cpu(), expected, atol=1e-5, rtol=1e-5)
    assert_close(scores.double().cpu(), expected_scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_a_closed_gate_is_the_identity(rng, device, window):
    block = SemanticAttention(6, 4, window=window).to(device)  # in training mode, with dropout
    x = torch.randn(2, 6, 9, 11, generator=rng).to(device)
    assert torch.equal(block(x)[0], x)


def test_with_the_norm_residual_a_closed_gate_is_the_layer_norm(rng):
    block = SemanticAttention(6, 4, residual="norm")
    x = torch.randn(2, 6, 9, 11, generator=rng)
    assert_close(block(x)[0], block.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_a_window_does_not_see_its_neighbor(rng):
    block = scramble(SemanticAttention(4, 3, window=5)).eval()
    x = torch.randn(1, 4, 10, 10, generator=rng)
    changed = x.clone()
    changed[..., 5:] = 0
    assert_close(block(x)[0][..., :5], block(changed)[0][..., :5])


def test_attention_options_are_checked():
    with pytest.raises(ValueError, match="window"):
        SemanticAttention(4, 3, window=0)
    with pytest.raises(ValueError, match="residual"):
        SemanticAttention(4, 3, residual="none")


# ---- backbones


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "swin_t"])
def test_the_run_through_the_stages_is_mmdets_own(images, name):
    model = scramble(tiny_semask(name)).eval()
    with torch.no_grad():
        found = run_stages(model.backbone, images, lambda stage, x: x)
        expected = model.backbone(images)
    assert [x.shape[1] for x in found] == stage_channels(model.backbone)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_a_stage_is_given_goes_on_to_the_next(images):
    model = scramble(tiny_semask()).eval()
    seen = []

    def between(stage, x):
        seen.append(stage)
        return x * 0 if stage == 1 else x

    with torch.no_grad():
        maps = run_stages(model.backbone, images, between)
    assert seen == [0, 1, 2, 3]
    assert maps[1].abs().sum() == 0
    # Stage 1 has removed all dependence on the images.
    assert_close(maps[3][0], maps[3][1])


@pytest.mark.parametrize("name", BACKBONES)
def test_the_table_says_the_widths_of_the_network(name):
    config = backbone_config(name, base_channels=16, pretrained=False)
    backbone = MODELS.build(config | ({"depths": (1, 1, 1, 1)} if name in SWINS else {}))
    assert stage_channels(backbone) == BACKBONES[name].widths(16)


@pytest.mark.parametrize("name", [*RESNETS, *SWINS])
def test_every_backbone_has_its_published_widths_and_windows(name):
    config = backbone_config(name, pretrained=False)
    backbone = MODELS.build(config | ({"depths": (1, 1, 1, 1)} if name in SWINS else {}))
    width = {"swin_t": 96, "swin_s": 96, "swin_b": 128, "swin_l": 192, "resnet18": 64, "resnet34": 64}.get(name, 256)
    assert stage_channels(backbone) == [width * 2**stage for stage in range(4)]
    window = {"swin_b": 12, "swin_l": 12}.get(name, 7)
    reaches = name in ("swin_t", "swin_s", "swin_l")
    assert stage_windows(name, 21) == (window, window, *((None, None) if reaches else (window, window)))
    assert stage_windows(name, 19) == (window,) * 4


def test_an_unknown_backbone_is_one_clear_sentence():
    with pytest.raises(UserError, match=r"^there is no backbone 'resnet19'; did you mean 'resnet18'\?$"):
        backbone_config("resnet19")
    with pytest.raises(UserError, match=r"^there is no backbone 'vgg'; choose one of resnet18, .*timm:"):
        backbone_config("vgg")


def test_a_missing_download_is_one_clear_sentence_or_a_start_from_scratch(monkeypatch):
    from urllib.error import URLError

    import mmengine.runner.checkpoint as checkpoint

    def offline(*_, **__):
        raise URLError("no route to the host")

    monkeypatch.setattr(checkpoint, "load_url", offline)
    config = backbone_config("resnet18")
    with pytest.raises(UserError, match=r"torchvision://resnet18 could not be loaded \(URLError.*from scratch"):
        build_backbone(config)
    backbone = build_backbone(config, or_scratch=True)
    assert all(p.isfinite().all() for p in backbone.parameters())


@pytest.mark.parametrize("checkpoint", ["no/such/file.pth", "torchvision://resnet19"])
def test_a_missing_file_or_name_is_one_clear_sentence(checkpoint):
    config = backbone_config("resnet18", base_channels=8, pretrained=checkpoint)
    with pytest.raises(UserError, match=f"{checkpoint} could not be loaded"):
        build_backbone(config)


def official(key):
    """Returns the name of a weight in Swin's published files."""
    for ours, theirs in (
        ("stages", "layers"),
        ("attn.w_msa.", "attn."),
        ("ffn.layers.0.0.", "mlp.fc1."),
        ("ffn.layers.1.", "mlp.fc2."),
        ("patch_embed.projection", "patch_embed.proj"),
    ):
        key = key.replace(ours, theirs, 1)
    return key


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_a_local_file_is_loaded(tmp_path, name):
    source = scramble(tiny_semask(name).backbone)
    state = source.state_dict()
    if name == "swin_t":
        # Those files hold no norms for the stages' outputs: these keep their initial values.
        state = {official(key): value for key, value in state.items() if not key.startswith("norm")}
    torch.save({"model" if name == "swin_t" else "state_dict": state}, tmp_path / "weights.pth")
    config = tiny_backbone(name, pretrained=tmp_path / "weights.pth")
    loaded = build_backbone(config).state_dict()
    wrong = [key for key, value in source.state_dict().items() if not torch.equal(value, loaded[key])]
    norms = {key for key in loaded if name == "swin_t" and key.startswith("norm")}
    assert not [key for key in wrong if "downsample" not in key and key not in norms]  # the converter reorders those
    assert all((loaded[key] == (1 if key.endswith("weight") else 0)).all() for key in norms)


def test_a_file_that_fits_nowhere_is_refused(tmp_path):
    torch.save(build_backbone(backbone_config(**SMALL)).state_dict(), tmp_path / "narrow.pth")
    config = backbone_config("resnet18", base_channels=16, pretrained=tmp_path / "narrow.pth")
    with pytest.raises(UserError, match="could not be loaded"):
        build_backbone(config)
    assert all(p.isfinite().all() for p in build_backbone(config, or_scratch=True).parameters())


# ---- the network


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "swin_t"])
@pytest.mark.parametrize("size", [(64, 96), (67, 93), (33, 41)])
def test_shapes_at_any_size(rng, device, name, size):
    model = tiny_semask(name).to(device)
    maps = model(torch.randn(2, 3, *size, generator=rng).to(device))
    h, w = (-(-side // 4) for side in size)
    assert maps.features.shape == (2, 16, h, w)
    assert maps.logits.shape == maps.stage_logits.shape == (2, len(CLASSES) + 1, h, w)
    assert (maps.features >= 0).all()


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_logits_are_feature_times_classifier_plus_bias(images, device, name):
    model = scramble(tiny_semask(name)).eval().to(device)
    with torch.no_grad():
        maps = model(images.to(device))
    k, bias = model.classifier.weight[:, :, 0, 0], model.classifier.bias
    exact = torch.einsum("nd,bdhw->bnhw", k.double(), maps.features.double()) + bias.double()[:, None, None]
    assert_close(maps.logits.double(), exact, atol=1e-5, rtol=1e-5)
    # The very convolution of S with K is bit for bit the same.
    again = torch.nn.functional.conv2d(maps.features, model.classifier.weight, bias)
    assert torch.equal(maps.logits, again)


def test_closed_gates_leave_the_backbone_intact(images):
    model = tiny_semask().eval()
    plain = model.backbone(images)
    seen = run_stages(model.backbone, images, lambda stage, x: model.attention[stage](x)[0])
    assert all(torch.equal(a, b) for a, b in zip(seen, plain, strict=True))


@pytest.mark.parametrize(("name", "residual"), [("resnet18", "input"), ("swin_t", "norm"), ("swin_t", "input")])
def test_every_parameter_learns_once_the_gates_are_open(rng, name, residual):
    model = scramble(tiny_semask(name, residual=residual, windows=(7, 7, None, None)))
    maps = model(torch.randn(2, 3, 64, 64, generator=rng))
    target = torch.randint(0, 4, maps.logits.shape[-2:], generator=rng).expand(2, -1, -1)
    loss = torch.nn.functional.cross_entropy(maps.logits, target)
    (loss + 0.4 * torch.nn.functional.cross_entropy(maps.stage_logits, target)).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not silent


def test_stage_logits_are_the_sum_of_the_raised_stage_scores(images):
    model = scramble(tiny_semask()).eval()
    scores = []
    for block in model.attention:
        block.register_forward_hook(lambda _, __, result: scores.append(result[1]))
    with torch.no_grad():
        found = model(images).stage_logits
    expected = 0
    for level, score in enumerate(scores):
        for _ in range(level):
            score = torch.nn.functional.interpolate(score, scale_factor=2, mode="bilinear", align_corners=False)
        expected = expected + score
    assert_close(found, expected)


def test_s_is_the_sum_of_the_four_levels_at_stride_4(images):
    model = scramble(tiny_semask()).eval()
    levels = []
    for blocks in model.decoder:
        blocks[-1].register_forward_hook(lambda _, __, result: levels.append(result))
    with torch.no_grad():
        found = model(images).features
    # Every level's last block works at stride 4 (the first level) or 8; one upsampling by 2 remains.
    raised = [
        torch.nn.functional.interpolate(x, size=found.shape[-2:], mode="bilinear", align_corners=False) for x in levels
    ]
    assert [len(blocks) for blocks in model.decoder] == [1, 1, 2, 3]
    assert [x.shape[-1] for x in levels] == [24, 12, 12, 12]
    assert_close(found, sum(raised))


@pytest.mark.parametrize("background", [None, 0, 2])
def test_the_prior_is_s_and_the_foreground_rows(images, background):
    model = scramble(tiny_semask(background=background))
    prior = model.prior(images)
    assert model.training
    assert not prior.features.requires_grad
    assert not prior.saliency_factors.requires_grad
    model.eval()
    with torch.no_grad():
        assert_close(prior.features, model(images).features)
    rows = [r for r in range(4) if r != (3 if background is None else background)]
    assert torch.equal(prior.saliency_factors, model.classifier.weight[rows, :, 0, 0])


def test_asking_for_a_prior_changes_no_statistics(images):
    model = tiny_semask()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.prior(images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_checkpoint_loads_weights_only_and_says_what_it_is():
    model = scramble(tiny_semask())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = tiny_semask()
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.contract == (CLASSES, 3, MEAN, STD)


def test_mmengine_saves_and_loads_it_too(tmp_path):
    model = scramble(tiny_semask())
    save_checkpoint({"state_dict": model.state_dict()}, str(tmp_path / "teacher.pth"))
    other = tiny_semask()
    load_checkpoint(other, str(tmp_path / "teacher.pth"), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"background": 0}, "declares background 3"), ({"mean": (0.0, 0.0, 0.0)}, r"declares mean \(123")],
)
def test_a_checkpoint_of_another_contract_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        tiny_semask(**options).load_state_dict(tiny_semask().state_dict())


def test_wrong_input_is_one_clear_sentence():
    config = backbone_config(**SMALL)
    with pytest.raises(ValueError, match="one class or more"):
        SeMask(config, ())
    with pytest.raises(ValueError, match="background 4"):
        SeMask(config, CLASSES, background=4)
    with pytest.raises(ValueError, match="window for each of 4 stages"):
        SeMask(config, CLASSES, windows=(7, 7))
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\)"):
        tiny_semask()(torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize("background", [0, 2, 3])
def test_the_last_layer_gives_the_logits_with_the_background_apart(images, background):
    model = scramble(SeMask(tiny_backbone("resnet18"), CLASSES, channels=16, background=background)).eval()
    with torch.no_grad():
        maps = model(images)
    layer = model.last_layer()
    rows = torch.cat([layer.factors, layer.background[None]])
    bias = torch.cat([layer.bias, layer.background_bias[None]])
    found = torch.einsum("nd,bdhw->bnhw", rows, maps.features) + bias[:, None, None]
    order = [row for row in range(4) if row != background] + [background]
    assert_close(found, maps.logits[:, order], rtol=1e-4, atol=1e-5)
    assert_close(layer.factors, model.prior(images).saliency_factors)


@pytest.mark.parametrize("background", [0, 2, 3])
def test_label_maps_have_the_background_last_whichever_row_it_is(images, background):
    """A network that knows the answer has the smallest loss, and predicts it."""
    truth = torch.randint(0, 4, (2, 64, 96), generator=torch.Generator().manual_seed(1))
    order = [row for row in range(4) if row != background] + [background]
    rows = torch.tensor(order)[truth]  # the row of each label
    logits = 20 * torch.nn.functional.one_hot(rows, 4).permute(0, 3, 1, 2).float()
    network = {"type": SeMask, "backbone": tiny_backbone("resnet18"), "classes": CLASSES, "channels": 16}
    teacher = SemanticTeacher(network | {"background": background}, None, 0.4, 4)
    teacher.network.forward = lambda _: SemanticMaps(images, logits, logits)
    samples = [DetDataSample(metainfo={"img_shape": (64, 96), "ori_shape": (64, 96)}) for _ in truth]
    for sample, labels in zip(samples, truth, strict=True):
        sample.gt_sem_seg = PixelData(sem_seg=labels[None])
    assert all(loss < 1e-4 for loss in teacher(images, samples, mode="loss").values())
    for sample, labels in zip(teacher(images, samples, mode="predict"), truth, strict=True):
        assert torch.equal(sample.pred_sem_seg.sem_seg[0].long(), labels)
