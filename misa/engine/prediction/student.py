"""A trained student as a function of images: loading it, and what it finds in one or several images."""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from numpy.typing import NDArray
from torch import Tensor, nn

from misa.data.rle import Runs, encode_part
from misa.data.rle import decode as decode_runs
from misa.engine.runs.checkpoints import fill, last_checkpoint, read_checkpoint, require_fit
from misa.engine.runs.record import read_params
from misa.engine.runs.state import warn
from misa.errors import UserError
from misa.experiment import Experiment, require_types
from misa.models.students.base import TRAINING_ONLY
from misa.models.students.solov2_decode import (
    Dense,
    Found,
    Part,
    decode,
    dense_outputs,
    each_image,
    enlarge,
    enlargement,
    whole_part,
)
from misa.models.students.table import model_config

CARD = "student"
"""The key of an exported checkpoint under which its row and classes are."""

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Instances:
    """What was found in an image of `size` (h, w), best score first.

    scores (n), labels (n names), boxes (n 4: x1 y1 x2 y2 of the mask's extent in pixels), runs (n masks as COCO run
    lengths). prompts (n): for given boxes, which of them an instance answers; else None.
    """

    size: tuple[int, int]
    scores: NDArray[np.float64]
    labels: tuple[str, ...]
    boxes: NDArray[np.float64]
    runs: tuple[Runs, ...]
    prompts: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def masks(self) -> NDArray[np.bool_]:
        """All masks (n h w)."""
        return np.stack([decode_runs(r) for r in self.runs]) if self.runs else np.zeros((0, *self.size), bool)


@dataclass(frozen=True)
class Student:
    """A trained student, ready to predict: see `load_student`. `digest` names its weights."""

    model: nn.Module = field(repr=False)
    experiment: Experiment
    classes: tuple[str, ...]
    path: Path
    digest: str

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.model.parameters()).device

    @property
    def mask_stride(self) -> int:
        """Pixels of the padded input per pixel of the masks."""
        return int(self.model.mask_head.mask_stride)  # type: ignore[union-attr, arg-type]


def load_student(path: str | Path, *, device: str = "auto") -> Student:
    """The student of a run folder, of one of its checkpoints, or of a file made by `misa export`.

    Weights only are loaded: nothing in the file is executed, no teacher is needed. device: "cpu", "cuda", "cuda:1",
    or "auto" for a GPU if there is one.

    Raises:
        UserError: no student there, or no such device.
    """
    place = choose_device(device)
    warnings.filterwarnings("ignore", message=".*torch.meshgrid.*")
    path = Path(path).expanduser()
    folder = path.resolve() if _is_run(path) else None
    path = (path if folder is None else last_checkpoint(path)).resolve()
    checkpoint = read_checkpoint(path)
    experiment, classes = _card(path, checkpoint)
    if experiment.semantic is not None:
        raise UserError(f"{path} is a semantic teacher; predictions are a student's, of a row such as demo:box.")
    model = build_student(experiment, classes, path=path, weights=checkpoint["state_dict"])
    if folder is not None:  # whoever names a checkpoint knows which state it is of
        warn(folder, experiment, checkpoint=path)
    return Student(model.to(place), experiment, classes, path, _digest(checkpoint["state_dict"]))


