"""Where an experiment's images, boxes and class names come from."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from misa.data.check import require_usable
from misa.data.layout import Split, find_layout
from misa.data.synthetic import Scenes, write_scenes
from misa.experiment import Experiment


@dataclass(frozen=True)
class Source:
    """A data set that can be trained on: both splits and the classes, in the annotation file's order."""

    root: Path
    train: Split
    val: Split
    classes: tuple[str, ...]


def open_source(experiment: Experiment, data_root: str | Path) -> Source:
    """The checked data of an experiment; the embedded data is written below `data_root` the first time.

    Raises:
        UserError: a file is missing, unreadable, or not fit to train on.
    """
    root = Path(data_root).expanduser().resolve()
    if experiment.data == "demo":
        scenes = Scenes(**dict(experiment.scenes))
        root = write_scenes(root / f"demo-{hashlib.sha256(repr(scenes).encode()).hexdigest()[:8]}", scenes)
    layout = find_layout(root)
    report = require_usable(*layout.train)
    require_usable(*layout.val, classes=report.classes, purpose="eval")
    return Source(layout.root, layout.train, layout.val, report.classes)
