"""Check the image files listed in an annotation file: present, complete and of the stated size."""

import filecmp
import os
import re
import threading
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from tqdm.auto import tqdm

from misa.data.check.report import KEPT
from misa.data.formats.coco import DataError
from misa.data.formats.parts import IMAGES
from misa.errors import counted, did_you_mean, stem
from misa.files import listing

# The last bytes of a complete file. Decoding 100k images takes many minutes, reading their ends some seconds.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_EXIF_ORIENTATION = 0x0112
_EXTRA_SAMPLES = 338  # TIFF's tag: 1 and 2 for transparency
_THREADS = 8
_AT_ONCE = 2000  # images submitted to the threads at a time
_MOST_PIXELS = 2**30
_ERRORS = 2  # OpenCV's level of messages: errors, no warnings
_TAIL = 4096  # bytes at the end that distinguish most files


_turn, _open, _limit = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS  # see `_opened`


class Listed(NamedTuple):
    """An image as listed in the annotation file; width and height in pixels."""

    id: int
    file_name: str
    width: int
    height: int
    where: str = ""  # its place in the original file, for converted data


class Fault(NamedTuple):
    """A fault of an image file, and how to fix it."""

    image: Listed
    kind: str
    message: str
    advice: str
    weight: Literal["error", "warning", "note"] = "error"


Twins = dict[int, list[str]]
"""Paths of files by a key of their size and the checksum of their end: only files with equal keys can be equal."""
SHARED = "image-shared"
"""Kind of fault: the file has the name and the content of one that was checked in an earlier call, of another split."""


def check_files(
    images: list[Listed], folder: Path, *, read: bool, twins: Twins | None = None, alone: bool = True
) -> Iterator[Fault]:
    """Yield the faults of the listed files, in their order; `read` also opens each file, with a progress bar.

    twins: collects files to report duplicates, also across several calls.
    alone: no other list has images in the folder, so images that are not listed get a note.
    """
    _hush()
    earlier = {path for paths in (twins or {}).values() for path in paths}
    names = {entry.name for entry in os.scandir(folder) if entry.is_file()}
    unlisted, absent = _Unlisted(images, folder), 0
    found: list[Listed] = []
    for image in images:
        # One listing of the folder instead of 100k system calls, which only names with a folder in them need.
        if image.file_name in names or os.path.isfile(folder / image.file_name):
            found.append(image)
        else:
            absent += 1
            hint = unlisted.like(image.file_name) if absent <= KEPT else ""  # the others are only counted
            remove = "remove what is said of it here" if image.where else f"take image {image.id} out of the list"
            advice = hint[2:] or f"add it, or {remove}"
            yield Fault(image, "image-absent", f"the file {folder / image.file_name} is missing", advice)
    if not read:
        return
    names.difference_update([image.file_name for image in found])
    others = sum(name.lower().endswith(IMAGES) for name in names)
    # No progress bar for work of a second or in a log file.
    bar = tqdm(total=len(found), desc="check images", unit="image", leave=False, delay=2, disable=None)
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(found), _AT_ONCE):
            some = found[first : first + _AT_ONCE]
            for image, faults in zip(some, pool.map(lambda image: _look(image, folder), some), strict=True):
                yield from faults
                if twins is not None and not any(fault.weight == "error" for fault in faults):
                    yield from _twin(image, folder / image.file_name, twins, earlier)
                bar.update()
    if others and found and alone:
        message = f"the folder {folder} has {counted(others, 'image')} not listed in the annotations"
        yield Fault(
            Listed(0, "", 0, 0, str(folder)), "unlisted", message, "nothing to do, if they are not meant", "note"
        )


