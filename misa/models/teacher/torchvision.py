"""torchvision segmentation networks as teachers, an example of any network with a dense feature and a classifier.

Axes: b image · d channel · c category · h row · w column.
"""

import urllib.error
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models, segmentation

from misa.data.pipeline import MEAN, STD
from misa.errors import UserError, counted, did_you_mean
from misa.losses.inputs import SemanticPrior
from misa.models.teacher.contract import TeacherContract, TeacherNetwork, evaluating
from misa.ops.readings import Classifier, Vocabulary

_COCO_WORDS = {"airplane": "aeroplane", "couch": "sofa", "motorcycle": "motorbike", "tv": "tvmonitor"}


class TorchvisionTeacher(TeacherNetwork):
    """torchvision's FCN or DeepLabV3 as a teacher that is not trained here.

    model: for example `torchvision.models.segmentation.fcn_resnet50(weights=...)`.
    categories: names of the rows of its last 1x1 convolution, such as `weights.meta["categories"]`.
    classes: the student's categories, which define the order of K's rows.
    known: category of each class; by default the class's own name. A class without a category is represented as
        "not background": by the background's row with the opposite sign, its probability by 1 minus the background's.
    background: name of the background's row.

    torchvision's ImageNet mean and std equal those of `misa.data.pipeline`, so it takes the student's images unchanged.
    """

    foreground: Tensor
    sign: Tensor

    def __init__(
        self,
        model: nn.Module,
        categories: Sequence[str],
        classes: Sequence[str],
        *,
        known: Mapping[str, str] | None = None,
        background: str = "__background__",
    ) -> None:
        super().__init__()
        head = getattr(model, "classifier", None)
        if not isinstance(head, nn.Sequential) or not isinstance(head[-1], nn.Conv2d) or head[-1].kernel_size != (1, 1):
            raise ValueError(
                "TorchvisionTeacher needs a network whose `classifier` is a sequence ending in a 1x1 convolution, "
                f"as FCN and DeepLabV3 have: {type(model).__name__} has {type(head).__name__}."
            )
        if len(categories) != head[-1].out_channels:
            raise ValueError(
                f"TorchvisionTeacher needs a name for each of the classifier's {head[-1].out_channels} rows: "
                f"categories has {len(categories)}."
            )
        self.known = {name: name for name in classes} if known is None else dict(known)
        missing = [name for name in [background, *self.known.values()] if name not in categories]
        if missing:
            raise ValueError(
                f"TorchvisionTeacher cannot teach {', '.join(missing)}: the network knows {', '.join(categories)}."
            )
        self.model = model
        self.contract = TeacherContract(tuple(classes), list(categories).index(background), MEAN, STD)
        rows = torch.tensor([list(categories).index(self.known.get(name, background)) for name in classes])
        self.register_buffer("foreground", rows, persistent=False)
        sign = torch.tensor([1.0 if name in self.known else -1.0 for name in classes])
        self.register_buffer("sign", sign, persistent=False)
        self.train(model.training)  # a wrapper must not change the mode of the wrapped model

    @torch.no_grad()
    def prior(self, images: Tensor) -> SemanticPrior:
        """Return the feature before the last 1x1 convolution at stride 4 (bilinear) and that layer's rows of `classes`.

        `images` (b 3 h w) are normalized by the contract; runs without gradient and in eval mode.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"TorchvisionTeacher takes images of shape (b, 3, h, w): they are {tuple(images.shape)}.")
        *body, classifier = self.model.classifier  # type: ignore[misc]
        with evaluating(self):
            features = self.model.backbone(images)["out"]  # type: ignore[operator]
            for layer in body:
                features = layer(features)
        size = (-(-images.shape[-2] // 4), -(-images.shape[-1] // 4))
        features = F.interpolate(features.float(), size=size, mode="bilinear", align_corners=False)
        return SemanticPrior(features, self._rows(classifier.weight))

    def last_layer(self) -> Classifier:
        """Return the rows of the student's classes (K), background row, biases and all rows, without gradient."""
        layer: Any = self.model.classifier[-1]  # type: ignore[index]
        rows = layer.weight.detach().flatten(1)
        bias = rows.new_zeros(len(rows)) if layer.bias is None else layer.bias.detach()
        background = self.contract.background
        signed = bias[self.foreground] * self.sign
        vocabulary = Vocabulary(rows, bias, self.foreground, background)
        return Classifier(self._rows(layer.weight), rows[background], signed, bias[background], vocabulary)

    def _rows(self, weight: Tensor) -> Tensor:
        """K (c d), the signed rows of the student's classes."""
        return weight.detach().flatten(1).index_select(0, self.foreground) * self.sign[:, None]

    @property
    def matches(self) -> str:
        """Sentence for the log: which of the student's classes the network knows."""
        classes = self.contract.classes
        own = [name if name == self.known[name] else f"{name} ({self.known[name]})" for name in self.known]
        others = [name for name in classes if name not in self.known]
        text = (
            f"it knows {len(own)} of {counted(len(classes), 'class', 'classes')}{': ' if own else ''}{', '.join(own)}"
        )
        return f"{text}; by its background alone it sees {', '.join(others)}" if others else text