def choose_device(name: str) -> torch.device:
    """The torch device of that name; UserError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is none; give cpu, cuda, cuda:1, or auto.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported; give cpu, cuda, cuda:1, or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not there: torch finds {torch.cuda.device_count()} CUDA devices; use cpu.")
    return device


def for_inference(experiment: Experiment) -> Experiment:
    """The row without what only a training needs: its terms, its teacher, the weights it started from."""
    network = {"pretrained": False, "frozen_stages": -1}
    terms: dict[str, Any] = {"affinity": None, "distillation": None, "objective": None, "teacher": ""}
    return experiment.but(**terms, expected=None, network=network)


def build_student(
    experiment: Experiment, classes: tuple[str, ...], *, path: Path, weights: dict[str, Tensor]
) -> nn.Module:
    """The student's network with these weights, in evaluation mode; UserError where they are of another network."""
    try:
        config = ConfigDict(model_config(for_inference(experiment), classes))
        with torch.device("meta"):  # a stranger's card may ask for any size: nothing is allocated before it fits
            skeleton = MODELS.build(config)
    except Exception as error:  # mmdet and torch raise what they like for values that make no network
        raise UserError(f"{path} names no network that can be built ({error!r}); export it again.") from error
    require_fit(skeleton, weights, path)
    model: nn.Module = MODELS.build(config)
    fill(model, weights, path)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def find(
    student: Student,
    images: Sequence[Image],
    *,
    score: float = 0.3,
    mask: float | None = None,
    per_image: int | None = None,
) -> list[Instances]:
    """The instances of RGB images (h w 3, 0..255).

    score: least score of an instance; mask: least probability of a mask's pixel, of SOLOv2 only (default: the row's);
    per_image: most instances of an image (default: the row's). Images that have one size as the network sees them run
    together; others would be padded, which moves the network's grid.
    """
    if student.experiment.student != "solov2":
        if mask is not None:
            raise UserError(
                f"mask is a threshold of solov2 students; {student.path} is a {student.experiment.student}."
            )
        return _find_by_mmdet(student, images, score, per_image)
    inference = student.experiment.inference
    threshold = inference.mask if mask is None else mask
    grids, strides = student.experiment.network.grids, student.experiment.network.strides
    results = []
    for image, view in zip(images, views(student, images), strict=True):
        found = decode(
            view.dense,
            grids=grids,
            strides=strides,
            score=min(inference.score, score),
            keep=score,
            mask=threshold,
            candidates=inference.candidates,
            per_image=per_image or inference.per_image,
        )
        results.append(as_instances(student, found, view, (image.shape[0], image.shape[1]), threshold))
    return results


def _find_by_mmdet(student: Student, images: Sequence[Image], score: float, per_image: int | None) -> list[Instances]:
    """What the other students' own heads find; masks of the whole image are in memory for one image at a time."""
    results = []
    for image in images:
        resized = resize(image, student.experiment)
        h, w = resized.shape[:2]
        meta = {
            "img_shape": (h, w),
            "ori_shape": image.shape[:2],
            "scale_factor": (w / image.shape[1], h / image.shape[0]),
        }
        sample = DetDataSample(metainfo=meta)
        data = student.model.data_preprocessor(  # type: ignore[operator]
            {"inputs": [_tensor(resized)], "data_samples": [sample]}, False
        )
        (answer,) = student.model.predict(data["inputs"], data["data_samples"], rescale=True)  # type: ignore[operator]
        found = answer.pred_instances
        order = found.scores.argsort(descending=True)[:per_image]
        chosen = [i for i in order.tolist() if found.scores[i] >= score and found.masks[i].any()]
        parts = [whole_part(found.masks[i].cpu().numpy()) for i in chosen]
        size = (image.shape[0], image.shape[1])
        results.append(
            Instances(
                size,
                found.scores.double().cpu().numpy()[chosen],
                tuple(student.classes[int(found.labels[i])] for i in chosen),
                np.array([extent(part) for part in parts], dtype=float).reshape(-1, 4),
                tuple(encode_part(part.pixels, part.top, part.left, size) for part in parts),
            )
        )
    return results


@dataclass(frozen=True)
class View:
    """The network's outputs of an image, the size it was resized to and that of the padded input, each (h, w)."""

    dense: Dense
    resized: tuple[int, int]
    padded: tuple[int, int]


