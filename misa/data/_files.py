"""Looks at the image files that an annotation file lists: there, whole, and of the size it says."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
from PIL import Image
from tqdm.auto import tqdm

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
    again = "copy or download it again"
    try:
        if path.stat().st_size == 0:
            return Fault(image, "image-truncated", f"the file {path} is empty", again)
        with Image.open(path) as picture:
            size = picture.size
            # The reader turns a picture as its EXIF says. Asked only in doubt: for a PNG it means decoding.
            doubt = size != (image.width, image.height)
            turned = size[::-1] if doubt and picture.getexif().get(_EXIF_ORIENTATION, 1) >= 5 else size
            if str(picture.format) not in _ENDS and not cv2.haveImageReader(str(path)):
                message = f"the file {path} is {picture.format}, which OpenCV does not read here"
                return Fault(image, "image-format", message, "convert it to PNG or JPEG")
            if not _ends_well(path, str(picture.format)):
                picture.load()  # decodes it all: the only way to be sure
                # Pillow is content with a PNG that has its pixels but no end; OpenCV, which will read it, is not.
                if picture.format == "PNG" and _ENDS["PNG"] not in path.read_bytes():
                    raise OSError("its end is missing")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).split("\n")[0].replace(f" {str(path)!r}", "")
        return Fault(image, "image-truncated", f"the file {path} is truncated or no image ({reason})", again)
    if (image.width, image.height) not in (size, turned):
        shown = f"{turned[0]} x {turned[1]}"
        message = f"the file {path} is {shown} pixels, but {image.width} x {image.height} are listed"
        return Fault(image, "image-size", message, "correct width and height, the boxes are in these pixels")
    return None


def _ends_well(path: Path, kind: str) -> bool:
    end = _ENDS.get(kind)
    if end is None:
        return False
    with path.open("rb") as file:
        file.seek(-len(end), os.SEEK_END)
        return file.read() == end
