"""Run folders: their record, lock and scores, and opening them."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_world_size

from misa.data.digest import data_digests
from misa.data.source import Source, open_source
from misa.engine.runs.checkpoints import newest
from misa.engine.runs.record import (
    RESUMED,
    SMOKE,
    environment,
    learned_from_same,
    loadable,
    read_params,
    require_own,
)
from misa.engine.runs.state import warn_changed
from misa.errors import UserError, option_name
from misa.experiment import Experiment
from misa.files import locked, read_json, write_json


@dataclass(frozen=True)
class Run:
    """A scored run: its experiment, folder, the data it was scored on, and metrics in percent."""

    experiment: Experiment
    folder: Path
    source: Source
    metrics: dict[str, Any]
    checkpoint: Path | None = None  # the scored weights, where `evaluate` has chosen them

    def scores(self) -> dict[str, dict[str, float | None]]:
        """A student's mask AP, also of masks filled to rectangles and class-agnostic; a teacher's IoU per class.

        If the validation data has no masks, the AP of the predicted masks' bounding boxes.
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
        """The scores as text, with the IoU of a student's merged instances if measured; a smoke run is marked."""
        tables = [] if self.metrics.keys().isdisjoint(("segm", "bbox")) else [score_table(self.scores())]
        if "per_class" in self.metrics:
            tables.append(score_table(self.metrics["per_class"]))
        if "miou" in self.metrics:
            # One line per class: there may be eighty.
            name = "merged IoU" if tables else "IoU"
            tables.append(score_table({label: {name: value} for label, value in iou_figures(self.metrics).items()}))
        tables += [SMOKE[0].upper() + SMOKE[1:]] if self.experiment.limit is not None else []
        return "\n\n".join(tables)


def iou_figures(metrics: dict[str, Any]) -> dict[str, float | None]:
    """The mean IoU and that of each class, None for classes that the data does not have."""
    return {"mean": metrics["miou"], **metrics["iou"]}


