"""Estimate step time, memory and training time of a row on other GPUs from two small steps measured here.

    step   = accumulate · images · F / (peak · u)          seconds on N GPUs, batch = N · images · accumulate
    memory = P · (4 + 4 + state) + T + images · A          bytes on each of them
    days   = epochs · ⌊training images / batch⌋ · step / 86,400

F is the number of FLOPs of an image's forward and backward pass in matrix products and convolutions, A the bytes of its
activations saved for the backward pass. Both are counted in real steps of the row on two smaller images and
extrapolated linearly in the number of pixels: grids and queries have a constant cost, maps grow. P is the number of
parameters (weight, gradient and the optimizer's state, 8 bytes for AdamW, 4 for SGD), T the size of the teacher's
weights. `peak` is the vendor's figure for dense products in the row's precision, u the utilization of it: measured as
F / (seconds · peak) on a known GPU, otherwise assumed, which the report says. Not included: image loading (use enough
workers), gradient all-reduce (overlaps with the backward pass), propagation and matching, temporary buffers of single
operations, evaluation.
"""

import itertools
import json
import math
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from misa.errors import UserError, counted, did_you_mean, option_name
from misa.experiment import Experiment
from misa.machine import BatchSplit, split_batch
from misa.models.students.table import model_config
from misa.models.teacher.table import untrained_teacher

OBJECTS = 7  # per image: COCO has 7.3
ASSUMED = 0.3  # u if it cannot be measured
CLASSES = {"coco": 80, "voc": 20, "demo": 8}
IMAGES = {"coco": 118_287, "voc": 10_582}


class Gpu(NamedTuple):
    """The vendor's data sheet: dense TFLOP/s in float32 and, with tensor cores, in half precision; memory in GB."""

    float32: float
    half: float
    memory: float


GPUS: Mapping[str, Gpu] = {
    "T4": Gpu(8.1, 65, 16),
    "V100": Gpu(15.7, 125, 32),
    "RTX3090": Gpu(35.6, 71, 24),
    "RTX4090": Gpu(82.6, 165, 24),
    "L40S": Gpu(91.6, 362, 48),
    "A100": Gpu(19.5, 312, 80),
    "H100": Gpu(67, 989, 80),
    "H200": Gpu(67, 989, 141),
}


@dataclass(frozen=True)
class Step:
    """A measured training step of one image of `pixels` padded pixels."""

    flops: float
    kept: float  # bytes saved for the backward pass
    parameters: int
    frozen: int  # the teacher's
    pixels: int
    seconds: float
    device: str


@dataclass(frozen=True)
class Work:
    """Two measured steps, the smaller image first, and their linear extrapolation to other sizes."""

    small: Step
    large: Step

    def flops(self, pixels: float) -> float:
        """F of an image of so many pixels."""
        return self._extrapolated("flops", pixels)

    def kept(self, pixels: float) -> float:
        """A of an image of so many pixels, in bytes."""
        return self._extrapolated("kept", pixels)

    def seconds(self, pixels: float) -> float:
        """Step time of an image of so many pixels, on the measuring machine."""
        return self._extrapolated("seconds", pixels)

    def _extrapolated(self, name: str, pixels: float) -> float:
        low, high = getattr(self.small, name), getattr(self.large, name)
        share = (pixels - self.small.pixels) / (self.large.pixels - self.small.pixels)
        value: float = low + share * (high - low)
        return value


@dataclass(frozen=True)
class Estimate:
    """The estimate for a row on a number of GPUs of one model; memory in GB."""

    split: BatchSplit
    step_seconds: float
    memory: float
    days: float
    utilization: float
    measured: bool  # whether the utilization is measured
    gpu: str
    images: int  # of the training split
    source: str = "measured here"  # origin of a measured utilization

    def __str__(self) -> str:
        u = f"u = {self.utilization:.2f}, {self.source if self.measured else 'assumed'}"
        fits = (
            ""
            if self.memory <= 0.92 * GPUS[self.gpu].memory
            else f", more than a {self.gpu} has: lower {option_name('per_gpu')}"
        )
        return (
            f"{self.split} on {self.split.processes} x {self.gpu} ({u})\n"
            f"step {self.step_seconds:.2f} s, memory {self.memory:.1f} GB on each{fits}, {self.days:.2f} days with "
            f"{counted(self.images, 'training image')}"
        )


