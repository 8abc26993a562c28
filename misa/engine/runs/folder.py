"""A run folder: its name, its record, and what a finished run holds."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_world_size

from misa.data.digest import data_digests
from misa.data.source import Source, open_source
from misa.engine.runs.checkpoints import newest
from misa.engine.runs.record import environment, loadable, read_params, require_own, same_data
from misa.engine.runs.state import SMOKE, warn_changed
from misa.errors import UserError, option_name
from misa.experiment import Experiment
from misa.files import locked, read_json, write_json


@dataclass(frozen=True)
class Run:
    """A scored run: what was trained, its folder, the data it was scored on, and its metrics in percent."""

    experiment: Experiment
    folder: Path
    source: Source
    metrics: dict[str, Any]

    def scores(self) -> dict[str, dict[str, float | None]]:
        """A student's mask AP, also as full rectangles and class-agnostic; a teacher's IoU a class.

        Where the validation data has no masks, the AP of the boxes around the predicted ones.
        """
        if "bbox" in self.metrics:
            return {"boxes": self.metrics["bbox"]}
        if "segm" not in self.metrics:
            return {"IoU": iou_figures(self.metrics)}
        rows = {"masks": self.metrics["segm"], "as rectangles": self.metrics["segm_as_rectangles"]}
        rows |= {"any class": self.metrics["segm_any_class"]} if "segm_any_class" in self.metrics else {}
        return rows | ({"boundaries": self.metrics["boundary"]} if "boundary" in self.metrics else {})

    def leading(self) -> dict[str, float | None]:
        """The first of the scores."""
        return next(iter(self.scores().values()))

    def table(self) -> str:
        """The scores as text, with the IoU of a student's merged instances where it was asked for.

        A smoke run says so.
        """
        tables = [] if self.metrics.keys().isdisjoint(("segm", "bbox")) else [score_table(self.scores())]
        if "per_class" in self.metrics:
            tables.append(score_table(self.metrics["per_class"]))
        if "miou" in self.metrics:
            # A line a class: there may be eighty.
            name = "merged IoU" if tables else "IoU"
            tables.append(score_table({label: {name: value} for label, value in iou_figures(self.metrics).items()}))
        tables += [SMOKE[0].upper() + SMOKE[1:]] if self.experiment.limit is not None else []
        return "\n\n".join(tables)


def iou_figures(metrics: dict[str, Any]) -> dict[str, float | None]:
    """The mean IoU and that of each class, None where the data has none of it."""
    return {"mean": metrics["miou"], **metrics["iou"]}


def score_table(scores: Mapping[str, Mapping[str, float | None]]) -> str:
    """Rows of figures as plain text; a dash where the data has nothing to measure one on, "objects" as a count."""
    names = list(next(iter(scores.values())))
    width, margin = max(7, 1 + max(map(len, names))), max(16, 1 + max(map(len, scores)))
    lines = [" " * margin + "".join(f"{name:>{width}}" for name in names)]
    for label, values in scores.items():
        cells = (
            "-" if (value := values[name]) is None else f"{value:.{0 if name == 'objects' else 1}f}" for name in names
        )
        lines.append(f"{label:<{margin}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def finished(folder: str | Path) -> Run:
    """The run that a folder holds, as `train` returned it; UserError where it has not been scored."""
    experiment, source, folder, _ = opened(folder)
    metrics = read_json(folder / "metrics.json")
    if metrics is None:
        raise UserError(f"{folder} has no metrics.json: its training has not ended; train it on.")
    return Run(experiment, folder, source, metrics)


def require_own_teacher(place: Path, student: Mapping[str, Any]) -> None:
    """UserError where a teacher's folder holds one of other data; the user named the student's folder alone."""
    params = read_json(place / "params.json")
    if params is not None and not same_data(params, student):
        name = option_name("work_dir")
        raise UserError(
            f"the teacher beside this {name}, {place}, learned from {params['data_root']}, and the student is to learn "
            f"from {student['data_root']}; choose a {name} in another folder, where a teacher of its own is trained."
        )


def hold(folder: Path, stack: contextlib.ExitStack) -> None:
    """Lock a run folder until the stack ends; not a finished run, which several students may read at a time."""
    if read_json(folder / "metrics.json") is None:
        stack.enter_context(locked(folder))


def earlier_work(folder: Path, params: dict[str, Any], resume: bool) -> tuple[dict[str, Any] | None, Path | None]:
    """The metrics and the newest checkpoint of an earlier call; UserError where the folder is another run's."""
    require_own(folder, params)
    metrics, checkpoint = read_json(folder / "metrics.json"), newest(folder)
    if not resume and (metrics or checkpoint):
        name, off = option_name("work_dir"), option_name("resume", off=True)
        raise UserError(f"{name} {folder} holds this run already; leave out {off} or choose another {name}.")
    if metrics is not None:
        before = read_params(folder)
        warn_changed(folder, before, params["data"])
        if before["data_root"] != params["data_root"]:  # it has moved, and the figures look for it where it is
            write_json(folder / "params.json", before | {"data_root": params["data_root"]})
    return metrics, checkpoint


def write_record(folder: Path, params: dict[str, Any], config: Config, device: str | None) -> None:
    """Write params.json, config.py and, for a new run on `device`, env.json."""
    write_json(folder / "params.json", params)
    if device is not None:
        write_json(folder / "env.json", environment(device) | {"processes": get_world_size()})
    loadable(config).dump(str(folder / "config.py"))


def opened(
    folder: str | Path, *, data_root: str | Path | None = None
) -> tuple[Experiment, Source, Path, dict[str, Any]]:
    """The experiment, data, path and parameters of a run folder; UserError where it is none."""
    experiment, folder, params = recorded(folder)
    root = Path(data_root or params["data_root"])
    if data_root is None and not root.exists():
        raise UserError(f"the data of {folder} is no longer at {root}; restore it, or give {option_name('data_root')}.")
    # The data is there already, at the root that was recorded; nothing is drawn again.
    there = replace(experiment, data="coco", scenes=()) if experiment.data == "demo" else experiment
    source = open_source(there, root, classes=params["classes"], need_train=False)
    if data_root is None:  # other data is no change
        warn_changed(folder, params, data_digests(source.train, source.val))
    return experiment, source, folder, params


def recorded(folder: str | Path) -> tuple[Experiment, Path, dict[str, Any]]:
    """The experiment, path and parameters of a run folder, without its data; UserError where it is none."""
    folder = Path(folder).expanduser().resolve()
    params = read_params(folder)
    try:
        return Experiment.from_values(params["experiment"]), folder, params
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'params.json'} is not this version's ({error}); train the row again.") from error
