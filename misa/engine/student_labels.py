"""Label maps from a trained box-supervised student (facts 9.5, third reading): boxes known, masks its own."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS

from misa.data.coco import CocoImages
from misa.data.labels import LabelMap, merge_probabilities
from misa.data.pipeline import train_pipeline
from misa.data.source import Source
from misa.engine.checkpoints import last_checkpoint
from misa.engine.config import model_config
from misa.engine.evaluate import load_weights
from misa.engine.train import opened
from misa.errors import UserError
from misa.models.misa import BoxSupervised

UNSURE = (0.35, 0.65)
"""A student's mask probabilities in between are void."""


def student_maps(run: Path, source: Source, *, limit: int | None = None) -> Iterator[Callable[[], LabelMap]]:
    """How to make the label map of each training image, in the annotation file's order.

    Every box has its own mask (`BoxSupervised.masks_of_boxes`), so neither its class nor its instance is guessed.

    Raises:
        UserError: `run` is not a trained box-supervised student of these classes.
    """
    student, data, run, _ = opened(run)
    if student.supervision != "box" or student.semantic is not None:
        raise UserError(f"{run} is no box-supervised student; give the run of a row such as demo:box.")
    if data.classes != source.classes:
        raise UserError(f"the student {run} knows {', '.join(data.classes)}, the data has {', '.join(source.classes)}.")
    model = MODELS.build(model_config(student.but(network={"pretrained": False}), source.classes))
    if not isinstance(model, BoxSupervised):
        raise UserError(
            f"{run} is a {student.student}, whose masks are not matched to boxes; give the run of a box-supervised "
            "solov2 or mask2former."
        )
    load_weights(model, last_checkpoint(run))
    model.eval()
    # As in the test, the whole image: large-scale jittering would cut a part of it by chance.
    sizes = {"short_sides": (student.augmentation.test_short_side,), "flip": 0.0, "jitter": None}
    images = CocoImages(
        ann_file=str(source.train.annotations),
        data_prefix={"img": str(source.train.images)},
        filter_cfg={"filter_empty_gt": False, "min_size": 0},
        pipeline=train_pipeline(student.but(augmentation=sizes).augmentation, masks=False),
        metainfo={"classes": source.classes},
        indices=limit,
        masks=False,
    )
    for i in range(len(images)):
        yield partial(_label_map, model, images, i, len(source.classes))


@torch.no_grad()
def _label_map(model: Any, images: CocoImages, index: int, background: int) -> LabelMap:
    data = model.data_preprocessor(pseudo_collate([images[index]]), False)
    inputs, (sample,) = data["inputs"], data["data_samples"]
    original, truth = tuple(sample.ori_shape[:2]), sample.gt_instances
    if len(truth.labels) == 0:
        return np.full(original, background, np.uint8)
    size = (inputs.shape[-2], inputs.shape[-1])
    ((masks, answered),) = model.masks_of_boxes(inputs, [truth])
    masks[~answered] = sum(UNSURE) / 2  # what stands for no box says nothing about its pixels: halfway is void
    rows, columns = sample.img_shape[:2]
    fine = F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[:, :, :rows, :columns]
    whole = F.interpolate(fine, size=original, mode="bilinear", align_corners=False)[0]
    boxes = truth.bboxes.double().cpu().numpy() / np.tile(np.asarray(sample.scale_factor), 2)
    return merge_probabilities(
        whole.cpu().numpy(), boxes, truth.labels.tolist(), background=background, low=UNSURE[0], high=UNSURE[1]
    )