class _Unlisted:
    """The image files that are not listed: one of them may be a missing file under another name."""

    def __init__(self, images: list[Listed], folder: Path) -> None:
        self.folder, self.listed = folder, {image.file_name for image in images}
        self.homes: dict[str, defaultdict[tuple[int, ...], list[str]]] = {}

    def like(self, file_name: str) -> str:
        """Returns a hint at a file in the same folder with a similar name and the same numbers (01 is 1), or ""."""
        home, slash, name = file_name.rpartition("/")
        if home not in self.homes:
            self.homes[home] = defaultdict(list)
            for other in listing(self.folder / home):
                if other.lower().endswith(IMAGES) and home + slash + other not in self.listed:
                    self.homes[home][_numbers(other)].append(other)
        return did_you_mean(name, self.homes[home][_numbers(name)], key=stem)


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall("[0-9]+", stem(name))))


def _twin(image: Listed, path: Path, twins: Twins, earlier: set[str]) -> Iterator[Fault]:
    """Yield a warning if another file has the same content; files are read completely only if their keys are equal."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TAIL, 0))
        mine = twins.setdefault(size << 32 | zlib.crc32(file.read()), [])
    for other in mine:
        if other == str(path):
            return  # listed twice, which is reported elsewhere
        if filecmp.cmp(path, other, shallow=False):
            message = f"the file {path} has the same content as {other}"
            advice = "keep one of them; an image that is trained and scored on flatters the score"
            shared = other in earlier and Path(other).name == path.name
            yield Fault(image, SHARED if shared else "image-duplicate", message, advice, "warning")
            return
    mine.append(str(path))


def _look(image: Listed, folder: Path) -> list[Fault]:
    path = folder / image.file_name
    try:
        facts = look(path, listed=(image.width, image.height))
    except BadFile as error:
        return [Fault(image, error.kind, f"the file {path} {error.message}", error.advice)]
    faults = [Fault(image, kind, f"the file {path} {words}", hint, weight) for kind, words, hint, weight in facts.odd]
    if (image.width, image.height) == facts.size:
        return faults
    shown, listed = f"{facts.size[0]} x {facts.size[1]}", f"{image.width} x {image.height}"
    if facts.size != facts.raw:
        message = f"the file {path} is read as {shown} pixels, turned by its EXIF orientation, but {listed} are listed"
        advice = "list the turned size and boxes, or remove the orientation"
    else:
        message = f"the file {path} is {shown} pixels, but {listed} are listed"
        advice = "correct width and height, the boxes are in these pixels"
        if _UNTURNED in facts.odd:
            message, advice = f"{message}: it is not turned by its EXIF orientation", "save it upright"
    return [Fault(image, "image-size", message, advice), *faults]


# Kinds of files that are read differently from how they look: kind, message, advice, severity.
_Odd = tuple[str, str, str, Literal["warning", "note"]]
_GREY: _Odd = ("image-grey", "is gray and is read as three equal channels", "nothing to do", "note")
_TURNED: _Odd = ("image-turned", "is turned by its EXIF orientation when it is read", "nothing to do", "note")
_UNTURNED: _Odd = (
    "image-not-turned",
    "has an EXIF orientation, by which it is not turned when it is read",
    "save it upright, if its boxes are of the upright image",
    "warning",
)
_DEEP: _Odd = (
    "image-16-bit",
    "has 16 bits a channel, of which the upper 8 are read",
    "convert it to 8 bits with the contrast that you want",
    "warning",
)
_CLEAR: _Odd = (
    "image-alpha",
    "has transparency, which is not read: what is hidden there appears",
    "put it on a background, if that matters",
    "warning",
)
_DARK: _Odd = (
    "image-alpha",
    "has transparency, by which its colors are darkened when it is read",
    "put it on a background",
    "warning",
)
_INKS: _Odd = (
    "image-cmyk", "is CMYK, which is read as RGB with other colors", "convert it to RGB yourself", "warning"
)  # fmt: skip


def _odd(path: Path, picture: Image.Image) -> tuple[_Odd, ...]:
    """Returns the peculiarities of an image from its headers, without decoding it."""
    found: list[_Odd] = []
    if picture.format == "TIFF" and (pages := cv2.imcount(str(path))) > 1:
        words = f"has {pages} pages, of which the first is read"
        found.append(("image-pages", words, "save each page that you want as a file of its own", "warning"))
    if ";16" in picture.mode or ";16" in str(getattr(picture, "tile", "")):
        found.append(_DEEP)
    elif picture.mode in ("1", "L", "LA"):
        found.append(_GREY)
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        extra = getattr(picture, "tag_v2", {}).get(_EXTRA_SAMPLES, (0,))[0]  # OpenCV multiplies RGBA of TIFF by it
        found.append(_DARK if picture.mode == "RGBA" and extra in (1, 2) and _DEEP not in found else _CLEAR)
    if picture.mode == "CMYK":
        found.append(_INKS)
    return tuple(found)


class BadFile(Exception):
    """An unusable image file: the kind of fault, a message to follow the file name, and advice."""

    def __init__(self, kind: str, message: str, advice: str) -> None:
        super().__init__(kind, message, advice)
        self.kind, self.message, self.advice = kind, message, advice


class Facts(NamedTuple):
    """An image file: (width, height) as read and as stored in the file, and its peculiarities."""

    size: tuple[int, int]
    raw: tuple[int, int]
    odd: tuple[_Odd, ...] = ()


def look(path: Path, *, listed: tuple[int, int] | None = None) -> Facts:
    """Inspect a file, if possible without decoding it; BadFile if it is not a complete image.

    listed: the expected (width, height); a file that has it and is not rotated is not decoded.
    """
    again = "copy or download it again"
    try:
        if path.stat().st_size == 0:
            raise BadFile("image-truncated", "is empty", again)
        with _opened(path) as picture:
            size = raw = picture.size
            if size[0] * size[1] > _MOST_PIXELS:
                message = f"has {size[0]} x {size[1]} pixels, more than OpenCV reads ({_MOST_PIXELS})"
                raise BadFile("image-pixels", message, "cut it into parts")
            # Training's reader rotates by EXIF; where that may matter the reader itself gives the size, by decoding.
            odd, orientation = _odd(path, picture), _orientation(picture)
            oriented = 2 <= orientation <= 8
            doubt = orientation >= 5 or (listed is not None and raw != listed)
            doubt = doubt or (oriented and picture.format != "JPEG")  # OpenCV turns PNG and TIFF, but not WebP
            if str(picture.format) not in _ENDS and not cv2.haveImageReader(str(path)):
                message = f"is {picture.format}, which OpenCV does not read here"
                raise BadFile("image-format", message, "convert it to PNG or JPEG")
            if not _ends_well(path, str(picture.format)):
                picture.load()  # full decoding is the only certain check
                # Pillow accepts a PNG with all pixels but no end chunk; OpenCV, which will read it, does not.
                if picture.format == "PNG" and _ENDS["PNG"] not in path.read_bytes():
                    raise OSError("its end is missing")
                doubt = True  # Pillow also decodes what OpenCV does not
            pixels = _as_read(path, picture) if doubt else None
            if pixels is not None:
                size = pixels.shape[1], pixels.shape[0]
            if oriented:
                turned = picture.format == "JPEG" or pixels is None or _is_turned(pixels, picture)
                odd = (*odd, _TURNED if turned else _UNTURNED)
    except (OSError, ValueError, SyntaxError, cv2.error, Image.DecompressionBombError) as error:
        reason = str(error).split("\n")[0].replace(f" {str(path)!r}", "")
        raise BadFile("image-truncated", f"is truncated or not an image ({reason})", again) from error
    return Facts(size, raw, odd)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image of any size with Pillow's size limit lifted; images too large for OpenCV get our own message.

    The limit is global and files are read in threads: the first thread lifts it, the last restores it.
    """
    global _open, _limit
    with _turn:
        if _open == 0:
            _limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _open += 1
    try:
        with Image.open(path) as picture:
            yield picture
    finally:
        with _turn:
            _open -= 1
            if _open == 0:
                Image.MAX_IMAGE_PIXELS = _limit


