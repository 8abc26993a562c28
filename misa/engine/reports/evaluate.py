"""Score a checkpoint, or the untrained network, on a run's validation data or on other data."""

import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misa.data.digest import data_digests
from misa.data.label_maps import MOST_CLASSES
from misa.data.source import Source
from misa.engine.prediction.student import for_inference
from misa.engine.runs.checkpoints import CARD, fill, last_checkpoint, newest, read_checkpoint, record_of
from misa.engine.runs.folder import Run, opened, recorded
from misa.engine.runs.record import read_params
from misa.engine.runs.scores import DETECTIONS, MERGE_SCORE, score_merged, scored
from misa.engine.runs.state import warn
from misa.engine.training.config import run_config
from misa.engine.training.runner import choose_device, quiet_runner
from misa.errors import UserError, counted, option_name
from misa.evaluation.ap import read_truth
from misa.evaluation.details import detailed
from misa.experiment import Experiment
from misa.machine import Machine


@dataclass(frozen=True)
class Trained:
    """A run folder's row, parameters and chosen checkpoint (None for the untrained network)."""

    experiment: Experiment
    folder: Path
    params: dict[str, Any]
    checkpoint: Path | None


def evaluate(
    run_folder: str | Path,
    *,
    checkpoint: str | Path | None = None,
    data_root: str | Path | None = None,
    merged: bool = False,
    merge_score: float = MERGE_SCORE,
    details: bool = False,
    boundary: bool = False,
    predictions: str | Path | None = None,
    machine: Machine | None = None,
) -> Run:
    """Compute mask AP of a run's checkpoint (default: the last; "none": the untrained network), or a teacher's mIoU.

    `merged` adds mIoU for a student, of its instances with a score of at least `merge_score` painted into one label map
    in increasing order of score (Figure 1). `details` adds AP per class and precision-recall curves (of boxes, where
    the data has no masks), `boundary` the boundary AP, which requires masks and faster-coco-eval. `predictions` writes
    a student's detections as a COCO results file; it replaces such a file, and no other. The run folder is not changed.
    Raises UserError: no run folder, no checkpoint, another model's checkpoint or one for other classes,
    unusable data, another file in the way.
    """
    if boundary and importlib.util.find_spec("faster_coco_eval") is None:
        raise UserError("boundary AP needs the package faster-coco-eval; pip install it.")
    run = load_run(run_folder, checkpoint=checkpoint, machine=machine)
    experiment, source, folder, _ = opened(run_folder, data_root=data_root)
    if merged and len(source.classes) > MOST_CLASSES:
        raise UserError(
            f"label maps hold at most {MOST_CLASSES} classes, and the data has {len(source.classes)}; leave "
            f"{option_name('miou')} out."
        )
    if merged and not source.masks:
        where = f"the val split of {source.root}"
        raise UserError(f"mean IoU compares with true masks, and {where} has none; leave miou out.")
    if boundary and not source.masks:
        raise UserError(f"boundary AP compares with true masks, and the val split of {source.root} has none.")
    if predictions is not None and experiment.semantic is not None:
        raise UserError(f"{folder} is a semantic teacher, which detects nothing; leave predictions out.")
    if predictions is not None:
        _require_place(Path(predictions).expanduser())
    with tempfile.TemporaryDirectory() as scratch:
        predict_split(run, source, Path(scratch), machine)
        metrics = scored(experiment, source, Path(scratch))
        detections = Path(scratch) / DETECTIONS
        if predictions is not None:
            shutil.copyfile(detections, Path(predictions).expanduser())
        if merged and experiment.semantic is None:
            metrics |= score_merged(source, detections, limit=experiment.limit, threshold=merge_score)
        if (details or boundary) and experiment.semantic is None:
            more = detailed(
                source.val.annotations,
                detections,
                limit=experiment.limit,
                classes=source.classes,
                masks=source.masks,
                boundary=boundary,
            )
            metrics |= more if details else {"boundary": more["boundary"]}
    return Run(experiment, folder, source, metrics, run.checkpoint)


