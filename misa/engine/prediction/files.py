"""Output files of `predict`: the record of finished images, masks and overlays, COCO json, CSV and video.

Files are written atomically, so that a kill leaves only complete ones; an image's are written before its record.
"""

import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from pycocotools import mask as rle

from misa.data.formats.json_rows import object_file
from misa.data.images import Video
from misa.data.rle import decode_part
from misa.engine.prediction.shares import record_files
from misa.engine.prediction.student import Image, Instances
from misa.figures.overlay import label_palette, overlay
from misa.files import atomic_write


def rows_of(result: Instances) -> list[dict[str, Any]]:
    """Convert the instances of an image to plain values."""
    return [
        {
            "label": label,
            "score": round(float(score), 6),
            "box": [float(side) for side in box],
            "area": int(rle.area(runs)),
            "segmentation": runs,
            **({} if result.prompts is None else {"prompt": result.prompts[i]}),
        }
        for i, (label, score, box, runs) in enumerate(
            zip(result.labels, result.scores, result.boxes, result.runs, strict=True)
        )
    ]


_LONGEST_SIDE = 65500  # pixels of a JPEG


def paint(folder: Path, name: str, image: Image, result: Instances, *, masks: str, pictures: bool) -> None:
    """Write the PNG masks and the overlay of an image."""
    if masks == "none" and not pictures:
        return
    parts = [decode_part(runs) for runs in result.runs]
    if masks == "map":
        _save(folder / "masks" / f"{name}.png", instance_map(parts, result.size), format="PNG")
    elif masks == "each":
        for i, (top, left, pixels) in enumerate(parts):
            canvas = np.zeros(result.size, np.uint8)
            canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = 255 * pixels
            _save(folder / "masks" / name / f"{i + 1:04d}.png", Pillow.fromarray(canvas), format="PNG")
    if pictures:
        labels = [f"{label} {score:.2f}" for label, score in zip(result.labels, result.scores, strict=True)]
        picture = Pillow.fromarray(overlay(image, parts, labels))
        picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        _save(folder / "overlay" / f"{name}.jpg", picture, format="JPEG", quality=90)


def _save(path: Path, picture: Pillow.Image, **options: Any) -> None:
    with atomic_write(path) as partial:
        picture.save(partial, **options)


def forget(folder: Path, name: str, *, masks: str) -> None:
    """Delete the masks and overlay of an image; a film in the place of a folder for them gets another name."""
    # With "each" masks/a/0001.png is the first of the image a, and the image a/0001 has its masks below masks/a/0001/.
    of_each = (folder / "masks" / name).glob("[0-9]*.png") if masks == "each" else ()
    of_all = [folder / "masks" / f"{name}.png"] if masks == "map" else []
    overlays = folder / "overlay"
    for above in (overlays / name).parents:
        if above.is_relative_to(overlays) and above.is_file():
            above.replace(_beside_folder(above))
    for path in (overlays / f"{name}.jpg", *of_all, *of_each):
        path.unlink(missing_ok=True)


def is_frame(name: str) -> bool:
    """Whether the last part of a name is that of a video's frame: six or more digits."""
    number = name.rpartition("/")[2]
    return len(number) >= 6 and number.isascii() and number.isdigit()


def film_of(folder: Path, name: str) -> Path:
    """Where the film of a video's overlays is: NAME.mp4, or NAME.video.mp4 beside a folder of that name."""
    target = folder / "overlay" / f"{name}.mp4"
    return _beside_folder(target) if target.is_dir() else target


def _beside_folder(film: Path) -> Path:
    return film.with_suffix(".video.mp4")


def instance_map(parts: Sequence[tuple[int, int, NDArray[np.bool_]]], size: tuple[int, int]) -> Pillow.Image:
    """Draw an image (h w) of instance numbers from 1, 0 for background; the first of overlapping masks is on top.

    8 bits with a palette, or 16 bits for more than 255 instances.
    """
    wide = len(parts) > 255
    canvas = np.zeros(size, np.uint16 if wide else np.uint8)
    for i, (top, left, pixels) in reversed(list(enumerate(parts))):
        canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]][pixels] = i + 1
    picture = Pillow.fromarray(canvas)
    if not wide:
        picture.putpalette(label_palette())
    return picture


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of images, sorted by name, without lines truncated by a kill.

    A line has name, file, stamp, size, instances and call (`next_call`; 0 in older records). The last line of a name is
    valid, which is that of the highest call in whichever file; instances of None (not an empty list) delete the name's
    record.
    """
    last: dict[str, tuple[int, BinaryIO, int]] = {}
    with ExitStack() as stack:
        for path in record_files(folder):
            file: BinaryIO = stack.enter_context(path.open("rb"))
            inside = {row["name"]: (row.get("call", 0), file, place) for place, row in _lines(file)}
            last |= {name: line for name, line in inside.items() if name not in last or line[0] >= last[name][0]}
        for name in sorted(last):
            _, file, place = last[name]
            file.seek(place)
            row = json.loads(file.readline())
            if row["instances"] is not None:
                yield name, row


def next_call(folder: Path) -> int:
    """The number of a call that begins now: one above those in the records, so that its lines replace older ones."""
    call = 0
    for path in record_files(folder):
        with path.open("rb") as file:
            call = max([call, *(row.get("call", 0) for _, row in _lines(file))])
    return call + 1


def _lines(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the valid lines of a record file with their byte offsets."""
    place = 0
    for line in file:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and {"name", "file", "stamp", "size", "instances"} <= row.keys():
                yield place, row
        place += len(line)


