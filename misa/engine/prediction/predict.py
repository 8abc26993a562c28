"""Predict with a student on images, folders and videos: masks, overlays, COCO json and CSV; no annotations needed.

    from misa.engine.prediction.predict import predict
    predict("runs/demo-long-seed0", ["photos", "film.mp4"], out="results")

For arrays in memory see `misa.engine.prediction.student.find`, for known boxes
`misa.engine.prediction.known_boxes.find_boxes`.
"""

import dataclasses
import filecmp
import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from misa.data.formats.coco import DataError, PathLike
from misa.data.formats.names import plain_name
from misa.data.images import Picture, Video, find_inputs, frames, read_image
from misa.engine.prediction.files import (
    appended,
    collect,
    film,
    film_of,
    forget,
    is_frame,
    next_call,
    paint,
    records,
    rows_of,
)
from misa.engine.prediction.known_boxes import find_boxes, reaching_beyond, require_class, without_area
from misa.engine.prediction.shares import DONE, Share
from misa.engine.prediction.student import Image, Instances, Student, find, load_student, require_mask_threshold
from misa.engine.prediction.tiling import find_tiled
from misa.errors import UserError, option_name
from misa.experiment import require_types
from misa.files import read_json, write_first

MASKS = ("map", "each", "none")
"""One indexed PNG per image, one PNG per instance, or none."""
_CARD = "predict.json"


class _Frame(NamedTuple):
    """An image to predict: the name of its results, its file, path, stamp to detect changes, and pixels."""

    name: str
    file: str
    source: str
    stamp: tuple[int, ...]
    image: Image


class Boxes(NamedTuple):
    """Known boxes of an image: `boxes` (n 4, x1 y1 x2 y2 in pixels) and `labels`, None if unknown."""

    boxes: NDArray[np.float64]
    labels: list[str | None]