def measure(experiment: Experiment, *, sides: tuple[int, int] = (192, 320), device: str = "cpu") -> Work:
    """Measure training steps of the row's full-size network on square images of these two sides in pixels.

    Raises UserError: a semantic teacher's row, or sides that are no two multiples of 32.
    """
    _require_student(experiment)
    if not 64 <= sides[0] < sides[1] or any(side % 32 for side in sides):
        raise UserError(f"sides are {sides}; give two multiples of 32 from 64, the smaller first.")
    logger = MMLogger.get_current_instance()
    logger.setLevel("ERROR")  # otherwise it logs every initialized parameter
    classes = tuple(f"class {i}" for i in range(CLASSES[experiment.data]))
    warnings.filterwarnings("ignore", message=".*torch.meshgrid.*")  # from mmdet's heads at their first call
    scratch = experiment.but(network={"pretrained": False}, augmentation={"jitter": None})
    model: nn.Module = MODELS.build(model_config(scratch, classes))
    # mmengine would also write them to the log file of an earlier run of this process, which may be closed.
    with patch.object(logger, "handlers", []):
        model.init_weights()  # type: ignore[operator]
    model.to(device).train()
    frozen = 0
    if experiment.teacher:
        teacher = untrained_teacher(experiment, classes)
        model.attach(teacher)  # type: ignore[operator]
        frozen = sum(value.numel() for value in teacher.parameters())
    parameters = sum(value.numel() for value in model.parameters())
    small, large = (_measured(model, experiment, side, device, parameters, frozen) for side in sides)
    return Work(small, large)


def _measured(model: nn.Module, experiment: Experiment, side: int, device: str, parameters: int, frozen: int) -> Step:
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(experiment.schedule.precision)
    kept = _Kept({value.untyped_storage().data_ptr() for value in model.parameters()})
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        # The first step, which compiles and tunes kernels, is not timed: FLOPs are counted in it.
        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda x: x),
        ):
            _step(model, experiment, side)
        _wait(device)
        started = time.perf_counter()
        _step(model, experiment, side)
        _wait(device)
    seconds = time.perf_counter() - started
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return Step(counter.get_total_flops(), kept.total, parameters, frozen, side * side, seconds, name)


def require_known(gpu: str) -> None:
    """Raise UserError if there is no data sheet for the GPU."""
    if gpu not in GPUS:
        hint = did_you_mean(gpu, GPUS) or f"; known are {', '.join(GPUS)}."
        raise UserError(f"there is no data sheet for the GPU {gpu!r}{hint}")


def require_estimable(
    experiment: Experiment, *, gpus: int, per_gpu: int | None = None, images: int | None = None
) -> tuple[int, BatchSplit]:
    """Return the number of training images and the split of a batch, known before any step is measured.

    Raises UserError: a semantic teacher's row, data of unknown size or of less than a batch, a batch that cannot be
    split.
    """
    _require_student(experiment)
    images = images or IMAGES.get(experiment.data)
    if images is None:
        raise UserError(f"how many training images {experiment.data} has is not known; give {option_name('images')}.")
    batch = experiment.schedule.batch
    if images < batch:
        raise UserError(
            f"{counted(images, 'training image')} cannot fill a batch of {batch}; give more images, or a row with a "
            "smaller batch."
        )
    return images, split_batch(batch, gpus, per_gpu)


def _require_student(experiment: Experiment) -> None:
    if experiment.semantic is not None:
        raise UserError("the formula is for students; of a semantic teacher, misa profile measures a step.")


