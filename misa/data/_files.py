"""Looks at the image files that an annotation file lists: there, whole, and of the size it says."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from misa.data.layout import DataError

# The last bytes of a whole file. Decoding 100k images takes many minutes, reading their ends some seconds.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_EXIF_ORIENTATION = 0x0112
_THREADS = 8


class Listed(NamedTuple):
    """An image as the annotation file has it; width and height in pixels."""

    id: int
    file_name: str
    width: int
    height: int


class Fault(NamedTuple):
    """What is wrong with an image file, and what to do."""

    image: Listed
    kind: str
    message: str
    cure: str


def check_files(images: list[Listed], folder: Path, *, read: bool) -> Iterator[Fault]:
    """The faults of the listed files, in their order; `read` also opens each file, with a progress bar."""
    there: dict[str, list[str]] = {}
    names: set[str] = set()
    for entry in os.scandir(folder):
        if entry.is_file():
            names.add(entry.name)
            there.setdefault(Path(entry.name).stem, []).append(entry.name)
    found: list[Listed] = []
    for image in images:
        # One listing of the folder instead of 100k questions; only names with a folder in them are asked for.
        if image.file_name in names or _is_file(folder / image.file_name):
            found.append(image)
        else:
            other = there.get(Path(image.file_name).stem, [])
            cure = f"did you mean {other[0]!r}?" if other else f"add it, or take image {image.id} out of the list"
            yield Fault(image, "image-absent", f"the file {folder / image.file_name} is absent", cure)
    if not read:
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        looks = pool.map(lambda image: _look(image, folder), found)
        # Neither a bar for a second's work nor one in a log file.
        bar = tqdm(looks, total=len(found), desc="check images", unit="image", leave=False, delay=2, disable=None)
        yield from (fault for fault in bar if fault)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have, such as one with a zero byte
        return False


def _look(image: Listed, folder: Path) -> Fault | None:
    path = folder / image.file_name
    try:
        facts = look(path, listed=(image.width, image.height))
    except BadFile as error:
        return Fault(image, error.kind, f"the file {path} {error.message}", error.cure)
    if (image.width, image.height) == facts.size:
        return None
    shown, listed = f"{facts.size[0]} x {facts.size[1]}", f"{image.width} x {image.height}"
    if facts.size != facts.raw:
        message = f"the file {path} is read as {shown} pixels, turned by its EXIF orientation, but {listed} are listed"
        return Fault(image, "image-size", message, "list the turned size and boxes, or remove the orientation")
    message = f"the file {path} is {shown} pixels, but {listed} are listed"
    return Fault(image, "image-size", message, "correct width and height, the boxes are in these pixels")


class BadFile(Exception):
    """An image file that cannot be used: its kind of fault, what is said of it after its name, and the cure."""

    def __init__(self, kind: str, message: str, cure: str) -> None:
        super().__init__(kind, message, cure)
        self.kind, self.message, self.cure = kind, message, cure


class Facts(NamedTuple):
    """An image file: (width, height) as it is read and as it lies in the file."""

    size: tuple[int, int]
    raw: tuple[int, int]


def look(path: Path, *, listed: tuple[int, int] | None = None) -> Facts:
    """Look at a file without decoding it where that can be helped; BadFile where it is not a whole image.

    listed: the (width, height) that it should have; a file that has them, unturned, need not be decoded.
    """
    again = "copy or download it again"
    try:
        if path.stat().st_size == 0:
            raise BadFile("image-truncated", "is empty", again)
        with Image.open(path) as picture:
            size = raw = picture.size
            # The reader turns a picture as its EXIF says. It is asked itself where that may be: that means decoding.
            doubt = _may_be_turned(picture) or (listed is not None and raw != listed)
            if str(picture.format) not in _ENDS and not cv2.haveImageReader(str(path)):
                message = f"is {picture.format}, which OpenCV does not read here"
                raise BadFile("image-format", message, "convert it to PNG or JPEG")
            if not _ends_well(path, str(picture.format)):
                picture.load()  # decodes it all: the only way to be sure
                # Pillow is content with a PNG that has its pixels but no end; OpenCV, which will read it, is not.
                if picture.format == "PNG" and _ENDS["PNG"] not in path.read_bytes():
                    raise OSError("its end is missing")
        if doubt:
            size = _size_as_read(path)
    except (OSError, ValueError, SyntaxError, cv2.error, Image.DecompressionBombError) as error:
        reason = str(error).split("\n")[0].replace(f" {str(path)!r}", "")
        raise BadFile("image-truncated", f"is truncated or no image ({reason})", again) from error
    return Facts(size, raw)


def require_whole(path: Path) -> None:
    """DataError where a file is not a whole image."""
    try:
        look(path)
    except BadFile as error:
        raise DataError(f"the file {path} {error.message}; {error.cure}.") from error


def _may_be_turned(picture: Image.Image) -> bool:
    """Whether rows and columns may be swapped when it is read; cheap, as nothing is decoded."""
    if picture.format == "PNG" and "exif" not in picture.info:
        return False  # asking on would decode it
    try:
        return int(picture.getexif().get(_EXIF_ORIENTATION, 1)) >= 5
    except Exception:  # Pillow raises what it likes on broken EXIF
        return True


def _size_as_read(path: Path) -> tuple[int, int]:
    """Width and height as the training's reader gives them."""
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise OSError("OpenCV cannot decode it")
    return pixels.shape[1], pixels.shape[0]


def _ends_well(path: Path, kind: str) -> bool:
    end = _ENDS.get(kind)
    if end is None:
        return False
    with path.open("rb") as file:
        file.seek(-len(end), os.SEEK_END)
        return file.read() == end