def named_teacher(
    name: str, *, weights: str | Path | None = "default", classes: Sequence[str] | None = None
) -> TorchvisionTeacher:
    """Build one of torchvision's FCN or DeepLabV3 networks as a frozen teacher, such as "deeplabv3_resnet50".

    name: torchvision's name; a suffix ":<file>" loads the weights of that file. weights: "default" for torchvision's,
    downloaded once; the path of a weights file; None for random weights, the same at each call. classes: the student's,
    matched to the network's by letters and digits, and COCO's names to VOC's; by default all of the network's.
    Raises UserError: unknown network, weights that cannot be downloaded or read, or none of the classes is known.
    """
    name, _, file = name.partition(":")
    published = _published(name)
    weights = file or weights
    background, *categories = published.meta["categories"]
    taught = tuple(categories if classes is None else classes)
    known = match_names(taught, categories)
    if not known and weights is not None:
        raise UserError(
            f"torchvision's {name} knows none of the classes {', '.join(taught)}; it knows {', '.join(categories)}. "
            "Name the classes so, or take a teacher that is trained on the data, such as teacher:demo."
        )
    with torch.random.fork_rng(devices=[]):  # leaves the training's random numbers unchanged
        torch.manual_seed(0)
        model = get_model(name, weights=None, weights_backbone=None, num_classes=1 + len(categories), aux_loss=True)
    if weights is not None:
        state = _downloaded(name, published) if weights == "default" else _stored(Path(weights).expanduser(), published)
        try:
            model.load_state_dict(state)
        except RuntimeError:  # a list of every tensor's name
            raise UserError(f"{weights} holds the weights of another network than {name}.") from None
    teacher = TorchvisionTeacher(model, [background, *categories], taught, known=known, background=background)
    return teacher.eval().requires_grad_(False)


def match_names(classes: Sequence[str], categories: Sequence[str]) -> dict[str, str]:
    """Map each class to the category of the same letters and digits, or by COCO's name to VOC's; others are omitted."""
    plain = {_letters(name): name for name in categories}
    found = {name: plain.get(_letters(name)) or plain.get(_COCO_WORDS.get(_letters(name), "")) for name in classes}
    return {name: category for name, category in found.items() if category is not None}


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


@cache
def feature_channels(name: str) -> int:
    """The channels of S of a torchvision network; UserError if it is unknown."""
    name = name.partition(":")[0]
    _published(name)
    with torch.device("meta"):
        model: Any = get_model(name, weights=None, weights_backbone=None)
    channels: int = model.classifier[-1].in_channels
    return channels


def network_names() -> list[str]:
    """torchvision's names of the networks that can be teachers, such as "deeplabv3_resnet50"."""
    return [one for one in list_models(module=segmentation) if not one.startswith("lraspp")]


def _published(name: str) -> Any:
    """torchvision's default weights of a network; UserError if it cannot be a teacher."""
    known = network_names()
    if name not in known:
        hint = did_you_mean(name, known) or f"; there are {', '.join(known)}."
        raise UserError(f"torchvision has no segmentation network {name!r} with a 1x1 classifier{hint}")
    return get_model_weights(name).DEFAULT


def _downloaded(name: str, published: Any) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = published.get_state_dict(progress=False, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"the weights of {name} cannot be downloaded ({getattr(error, 'reason', None) or error}); where there is "
            f"internet fetch {published.url} into {folder}, or name a file with the weights: torchvision:{name}:<file>."
        ) from None  # the reason is in the sentence
    return state


def _stored(path: Path, published: Any) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"there is no file of weights {path}; fetch {published.url}.")
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a truncated or foreign file
        raise UserError(f"{path} cannot be read as weights; fetch {published.url}.") from error
    return state
