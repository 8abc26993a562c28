"""Export a trained student as one small file (weights, row and class names), or its dense part as TorchScript.

The file contains only tensors and text and is read with weights_only=True, so that an untrusted file cannot execute
code. TorchScript is a program; load it only from a trusted source.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import misa
from misa.engine.prediction.student import Image, Student, find, for_inference, load_student
from misa.engine.runs.checkpoints import CARD, read_checkpoint
from misa.errors import UserError, counted
from misa.experiment import FRAMEWORKS
from misa.files import atomic_write
from misa.models.students.table import implementation

_FORMAT = 1
# Input shapes, other than the traced one, at which the program is compared, to detect constants frozen by tracing.
_CHECKED = ((1, 64, 96), (2, 128, 64), (1, 96, 160))


def export_student(checkpoint: str | Path | Student, out: str | Path, *, renew: bool = False) -> Path:
    """Write the student of a run folder or checkpoint to the new file `out` and return its path.

    Teacher, FSD's adapter, optimizer and random states are not included. Predictions equal the checkpoint's bit for
    bit, see `load_student`. renew: replace an earlier export at `out`, but no other file.
    Raises UserError: no student there, or `out` exists already or cannot be written.
    """
    student = checkpoint if isinstance(checkpoint, Student) else load_student(checkpoint, device="cpu")
    content = {CARD: _card(student), "state_dict": {k: v.cpu() for k, v in student.model.state_dict().items()}}
    place = _place(out, program=False)
    renew = renew and place.is_file() and CARD in read_checkpoint(place)
    return _put(place, lambda partial: torch.save(content, partial), renew=renew)


def compare_export(checkpoint: str | Path, exported: str | Path, images: Sequence[Image]) -> str:
    """Return a sentence saying that an exported file is the checkpoint's student.

    Compares weights, row and classes, and class, score and mask of every instance found in RGB images (h w 3), whatever
    its score. Raises UserError at the first difference.
    """
    ours, theirs = (load_student(path, device="cpu") for path in (checkpoint, exported))
    before, after = (
        {
            "weights": student.digest,
            "row or classes": _card(student),
            "instances": [(n.labels, n.scores.tolist(), n.runs) for n in find(student, images, score=0.0)],
        }
        for student in (ours, theirs)
    )
    if differ := [name for name in before if before[name] != after[name]]:
        raise UserError(f"{exported} has other {differ[0]} than the student of {checkpoint}; export it again.")
    found = counted(sum(len(labels) for labels, *_ in before["instances"]), "instance")
    return f"the exported student has the same weights and finds the same {found} in {counted(len(images), 'image')}"


@dataclass(frozen=True)
class Scripted:
    """A TorchScript file, and the largest difference between its outputs and the student's in the check."""

    path: Path
    difference: float


def export_torchscript(checkpoint: str | Path | Student, out: str | Path) -> Scripted:
    """Write the dense part of a SOLOv2 student as TorchScript to the new file `out`, and compare it with the student.

    Input: RGB images (b 3 h w), float32, 0..255, resized and padded with the row's mean color to multiples of 32 (see
    `DensePart`). Output: kernels (b p d), class probabilities (b p c), the feature I (b d h/4 w/4), for
    `misa.models.students.solov2_decode.decode`. Image size and batch size are free.

    Not supported: decoding, since matrix NMS and the number of instances are data-dependent (`decode` is in Python);
    students other than SOLOv2; backbones whose trace is of one image size, as mmdet's Swin (timm's are not); half
    precision; ONNX, which requires its own package.
    Raises UserError: another student, such a backbone, or `out` exists already or cannot be written.
    """
    place = _place(out, program=True)
    student = checkpoint if isinstance(checkpoint, Student) else load_student(checkpoint, device="cpu")
    script = implementation(student.experiment.student).script
    if script is None:
        able = [name for name in FRAMEWORKS if implementation(name).script is not None]
        raise UserError(
            f"{student.path} is a {student.experiment.student}; TorchScript is there for {', '.join(able)} students."
        )
    dense = script(student).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and the head builds its grids in Python
        program = torch.jit.trace(dense, _noise(1, 128, 128, student), check_trace=False)
        difference = max(differences(program, dense, student))
    if not difference <= 1e-4:
        raise UserError(
            f"TorchScript of the backbone {student.experiment.network.backbone} gives other values for other sizes "
            f"(by {difference:.1e}); export without torchscript, or train with another backbone, such as timm's."
        )
    extra = {"card.json": _card(student)}

    def save(partial: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(program, str(partial), _extra_files=extra)

    return Scripted(_put(place, save), difference)


def differences(program: Any, dense: nn.Module, student: Student) -> list[float]:
    """Largest absolute difference between the program's and the student's outputs, for each output and input."""
    return [
        float((ours - theirs).abs().max())
        for batch, h, w in _CHECKED
        for images in [_noise(batch, h, w, student)]
        for ours, theirs in zip(program(images), dense(images), strict=True)
    ]


def _noise(batch: int, h: int, w: int, student: Student) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 255 * torch.rand(batch, 3, h, w, generator=generator).to(student.device)


def _card(student: Student) -> str:
    values = for_inference(student.experiment).values()
    card = {"format": _FORMAT, "misa": misa.__version__, "classes": list(student.classes), "experiment": values}
    return json.dumps(card)


def _place(out: str | Path, *, program: bool) -> Path:
    """The file to write; UserError if its suffix is that of another form than weights, or a TorchScript `program`."""
    place = Path(out).expanduser()
    if place.suffix == ".onnx":
        raise UserError(f"out {place}: ONNX is not supported; write weights (.pth) or a TorchScript program (.ts).")
    if program and place.suffix == ".pth":
        raise UserError(f"out {place}: a .pth file holds weights, and this is a TorchScript program; name it .ts.")
    if not program and place.suffix in (".ts", ".torchscript"):
        raise UserError(f"out {place} is named as a TorchScript program; add torchscript, or name the weights .pth.")
    return place


def _put(out: Path, write: Callable[[Path], None], *, renew: bool = False) -> Path:
    """Write a new file atomically; UserError if it exists already, unless `renew`, or cannot be written."""
    if out.is_dir():
        raise UserError(f"out {out} is a folder; give the name of a new file, for example {out / 'student.pth'}.")
    if out.exists() and not renew:
        raise UserError(f"out {out} exists already; give another name, or delete it first.")
    try:
        with atomic_write(out) as partial:
            write(partial)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"out {out} cannot be written ({reason}); choose another place.") from error
    return out