@dataclass(frozen=True)
class Options:
    """Settings of a folder's predictions; a call with equal settings resumes it. See `predict`."""

    score: float = 0.3
    mask: float | None = None
    tile: int | None = None
    overlap: int = 128
    every: int = 1
    masks: Literal["map", "each", "none"] = "map"
    overlay: bool = True

    def __post_init__(self) -> None:
        for name in ("score", "mask"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 <= value <= 1:
                raise UserError(f"{name} must be from 0 to 1, not {value!r}.")
        if self.masks not in MASKS:
            raise UserError(f"masks must be one of {', '.join(MASKS)}, not {self.masks!r}.")
        try:
            require_types(self, "predict")
        except TypeError as error:
            raise UserError(f"{error}.") from error
        if self.tile is not None and self.tile < 32:
            raise UserError(f"tile must be at least 32 pixels, not {self.tile}.")
        if self.tile is not None and not 0 <= self.overlap < self.tile:
            raise UserError(f"overlap must be at least 0 and below tile ({self.tile}), not {self.overlap}.")
        if self.every < 1:
            raise UserError(f"every must be at least 1, not {self.every}.")


@dataclass(frozen=True)
class Predictions:
    """Result of `predict`: the folder, its numbers of images and instances, and the images that failed.

    given: how many of these images and instances belong to the inputs of this call. predicted: how many images it had
    to predict. Of a share, images and instances are those that all shares have on record so far. unanswered: number of
    known boxes without a mask, by image name. clipped: number of known boxes that reach beyond their image by more than
    a pixel, by image name. outside: number of those that have no area in it, where others have. unused: image names
    with boxes that are not inputs. skipped: files in the given folders that are no images. names: of the results of
    these inputs, in order; empty for a share.
    """

    folder: Path
    images: int
    instances: int
    failed: dict[str, str]
    unanswered: dict[str, int] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    given: tuple[int, int] = (0, 0)
    predicted: int = 0
    clipped: dict[str, int] = dataclasses.field(default_factory=dict)
    outside: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()


def predict(
    checkpoint: str | Path | Student,
    inputs: PathLike | Sequence[PathLike],
    *,
    out: PathLike,
    boxes: Mapping[str, Boxes] | None = None,
    batch: int = 1,
    device: str = "auto",
    share: Share | None = None,
    **options: Any,
) -> Predictions:
    """Predict on image files, folders and videos, and write the results to the folder `out`.

    `out` contains masks/ (PNG), overlay/ (JPEG; of a video also an mp4), instances.json (COCO, with run-length encoding
    and scores) and instances.csv. The same call again resumes, and predicts only new or changed images.

    Args:
        checkpoint: a run folder, a checkpoint in it, a file made by `misa export`, or a loaded student.
        inputs: files and folders; results are named by their paths.
        out: a new folder, or one made by the same call.
        boxes: known boxes by image name; one mask is predicted per box (`find_boxes`), and images without boxes are
            skipped.
        batch: images per batch; it affects results only by rounding.
        device: "cpu", "cuda", "cuda:1", or "auto".
        share: the part of the images to predict; the same call without a share then writes the tables of all.
        options: the fields of `Options`: score and mask (thresholds), tile and overlap (pixels; very large images in
            parts), every (every n-th frame of a video), masks ("map": an indexed PNG per image, with the instances'
            numbers in the CSV; "each": a PNG per instance; "none"), overlay.

    Raises UserError: wrong input, before anything is written. Images that cannot be read are listed in `failed`.
    """
    try:
        chosen = Options(**options)
    except TypeError as error:
        names = ", ".join(field.name for field in dataclasses.fields(Options))
        raise UserError(f"predict: {str(error).split('() ')[-1]}; the options are {names}.") from error
    if batch < 1:
        raise UserError(f"batch must be at least 1, not {batch}.")
    if boxes is not None and chosen.tile is not None:
        raise UserError("boxes and tile do not go together: known boxes are looked at in the whole image.")
    folder = Path(out).expanduser().resolve()
    found, left, skipped = _found(inputs, folder)
    student = checkpoint if isinstance(checkpoint, Student) else load_student(checkpoint, device=device)
    require_mask_threshold(student, chosen.mask)
    known, unused = _boxes_by_name(boxes, found, student) if boxes is not None else (None, ())
    share = share or Share()
    with share.locked(folder, option_name("out")):
        require_own(folder, _settings(student, chosen, known))
        predicted, failed = _work(student, found, folder, chosen, known, batch, share, left)
        if not share.whole:
            rows = [len(row["instances"]) for _, row in records(folder)]
            return replace(_result(folder, (len(rows), sum(rows)), failed, known, unused), skipped=skipped)
        held = collect(folder, student.classes, prompted=known is not None)
        for item in found:
            if chosen.overlay and isinstance(item, Video):
                film(folder, item, chosen.every)
        each = {row["name"]: len(row["instances"]) for _, row in _of(found, folder)}
        given = len(each), sum(each.values())
        result = _result(folder, held, failed, known, unused)
        return replace(result, given=given, predicted=predicted, skipped=skipped, names=tuple(each))


def _found(
    inputs: PathLike | Sequence[PathLike], folder: Path
) -> tuple[list[Picture | Video], dict[str, str], tuple[Path, ...]]:
    """The inputs of a call, the messages on files that are left out, and the files that are no images."""
    left: dict[str, str] = {}
    skipped: dict[Path, None] = {}
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    return find_inputs(given, out=folder, failed=left, skipped=skipped), left, tuple(skipped)


def _settings(student: Student, options: Options, boxes: Mapping[str, Boxes] | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"weights": student.digest, "classes": list(student.classes)}
    unused = {name for name, idle in (("score", boxes is not None), ("overlap", options.tile is None)) if idle}
    used = {name: value for name, value in dataclasses.asdict(options).items() if name not in unused}
    settings |= {f"options.{name}": value for name, value in used.items()}
    return settings | {"boxes": boxes is not None}


def require_own(
    folder: Path,
    settings: dict[str, Any],
    *,
    card: str = _CARD,
    what: str = "predictions",
    out: Path | None = None,
    advice: str = "choose another folder or delete that one",
) -> None:
    """Raise UserError if the folder holds anything but results with these settings, which are stored in `card`.

    out: the requested output, if it is not the folder itself. advice: advice for different settings.
    """
    before = read_json(folder / card)
    if before is None:
        names = sorted(path.name for path in folder.iterdir())
        others = [name for name in names if name not in (".lock", "shards") and not name.startswith(card)]
        if others and not (folder / card).exists():  # else other shares have begun in the meantime
            place = f"out {folder}" if out is None else f"out {out}: the folder {folder.name} beside it"
            raise UserError(
                f"{place} holds {others[0]} and no {what}; choose {'a new folder' if out is None else 'another out'}."
            )
        write_first(folder / card, settings)
        before = read_json(folder / card) or {}
    for name, value in settings.items():
        if before.get(name) != value:
            raise UserError(
                f"out {out or folder} was made with other settings ({name.removeprefix('options.')} is "
                f"{before.get(name)} there and {value} here); {advice}."
            )


def _of(inputs: Sequence[Picture | Video], folder: Path) -> Iterator[tuple[Picture | Video, dict[str, Any]]]:
    """The records of the inputs; each frame of a video has one."""
    pictures = {item.name: item for item in inputs if isinstance(item, Picture)}
    videos = {item.name: item for item in inputs if isinstance(item, Video)}
    for name, row in records(folder):
        video = videos.get(name.rpartition("/")[0]) if is_frame(name) else None
        if (item := pictures.get(name) or video) is not None:
            yield item, row


def _require_same_files(folder: Path, inputs: Sequence[Picture | Video]) -> None:
    """Raise UserError if results of another file have the name of an input and would be overwritten."""
    for item, row in _of(inputs, folder):
        path = os.path.abspath(item.path)
        source = row.get("source", path)
        # An equal stamp is a file that was moved, or another one of equal size and time, as after unzipping.
        changed = row["stamp"][:2] != list(item.stamp)
        if source != path and (changed or (os.path.isfile(source) and not filecmp.cmp(source, path, shallow=False))):
            raise UserError(
                f"out {folder} holds results of {source}, which those of {path} would replace, as both are "
                f"called {row['name']}; choose another out."
            )


def _work(
    student: Student,
    inputs: Sequence[Picture | Video],
    folder: Path,
    options: Options,
    boxes: Mapping[str, Boxes] | None,
    batch: int,
    share: Share,
    left: Mapping[str, str],
) -> tuple[int, dict[str, str]]:
    """Predict unfinished images, recorded one per line; return their number, and those that failed or were left.

    UserError where a result of another file would be replaced.
    """
    _require_same_files(folder, inputs)
    outdated = _outdated(inputs, folder, boxes) if share.whole else []
    films = {os.path.abspath(item.path) for item in inputs if isinstance(item, Video)}
    done = {name: row["stamp"] for name, row in records(folder)}
    predicted, failed, call = 0, dict(left), next_call(folder)
    with appended(share.place(folder) / DONE) as record:
        for row in outdated:
            forget(folder, row["name"], masks=options.masks)
            if row.get("source") in films:  # under its former name; it is made again from the frames
                film_of(folder, row["name"].rpartition("/")[0]).unlink(missing_ok=True)
            record.write(json.dumps(row | {"instances": None, "call": call}).encode() + b"\n")
        for group in _batches(_images(inputs, options, done, boxes, failed, share), batch):
            results = _find(student, group, options, boxes, failed, batch)
            for frame, result in zip(group, results, strict=True):
                if result is None:
                    continue
                forget(folder, frame.name, masks=options.masks)
                paint(folder, frame.name, frame.image, result, masks=options.masks, pictures=options.overlay)
                row = {"name": frame.name, "file": frame.file, "source": frame.source, "stamp": frame.stamp}
                row |= {"size": result.size, "instances": rows_of(result), "call": call}
                # After the image's files, so that those of recorded images exist.
                record.write(json.dumps(row).encode() + b"\n")
                record.flush()
                predicted += 1
        # The results of images that have changed and failed are of their earlier content.
        for name in sorted((failed.keys() - left.keys()) & done.keys()):
            forget(folder, name, masks=options.masks)
            gone: dict[str, Any] = {"name": name, "file": "", "stamp": [], "size": [], "instances": None, "call": call}
            record.write(json.dumps(gone).encode() + b"\n")
    return predicted, failed


def _find(
    student: Student,
    group: Sequence[_Frame],
    options: Options,
    boxes: Mapping[str, Boxes] | None,
    failed: dict[str, str],
    batch: int,
) -> list[Instances | None]:
    try:
        if boxes is not None:
            return [_of_boxes(student, frame, boxes[frame.name], options.mask, failed) for frame in group]
        if options.tile is not None:
            side, overlap = options.tile, options.overlap
            return [
                find_tiled(
                    student, f.image, side=side, overlap=overlap, batch=batch, score=options.score, mask=options.mask
                )
                for f in group
            ]
        return list(find(student, [f.image for f in group], score=options.score, mask=options.mask))
    except torch.OutOfMemoryError as error:
        smaller = "set device cpu" if boxes is not None else "set a smaller batch, tile, or device cpu"
        raise UserError(f"{group[0].file} does not fit into the memory of {student.device}; {smaller}.") from error


def _of_boxes(
    student: Student, frame: _Frame, boxes: Boxes, mask: float | None, failed: dict[str, str]
) -> Instances | None:
    """The masks of an image's known boxes in it; None, with the reason in `failed`, if none of them is."""
    size = frame.image.shape[:2]
    there = np.flatnonzero(~without_area(boxes.boxes, size)).tolist()
    try:
        if there and len(there) < len(boxes.boxes):
            own = boxes.boxes[there], [boxes.labels[i] for i in there]
            found = find_boxes(student, frame.image, *own, mask=mask)
            return dataclasses.replace(found, prompts=tuple(there[i] for i in found.prompts or ()))
        return find_boxes(student, frame.image, *boxes, mask=mask)
    except UserError as error:
        failed[frame.name] = f"{frame.file}: {error}"
        return None


def _images(
    inputs: Sequence[Picture | Video],
    options: Options,
    done: Mapping[str, list[int]],
    boxes: Mapping[str, Boxes] | None,
    failed: dict[str, str],
    share: Share,
) -> Iterator[_Frame]:
    """Yield the images of a share that are still to be predicted, with a progress bar."""
    numbers = itertools.count()
    total = sum(-(-item.frames // options.every) if isinstance(item, Video) else 1 for item in inputs)
    with tqdm(total=total, desc="predict", unit="image", disable=None) as bar:
        for item in inputs:
            stamp, source = _stamp(item, boxes), os.path.abspath(item.path)

            def wanted(name: str, stamp: tuple[int, ...] = stamp) -> bool:
                mine = share.takes(next(numbers))
                return mine and done.get(name) != list(stamp) and (boxes is None or name in boxes)

            if isinstance(item, Picture):
                if wanted(item.name):
                    try:
                        yield _Frame(item.name, _file(item), source, stamp, read_image(item.path, say=_warn))
                    except DataError as error:
                        failed[item.name] = str(error)
                bar.update()
                continue
            for name, frame in frames(item, every=options.every, wanted=wanted):
                if frame is not None:
                    yield _Frame(name, name, source, stamp, frame)
                bar.update()


def _warn(sentence: str) -> None:
    tqdm.write(f"warning: {sentence}".encode("utf-8", "backslashreplace").decode())


def _stamp(item: Picture | Video, boxes: Mapping[str, Boxes] | None) -> tuple[int, ...]:
    """A key that changes with an input's file or known boxes."""
    if boxes is None or item.name not in boxes:
        return item.stamp
    known = boxes[item.name]
    text = json.dumps([np.asarray(known.boxes, dtype=float).tolist(), known.labels])
    return (*item.stamp, zlib.crc32(text.encode()))


def _outdated(
    inputs: Sequence[Picture | Video], folder: Path, boxes: Mapping[str, Boxes] | None
) -> list[dict[str, Any]]:
    """Records that are no longer those of an input.

    They are of frames of a video's earlier version, of inputs whose name in the results has changed, or of images that
    had known boxes and have none.
    """
    pictures = {item.name for item in inputs if isinstance(item, Picture)}
    files = {_file(item) for item in inputs if isinstance(item, Picture)}
    paths = {os.path.abspath(item.path) for item in inputs}
    videos = {item.name: item for item in inputs if isinstance(item, Video)}

    def outdated(name: str, row: dict[str, Any]) -> bool:
        video = videos.get(name.rpartition("/")[0]) if is_frame(name) else None
        if name in pictures or (video is not None and row.get("source", "") in ("", os.path.abspath(video.path))):
            changed = video is not None and name not in pictures and row["stamp"] != list(video.stamp)
            return changed or (boxes is not None and name not in boxes)
        return row["source"] in paths if "source" in row else row["file"] in files

    return [row for name, row in records(folder) if outdated(name, row)]


def _batches(images: Iterable[_Frame], size: int) -> Iterator[list[_Frame]]:
    left = iter(images)
    while group := list(itertools.islice(left, size)):
        yield group


def _result(
    folder: Path,
    held: tuple[int, int],
    failed: dict[str, str],
    known: Mapping[str, Boxes] | None,
    unused: tuple[str, ...],
) -> Predictions:
    """`Predictions` with the numbers of known boxes without a mask and beyond their image, from the record."""
    left: dict[str, int] = {}
    beyond: dict[str, int] = {}
    absent: dict[str, int] = {}
    for name, row in records(folder):
        if known is not None and name in known and name not in failed:
            out = without_area(known[name].boxes, row["size"])
            absent[name], own = int(out.sum()), known[name].boxes[~out]
            left[name] = len(own) - len(row["instances"])
            beyond[name] = reaching_beyond(own, row["size"])
    unanswered, clipped, outside = ({name: n for name, n in c.items() if n} for c in (left, beyond, absent))
    return Predictions(folder, *held, failed, unanswered, unused, clipped=clipped, outside=outside)


def _boxes_by_name(
    given: Mapping[str, Boxes], inputs: Sequence[Picture | Video], student: Student
) -> tuple[dict[str, Boxes], tuple[str, ...]]:
    """Match given boxes to inputs by name; return them, and the names in `given` without an input.

    UserError if no name matches, or a label is unknown.
    """
    pictures = []
    for item in inputs:
        if isinstance(item, Video):
            raise UserError(f"boxes are for images; {item.path} is a video.")
        pictures.append(item)
    names = {item: name for item, name in _matched(list(given), pictures).items() if len(given[name].boxes)}
    for item in pictures:
        for label in given[names[item.name]].labels if item.name in names else ():
            require_class(student, label, f"; it is the label of a box of {_file(item)}")
    if not names:
        some = next((name for name, own in given.items() if len(own.boxes)), "no image")
        raise UserError(f"no box is of an image that was given: boxes are of {some}, the images are {inputs[0].name}.")
    used = set(names.values())
    return {item: given[name] for item, name in names.items()}, tuple(
        name for name, own in given.items() if len(own.boxes) and name not in used
    )


def _file(item: Picture) -> str:
    """Returns the name of an image in the results, with its suffix."""
    return (Path(item.name).parent / item.path.name).as_posix()


def _matched(given: Sequence[str], pictures: Sequence[Picture]) -> dict[str, str]:
    """Returns the given name of each image, by the image's name in the results.

    The path comes first, then the name that shares the most last folders, if both are each other's only nearest: a
    file's name alone, if it is unique on both sides. Last comes the name in the results. Where one name's folders are
    those of its image, all others' have to be: else the boxes are of another folder's image.
    """
    paths = {os.path.abspath(name): name for name in given}
    stems = Counter(str(Path(name).with_suffix("")) for name in given)
    exact = {name: name for name in given}
    plain = {stem: name for name in given if stems[stem := str(Path(name).with_suffix(""))] == 1}
    alike, rivals = _Nearest(given), _Nearest([os.path.abspath(item.path) for item in pictures])
    found: dict[str, str] = {}
    agree: dict[str, bool] = {}  # of matched names with folders: whether these are the image's
    for item in pictures:
        path = os.path.abspath(item.path)
        near = alike.of(path)
        mutual = {path: near} if near is not None and rivals.of(near) == path else {}
        ways = ((paths, path), (mutual, path), (exact, _file(item)), (exact, item.name), (plain, item.name))
        match = next((table[key] for table, key in ways if key in table), None)
        if match is not None:
            found[item.name] = match
            if folders := _reversed(match)[1:]:
                agree[item.name] = _reversed(path)[1 : 1 + len(folders)] == folders
    strict = any(agree.values())
    return {name: match for name, match in found.items() if agree.get(name, True) or not strict}


class _Nearest:
    """Paths by their last parts, to find the one that has most of them in common with another path."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.ends: dict[tuple[str, ...], str | None] = {}  # None: several have them
        for path in paths:
            parts = _reversed(path)
            for count in range(1, len(parts) + 1):
                self.ends[parts[:count]] = None if parts[:count] in self.ends else path

    def of(self, path: str) -> str | None:
        """Returns the path with the most last parts in common with this one; None if there is no such one."""
        parts = _reversed(path)
        ends = (parts[:count] for count in range(len(parts), 0, -1))
        return next((self.ends[end] for end in ends if end in self.ends), None)


def _reversed(path: str) -> tuple[str, ...]:
    """The parts of a path from the last one on, for comparison; without those that lead out of its folder."""
    parts = Path(plain_name(os.path.normpath(plain_name(path)))).parts
    return tuple(part for part in reversed(parts) if part != "..")
