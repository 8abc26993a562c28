"""Separation of objects by a trained teacher's S compared with color, on held-out images (Figure 4 as numbers)."""

from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from misa.data.dataset import OrderedCOCO
from misa.data.pipeline import network_input
from misa.data.source import Source
from misa.engine.runs.checkpoints import last_checkpoint
from misa.engine.runs.folder import Run, opened
from misa.engine.runs.teacher import load_teacher
from misa.errors import UserError
from misa.evaluation.separation import separation
from misa.experiment import Augmentation
from misa.models.teacher.contract import TeacherNetwork
from misa.ops.resize import coarse_masks

MAPS = ("color", "S", "S x K")
_UNKNOWN = "unknown"  # failure mode of an object without one


def teacher_separation(
    run_folder: str | Path,
    *,
    checkpoint: str | Path | None = None,
    data_root: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Run:
    """Mean AUC in percent over the validation objects, for color, S and S reweighted by K, by failure mode.

    The result's metrics are these means. checkpoint: the teacher's; the last one of the run by default.
    All maps are at stride 4, as in the losses: color is the network's input resized as for the pairwise loss. A cell
    belongs to an object that covers at least half of it. The last entry of each map is over all objects.
    """
    experiment, source, folder, _ = opened(run_folder, data_root=data_root)
    if checkpoint == "none":
        raise UserError("separation measures a trained teacher; give a checkpoint, or leave checkpoint out.")
    if not source.masks:
        raise UserError(f"separation compares with true masks, and the val split of {source.root} has none.")
    weights = Path(checkpoint) if checkpoint else last_checkpoint(folder)
    teacher = load_teacher(weights, classes=source.classes)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in MAPS}
    truth, label = _truth(source)
    records = truth.loadImgs(truth.getImgIds()[: experiment.limit if limit is None else limit])
    for record in tqdm(records, desc="separation", unit="image", leave=False, delay=2, disable=None):
        objects = truth.loadAnns(truth.getAnnIds(imgIds=[record["id"]], catIds=list(label), iscrowd=False))
        if not objects:
            continue
        pixels = mmcv.imread(source.val.images / record["file_name"], channel_order="rgb")
        maps, factors, size, stride = teacher_maps(teacher, pixels, experiment.augmentation)
        h, w = (side // stride for side in size)  # whole cells of the image, without padding
        color, semantic = (values[:, :h, :w].numpy() for values in maps)
        whole = (torch.from_numpy(truth.annToMask(a).astype(bool))[None] for a in objects)
        masks = np.concatenate([coarse_masks(mask, size, (h, w), stride=stride).numpy() for mask in whole])
        rows = factors.numpy()[[label[a["category_id"]] for a in objects]]
        scores = (
            separation(color, masks, seed=seed),
            separation(semantic, masks, seed=seed),
            separation(semantic, masks, factors=rows, seed=seed),
        )
        for name, values in zip(MAPS, scores, strict=True):
            for a, value in zip(objects, values, strict=True):
                mode = a.get("mode")
                found[name].setdefault(mode if isinstance(mode, str) else _UNKNOWN, []).append(100 * float(value))
    return Run(experiment, folder, source, {name: _means(modes) for name, modes in found.items()}, weights)


def teacher_maps(
    teacher: TeacherNetwork, pixels: NDArray[np.uint8], sizes: Augmentation
) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[int, int], int]:
    """Colors and S (channels h w) of a padded image, the factors of its classes, its size without, and their stride.

    Without the padding of training the stages' sizes would be rounded up, and their maps stretched against the image.
    """
    height, width = network_input(pixels, sizes).shape[-2:]
    images = network_input(pixels, sizes, divisor=32)
    features, factors = teacher.prior(images)
    color = F.interpolate(images, size=features.shape[-2:], mode="bilinear", align_corners=False)
    return (color[0], features[0]), factors, (height, width), images.shape[-2] // features.shape[-2]


def _means(modes: dict[str, list[float]]) -> dict[str, float | None]:
    """By failure mode, if there are any, and of all objects."""
    named = sorted(mode for mode in modes if len(modes) > 1 or mode != _UNKNOWN)
    everything = [value for values in modes.values() for value in values]
    return {mode: _mean(modes[mode]) for mode in named} | {"all": _mean(everything)}


def _mean(values: list[float]) -> float | None:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None


def _truth(source: Source) -> tuple[Any, dict[int, int]]:
    truth = OrderedCOCO(str(source.val.annotations))
    names = {c["id"]: c["name"] for c in truth.dataset["categories"]}
    return truth, {i: source.classes.index(name) for i, name in names.items() if name in source.classes}
