"""Detections of a student as COCO results, from its run folder or another file."""

import json
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from misa.data.check.masks import mask_fault_of
from misa.engine.runs.scores import DETECTIONS
from misa.errors import UserError, option_name, whole


def results_file(folder: Path, given: str | Path | None = None) -> Path:
    """A results file, `given` or the run's own; UserError if none is given and the run has none."""
    if given is None and not (folder / DETECTIONS).is_file():
        raise UserError(
            f"{folder} has no predictions, as a training writes them at its end; let the same misa train go on, or "
            f"give {option_name('predictions')} the file of misa evaluate --predictions."
        )
    return Path(given or folder / DETECTIONS).expanduser()


def read_detections(path: Path, truth: COCO, truth_of: Path) -> list[dict[str, Any]]:
    """Read a COCO results file; UserError if it is not one for this data."""
    if not path.is_file():
        raise UserError(f"there are no predictions {path}; correct {option_name('predictions')}, or leave it out.")
    try:
        rows = json.loads(path.read_bytes())
        if not isinstance(rows, list):
            raise UserError(f"{path} is not a list of detections; give the file of misa evaluate --predictions.")
        for row in rows:
            for key, known in (("image_id", truth.imgs), ("category_id", truth.cats)):
                if not whole(row[key]):
                    raise UserError(f"{path} has the {key} {row[key]!r}, which is not a whole number; correct it.")
                if row[key] not in known:
                    message = f"{path} holds predictions on other data: {key} {row[key]} is not in this"
                    raise UserError(f"{message}; give {option_name('data_root')}, or predictions on {truth_of}.")
            if not (isinstance(row["segmentation"], dict) and isinstance(row["segmentation"]["counts"], str)):
                fault: str | None = "is not run lengths as text"
            elif not -1e9 < row["score"] < 1e9:
                fault = "or its score is not a number"
            else:
                fault = mask_fault_of(row, truth.imgs[row["image_id"]])
            if fault is not None:
                raise ValueError(f"a segmentation of image {row['image_id']} {fault}")
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a COCO results file with masks ({error!r}); evaluate the run again.") from error
    return list(rows)
