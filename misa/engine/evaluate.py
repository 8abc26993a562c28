"""Score a checkpoint, or the untrained network, on a run's validation data or on other data."""

import shutil
import tempfile
from pathlib import Path

from torch import nn

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
    weights = read_checkpoint(path)["state_dict"]
    own = model.state_dict()
    for name, value in own.items():
        if name not in weights or weights[name].shape != value.shape:
            there = "is missing" if name not in weights else f"has shape {tuple(weights[name].shape)}"
            raise UserError(
                f"{path} is a checkpoint of another model: {name} {there}, this run's has {tuple(value.shape)}; "
                "give a checkpoint of the same row."
            )
    model.load_state_dict({name: weights[name] for name in own})