def size_of(path: Path) -> tuple[int, int] | None:
    """Returns (width, height) of an image file as read; None if it is unusable, which `check_files` reports."""
    try:
        return look(path).size
    except (BadFile, OSError, ValueError):
        return None


def _hush() -> None:
    """Suppress Pillow's and OpenCV's own warnings, such as on corrupt tags; unusable files are reported by us."""
    warnings.filterwarnings("ignore", module=r"PIL\..*")
    cv2.setLogLevel(min(cv2.getLogLevel(), _ERRORS))


def require_whole(path: Path) -> Facts:
    """Returns the result of `look`; DataError if the file is not a complete image."""
    _hush()
    try:
        return look(path)
    except BadFile as error:
        raise DataError(f"the file {path} {error.message}; {error.advice}.") from error


# What brings an image of this orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(picture: Image.Image) -> int:
    """Returns the EXIF orientation without decoding: 1 for none, 5 and more swap rows and columns.

    Not Pillow's own, which takes one of XMP in its place; OpenCV does not.
    """
    try:
        if isinstance(picture, TiffImageFile):
            return int(picture.tag_v2.get(_EXIF_ORIENTATION, 1))
        exif = Image.Exif()
        exif.load(picture.info.get("exif") or b"")
        found = int(exif.get(_EXIF_ORIENTATION, 1))
        return found if found == 1 or _EXIF_ORIENTATION in picture.getexif() else 1  # else removed by the caller
    except Exception:  # Pillow raises many kinds of exceptions on broken EXIF
        return 9


