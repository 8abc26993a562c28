"""Score a checkpoint, or the untrained network, on a run's validation data or on other data."""

import shutil
import tempfile
from pathlib import Path

from torch import Tensor, nn

from misa.engine.checkpoints import last_checkpoint, read_checkpoint
from misa.engine.config import DETECTIONS, run_config
from misa.engine.teacher import MERGE_SCORE, score_merged
from misa.engine.train import Run, choose_device, opened, quiet_runner, scored
from misa.errors import UserError


def evaluate(
    run_folder: str | Path,
    *,
    checkpoint: str | Path | None = None,
    data_root: str | Path | None = None,
    merged: bool = False,
    merge_score: float = MERGE_SCORE,
    predictions: str | Path | None = None,
    gpus: int | None = None,
    workers: int = 0,
    threads: int = 1,
) -> Run:
    """Mask AP of a run's checkpoint (default: its last; "none": the untrained network); mIoU of a teacher's.

    `merged` scores a student by mIoU as well: its instances of `merge_score` or more painted into one label map, the
    better on top (Figure 1). `predictions` keeps a student's
    detections as a COCO results file. Nothing in the run folder changes. gpus, workers, threads: as in `train`.

    Raises:
        UserError: no run folder, no checkpoint, another model's checkpoint, unusable data.
    """
    choose_device(gpus, threads)
    experiment, source, folder, params = opened(run_folder, data_root=data_root)
    if merged and not source.masks:
        raise UserError(f"mean IoU compares with true masks, and {source.val.annotations} has none; leave miou out.")
    path = None if checkpoint == "none" else Path(checkpoint) if checkpoint else last_checkpoint(folder)
    with tempfile.TemporaryDirectory() as scratch:
        config = run_config(
            # A checkpoint fills everything: no pre-trained weights are fetched for it.
            experiment if path is None else experiment.but(network={"pretrained": False}),
            source,
            folder=Path(scratch),
            seed=params["seed"],
            workers=workers,
        )
        runner = quiet_runner(config)
        runner.model.init_weights()
        if path is not None:
            load_weights(runner.model, path)
        runner.test()
        metrics = scored(experiment, source, Path(scratch))
        if predictions is not None:
            shutil.copyfile(Path(scratch) / DETECTIONS, predictions)
        if merged and experiment.semantic is None:
            detections = Path(scratch) / DETECTIONS
            metrics |= score_merged(source, detections, limit=experiment.limit, threshold=merge_score)
    return Run(experiment, folder, source, metrics)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint's weights, all of them or none; executes nothing that is in the file."""
    fill(model, read_checkpoint(path)["state_dict"], path)


def fill(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load weights that were read from `path`, all that the model has or none."""
    require_fit(model, weights, path)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})


def require_fit(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """UserError where the weights read from `path` are not of this model's shapes."""
    for name, value in model.state_dict().items():
        there = weights.get(name)
        if not isinstance(there, Tensor) or there.shape != value.shape:
            what = f"has shape {tuple(there.shape)}" if isinstance(there, Tensor) else "is missing"
            raise UserError(
                f"{path} is a checkpoint of another model: {name} {what}, this run's has {tuple(value.shape)}; "
                "give a checkpoint of the same row."
            )
