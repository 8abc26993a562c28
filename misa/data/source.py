"""Open and check the data set of an experiment: images, boxes and class names."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misa.data.check.annotations import Purpose, require_usable
from misa.data.check.report import Report
from misa.data.formats.coco import Split
from misa.data.formats.convert import open_layout
from misa.data.scenes.scenes import EDITION, Scenes, write_scenes
from misa.errors import UserError
from misa.experiment import Experiment

# Wording of the count of each kind of warning; classes that are left out are listed by name instead.
_COUNTED = {
    "box-clipped": ("box clipped", "boxes clipped"),
    "box-thin": ("box thinner than a pixel left out", "boxes thinner than a pixel left out"),
    "box-size": ("box without area left out", "boxes without area left out"),
    "box-thin-mask": ("object thinner than a pixel scored by its mask", "objects thinner than a pixel scored by masks"),
    "box-size-mask": ("box without area scored by its mask", "boxes without area scored by their masks"),
    "duplicate-box": ("box given twice", "boxes given twice"),
    "duplicate-file": ("image listed twice", "images listed twice"),
    "image-16-bit": ("image of 16 bits read as 8", "images of 16 bits read as 8"),
    "image-alpha": ("image whose transparency is not read", "images whose transparency is not read"),
    "image-cmyk": ("CMYK image read as RGB", "CMYK images read as RGB"),
    "image-pages": ("image of which the first page is read", "images of which the first page is read"),
}
# Passed checks of this process: check, train and evaluate in one notebook read the images once.
_passed: dict[tuple[Any, ...], Report] = {}
_printed: set[tuple[Path, str]] = set()


@dataclass(frozen=True)
class Source:
    """A usable data set: both splits and the classes, in the order of the annotation file.

    images: number of training images that the experiment uses; 0 if only the validation split was opened.
    masks: whether the validation split has ground-truth masks, or boxes only.
    """

    root: Path
    train: Split
    val: Split
    classes: tuple[str, ...]
    images: int = 0
    masks: bool = True


def drawn_scenes(values: Mapping[str, Any]) -> Scenes:
    """Returns the embedded data of these parameters, `Experiment.scenes`; UserError if it has no such ones."""
    try:
        return Scenes(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"scenes of a row: {str(error).rstrip('.')}; see misa.data.scenes.scenes.Scenes.") from error


def open_source(
    experiment: Experiment, data_root: str | Path, *, classes: Sequence[str] | None = None, need_train: bool = True
) -> Source:
    """Open and check the data of an experiment; the embedded data is written below `data_root` the first time.

    experiment: gives the data set, the supervision (boxes or masks) and the image size. data_root: a data set in any of
    `misa.data.formats.table.FORMATS`; for data="demo" the folder for the embedded data. classes: a run's classes, in
    its order, which are required; None: those of the training split. need_train: False opens only the validation
    split, for which `classes` must be given.
    Raises UserError: a file is missing, unreadable, or not fit to train on.
    """
    if not need_train and classes is None:
        raise ValueError("open_source needs classes where the training split, which has them, is not needed.")
    root = Path(data_root).expanduser().resolve()
    if experiment.data == "demo":
        scenes = drawn_scenes(dict(experiment.scenes))
        name = hashlib.sha256(f"{EDITION} {scenes!r}".encode()).hexdigest()[:8]
        root = write_scenes(root / f"demo-{name}", scenes)
    layout = open_layout(root, need_train=need_train)
    wanted, images, of_run = tuple(classes) if classes is not None else None, 0, classes is not None
    cap = experiment.augmentation.long_side
    if need_train:
        purpose: Purpose = "mask" if experiment.supervision == "mask" else "train"
        report = _checked(layout.root, "train", layout.train, wanted, purpose, cap, of_run)
        wanted = report.classes
        images = report.images if experiment.limit is None else min(report.images, experiment.limit)
    report = _checked(layout.root, "val", layout.val, wanted, "score", cap, of_run)
    masks = report.masks
    if not masks and (layout.root, "masks") not in _printed:
        _printed.add((layout.root, "masks"))
        print("data: the val split has no masks; the score compares boxes around the masks with its boxes", flush=True)
    return Source(layout.root, layout.train, layout.val, report.classes, images, masks)


def _checked(
    root: Path,
    name: str,
    split: Split,
    classes: tuple[str, ...] | None,
    purpose: Purpose,
    long_side: int,
    of_run: bool,
) -> Report:
    """Returns the report of a usable split, cached while the file and the folder are unchanged."""
    there = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in split]
    key = (*there, classes, purpose, long_side)
    if key not in _passed:
        _passed[key] = require_usable(*split, classes=classes, purpose=purpose, long_side=long_side, of_run=of_run)
    report = _passed[key]
    if report.warnings and (root, name) not in _printed:
        _printed.add((root, name))
        # misa check compares the splits with each other, not with a run's classes.
        unlisted = of_run and all(warning.kind.startswith("class-") for warning in report.warnings)
        more = "" if unlisted else f"; `misa check {root}` lists them"
        print(f"data: in the {name} split {_summary(report)}{more}", flush=True)
    return report


def _summary(report: Report) -> str:
    """Summarize the warnings of a report."""
    words = []
    for kind in dict.fromkeys(warning.kind for warning in report.warnings):
        count = report.totals[kind]
        first = next(warning for warning in report.warnings if warning.kind == kind)
        words.append(f"{count} {_COUNTED[kind][count > 1]}" if kind in _COUNTED else first.message)
    return ", ".join(words)