def score_table(scores: Mapping[str, Mapping[str, float | None]]) -> str:
    """Format rows of scores as plain text; a dash for a score that could not be measured, "objects" as a count."""
    names = list(next(iter(scores.values())))
    width, margin = max(7, 1 + max(map(len, names))), max(16, 1 + max(map(len, scores)))
    lines = [" " * margin + "".join(f"{name:>{width}}" for name in names)]
    for label, values in scores.items():
        cells = ("-" if (v := values[name]) is None else f"{v:.{0 if name == 'objects' else 1}f}" for name in names)
        lines.append(f"{label:<{margin}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def finished(folder: str | Path) -> Run:
    """Return the run in a folder, as `train` returned it; UserError if it has not been scored."""
    experiment, source, folder, _ = opened(folder)
    metrics = read_json(folder / "metrics.json")
    if metrics is None:
        raise UserError(f"{folder} has no metrics.json: its training has not ended; train it on.")
    return Run(experiment, folder, source, metrics)


def require_own_stage(place: Path, now: Mapping[str, Any], what: str) -> None:
    """Raise UserError if the folder of a run that is trained first, which the user did not name, is of other data.

    now: the record of the run that learns from it. what: "teacher" or "student".
    """
    params = read_json(place / "params.json")
    if params is None or learned_from_same(params, now):
        return
    name, where = option_name("work_dir"), now["data_root"]
    other = f"{where} before its annotations changed" if params["data_root"] == where else params["data_root"]
    raise UserError(
        f"the {what} beside this {name}, {place}, learned from {other}, and this run is to learn from {where}; choose "
        f"a {name} in another folder, where a {what} of its own is trained."
    )


def require_there(folder: Path, place: Path) -> None:
    """Raise UserError if the teacher that an interrupted student has begun with is gone: another one has other weights.

    Older runs did not record its weights: theirs is trained again.
    """
    if "teacher" in (read_json(folder / "env.json") or {}) and not (place / "metrics.json").exists():
        raise UserError(
            f"the teacher that the run in {folder} began with is no longer in {place}; restore it, or choose another "
            f"{option_name('work_dir')} to train both anew."
        )


def require_same_teacher(folder: Path, place: Path, weights: str) -> None:
    """Raise UserError if an interrupted student has begun with other weights of its teacher than those there now."""
    began = (read_json(folder / "env.json") or {}).get("teacher", weights)  # older runs did not record it
    if began != weights:
        raise UserError(
            f"the weights of the teacher in {place} have changed since the run in {folder} began with them ({began} "
            f"then, {weights} now), and it cannot go on with others; restore them, or choose another "
            f"{option_name('work_dir')} to train a student with the present teacher."
        )


def lock_folder(folder: Path, stack: contextlib.ExitStack) -> None:
    """Lock a run folder until the stack exits, unless the run is finished: several students may read it at a time.

    UserError also for a path that is not UTF-8, which TensorBoard cannot write to.
    """
    if read_json(folder / "metrics.json") is None:
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            name = option_name("work_dir")
            raise UserError(f"{name} {folder} is not UTF-8, which TensorBoard needs; choose another {name}.") from None
        stack.enter_context(locked(folder))


def earlier_work(folder: Path, params: dict[str, Any], resume: bool) -> tuple[dict[str, Any] | None, Path | None]:
    """Return metrics and newest checkpoint of an earlier call; UserError if the folder holds another run."""
    require_own(folder, params)
    metrics, checkpoint = read_json(folder / "metrics.json"), newest(folder)
    if not resume and (metrics or checkpoint):
        name, off = option_name("work_dir"), option_name("resume", off=True)
        raise UserError(f"{name} {folder} holds this run already; leave out {off} or choose another {name}.")
    if metrics is not None:
        before = read_params(folder)
        warn_changed(folder, before, params["data"])
        if before["data_root"] != params["data_root"]:  # the data has moved, and figures need its new place
            write_json(folder / "params.json", before | {"data_root": params["data_root"]})
    return metrics, checkpoint


def write_record(
    folder: Path,
    params: dict[str, Any],
    config: Config,
    *,
    device: str,
    resumed: bool,
    weights: Mapping[str, str | None],
    micro_batch: int,
) -> None:
    """Write params.json, config.py and env.json, or what a resumed run has otherwise into `RESUMED`.

    weights: hashes of those it begins with, "start" and "teacher", None if it has none. micro_batch: images of a
    process's.
    """
    write_json(folder / "params.json", params)
    now = environment(device) | {"processes": get_world_size(), "micro_batch": micro_batch}
    if resumed:
        before = read_json(folder / "env.json") or {}
        if changed := {name: value for name, value in now.items() if before.get(name) != value}:
            with (folder / RESUMED).open("a") as file:
                file.write(json.dumps(changed) + "\n")
    else:
        (folder / RESUMED).unlink(missing_ok=True)
        begins = {name: value for name, value in weights.items() if value is not None}
        write_json(folder / "env.json", now | begins)
    loadable(config).dump(str(folder / "config.py"))


def opened(
    folder: str | Path, *, data_root: str | Path | None = None
) -> tuple[Experiment, Source, Path, dict[str, Any]]:
    """Return the experiment, data, path and parameters of a run folder.

    data_root: other data than the run's; of embedded data also the folder that holds it, as in `misa train`.
    Raises UserError: not a run folder, or there is no such data.
    """
    experiment, folder, params = recorded(folder)
    root = Path(data_root or params["data_root"]).expanduser()
    if data_root is None and not root.exists():
        raise UserError(f"the data of {folder} is no longer at {root}; restore it, or give {option_name('data_root')}.")
    if experiment.data == "demo" and (inside := root / Path(params["data_root"]).name).is_dir():
        root = inside
    # Embedded data exists at the recorded root already; it is not generated again.
    there = replace(experiment, data="coco", scenes=()) if experiment.data == "demo" else experiment
    source = open_source(there, root, classes=params["classes"], need_train=False)
    if data_root is None:  # otherwise other data is intended
        warn_changed(folder, params, data_digests(source.train, source.val))
    return experiment, source, folder, params


def recorded(folder: str | Path) -> tuple[Experiment, Path, dict[str, Any]]:
    """Return the experiment, path and parameters of a run folder, not its data; UserError if it is not one."""
    folder = Path(folder).expanduser().resolve()
    params = read_params(folder)
    try:
        return Experiment.from_values(params["experiment"]), folder, params
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'params.json'} is not this version's ({error}); train the row again.") from error
