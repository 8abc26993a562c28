"""Convert a data set of any format to plain COCO, which every tool reads: `misa convert`.

    out/annotations/instances_{train,val,test}2017.json    out/{train,val,test}2017/

The splits, names, boxes and masks are those that a training reads.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from misa.data.digest import data_digests, digest_of
from misa.data.formats.cache import OURS
from misa.data.formats.coco import DataError, PathLike, Split
from misa.data.formats.coco_file import TABLES, CocoFile
from misa.data.formats.convert import SPLITS, open_layout
from misa.data.formats.json_rows import write_coco
from misa.errors import UserError, counted
from misa.files import atomic_write, locked, read_json, write_json

ImagesAs = Literal["link", "copy"]
_CARD = "unfinished.json"  # identifies the data of an unfinished folder


@dataclass(frozen=True)
class Written:
    """A written split: its name and the numbers of images, objects and objects with masks."""

    split: str
    images: int
    objects: int
    masks: int

    def __str__(self) -> str:
        masks = f"{self.masks} of them with masks" if self.masks else "without masks"
        return f"{self.split}: {counted(self.images, 'image')}, {counted(self.objects, 'object')}, {masks}"


def convert(data: PathLike, out: PathLike, *, images: ImagesAs = "link") -> list[Written]:
    """Write a data set as plain COCO into the new folder `out`, which appears when it is complete.

    An interrupted call leaves a hidden folder beside `out`, and the same call resumes from it.

    data: a folder or file in any of `misa.data.formats.table.FORMATS`. out: a new folder. images: "link" for hard links
    (no space, but one file with two names; across file systems they are copied), "copy" for separate files.
    Raises UserError: `out` exists or cannot be written, the data has faults, or an image is missing.
    """
    layout, out = open_layout(data), Path(out).expanduser().absolute()
    if os.path.lexists(out):
        raise UserError(f"{out} exists already and was not changed; give the name of a new folder.")
    if out.resolve().is_relative_to(layout.root if layout.root.is_dir() else layout.root.parent):
        raise UserError(f"out {out} is inside the data, where it would be read as part of it; give another place.")
    beside = unfinished(out)
    card = {"data": str(layout.root), "images": images, **data_digests(layout.train, layout.val)}
    card |= {"test": digest_of(layout.test.annotations)} if layout.test is not None else {}
    with locked(beside, "out"):
        if (beside / _CARD).exists() and read_json(beside / _CARD) != card:  # of other data or annotations
            for path in beside.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(beside / _CARD, card)
        splits = [(name, split) for name in SPLITS if (split := getattr(layout, name)) is not None]
        written = [found for name, split in splits if (found := _write_split(beside, name, split, images)) is not None]
    for name in (_CARD, ".lock"):
        (beside / name).unlink(missing_ok=True)
    try:
        beside.rename(out)
    except OSError as error:
        raise UserError(f"out {out} cannot be made of {beside} ({error.strerror}); rename it yourself.") from error
    return written


def unfinished(out: PathLike) -> Path:
    """Where an interrupted call of `convert` keeps what is done."""
    out = Path(out).expanduser().absolute()
    return out.with_name(f".{out.name}.unfinished")


def _write_split(out: Path, name: str, split: Split, images: ImagesAs) -> Written | None:
    """Link or copy the images of a split and write its annotations; None if it has no images."""
    file = CocoFile(split.annotations)
    if missing := [key for key in TABLES if not file.has(key)]:
        raise DataError(f"{split.annotations} has no list {missing[0]!r}; `misa check` says what is wrong.")
    for _, where, message, advice, fatal in file.content.get("faults", ()):
        if fatal:
            raise DataError(f"{where}: {message}; {advice} (`misa check` lists all that is wrong).")
    paths = [_path(row, split) for row in file.images]
    if not paths:
        return None
    base = Path(os.path.commonpath([path.parent for path in paths]))
    rows = [
        {**row, "file_name": path.relative_to(base).as_posix()} for row, path in zip(file.images, paths, strict=True)
    ]
    for row, path in zip(tqdm(rows, desc=f"{name} images", leave=False, delay=2, disable=None), paths, strict=True):
        _bring(path, out / f"{name}2017" / row["file_name"], images)
        if os.path.isfile(source := split.label_map(row["file_name"])):
            _bring(source, out / source.parent.name / source.name, images)
    masks, converted, ids = 0, "converted_from" in file.content, [row.get("id") for row in rows]
    known = {key for key in ids if isinstance(key, int)}

    def bare(row: Any) -> Any:
        return {k: v for k, v in row.items() if k != "where"} if converted and isinstance(row, dict) else row

    def each(add: Callable[[Any], None]) -> None:
        def take(row: Any) -> None:
            nonlocal masks
            image = row.get("image_id") if isinstance(row, dict) else None
            if not isinstance(image, int) or image not in known:
                raise DataError(
                    f"{file.content.get('plain_of', split.annotations)} has an annotation of image "
                    f"{json.dumps(image)[:60]}, which is none of its images; `misa check` says where."
                )
            masks += isinstance(row, dict) and bool(row.get("segmentation"))
            add(bare(row))

        file.each_annotation(take, areas=True)

    content = {key: value for key, value in file.content.items() if key not in OURS}
    content |= {"images": [bare(row) for row in rows]}
    write_coco(out / f"annotations/instances_{name}2017.json", content | {"categories": file.categories}, each)
    return Written(name, len(rows), file.count, masks)


def _path(row: Any, split: Split) -> Path:
    """Returns the path of an image; DataError if it does not exist."""
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str):
        raise DataError(f"{split.annotations} has an image without file_name: {json.dumps(row)[:60]}; correct it.")
    path = Path(os.path.normpath(split.images / name))
    if not os.path.isfile(path):
        raise DataError(
            f"the image {path} is missing; add it, or take it out of the annotations: misa check says where."
        )
    return path


def _bring(source: Path, place: Path, images: ImagesAs) -> None:
    """Link or copy a file unless an earlier call has done so."""
    if place.exists():
        ours, theirs = place.stat(), source.stat()
        if os.path.samestat(ours, theirs) or (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns):
            return
        place.unlink()
    if images == "link":
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), place)
            return
        except OSError:  # another file system, or no support for hard links
            pass
    with atomic_write(place) as partial:
        shutil.copy2(source, partial)