def views(student: Student, images: Sequence[Image]) -> list[View]:
    """The network's outputs of RGB images (h w 3)."""
    resized = [resize(image, student.experiment) for image in images]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(resized):
        groups.setdefault(image.shape, []).append(i)
    found: dict[int, View] = {}
    for members in groups.values():
        inputs = student.model.data_preprocessor(  # type: ignore[operator]
            {"inputs": [_tensor(resized[i]) for i in members], "data_samples": None}, False
        )["inputs"]
        outputs = each_image(
            dense_outputs(student.model.mask_head(student.model.extract_feat(inputs)))  # type: ignore[operator]
        )
        padded = (inputs.shape[-2], inputs.shape[-1])
        for i, dense in zip(members, outputs, strict=True):
            found[i] = View(dense, (resized[i].shape[0], resized[i].shape[1]), padded)
    return [found[i] for i in range(len(images))]


def as_instances(student: Student, found: Found, view: View, size: tuple[int, int], threshold: float) -> Instances:
    """Instances of an image of `size` (h, w); those whose mask vanishes at that size are left out."""
    by = enlargement(
        (view.dense.features.shape[-2], view.dense.features.shape[-1]),
        stride=student.mask_stride,
        resized=view.resized,
        original=size,
        like=view.dense.features,
    )
    parts = list(enlarge(found.masks, by, threshold))
    kept = [i for i, part in enumerate(parts) if part.pixels.size]
    return Instances(
        size,
        found.scores.double().cpu().numpy()[kept],
        tuple(student.classes[int(found.labels[i])] for i in kept),
        np.array([extent(parts[i]) for i in kept], dtype=float).reshape(-1, 4),
        tuple(encode_part(parts[i].pixels, parts[i].top, parts[i].left, size) for i in kept),
    )


def extent(part: Part) -> tuple[int, int, int, int]:
    """The box x1 y1 x2 y2 of a part of an image."""
    return part.left, part.top, part.left + part.pixels.shape[1], part.top + part.pixels.shape[0]


def resize(image: Image, experiment: Experiment) -> Image:
    """An image as the network sees it, like mmdet's Resize; at least one pixel wide."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise UserError(f"an image must be RGB (h w 3) of 8 bits, not {image.shape} of {image.dtype}.")
    sizes = experiment.augmentation
    scale = (sizes.long_side, sizes.test_short_side)
    width, height = mmcv.rescale_size((image.shape[1], image.shape[0]), scale)
    if (height, width) == image.shape[:2]:
        return image
    resized: Image = mmcv.imresize(image, (max(width, 1), max(height, 1)))
    return resized


def _tensor(image: Image) -> Tensor:
    # BGR, as the pipeline hands images over; a copy, since torch takes no negative strides.
    return torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)))


def _is_run(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.is_dir()
    return False


def _card(path: Path, checkpoint: dict[str, Any]) -> tuple[Experiment, tuple[str, ...]]:
    """The row and classes of a checkpoint: its own card, or those of the run folder that it lies in."""
    card = checkpoint.get(CARD)
    try:
        if card is not None:
            values = json.loads(card)
            classes, experiment = values["classes"], Experiment.from_values(values["experiment"])
        elif (path.parent.parent / "params.json").is_file():
            params = read_params(path.parent.parent)
            classes, experiment = params["classes"], Experiment.from_values(params["experiment"])
        elif "experiment" in checkpoint:  # a teacher's
            raise UserError(f"{path} is a semantic teacher; predictions are a student's, of a row such as demo:box.")
        else:
            raise UserError(
                f"{path} does not say what network it is of, and no run folder is around it; give the run folder, or "
                "a file made by misa export."
            )
        require_types(experiment, "experiment")
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} was made by another version of misa ({error}); export it again.") from error
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) and name for name in classes):
        raise UserError(f"{path} names no classes; export it again.")
    return experiment, tuple(classes)


def _digest(weights: dict[str, Tensor]) -> str:
    """A short hash of the weights; a file that was copied or exported keeps it."""
    total = hashlib.sha256()
    for name in sorted(weights):
        if not name.startswith(TRAINING_ONLY):
            total.update(name.encode() + weights[name].detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:12]
