"""A torchvision segmentation network as the teacher: any network with a dense feature and a classifier can be one.

Axes: b image · d channel · c category · h row · w column.
"""

import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models, segmentation

from misa.data.pipeline import MEAN, STD
from misa.errors import UserError, did_you_mean
from misa.losses.inputs import SemanticPrior
from misa.models.teacher.contract import TeacherContract, evaluating
from misa.ops.readings import Classifier


class TorchvisionTeacher(nn.Module):
    """FCN or DeepLabV3 of torchvision behind the teacher's two doors, `contract` and `prior`.

    model: for example `torchvision.models.segmentation.fcn_resnet50(weights=...)`.
    categories: the name of every row of its last 1x1 convolution, such as `weights.meta["categories"]`.
    classes: the student's categories, which must be among them; the rows come in this order.
    background: name of the background's row.

    torchvision's ImageNet mean and std are those of `misa.data.pipeline`, so the student's images serve as they are.
    """

    foreground: Tensor

    def __init__(
        self,
        model: nn.Module,
        categories: Sequence[str],
        classes: Sequence[str],
        *,
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
        missing = [name for name in [background, *classes] if name not in categories]
        if missing:
            raise ValueError(
                f"TorchvisionTeacher cannot teach {', '.join(missing)}: the network knows {', '.join(categories)}."
            )
        self.model = model
        self.contract = TeacherContract(tuple(classes), list(categories).index(background), MEAN, STD)
        rows = torch.tensor([list(categories).index(name) for name in classes])
        self.register_buffer("foreground", rows, persistent=False)
        self.train(model.training)  # a wrapper changes nothing about what it wraps

    @torch.no_grad()
    def prior(self, images: Tensor) -> SemanticPrior:
        """The feature before the last 1x1 convolution at stride 4 (bilinear) and that layer's rows for `classes`.

        `images` (b 3 h w) are normalised by the contract; runs without gradient and as in evaluation.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"TorchvisionTeacher takes images of shape (b, 3, h, w): they are {tuple(images.shape)}.")
        *body, classifier = self.model.classifier  # type: ignore[misc]
        with evaluating(self):
            features = self.model.backbone(images)["out"]  # type: ignore[operator]
            for layer in body:
                features = layer(features)
        size = (-(-images.shape[-2] // 4), -(-images.shape[-1] // 4))
        features = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
        return SemanticPrior(features, classifier.weight.detach().flatten(1).index_select(0, self.foreground))

    def last_layer(self) -> Classifier:
        """K and its bias, without gradient; the background's row apart. Rows of other categories are left out."""
        layer: Any = self.model.classifier[-1]  # type: ignore[index]
        rows = layer.weight.detach().flatten(1)
        bias = rows.new_zeros(len(rows)) if layer.bias is None else layer.bias.detach()
        background = self.contract.background
        return Classifier(rows[self.foreground], rows[background], bias[self.foreground], bias[background])


def named_teacher(
    name: str, *, weights: str | Path | None = "default", classes: Sequence[str] | None = None
) -> TorchvisionTeacher:
    """One of torchvision's FCN or DeepLabV3 networks as a frozen teacher, such as "deeplabv3_resnet50".

    Args:
        name: as torchvision calls it.
        weights: "default" takes torchvision's own, downloaded once; a path, a file of these; None, none at all.
        classes: those that it is to teach, all of its own by default.

    Raises:
        UserError: no such network, weights that cannot be downloaded or read, or classes that it does not know.
    """
    known = [one for one in list_models(module=segmentation) if not one.startswith("lraspp")]
    if name not in known:
        hint = did_you_mean(name, known) or f"; there are {', '.join(known)}."
        raise UserError(f"torchvision has no segmentation network {name!r} with a 1x1 classifier{hint}")
    published: Any = get_model_weights(name).DEFAULT
    categories = list(published.meta["categories"])
    model = get_model(name, weights=None, weights_backbone=None, num_classes=len(categories), aux_loss=True)
    if weights is not None:
        state = _downloaded(name, published) if weights == "default" else _stored(Path(weights).expanduser(), published)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"{weights} holds the weights of another network than {name}.") from error
    background = categories[0]
    unknown = [one for one in classes or () if one not in categories[1:]]
    if unknown:
        raise UserError(f"{name} does not know the class {unknown[0]!r}; it knows {', '.join(categories[1:])}.")
    taught = categories[1:] if classes is None else list(classes)
    teacher = TorchvisionTeacher(model, categories, taught, background=background)
    return teacher.eval().requires_grad_(False)


def _downloaded(name: str, published: Any) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = published.get_state_dict(progress=False, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"the weights of {name} cannot be downloaded ({getattr(error, 'reason', None) or error}); where there is "
            f"internet fetch {published.url} into {folder}, or give the file with weights=."
        ) from error
    return state


def _stored(path: Path, published: Any) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"there is no file of weights {path}; fetch {published.url}.")
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut or not its own
        raise UserError(f"{path} cannot be read as weights; fetch {published.url}.") from error
    return state
