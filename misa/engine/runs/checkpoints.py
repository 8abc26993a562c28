"""The checkpoints of a run folder: which one to go on from."""

import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from misa.errors import UserError
from misa.files import missing


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, None where there is none.

    What counts is what lies in the folder: it may have been moved or copied, and a kill may have cut the file that
    was being written. A damaged checkpoint is skipped with a message.
    """
    found = sorted((folder / "checkpoints").glob("epoch_*.pth"), key=_progress, reverse=True)
    for path in found:
        if _whole(path):
            return path
        print(f"{path.name} is damaged; looking for the one before.")
    return None


def last_checkpoint(folder: Path) -> Path:
    """`newest`, or UserError where there is none."""
    path = newest(folder)
    if path is None:
        raise UserError(f"{folder} holds no checkpoint; train it first, for example with misa train.")
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; executes nothing that is in the file.

    Raises:
        UserError: there is no such file, or it is none that torch has written, or it holds more than numbers and text.
    """
    if not path.is_file():
        raise UserError(missing(path, "checkpoint", "give a run folder or a file of its checkpoints folder"))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut or not its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}); give one made by misa train.") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path} holds no state_dict; give a checkpoint made by misa train.")
    return checkpoint


@contextmanager
def tensors_only() -> Iterator[None]:
    """Inside, no torch.load of this process unpickles objects: mmengine's own would, where the careful way fails."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _progress(path: Path) -> tuple[int, ...]:
    """How far a checkpoint has come: whole epochs, then steps where it was saved within one."""
    return tuple(int(number) for number in re.findall(r"\d+", path.stem))


def _whole(path: Path) -> bool:
    """Whether every part of the file has the checksum that it was written with (torch saves zip archives)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


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
