"""The run folder: everything that made a result, and the result."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import misa
from misa.errors import UserError
from misa.experiment import Experiment

FILES = ("params.json", "env.json", "config.py", "log.txt", "losses.jsonl", "metrics.json")


def write_json(path: Path, value: Any) -> None:
    """Write a json file in one step: a killed process leaves the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """The value of a json file, or None where there is none; UserError where it cannot be read."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not readable json ({error}); move it away and run again.") from error


def run_params(experiment: Experiment, *, row: str, seed: int, data_root: Path) -> dict[str, Any]:
    """What makes a run that run; the same values again mean the same run."""
    return {
        "row": row,
        "digest": experiment.digest(),
        "seed": seed,
        "data_root": str(data_root),
        "experiment": experiment.values(),
    }


def claim(folder: Path, params: dict[str, Any]) -> None:
    """Make `folder` this run's own; UserError if it cannot be written or holds another run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"work_dir {folder} cannot be written ({error.strerror}); choose another work_dir.") from error
    before = read_json(folder / "params.json")
    if before is not None:
        for name in ("digest", "seed", "data_root"):
            if before.get(name) != params[name]:
                raise UserError(
                    f"work_dir {folder} holds another run ({name} {before.get(name)}, row {before.get('row')}), "
                    f"this one has {name} {params[name]}; choose another work_dir or delete that one."
                )
        return
    foreign = [name for name in FILES if (folder / name).exists()]
    if foreign:
        raise UserError(f"work_dir {folder} has a {foreign[0]} but no params.json; choose an empty folder.")
    write_json(folder / "params.json", params)


def environment() -> dict[str, Any]:
    """The versions, device and commit that a result came from."""
    import mmcv
    import mmdet
    import mmengine
    import numpy
    import torchvision

    return {
        "misa": misa.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "mmdet": mmdet.__version__,
        "mmcv": mmcv.__version__,
        "mmengine": mmengine.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(misa.__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def last_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of a run folder; UserError where there is none."""
    pointer = folder / "checkpoints" / "last_checkpoint"
    path = Path(pointer.read_text().strip()) if pointer.exists() else None
    # The folder may have been moved since: what counts is the file's name.
    found = folder / "checkpoints" / path.name if path else None
    if found is None or not found.exists():
        raise UserError(f"{folder} holds no checkpoint; train it first, for example with misa train.")
    return found
