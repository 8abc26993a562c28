"""Where an experiment's images, boxes and class names come from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from misa.data.synthetic import Scenes, write_scenes
from misa.experiment import Experiment


class Split(NamedTuple):
    """One annotation file and the folder of its images."""

    annotations: Path
    images: Path


@dataclass(frozen=True)
class Source:
    """A data set that can be trained on: both splits and the classes, in the annotation file's order."""

    root: Path
    train: Split
    val: Split
    classes: tuple[str, ...]
    categories: tuple[int, ...]  # the annotation file's id of each class


def open_source(experiment: Experiment, data_root: Path) -> Source:
    root = data_root.resolve()
    if experiment.data == "demo":
        scenes = Scenes(**dict(experiment.scenes))
        root = write_scenes(root / "demo", scenes)
    ann = root / "annotations"
    train = Split(ann / "instances_train2017.json", root / "train2017")
    val = Split(ann / "instances_val2017.json", root / "val2017")
    cats = json.loads(train.annotations.read_text())["categories"]
    return Source(root, train, val, tuple(c["name"] for c in cats), tuple(c["id"] for c in cats))