def _is_turned(pixels: NDArray[np.uint8], picture: Image.Image) -> bool:
    """Whether the pixels (h w 3) as read are those of the picture turned by its orientation, and not as stored."""
    step = 1 + int((pixels.shape[0] * pixels.shape[1] / 1e6) ** 0.5)  # about a million pixels tell

    def likeness(image: Image.Image) -> float:
        band = image if ";16" in image.mode else image.getchannel(0) if image.mode == "LAB" else image.convert("L")
        grey = np.asarray(band, dtype=np.float32)
        if grey.shape != pixels.shape[:2]:
            return -1.0
        with np.errstate(invalid="ignore", divide="ignore"):  # of an image in one color
            grey, read = grey[::step, ::step].ravel(), pixels[::step, ::step].mean(2).ravel()
            return float(np.nan_to_num(np.corrcoef(grey, read)[0, 1]))

    return likeness(_turned(picture)) >= likeness(picture)


def upright(picture: Image.Image) -> Image.Image:
    """Turn an image that Pillow has opened by its EXIF orientation, where OpenCV, with which training reads, does too.

    One that is not from a file is turned as Pillow does.
    """
    if picture.format is None:
        return ImageOps.exif_transpose(picture)
    return picture if picture.format == "WEBP" else _turned(picture)


def _turned(picture: Image.Image) -> Image.Image:
    picture.load()  # turns a TIFF, which then has no orientation any more
    turn = _TURNS.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _as_read(path: Path, picture: Image.Image) -> NDArray[np.uint8]:
    """Returns the pixels (h w 3) as training's reader gives them; BadFile if only Pillow reads the file."""
    pixels: Any = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    if pixels is not None:
        return np.asarray(pixels, dtype=np.uint8)
    if picture.format in _ENDS:
        raise OSError("OpenCV cannot decode it")
    form = f"{picture.format} (pixels {picture.mode}, compression {picture.info.get('compression', 'unknown')})"
    raise BadFile("image-format", f"is {form}, which OpenCV does not read here", "convert it to 8-bit PNG or JPEG")


def _ends_well(path: Path, kind: str) -> bool:
    end = _ENDS.get(kind)
    if end is None:
        return False
    with path.open("rb") as file:
        file.seek(-len(end), os.SEEK_END)
        return file.read() == end
