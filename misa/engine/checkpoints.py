"""The checkpoints of a run folder: which one to go on from."""

import re
import zipfile
from pathlib import Path

from misa.errors import UserError


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, None where there is none.

    What counts is what lies in the folder: it may have been moved or copied, and a kill may have cut the file that
    was being written. A damaged checkpoint is passed over, and said so.
    """
    found = sorted((folder / "checkpoints").glob("epoch_*.pth"), key=_epoch, reverse=True)
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


def _epoch(path: Path) -> int:
    number = re.search(r"\d+", path.stem)
    return int(number.group()) if number else -1


def _whole(path: Path) -> bool:
    """Whether every part of the file has the checksum that it was written with (torch saves zip archives)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False
