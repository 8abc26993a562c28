"""SeMask, the semantic teacher (§3.1, Eq. 1; Jain et al. 2023), which provides the dense feature S and classifier K.

Axes: b image · d channel · n class (background included) · c category (without) · h row · w column.

Semantic attention after each stage of a backbone, a Semantic-FPN decoder, S the sum of its four levels at stride 4
(so S ≥ 0), and a 1x1 classifier whose weight rows are the saliency factors K of Eq. 11.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misa.data.pipeline import MEAN, STD
from misa.experiment import Experiment
from misa.losses.inputs import SemanticPrior
from misa.models.backbones import SWINS, backbone_of, build_backbone, run_stages, stage_channels
from misa.models.teacher.attention import Residual, SemanticAttention
from misa.models.teacher.contract import SemanticMaps, TeacherContract, TeacherNetwork, evaluating
from misa.ops.readings import Classifier

__all__ = ["SeMask", "SemanticMaps", "stage_windows"]


class SeMask(TeacherNetwork):
    """The teacher network.

    backbone: config of an mmdet ResNet or Swin Transformer with four stages (see `backbone_config`).
    classes: names of the foreground categories; the network has one more class, the background.
    channels: D of S, 256 as published.
    windows: attention window of each stage, None for the whole map; see `stage_windows` for the published choice.
    residual: "input" keeps a pretrained backbone unchanged at first, "norm" is the published form for Swin.
    background: row of the classifier for the background; by default the last.
    or_scratch: initialize at random if the pretrained weights cannot be loaded.

    The state dict contains the class names, the background's row and the input's mean and std (`contract`); loading a
    checkpoint with others is an error.
    """

    foreground: Tensor

    def __init__(
        self,
        backbone: Mapping[str, Any],
        classes: Sequence[str],
        *,
        channels: int = 256,
        windows: Sequence[int | None] = (7, 7, 7, 7),
        residual: Residual = "input",
        background: int | None = None,
        dropout: float = 0.1,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        or_scratch: bool = False,
    ) -> None:
        super().__init__()
        n = len(classes) + 1
        background = n - 1 if background is None else background
        if not classes or not 0 <= background < n:
            raise ValueError(
                f"SeMask needs one class or more and a background row from 0 to their number: "
                f"{len(classes)} classes, background {background}."
            )
        self.contract = TeacherContract(tuple(classes), background, tuple(mean), tuple(std))
        self.backbone = build_backbone(backbone, or_scratch=or_scratch)
        stages = stage_channels(self.backbone)
        if len(windows) != len(stages):
            raise ValueError(f"SeMask needs a window for each of {len(stages)} stages: windows is {tuple(windows)}.")
        self.attention = nn.ModuleList(
            SemanticAttention(d, n, window=window, residual=residual, dropout=dropout)
            for d, window in zip(stages, windows, strict=True)
        )
        self.decoder = nn.ModuleList(_level(d, channels, steps=max(1, level)) for level, d in enumerate(stages))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, n, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]
        rows = [row for row in range(n) if row != background]
        self.register_buffer("foreground", torch.tensor(rows), persistent=False)

    def forward(self, images: Tensor) -> SemanticMaps:
        """Return S, logits and summed stage logits at stride 4 of normalized images (b 3 h w) of any size."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"SeMask takes images of shape (b, 3, h, w): they are {tuple(images.shape)}.")
        scores: list[Tensor] = []

        def attend(stage: int, features: Tensor) -> Tensor:
            attended, classes = self.attention[stage](features)
            scores.append(classes)
            return attended

        maps = run_stages(self.backbone, images, attend)
        sizes = [(x.shape[-2], x.shape[-1]) for x in maps]
        branches = zip(self.decoder, maps, strict=True)
        levels = [_decode(blocks, x, sizes[:level]) for level, (blocks, x) in enumerate(branches)]
        features = torch.stack(levels).sum(dim=0)
        stage_logits = torch.stack([_rise(score, sizes[:level]) for level, score in enumerate(scores)]).sum(dim=0)
        return SemanticMaps(features, self.classifier(self.dropout(features)), stage_logits)

    @torch.no_grad()
    def prior(self, images: Tensor) -> SemanticPrior:
        """Return S and the foreground rows of K for the losses, without gradient and in eval mode."""
        with evaluating(self):
            features = self(images).features
        return SemanticPrior(features, self.classifier.weight.detach().flatten(1).index_select(0, self.foreground))

    def last_layer(self) -> Classifier:
        """Return the last layer's foreground rows (K), background row and biases, without gradient."""
        rows, bias = self.classifier.weight.detach().flatten(1), self.classifier.bias
        assert bias is not None
        bias, background = bias.detach(), self.contract.background
        return Classifier(
            rows.index_select(0, self.foreground),
            rows[background],
            bias.index_select(0, self.foreground),
            bias[background],
        )


def semask_config(experiment: Experiment, classes: tuple[str, ...]) -> dict[str, Any]:
    """The network's config for a teacher's row."""
    assert experiment.semantic is not None
    network = experiment.network
    return {
        "type": SeMask,
        "backbone": backbone_of(network),
        "classes": list(classes),
        "channels": network.feature_channels,
        "windows": list(stage_windows(network.backbone, len(classes) + 1)),
        "residual": experiment.semantic.residual,
    }


def stage_windows(backbone: str, classes: int) -> tuple[int | None, ...]:
    """SeMask's published attention windows for a backbone and a number of classes, background included.

    Swin-T, S and L with more than 19 classes attend over the whole map in the last two stages; Swin-B never does.
    Other backbones, which the paper does not use, get 7 everywhere.
    """
    if backbone not in SWINS:
        return (7, 7, 7, 7)
    embedding, _, _, window, _, _ = SWINS[backbone]
    return (window, window, None, None) if embedding != 128 and classes > 19 else (window,) * 4


def _level(incoming: int, channels: int, *, steps: int) -> nn.ModuleList:
    """One level of the decoder: one 3x3 block for each doubling of the resolution, at least one."""
    return nn.ModuleList(
        nn.Sequential(
            nn.Conv2d(incoming if step == 0 else channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        for step in range(steps)
    )


def _decode(blocks: Any, x: Tensor, finer: list[tuple[int, int]]) -> Tensor:
    """Alternate blocks and upsampling, up to the finest map's size."""
    targets: list[tuple[int, int] | None] = [*reversed(finer)] or [None]
    for block, target in zip(blocks, targets, strict=True):
        x = block(x)
        if target is not None:
            x = F.interpolate(x, size=target, mode="bilinear", align_corners=False)
    return x


def _rise(x: Tensor, finer: list[tuple[int, int]]) -> Tensor:
    """Upsample stepwise through the sizes of the finer maps, which need not be exact doubles."""
    for target in reversed(finer):
        x = F.interpolate(x, size=target, mode="bilinear", align_corners=False)
    return x