def estimate(
    experiment: Experiment,
    work: Work,
    *,
    gpus: int,
    gpu: str,
    per_gpu: int | None = None,
    images: int | None = None,
    utilization: float | None = None,
) -> Estimate:
    """Apply the formula of this file. images: size of the training split, by default the published one.

    Raises UserError: an unknown GPU, and as `require_estimable`.
    """
    require_known(gpu)
    images, split = require_estimable(experiment, gpus=gpus, per_gpu=per_gpu, images=images)
    half = experiment.schedule.precision != "float32"
    measured = _utilization(work.large, half=half)
    u = utilization or measured or ASSUMED
    pixels = input_pixels(experiment)
    peak = 1e12 * (GPUS[gpu].half if half else GPUS[gpu].float32)
    seconds = split.accumulate * split.images * work.flops(pixels) / (peak * u)
    state = 8 if experiment.schedule.optimizer == "adamw" else 4
    weights = work.large.parameters * (8 + state) + work.large.frozen * 4
    memory = weights + split.images * work.kept(pixels)
    steps = experiment.schedule.epochs * (images // experiment.schedule.batch)
    return Estimate(
        split=split,
        step_seconds=seconds,
        memory=memory / 1e9,
        days=steps * seconds / 86400,
        utilization=u,
        measured=measured is not None and utilization is None,
        gpu=gpu,
        images=images,
    )


def reported(path: str | Path, gpu: str, precision: str) -> float:
    """Read the u of a GPU and precision from a report of `make gpu`.

    Raises UserError: the file is not such a report, is of another GPU, or has no figure for the precision.
    """
    try:
        report = json.loads(Path(path).read_text())
        reason = dict(report.get("failed", {})).get("utilization")
        card, figures = str(report["card"]), {} if reason else dict(report["utilization"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a report of `make gpu` ({error}); give the gpu.json that it wrote.") from error
    if reason:
        raise UserError(f"{path} has no utilization, that part of `make gpu` failed ({reason}); run it again.")
    if not _is_card(gpu, card):
        raise UserError(
            f"{path} was measured on {card!r}, not on a {gpu}; give {option_name('gpu')} as the report has it."
        )
    u = figures.get(precision)
    if not isinstance(u, int | float) or not 0 < u <= 1:
        raise UserError(f"{path} has no utilization between 0 and 1 for {precision}; run `make gpu` again.")
    return float(u)


def input_pixels(experiment: Experiment) -> float:
    """Pixels of a padded training image: the crop's, or a 4:3 image with the mean short side, capped, padded to 32."""
    sizes = experiment.augmentation
    if sizes.jitter:
        return float((math.ceil(sizes.crop / 32) * 32) ** 2)
    short = float(np.mean(sizes.short_sides))
    long = min(short * 4 / 3, sizes.long_side)
    return math.ceil(short / 32) * 32 * math.ceil(long / 32) * 32


_OTHERS = {"LAPTOP", "MAX", "TI", "SUPER", "D", "MIG"}  # words of other models; the last of a share of a GPU


def _is_card(name: str, device: str) -> bool:
    """Whether torch's name of a device is that of a whole GPU of the table, not of another model of a similar name.

    >>> _is_card("RTX4090", "NVIDIA GeForce RTX 4090"), _is_card("A100", "NVIDIA A100-SXM4-40GB")
    (True, True)
    >>> _is_card("A100", "NVIDIA RTX A1000"), _is_card("RTX4090", "NVIDIA GeForce RTX 4090 Laptop GPU")
    (False, False)
    """
    words = re.split(r"[\s-]+", device.upper())
    return _OTHERS.isdisjoint(words) and name in {*words, *map("".join, itertools.pairwise(words))}


def _utilization(step: Step, *, half: bool) -> float | None:
    """u on the measuring machine, None if it has no data sheet."""
    known = [sheet for name, sheet in GPUS.items() if _is_card(name, step.device)]
    if not known:
        return None
    return step.flops / (step.seconds * 1e12 * (known[0].half if half else known[0].float32))


class _Kept:
    """Counts the bytes that autograd saves for the backward pass, each storage once, without the weights."""

    def __init__(self, weights: set[int]) -> None:
        self.seen = weights
        self.held: list[Tensor] = []  # keeps the storages alive, so that no address is reused
        self.total = 0

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.held.append(tensor)
            self.total += storage.nbytes()
        return tensor


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _step(model: nn.Module, experiment: Experiment, side: int) -> None:
    """Run a forward and backward pass on a random image with boxes of all sizes."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.6 * side, (OBJECTS, 2))
    boxes = np.concatenate([low, low + np.geomspace(0.08, 0.4, OBJECTS)[:, None] * side], axis=1)
    shape = (side, side)
    sample: Any = DetDataSample(metainfo={"img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)})
    truth = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32), labels=torch.arange(OBJECTS) % CLASSES[experiment.data]
    )
    if experiment.supervision == "mask":
        masks = np.zeros((OBJECTS, *shape), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
            mask[y1:y2, x1:x2] = 1
        truth.masks = BitmapMasks(masks, *shape)
    sample.gt_instances = truth
    image = torch.from_numpy(rng.integers(0, 256, (3, *shape), dtype=np.uint8))
    data: Any = model.data_preprocessor({"inputs": [image], "data_samples": [sample]}, True)  # type: ignore[operator]
    losses = model.loss(data["inputs"], data["data_samples"])  # type: ignore[operator]
    total = sum(
        part
        for name, value in losses.items()
        if "loss" in name
        for part in (value if isinstance(value, list) else [value])
    )
    model.zero_grad()
    total.backward()
