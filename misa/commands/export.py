"""Export a student as one file with its row and class names, without teacher and optimizer.

example: misa export runs/demo-long-seed0 student.pth
"""

from misa.commands import _shared as shared
from misa.parameters import Parameters, argument, option


class Export(Parameters):
    """Options of `misa export`."""

    checkpoint: str = argument("run folder, or a checkpoint in it")
    out: str = argument("the new file")
    torchscript: bool = option(False, "the dense part of a SOLOv2 as a TorchScript program instead")


def run(options: Export) -> int:
    """Write the file and print its size."""
    shared.require_student(options.checkpoint)
    from misa.engine.prediction.export import export_student, export_torchscript

    if options.torchscript:
        made = export_torchscript(options.checkpoint, options.out)
        path, more = made.path, f"; at most {made.difference:.1e} from the student, at several sizes"
    else:
        path, more = export_student(options.checkpoint, options.out), ""
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB{more}")
    return 0
