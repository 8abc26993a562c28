"""Detections on COCO test-dev, whose ground truth is not public, in the format of the evaluation server.

The server is closed; results are therefore compared on val2017, whose ground truth is public.
"""

import shutil
import tempfile
import zipfile
from pathlib import Path

from misa.data.formats.coco import Split
from misa.data.formats.coco2017 import TEST_DEV, list_images
from misa.data.source import Source
from misa.engine.reports.evaluate import Trained, predict_split
from misa.engine.runs.scores import DETECTIONS
from misa.errors import UserError
from misa.files import atomic_write
from misa.machine import Machine

NOTE = "public scoring of test-dev is closed and its truth is not public; compare on val2017 (misa evaluate)."


def submit(run: Trained, data_root: str | Path, out: str | Path, *, machine: Machine | None = None) -> Path:
    """Detect on test-dev2017, and write the results as json and as a zip to upload; return the zip.

    `run` is of `load_run`, `data_root` contains annotations/image_info_test-dev2017.json and test2017/. `out` is a
    folder, made if there is none.
    Raises UserError: a teacher's run, missing list or images, this run's results are in `out` already, or it is a file.
    """
    out = Path(out).expanduser()
    if run.experiment.semantic is not None:
        raise UserError(f"{run.folder} is a semantic teacher; test-dev scores instances, a student's.")
    split = _test_dev(Path(data_root).expanduser())
    target = out / f"detections_test-dev2017_{run.folder.name}_results.json"
    archive = target.with_suffix(".zip")
    if archive.exists() or target.exists():
        there = archive if archive.exists() else target
        raise UserError(f"{there} is there already; give another folder or delete it.")
    try:
        out.mkdir(parents=True, exist_ok=True)  # before the work whose result is written there
    except OSError as error:
        raise UserError(f"the folder {out} cannot be made ({error.strerror}); choose another one.") from error
    source = Source(Path(data_root), split, split, tuple(run.params["classes"]))
    with tempfile.TemporaryDirectory() as scratch:
        predict_split(run, source, Path(scratch), machine)
        with atomic_write(archive) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
            file.write(Path(scratch) / DETECTIONS, target.name)
        with atomic_write(target) as partial:
            shutil.copyfile(Path(scratch) / DETECTIONS, partial)
    return archive


def _test_dev(root: Path) -> Split:
    """Open the list and images; UserError if any are missing."""
    path = root / TEST_DEV
    if not path.is_file():
        raise UserError(f"{path} is missing; fetch image_info_test2017.zip from cocodataset.org.")
    images = next((p for p in (root / "test2017", root / "images" / "test2017") if p.is_dir()), None)
    if images is None:
        raise UserError(f"{root} has no test2017 folder; fetch test2017.zip from cocodataset.org.")
    names = list_images(path)
    there = {entry.name for entry in images.iterdir()}
    absent = [name for name in names if name not in there]
    if absent:
        raise UserError(f"{images} lacks {len(absent)} of {len(names)} listed images, such as {absent[0]}; fetch them.")
    return Split(path, images)