@contextlib.contextmanager
def appended(path: Path) -> Iterator[BinaryIO]:
    """Open a record file to append lines; a line truncated by a kill is terminated first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as record:
        if record.tell():
            record.seek(-1, os.SEEK_END)
            if record.read() != b"\n":
                record.write(b"\n")
        yield record


def collect(folder: Path, classes: Sequence[str], *, prompted: bool) -> tuple[int, int]:
    """Write instances.json and instances.csv from the record, streaming; return the numbers of images and instances.

    prompted: whether instances belong to known boxes, whose numbers are then a column of the CSV.
    """
    category = {name: i + 1 for i, name in enumerate(classes)}
    images = instances = 0
    with _table(folder / "instances.csv", prompted) as line, object_file(folder / "instances.json") as result:
        result.value("categories", [{"id": i, "name": name} for name, i in category.items()])
        with result.rows("images") as add:
            for images, (_, row) in enumerate(records(folder), 1):
                h, w = row["size"]
                add({"id": images, "file_name": row["file"], "height": h, "width": w})
        with result.rows("annotations") as add:
            for image, (name, row) in enumerate(records(folder), 1):
                for number, found in enumerate(row["instances"], 1):
                    instances += 1
                    x1, y1, x2, y2 = found["box"]
                    add(
                        {
                            "id": instances,
                            "image_id": image,
                            "category_id": category[found["label"]],
                            "bbox": [x1, y1, x2 - x1, y2 - y1],
                            "area": found["area"],
                            "iscrowd": 0,
                            "score": found["score"],
                            "segmentation": found["segmentation"],
                        }
                    )
                    line(name, number, found, row["file"])
    return images, instances


@contextlib.contextmanager
def _table(path: Path, prompted: bool) -> Iterator[Callable[[str, int, Mapping[str, Any], str], None]]:
    """Open instances.csv, written atomically; yields a function of image name, mask value, instance and file."""
    with (
        atomic_write(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        head = ["image", "number", "label", "score", "x1", "y1", "x2", "y2", "area"]
        writer.writerow([*head, *(["box"] if prompted else []), "file"])

        def line(name: str, number: int, found: Mapping[str, Any], of: str) -> None:
            box = [f"{side:g}" for side in found["box"]]
            tail = [found["prompt"] + 1] if prompted else []
            writer.writerow([name, number, found["label"], found["score"], *box, found["area"], *tail, of])

        yield line


def film(folder: Path, video: Video, every: int) -> None:
    """Write the overlays of a video's frames as an mp4, unless there is one newer than all of them."""
    target = film_of(folder, video.name)
    pictures = [path for path in (folder / "overlay" / video.name).glob("*.jpg") if is_frame(path.stem)]
    pictures.sort(key=lambda path: (len(path.stem), path.stem))
    newest = max((picture.stat().st_mtime_ns for picture in pictures), default=0)
    if not pictures or (target.exists() and target.stat().st_mtime_ns > newest):
        return
    h, w = cv2.imread(str(pictures[0])).shape[:2]  # type: ignore[union-attr]
    rate = video.fps / every
    if rate > 65 or rate < 0.01:  # MPEG-4 has no finer unit of time than 1 / 65535
        rate = max(round(rate, 2 if rate <= 655 else 1), 0.01)
    with atomic_write(target, suffix=".part.mp4") as partial:  # OpenCV chooses the container by the suffix
        writer = cv2.VideoWriter(str(partial), cv2.VideoWriter_fourcc(*"mp4v"), rate, (w, h))  # type: ignore[attr-defined]
        try:
            for picture in pictures:
                writer.write(cv2.imread(str(picture)))  # type: ignore[arg-type]
        finally:
            writer.release()
