"""Images to predict on: files, folders of them, and the frames of videos. No annotation file is needed.

Images are read as in training: 8 bits, three channels, JPEG, PNG and TIFF turned by their EXIF orientation; here RGB.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from numpy.typing import NDArray

from misa.data.formats.coco import DataError, PathLike
from misa.data.formats.parts import IMAGES, walk
from misa.errors import counted
from misa.files import missing

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class Picture:
    """An image file and the name of its results: a relative path without suffix.

    stamp: size in bytes and modification time, to detect a changed file.
    """

    name: str
    path: Path
    stamp: tuple[int, int]


@dataclass(frozen=True)
class Video:
    """A video file; its frames are named `name`/000000 and so on. frames: their number by its header; fps: rate."""

    name: str
    path: Path
    stamp: tuple[int, int]
    frames: int
    fps: float


def find_inputs(
    paths: Sequence[PathLike],
    *,
    out: Path | None = None,
    failed: dict[str, str] | None = None,
    skipped: dict[Path, None] | None = None,
) -> list[Picture | Video]:
    """List the images and videos at the paths; folders are searched recursively for images, also through links.

    paths: files and folders; a link keeps its own name. out: the folder of the results, which is skipped, as is any
    folder with earlier predictions. failed: filled with messages by name for skipped files: broken links and images of
    unsupported formats. skipped: filled with the files in the folders that are no images, such as notes.txt, and with
    the videos there.
    Raises DataError: a path does not exist or is of another kind, or a folder holds no image.
    """
    failed, skipped = {} if failed is None else failed, {} if skipped is None else skipped
    found: dict[Path, tuple[Path, str]] = {}  # file: the given folder and the path relative to it
    for given in paths:
        path = Path(given).expanduser()
        require_local(given)
        if os.path.isdir(path):
            files = list(_walk(path, out))
            _leave_out(path, files, failed)
            inside = [file for file in files if file.suffix.lower() in IMAGES and file.exists()]
            if not inside:
                videos = any(file.suffix.lower() in VIDEOS for file in files)
                what = "give its videos by their names" if videos else f"known are {', '.join(IMAGES)}"
                raise DataError(f"the folder {path} holds no image; {what}.")
            skipped |= dict.fromkeys(f.absolute() for f in files if f.suffix.lower() not in (*IMAGES, *_UNREAD))
            for file in inside:
                found.setdefault(file.absolute(), (path, file.relative_to(path).as_posix()))
        elif os.path.isfile(path):
            if path.suffix.lower() not in IMAGES + VIDEOS:
                kinds = ", ".join(IMAGES + VIDEOS)
                raise DataError(f"{path} is neither an image nor a video by its name; known are {kinds}.")
            found.setdefault(path.absolute(), (path.parent, path.name))
        else:
            raise DataError(missing(path, "image, folder or video", "correct the path"))
    if not found:
        raise DataError("there are no images: give image files, a folder of them, or a video.")
    names = _names([(below, name) for below, name in found.values()])
    return [_input(path, name) for path, name in zip(found, names, strict=True)]


def require_local(path: PathLike) -> None:
    """Raise DataError if a path is an address of the Internet: nothing is downloaded."""
    if "://" in str(path):
        raise DataError(f"{path} is an address; download it and give the file.")


# Images that OpenCV does not read on every platform, or only in part.
_UNREAD = (".gif", ".avif", ".heic", ".heif", ".jxl", ".svg", ".psd", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raw")


def _walk(folder: Path, out: Path | None) -> Iterator[Path]:
    """Yield the files below a folder in the order of their names, without folders of predictions."""
    results: list[Path] = []
    for inner, files in walk(folder):
        shares = "predict.json" in files and (inner / "shards").is_dir()  # whose results are not merged yet
        if shares or {"predict.json", "done.jsonl"} <= set(files) or (out is not None and inner.resolve() == out):
            results.append(inner)
        if not any(inner.is_relative_to(place) for place in results):
            yield from (inner / name for name in files)


def _leave_out(folder: Path, files: Sequence[Path], failed: dict[str, str]) -> None:
    other = [file for file in files if file.suffix.lower() in _UNREAD]
    if other:
        kinds = ", ".join(sorted({file.suffix.lower() for file in other}))
        files_of = f"{counted(len(other), 'file')} of other kinds ({kinds})"
        failed[str(folder)] = f"left out of {folder}: {files_of}; convert them to PNG or JPEG."
    for file in files:
        if file.suffix.lower() in IMAGES and not file.exists():
            failed[str(file)] = f"the link {file} leads nowhere; correct or remove it."


def _names(places: list[tuple[Path, str]]) -> list[str]:
    """Returns a unique name for each file: its path without suffix, with suffix or folder name if ambiguous."""
    plain = [str(Path(name).with_suffix("")) for _, name in places]
    full = [name for _, name in places]
    below = [f"{Path(os.path.abspath(folder)).name}/{name}" for folder, name in places]
    names, once = plain, Counter(plain)
    for longer in (full, below):
        names = [name if once[name] == 1 else other for name, other in zip(names, longer, strict=True)]
        once = Counter(names)
    # The frames of a video are named like files in a folder of its name, and that folder may exist.
    parents = {parent.as_posix() for name in names for parent in Path(name).parents}
    for i, name in enumerate(names):
        if name in parents and Path(full[i]).suffix.lower() in VIDEOS:
            names[i] = full[i] if full[i] not in parents else f"{full[i]}-video"
    once = Counter(names)
    twice = [place for place, name in zip(places, names, strict=True) if once[name] > 1]
    if twice:
        raise DataError(
            f"two images would both be called {twice[0][1]}: one in {twice[0][0]}, one in {twice[1][0]}; predict them "
            "into different folders."
        )
    return names


def _input(path: Path, name: str) -> Picture | Video:
    status = path.stat()
    stamp = status.st_size, status.st_mtime_ns
    if path.suffix.lower() in IMAGES:
        return Picture(name, path, stamp)
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened() or not capture.grab():
            raise DataError(f"the video {path} cannot be read by OpenCV; convert it to mp4 (H.264 or MPEG-4).")
        frames, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    finally:
        capture.release()
    return Video(name, path, stamp, max(int(frames), 0), fps if 0 < fps < 1000 else 25.0)


def read_image(path: Path, *, say: Callable[[str], object] | None = None) -> NDArray[np.uint8]:
    """Read an image (h w 3) in RGB; DataError if it is truncated or not an image. say: receives warnings about it."""
    from misa.data.check.image_files import require_whole

    facts = require_whole(path)
    for _, words, advice, weight in facts.odd if say is not None else ():
        if weight == "warning" and say is not None:
            say(f"the file {path} {words}; {advice}.")
    try:
        image: Any = mmcv.imread(path, channel_order="rgb")
    except (cv2.error, OSError, ValueError) as error:  # corrupt in the middle, which `require_whole` does not decode
        raise DataError(f"the file {path} cannot be decoded by OpenCV; copy or download it again.") from error
    return np.asarray(image, dtype=np.uint8)


def frames(video: Video, *, every: int = 1, wanted: Any = None) -> Iterator[tuple[str, NDArray[np.uint8] | None]]:
    """Yield every `every`-th frame in RGB with its name; None, without decoding, if `wanted(name)` is false."""
    capture = cv2.VideoCapture(str(video.path))
    try:
        index = 0
        while capture.grab():
            if index % every == 0:
                name = f"{video.name}/{index:06d}"
                if wanted is not None and not wanted(name):
                    yield name, None
                else:
                    there, frame = capture.retrieve()
                    if there:
                        yield name, np.ascontiguousarray(frame[:, :, ::-1])
            index += 1
    finally:
        capture.release()
