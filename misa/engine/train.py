"""Train a row, score it, and leave a run folder (§4.3)."""

import contextlib
import io
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import Runner

from misa.data.source import Source, open_source
from misa.engine.config import DETECTIONS, loadable, run_config
from misa.engine.record import claim, environment, read_json, run_params, write_json
from misa.errors import UserError
from misa.evaluation.ap import as_rectangles, mask_ap, read_truth
from misa.experiment import Experiment


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the data it was scored on and its metrics."""

    folder: Path
    source: Source
    metrics: dict[str, Any]


def train(
    experiment: Experiment,
    *,
    data_root: str | Path,
    work_dir: str | Path,
    row: str = "custom",
    seed: int = 0,
    workers: int = 0,
    threads: int = 1,
    resume: bool = True,
    interactive: bool = False,
) -> Run:
    """Train and evaluate; the same call again resumes where it was stopped or returns the finished run.

    Args:
        experiment: what to train.
        data_root: a COCO-layout folder; for data="demo" the folder that the embedded data goes into.
        work_dir: the run folder; it must be new, or this very run's.
        row: the row's name in the experiments folder, for the record.
        seed: of weights, order and augmentation.
        workers: processes that load images; the result does not depend on it.
        threads: of torch on the CPU. Two busy threads on two busy cores are many times slower than one.
        resume: go on from the last checkpoint; off: a folder with checkpoints is an error.
        interactive: progress bars instead of lines.

    Raises:
        UserError: wrong input, before any long work and with nothing overwritten.
    """
    folder = Path(work_dir).resolve()
    source = open_source(experiment, Path(data_root))
    claim(folder, run_params(experiment, row=row, seed=seed, data_root=source.root))
    finished = read_json(folder / "metrics.json")
    if finished is not None:
        print(f"{folder} is finished; nothing to train. Delete the folder to train again.")
        return Run(folder, source, finished)
    checkpointed = (folder / "checkpoints" / "last_checkpoint").exists()
    if checkpointed and not resume:
        raise UserError(f"work_dir {folder} holds checkpoints; set resume or choose another work_dir.")

    torch.set_num_threads(threads)
    config = run_config(
        experiment, source, folder=folder, seed=seed, workers=workers, resume=checkpointed, interactive=interactive
    )
    loadable(config).dump(str(folder / "config.py"))
    write_json(folder / "env.json", environment())
    runner = _runner(config)
    runner.train()
    runner.test()
    metrics = score(source, folder / DETECTIONS, limit=experiment.limit)
    metrics |= {"row": row, "digest": experiment.digest(), "seed": seed, "data": experiment.data}
    write_json(folder / "metrics.json", metrics)
    return Run(folder, source, metrics)


def score(source: Source, detections: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Mask AP of a results file, and of the same detections as full rectangles."""
    truth = read_truth(source.val.annotations)
    images = truth.getImgIds()[:limit]
    found = json.loads(detections.read_text())
    return {
        "segm": mask_ap(truth, found, images=images),
        "segm_as_rectangles": mask_ap(truth, as_rectangles(found), images=images),
        "detections": len(found),
        "images": len(images),
    }


def _runner(config: Any) -> Runner:
    """mmengine's Runner without its greeting; its own log goes below checkpoints/."""
    # mmengine starts OpenMP and OpenCV threads of its own unless told otherwise.
    config.env_cfg = {"cudnn_benchmark": False, "mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0}}
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.meshgrid.*")
        return Runner.from_cfg(config)