def heading(result: Run) -> str:
    """Two lines on a result of `evaluate`: the run and the scored weights, and the data with its number of images."""
    images = len(read_truth(result.source.val.annotations).getImgIds()[: result.experiment.limit])
    data = f"data: val split of {result.source.root}, {counted(images, 'image')}"
    return f"{run_line(result.folder, result.checkpoint)}\n{data}"


def figures_folder(result: Run) -> Path:
    """Where figures on a result of `evaluate` belong: the run's figures/, those of other weights or data inside it."""
    folder, params = result.folder / "figures", read_params(result.folder)
    if result.checkpoint is None:
        folder /= "untrained"
    elif (last := newest(result.folder)) is None or result.checkpoint.resolve() != last.resolve():
        folder /= result.checkpoint.stem
    root, val = result.source.root, data_digests(result.source.train, result.source.val).get("val")
    if str(root) != params["data_root"] and val != params.get("data", {}).get("val"):
        folder /= root.name
    return folder


def run_line(folder: Path, checkpoint: Path | None) -> str:
    """A line on a run folder and the weights that are scored; None: the untrained network."""
    params, weights = read_params(folder), "the untrained network"
    if checkpoint is not None:
        inside = checkpoint.resolve().parent == folder / "checkpoints"
        weights = checkpoint.name if inside else str(checkpoint)
    return f"run: {folder} ({params['row']}, seed {params['seed']}), {weights}"


def _require_place(path: Path) -> None:
    """Raise UserError, before long work, if a file holds something else or cannot be written; make its folder."""
    try:
        if path.is_file() and not _holds_detections(path):
            raise UserError(f"predictions {path} exists already and holds no detections; choose another file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise UserError(f"predictions {path} cannot be written ({error.strerror}); choose another file.") from error


def load_run(
    run_folder: str | Path, *, checkpoint: str | Path | None = None, machine: Machine | None = None
) -> Trained:
    """Open a run folder to predict with, and set device and threads. UserError if there is no run or checkpoint.

    Unless a checkpoint is named, warns on standard error if the run is unfinished or a smoke run.
    """
    choose_device(machine or Machine())
    experiment, folder, params = recorded(run_folder)
    path = None if checkpoint == "none" else Path(checkpoint).expanduser() if checkpoint else last_checkpoint(folder)
    if not checkpoint:
        warn(folder, experiment, checkpoint=path)
    return Trained(experiment, folder, params, path)


def predict_split(run: Trained, source: Source, target: Path, machine: Machine | None = None) -> None:
    """Write the network's predictions on the validation split of `source` to `target`, as after a training."""
    experiment, checkpoint = run.experiment, None
    if run.checkpoint is not None:
        checkpoint = read_checkpoint(run.checkpoint)
        # A checkpoint has all weights: pretrained ones are not downloaded. An exported one has those of inference.
        experiment = for_inference(experiment) if CARD in checkpoint else experiment.but(network={"pretrained": False})
    config = run_config(
        experiment,
        source,
        folder=target,
        seed=run.params["seed"],
        machine=machine,
    )
    runner = quiet_runner(config)
    runner.model.init_weights()
    if run.checkpoint is not None and checkpoint is not None:
        fill(runner.model, checkpoint["state_dict"], run.checkpoint)
        _require_classes(run, run.checkpoint, checkpoint)
    runner.test()


def _require_classes(run: Trained, path: Path, checkpoint: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint's record states other classes than the run's, or these in another order."""
    try:
        record = record_of(path.resolve(), checkpoint)
    except ValueError as error:
        raise UserError(f"{path} has an unreadable card ({error}); export it again.") from error
    known = record.get("classes") if isinstance(record, dict) else None
    if known is not None and known != list(run.params["classes"]):
        raise UserError(
            f"{path} is a checkpoint for the classes {', '.join(map(str, known))}, and the run {run.folder} has "
            f"{', '.join(run.params['classes'])}; give a checkpoint that was trained on the same classes in this order."
        )


def _holds_detections(path: Path) -> bool:
    """Return whether a file begins as a COCO results file, which the same call may replace."""
    with path.open("rb") as file:
        head = file.read(1 << 16).lstrip()
    return head[:1] == b"[" and (b'"score"' in head or head[1:].strip() == b"]")
