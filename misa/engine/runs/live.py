"""Live display of a training in a notebook: loss curves and a strip of predicted masks, updated in place.

One display is updated by its id. Output widgets are avoided: executing a notebook with one but without a browser can
hang for ever.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import mmcv
import numpy as np
import torch
from matplotlib.patches import Patch
from mmengine.model import is_model_wrapper
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from numpy.typing import NDArray

from misa.figures.plots import draw_objects
from misa.figures.style import CLASS_COLORS, COLORS, Picture

IMAGES = 6
SCORE = 0.3  # score threshold of drawn masks
_SAME = 0.5  # minimum IoU of two masks of the same object, which is drawn once


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this, so that displays are visible."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")


class Live:
    """The display of one training: losses so far, and predictions in the first validation images.

    It does not affect the training: neither random numbers nor weights or statistics change.
    """

    def __init__(self, runner: Runner) -> None:
        data = dict(runner.cfg.test_dataloader.dataset)
        data["indices"] = min(IMAGES, data["indices"] or IMAGES)
        with torch.random.fork_rng():
            dataset = DATASETS.build(data)
            samples = [dataset[i] for i in range(len(dataset))]
        self.classes = list(dataset.metainfo["classes"])
        self.batch = {key: [sample[key] for sample in samples] for key in ("inputs", "data_samples")}
        self.images = [mmcv.imread(sample.img_path, channel_order="rgb") for sample in self.batch["data_samples"]]
        self.seen: dict[str, list[float]] = {}
        self.handle: Any = None

    def show(self, runner: Runner, values: Mapping[str, float], words: str, step: int) -> None:
        """Update the display: curves of `values` by name so far, current masks, and the text `words` below."""
        from IPython.display import HTML, display

        for name, value in {"step": float(step), **values}.items():
            self.seen.setdefault(name, []).append(value)
        found = [_objects(sample) for sample in predicted(runner.model, self.batch)]
        picture = base64.b64encode(_png(drawn(self.seen, self.images, found, self.classes))).decode()
        alt = "losses over the steps, and masks in validation images"
        shown = HTML(f"<img alt='{alt}' src='data:image/png;base64,{picture}'><pre>{words}</pre>")
        if self.handle is None:
            self.handle = display(shown, display_id=True)
        else:
            self.handle.update(shown)


def predicted(model: Any, batch: Mapping[str, Any]) -> list[Any]:
    """Predict for a batch of test images; the model's mode and the random state are restored."""
    network = model.module if is_model_wrapper(model) else model
    training = network.training
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            found: list[Any] = network.test_step({key: list(values) for key, values in batch.items()})
    finally:
        network.train(training)
    return found


def _objects(sample: Any) -> tuple[NDArray[np.bool_], list[int]]:
    """Masks (n h w) with their classes: a student's above `SCORE`, one per object, or a teacher's classes."""
    if "pred_sem_seg" in sample:
        labels = sample.pred_sem_seg.sem_seg[0].cpu().numpy()
        present = [int(i) for i in np.unique(labels) if i < 255]
        return np.stack([labels == i for i in present]) if present else np.zeros((0, *labels.shape), bool), present
    found = sample.pred_instances
    order = [int(i) for i in found.scores.argsort(descending=True) if found.scores[i] >= SCORE]
    masks = found.masks[order].cpu().numpy().astype(bool) if order else np.zeros((0, *sample.ori_shape), bool)
    kept: list[int] = []
    for i in range(len(order)):
        if all((masks[i] & masks[k]).sum() < _SAME * (masks[i] | masks[k]).sum() for k in kept):
            kept.append(i)
    return masks[kept], [int(found.labels[order[i]]) for i in kept]


def drawn(
    seen: Mapping[str, list[float]],
    images: list[NDArray[np.uint8]],
    found: list[tuple[NDArray[np.bool_], list[int]]],
    classes: Sequence[str],
) -> Picture:
    """The losses `seen` by name over their "step", and below them images (h w 3) with masks (n h w) and their classes.

    classes: names of the classes, for a legend where each has a color of its own.
    """
    figure = Picture(figsize=(9, 4), layout="constrained")
    grid = figure.add_gridspec(2, max(len(images), 1), height_ratios=(1.4, 1))
    axes = figure.add_subplot(grid[0, :])
    for i, name in enumerate(name for name in seen if name != "step"):
        axes.plot(seen["step"], seen[name], ".-", color=COLORS[i % len(COLORS)], label=name, linewidth=1.4)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    for place, (image, (masks, numbers)) in enumerate(zip(images, found, strict=True)):
        axes = figure.add_subplot(grid[1, place])
        draw_objects(axes, image, masks=masks, colors=numbers)
    if images and len(classes) <= len(CLASS_COLORS):  # more would share colors
        patches = [Patch(color=color, label=name) for color, name in zip(CLASS_COLORS, classes, strict=False)]
        axes.legend(
            handles=patches, fontsize=8 if len(classes) <= 8 else 6, ncols=-(-len(classes) // 8), frameon=False,
            loc="upper left", bbox_to_anchor=(1, 1),
        )  # fmt: skip
    figure.supxlabel("validation images, with what is found in them now; a color a class", fontsize=9)
    return figure


def _png(figure: Picture) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
