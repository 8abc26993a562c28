"""Device, loggers, and mmengine's Runner without its printed banner."""

import contextlib
import hashlib
import io
import itertools
import os
import sys
import uuid
import warnings
from pathlib import Path
from typing import Any

import mmengine.device.utils
import torch
from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmengine.visualization import MLflowVisBackend, TensorboardVisBackend, Visualizer, WandbVisBackend

from misa.engine.runs.start import Start, begin
from misa.engine.training.parallel import join
from misa.errors import UserError, option_name
from misa.files import read_json, write_first
from misa.machine import Machine

_VISUALIZERS = itertools.count()
_RUNNERS = itertools.count(1)


def visualizer_config(folder: Path, loggers: tuple[str, ...] | None) -> dict[str, Any]:
    """Config of mmengine's visualizer for a run folder, with TensorBoard and `loggers`; None: without any."""
    backends: list[dict[str, Any]] = []
    if loggers is not None:
        backends.append({"type": TensorboardVisBackend, "save_dir": str(folder / "tensorboard")})
    if loggers and "wandb" in loggers:
        start = {"project": "misa", "name": folder.name, "dir": str(folder), "resume": "allow", "id": run_id(folder)}
        backends.append({"type": WandbVisBackend, "save_dir": str(folder / "wandb"), "init_kwargs": start})
    if loggers and "mlflow" in loggers:
        backends.append(
            {"type": MLflowVisBackend, "exp_name": "misa", "run_name": folder.name, **_mlflow_store(folder)}
        )
    # A unique name: mmengine keeps one visualizer per name, even when closed, and warns if a name is used again.
    name = f"misa {folder} {next(_VISUALIZERS)}"
    return {"type": Visualizer, "vis_backends": backends or None, "name": name, "save_dir": str(folder)}


def _mlflow_store(folder: Path) -> dict[str, Any]:
    """The server in MLflow's variable MLFLOW_TRACKING_URI, by default a database in the run folder.

    mmengine would write plain files, which MLflow 3 rejects, and ignore the variable.
    """
    kept = folder.absolute() / "mlflow"
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if server:
        return {"save_dir": str(kept), "tracking_uri": server}
    place = {"tracking_uri": f"sqlite:///{kept / 'mlflow.db'}", "artifact_location": (kept / "artifacts").as_uri()}
    return {"save_dir": str(kept), **place}


def run_id(folder: Path) -> str:
    """A run's id, kept in its folder, so that W&B continues the same curve after a resume, and no other run's."""
    place = folder / "wandb"
    path = place / "run_id.json"
    if not path.is_file():
        # Earlier versions' was of the path, which runs of two machines, or one after the other, may share.
        earlier = hashlib.sha256(str(folder).encode()).hexdigest()
        place.mkdir(parents=True, exist_ok=True)
        begun = any(not one.name.startswith(path.name) for one in place.iterdir())
        new = earlier if begun else uuid.uuid4().hex
        write_first(path, {"id": new[:16]})
    return str((read_json(path) or {})["id"])


def choose_device(machine: Machine) -> str:
    """Set threads and device, for which mmengine would use any available GPU, and return the device.

    Initializes the process group if torchrun or SLURM has started several processes. UserError for missing GPUs.
    """
    gpus = machine.gpus
    torch.set_num_threads(machine.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(machine.threads))  # otherwise mmengine sets its own value
    if gpus and not torch.cuda.is_available():
        name = option_name("gpus")
        raise UserError(f"{name} is {gpus}, but torch finds no CUDA device; set {name} to 0, or see `misa doctor`.")
    use_cuda = torch.cuda.is_available() if gpus is None else gpus > 0
    mmengine.device.utils.DEVICE = device = "cuda" if use_cuda else "cpu"
    join(cuda=use_cuda)
    return device


class _QuietRunner(Runner):
    start: Start | None = None
    """The weights that the network begins with; mmengine would load a start without saying what fits."""

    def load_or_resume(self) -> None:
        """Load the checkpoint without mmengine's printed line about its storage.

        Called after `init_weights`, and once more before the test, which is of the trained weights.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            super().load_or_resume()
        start, self.start = self.start, None
        if start is not None:
            begin(self.model.module if is_model_wrapper(self.model) else self.model, start)


def quiet_runner(config: Config) -> _QuietRunner:
    """Build mmengine's Runner without its printed banner; its log is below checkpoints/.

    The name is made unique: Runners of one name share history, logger and writers, and mmengine's suffix is a time in
    whole seconds.
    """
    warnings.filterwarnings("ignore", message=".*torch.meshgrid.*")
    named = config.copy()
    named.experiment_name = f"{config.experiment_name}-{next(_RUNNERS)}"
    with contextlib.redirect_stdout(io.StringIO()):
        return _QuietRunner.from_cfg(named)


def close_loggers(runner: Runner) -> None:
    """Close a runner's loggers; where one cannot be closed, warn: the training itself has ended, well or not."""
    try:
        runner.visualizer.close()
    except Exception as error:  # any logger's
        print(f"warning: a logger could not be closed ({error}).", file=sys.stderr, flush=True)
