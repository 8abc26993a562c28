"""Check a whole dataset before training, and draw some of it: `misa check`."""

from dataclasses import dataclass, replace
from pathlib import Path

import mmcv
import numpy as np

from misa.data.check.annotations import Twins, check_coco
from misa.data.check.image_files import SHARED
from misa.data.check.report import Problem, Report, Sample
from misa.data.formats.coco import DataError, PathLike
from misa.data.formats.coco_json import images_of
from misa.data.formats.convert import open_layout
from misa.data.formats.splits import overlap
from misa.errors import UserError, counted, option_name
from misa.figures.plots import sample_grid
from misa.files import atomic_write
from misa.rows import find_row

SAMPLES = 16
_MARK = "misa check"  # in the pictures, so that no other file is replaced
_METADATA = {".png": {"Software": _MARK}, ".pdf": {"Creator": _MARK}, ".svg": {"Creator": _MARK}}
_OWN = ("photos:box", "own:small")  # the rows that are suggested for own data


@dataclass(frozen=True)
class Checkup:
    """The report of each annotation file, and the path of the picture of some images, or None.

    fault: why the picture could not be drawn.
    """

    reports: tuple[Report, ...]
    picture: Path | None
    fault: str = ""

    @property
    def usable(self) -> bool:
        """Whether the data can be used for training."""
        return all(report.usable for report in self.reports)

    def __str__(self) -> str:
        lines = [str(report) for report in self.reports]
        if self.picture is not None:
            lines.append(f"some of its images with their boxes: {self.picture}")
        if self.fault:
            lines.append(f"no picture was drawn: {self.fault}")
        return "\n\n".join(lines)


def check_data(data: PathLike, *, images: PathLike | None = None, picture: PathLike | None = None) -> Checkup:
    """Check a dataset in any format of docs/data.md; `images`: the image folder of a single COCO json.

    Every image file is opened; duplicates are reported, also across splits. picture: file for a drawing of some images
    with their boxes, or None; no other file is replaced.
    Raises UserError: there is no dataset.
    """
    path = Path(data).expanduser()
    twins: Twins = {}
    options = {"verify_images": "open", "twins": twins, "samples": -(-SAMPLES // 2)}
    if path.suffix.lower() == ".json" and path.is_file():
        folder = images_of(path) if images is None else Path(images).expanduser()
        reports = [check_coco(path, folder, purpose="score", **{**options, "samples": SAMPLES})]  # type: ignore[arg-type]
    elif images is not None:
        raise DataError(f"{option_name('images')} goes with one COCO json; {path} is not one.")
    else:
        layout = open_layout(path, settled=False)  # checked below, all at once
        options["alone"] = layout.train.images != layout.val.images
        train = check_coco(*layout.train, **options)  # type: ignore[arg-type]
        known = train.classes or None  # none where train cannot be read, which is no fault of val
        val = check_coco(*layout.val, classes=known, purpose="score", **options)  # type: ignore[arg-type]
        if not train.usable:  # report an error in the files, but not its consequences
            val = replace(val, problems=tuple(p for p in val.problems if p.kind not in ("no-images", "no-classes")))
        reported = {p.message for p in train.problems if p.kind == "class-names-alike"}
        copies = [p.message for p in val.problems if p.kind == SHARED]  # as misa convert makes them
        val = replace(val, problems=tuple(p for p in val.problems if p.message not in (*reported, *copies)))
        meant = "nothing to do, if that is meant"
        if layout.overlap:
            val = _warned(val, "split-overlap", layout.overlap, meant)
        if copies:
            text = overlap(val.totals[SHARED], val.images)
            val = _warned(val, "split-overlap", text, f"{meant} (such as: {copies[0]})")
        reports = [_with_batch(_with_untrained(train, val)), val]
    shown = [sample for report in reports for sample in report.samples][:SAMPLES]
    try:
        drawn, fault = None if picture is None else _draw(shown, Path(picture).expanduser()), ""
    except UserError as error:  # the picture is optional
        drawn, fault = None, str(error)
    return Checkup(tuple(reports), drawn, fault)


def _with_batch(train: Report) -> Report:
    """Add a warning if a batch of the rows for own data is larger than the training split."""
    large = [f"{row} ({batch})" for row in _OWN if (batch := find_row(row).schedule.batch) > train.images]
    if not train.usable or not large:
        return train
    message = f"{counted(train.images, 'image')} cannot fill a batch of {' or '.join(large)}"
    advice = f"add images, or train {'it' if len(large) == 1 else 'them'} with {option_name('batch')} {train.images}"
    return _warned(train, "few-images", message, advice)


def _with_untrained(train: Report, val: Report) -> Report:
    """Add a warning if a class has boxes only in the validation split."""
    alone = [(name, count) for name, count in val.per_class.items() if count and not train.per_class.get(name)]
    if not (train.usable and alone):
        return train
    shown = ", ".join(f"{name} ({count})" for name, count in alone[:8])
    more = f" and {len(alone) - 8} more" if len(alone) > 8 else ""
    message = f"the val split has boxes of {shown}{more} and the train split none, so that they are not learned"
    return _warned(train, "class-untrained", message, "bring images of each class into the train split")


def _warned(report: Report, kind: str, message: str, advice: str) -> Report:
    problem = Problem(kind, str(report.annotation_file), message, advice, fatal=False)
    return replace(report, problems=(*report.problems, problem), totals={**report.totals, kind: 1})


def _draw(samples: list[Sample], path: Path) -> Path | None:
    """Draw a grid of the readable images; return its path, or None if there are none.

    UserError: the file cannot be written, or is another's.
    """
    cells = []
    for sample in samples:
        try:
            image = mmcv.imread(sample.path, channel_order="rgb")
        except Exception:  # already in the report; OpenCV and mmcv raise many kinds
            continue
        if image is None:
            continue
        boxes = np.array(sample.boxes, dtype=float).reshape(-1, 4)
        cells.append({"image": image, "boxes": boxes, "labels": sample.labels, "title": sample.path.name[-24:]})
    if not cells:
        return None
    metadata = _METADATA.get(path.suffix.lower())
    if metadata is None:
        raise UserError(f"the picture {path} should end in {', '.join(_METADATA)}; give another name, or none.")
    if path.is_file() and _MARK.encode() not in path.read_bytes():
        advice = "delete it, or give another name"
        raise UserError(f"{path} exists already and was not drawn by this version's misa check; {advice}.")
    try:
        with atomic_write(path, suffix=f".part{path.suffix}") as partial:
            sample_grid(cells, columns=4).savefig(partial, dpi=200, metadata=metadata)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture {path} cannot be written ({error}); give another name, or none.") from error
    return path
