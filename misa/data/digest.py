"""Identify the state of a data set by a digest of each split's annotations that does not depend on their location.

For COCO's own layout it is the SHA-256 of the JSON file; for other formats that of the converted annotations without
the file paths, so that moving a data set keeps it. Images count by name and size. Standard library only.
"""

import functools
import hashlib
from pathlib import Path

from misa.data.formats.coco import Split

_MADE = (b'"plain_of": ', b'"converted_from": ', b'"faults": ')  # lines of converted files that hold paths
_PLACE = b', "where": '  # the last key of a converted row; inside a string the quotes would be escaped


def data_digests(train: Split, val: Split) -> dict[str, str]:
    """Returns the digest of each split whose annotations exist."""
    splits = {"train": train.annotations, "val": val.annotations}
    return {split: digest_of(path) for split, path in splits.items() if path.is_file()}


def digest_of(path: Path) -> str:
    """Returns the digest of an annotation file, cached in the process while size and modification time stay."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _digest(path: Path, size: int, time: int) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        if not file.read(32)[2:].startswith(_MADE[:2]):
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        faults = False  # whether the lines are those of faults, which name places, too
        for line in file:
            faults = line.startswith(_MADE[2]) or (faults and line.startswith(b"["))
            if not (faults or line.startswith(_MADE)):
                found.update(line.partition(_PLACE)[0])
    return found.hexdigest()
