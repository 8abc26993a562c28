"""Checkpoints of a run folder: find the newest valid one, and load weights."""

import hashlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from misa.errors import UserError
from misa.files import missing, read_json
from misa.models.students.base import SHADOW, TRAINING_ONLY

CARD = "student"
"""Key of an exported file's row and classes, as JSON."""


def newest(folder: Path) -> Path | None:
    """Return the newest intact checkpoint of a run folder, or None.

    Files are searched for, since the folder may have been moved. A damaged checkpoint, such as one truncated by a kill,
    is skipped with a message.
    """
    found = sorted((folder / "checkpoints").glob("epoch_*.pth"), key=_progress, reverse=True)
    for path in found:
        if _whole(path):
            return path
        print(f"{path.name} is damaged; looking for the one before.")
    return None


def last_checkpoint(folder: Path) -> Path:
    """`newest`, or UserError if there is none."""
    path = newest(folder)
    if path is None:
        if not (folder / "params.json").exists():
            run = folder.resolve().parent
            if (run / "params.json").exists():
                raise UserError(f"{folder} is a part of the run folder {run}; give that, or one checkpoint.")
            raise UserError(f"{folder} is not a run folder: it holds no checkpoint; give one made by misa train.")
        raise UserError(f"{folder} holds no checkpoint; train it first, for example with misa train.")
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; executes no code in the file.

    Raises UserError: there is no such file, it was not written by torch, or it contains more than numbers and text.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give one of the files in the checkpoints folder of a run.")
    if not path.is_file():
        raise UserError(missing(path, "checkpoint", "give a run folder or a file of its checkpoints folder"))
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise UserError(
                        f"{path} is a TorchScript program; give a run folder, or a file that misa export wrote "
                        "without --torchscript."
                    )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # of a file that torch did not write
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:  # its text advises weights_only=False, which would execute code in the file
        raise UserError(f"{path} cannot be read as a checkpoint; give one made by misa train.") from None
    except Exception as error:  # torch raises many kinds for a truncated or foreign file
        reason = (str(error).splitlines() or [""])[0]
        why = f" ({reason})" if " " in reason else ""  # a KeyError of torch is one byte of a text file
        raise UserError(f"{path} cannot be read as a checkpoint{why}; give one made by misa train.") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path} holds no state_dict; give a checkpoint made by misa train.")
    return checkpoint


def record_of(path: Path, checkpoint: dict[str, Any]) -> Any:
    """The values that a checkpoint's card or run folder states, "experiment" and "classes"; None if there is neither.

    They may be of another version: nothing in them is checked. ValueError for a card that is no JSON.
    """
    card = checkpoint.get(CARD)
    return read_json(path.parent.parent / "params.json") if card is None else json.loads(card)


def predicting(weights: dict[str, Tensor], *, from_shadow: bool) -> dict[str, Tensor]:
    """The weights of the network that predicts: with `Inference.from_shadow` the EMA model's, under their own names."""
    if not from_shadow:
        return weights
    return {name.removeprefix(SHADOW): value for name, value in weights.items() if name.startswith(SHADOW)}


def weights_digest(weights: dict[str, Tensor]) -> str:
    """A short hash of the weights, which copying and exporting preserve."""
    total = hashlib.sha256()
    for name in sorted(weights):
        if not name.startswith(TRAINING_ONLY):
            value = weights[name].detach().cpu().reshape(-1).contiguous()
            total.update(name.encode() + value.view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16
    return total.hexdigest()[:12]


@contextmanager
def tensors_only() -> Iterator[None]:
    """Context in which torch.load unpickles no objects; mmengine would do so if loading with weights_only fails."""
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
    """Progress of a checkpoint, from its name: epochs, then steps if it was saved within an epoch."""
    return tuple(int(number) for number in re.findall(r"\d+", path.stem))


def _whole(path: Path) -> bool:
    """Whether the checksums of all parts of the file are right (torch saves zip archives)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises many kinds for a damaged directory
        return False


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint's weights, all or none; executes no code in the file."""
    fill(model, read_checkpoint(path)["state_dict"], path)


def fill(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load all of the model's weights, or none, from those read from `path`; additional ones are ignored."""
    require_fit(model, weights, path)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})


def require_fit(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Raise UserError if weights read from `path` are missing or have other shapes than the model's."""
    for name, value in model.state_dict().items():
        there = weights.get(name)
        if not isinstance(there, Tensor) or there.shape != value.shape:
            what = f"has shape {tuple(there.shape)}" if isinstance(there, Tensor) else "is missing"
            raise UserError(
                f"{path} is a checkpoint of another model: {name} {what}, this run's has {tuple(value.shape)}; "
                "give a checkpoint of the same row."
            )
