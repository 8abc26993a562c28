"""Folders of Pascal VOC xml and csv files of boxes as what all the rest reads: COCO annotation files.

    VOC     root/Annotations/*.xml   root/JPEGImages/   root/ImageSets/Main/{train,val}.txt (or no lists)
    xml     root/*.xml beside the images, or root/train/ and root/val/ (also valid, validation) of that kind
    csv     root/boxes.csv or the file itself (with or without a column split), root/{train,val}.csv, or one in each of
            root/train/ and root/val/

Without a split, a tenth of the images, chosen by their names, is for validation. The annotation files go into a cache
folder ($XDG_CACHE_HOME/misa or ~/.cache/misa), never among the data; they are made again when anything there changes.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from misa.data.check.image_files import IMAGES, BadFile, look
from misa.data.formats.boxes import Boxed, Entry, Tell, read_csv, read_voc, xml_files
from misa.data.formats.coco import DataError, Layout, PathLike, Split, find_layout
from misa.data.formats.json_rows import ObjectFile, read_object

# Part of the cache's key: raised when the same data is written otherwise.
_EDITION = 2
_VAL = ("val", "valid", "validation")
_SPLITS = {
    **dict.fromkeys((*_VAL, "validate", "dev"), "val"),
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),  # not used
}
_SHARE = 10  # one image in so many is for validation, where no split is given
_told: set[Path] = set()


class _Part(NamedTuple):
    """Annotation files of one form, the folder of their images, and the split they are for ("": not said)."""

    files: tuple[Path, ...]
    images: Path
    split: str


class _Picture(NamedTuple):
    """An image of a part as it will be listed."""

    path: Path
    size: tuple[int, int] | None
    where: str


def open_layout(root: PathLike, *, need_train: bool = True) -> Layout:
    """The annotation files and image folders of a data set in COCO layout, VOC xml or csv.

    What is not in COCO layout is converted first. Faults of its files are written down in the annotation file, where
    `check_coco` finds them.

    Raises:
        DataError: nothing of that kind is there.
    """
    root = Path(root).expanduser().resolve()
    if _is_coco(root):
        return find_layout(root, need_train=need_train)
    parts = _parts(root)
    if not parts:
        return find_layout(root, need_train=need_train)  # which says what is missing
    return _converted(root, parts)


def _is_coco(root: Path) -> bool:
    return any((root / "annotations" / f"instances_{split}2017.json").is_file() for split in ("train", "val"))


def _parts(root: Path) -> list[_Part]:
    """The annotation files of a data set that is not COCO's; nothing where there are none."""
    if root.suffix.lower() == ".csv" and root.is_file():
        return [_Part((root,), root.parent, "")]
    if files := xml_files(root / "Annotations"):
        named = [root / name for name in ("JPEGImages", "images", "Images")]
        return [_Part(tuple(files), next((folder for folder in named if folder.is_dir()), root / "JPEGImages"), "")]
    if files := xml_files(root):
        return [_Part(tuple(files), root, "")]
    split = {name: "train" if name == "train" else "val" for name in ("train", *_VAL)}
    inner = [_Part(tuple(files), root / name, s) for name, s in split.items() if (files := xml_files(root / name))]
    if not inner:
        tables = [(root / f"{name}.csv", root, s) for name, s in split.items()]
        tables += [(file, root / name, s) for name, s in split.items() for file in _tables(root / name)]
        inner = [_Part((file,), folder, s) for file, folder, s in tables if file.is_file()]
    if inner:
        return inner
    found = _tables(root)
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:8])
        raise DataError(f"{root} holds several csv files ({names}); give one of them, or call them train.csv, val.csv.")
    return [_Part((file,), root, "") for file in found]


def _tables(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.csv") if not file.name.startswith(".")) if folder.is_dir() else []


def _converted(root: Path, parts: Sequence[_Part]) -> Layout:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "misa"
    place = home / f"{root.name}-{_fingerprint(root, parts)}"
    files = {split: place / f"instances_{split}.json" for split in ("train", "val")}
    if not all(file.is_file() for file in files.values()):
        try:
            place.mkdir(parents=True, exist_ok=True)
            _write(root, parts, files)
        except OSError as error:
            raise DataError(
                f"the converted annotations of {root} cannot be written to {place} ({error.strerror}); set "
                "XDG_CACHE_HOME to a folder that can be written."
            ) from error
    # Names of images are relative to the root: the splits may lie in different folders.
    folder = root if root.is_dir() else root.parent
    return Layout(root, Split(files["train"], folder), Split(files["val"], folder))


def _fingerprint(root: Path, parts: Sequence[_Part]) -> str:
    """Of the names, sizes and times of all files that the annotations are made from."""
    total = hashlib.sha256(f"{_EDITION} {root}".encode())
    folders = {root / "ImageSets" / "Main"} | {folder for part in parts for folder in _image_folders(part)}
    for part in parts:
        for file in part.files:
            status = file.stat()
            total.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    for folder in sorted(folders):
        if folder.is_dir():
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    status = entry.stat()
                    total.update(f"{entry.path} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "replace"))
    return total.hexdigest()[:12]


def _image_folders(part: _Part) -> list[Path]:
    names = ("images", "Images", "JPEGImages", "img", "imgs")
    return [part.images, *(part.images / name for name in names)]


def _write(root: Path, parts: Sequence[_Part], files: dict[str, Path]) -> None:
    """Write the annotation files; objects wait in a file of their own until the splits are known."""
    faults: list[tuple[str, ...]] = []

    def tell(*fault: str) -> None:
        faults.append(fault)

    pictures: dict[str, _Picture] = {}
    splits: dict[str, str] = {}
    labels: set[str] = set()
    base = root if root.is_dir() else root.parent
    with tempfile.TemporaryFile("w+") as waiting:
        for part in parts:
            named = _Names(part, base)
            for entry in _entries(part, tell):
                name = named(entry.file)
                known = pictures.get(name)
                if known is None or (known.size is None and entry.size is not None):
                    pictures[name] = _Picture(base / name, entry.size, known.where if known else entry.where)
                if entry.split and entry.split not in _SPLITS:
                    tell("split", entry.where, f"its split is {entry.split!r}", "write train, val or test")
                if split := part.split or _SPLITS.get(entry.split, ""):
                    splits.setdefault(name, split)
                for o in entry.objects:
                    labels.add(o.label)
                    waiting.write(json.dumps([name, o.label, o.box, int(o.hard), o.where]) + "\n")
        splits = _split(root, pictures, splits)
        sizes = _sizes(pictures)
        image = {name: i for i, name in enumerate(pictures, 1)}
        category = {label: i for i, label in enumerate(sorted(labels), 1)}
        for split, file in files.items():
            with ObjectFile(file) as out:
                out.value("converted_from", f"{root} ({split} split)")
                out.value("categories", [{"id": i, "name": label} for label, i in category.items()])
                with out.rows("faults") as add:
                    for fault in faults if split == "train" else ():
                        add(fault)
                with out.rows("images") as add:
                    for name, picture in pictures.items():
                        if splits[name] == split:
                            width, height = sizes[name]
                            size = {"width": width, "height": height}
                            add({"id": image[name], "file_name": name, **size, "where": picture.where})
                with out.rows("annotations") as add:
                    waiting.seek(0)
                    for i, line in enumerate(waiting, 1):
                        name, label, box, hard, where = json.loads(line)
                        if splits[name] == split:
                            row = {"id": i, "image_id": image[name], "category_id": category[label], "bbox": box}
                            add({**row, "area": box[2] * box[3], "iscrowd": hard, "where": where})


def _entries(part: _Part, tell: Tell) -> Iterator[Entry]:
    if part.files[0].suffix.lower() == ".csv":
        for file in part.files:
            yield from read_csv(file, tell)
    else:
        bar = tqdm(part.files, desc="read xml", unit="file", leave=False, delay=2, disable=None)
        yield from read_voc(bar, tell)


class _Names:
    """The name of an image relative to the root, for what an annotation calls it."""

    def __init__(self, part: _Part, base: Path) -> None:
        self.part, self.base = part, base
        self.full: dict[str, Path] = {}
        self.stems: dict[str, Path] = {}
        for folder in _image_folders(part):
            for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                if Path(name).suffix.lower() in IMAGES:
                    self.full.setdefault(name, folder / name)
                    self.stems.setdefault(Path(name).stem, folder / name)

    def __call__(self, file: str) -> str:
        path = Path(file)
        # As given, by its name in the folders of images, or with another suffix: exporters often write the wrong one.
        if file in self.full:
            found = self.full[file]
        elif len(path.parts) > 1 and (self.part.images / path).is_file():
            found = self.part.images / path
        else:
            found = self.full.get(path.name) or self.stems.get(path.stem) or self.part.images / path
        return os.path.relpath(found, self.base) if found.is_relative_to(self.base) else str(found)


def _split(root: Path, pictures: dict[str, _Picture], named: dict[str, str]) -> dict[str, str]:
    """The split of each image: as named, as VOC's lists have it, or a tenth for validation."""
    lists = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val")}
    if all(file.is_file() for file in lists.values()):
        stems = {stem: split for split, file in lists.items() for stem in file.read_text().split()}
        # What is in no list is not used, as a test split.
        return {name: stems.get(Path(picture.where).stem, "test") for name, picture in pictures.items()}
    if "val" in named.values():
        return {name: named.get(name, "train") for name in pictures}
    usable = [name for name in pictures if named.get(name, "train") == "train"]
    order = sorted(usable, key=lambda name: hashlib.sha256(Path(name).name.encode("utf-8", "replace")).digest())
    chosen = set(order[: -(-len(order) // _SHARE)]) if len(order) > 1 else set()
    if root not in _told:
        _told.add(root)
        print(f"data: no split is given, {len(chosen)} of {len(usable)} images are for validation", flush=True)
    return {name: "val" if name in chosen else named.get(name, "train") for name in pictures}


def _sizes(pictures: dict[str, _Picture]) -> dict[str, tuple[int, int]]:
    """(width, height) of each image, from its file where no annotation gives it."""
    asked = [name for name, picture in pictures.items() if picture.size is None]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda name: _size(pictures[name].path), asked)
        bar = tqdm(found, total=len(asked), desc="read sizes", unit="image", leave=False, delay=2, disable=None)
        read = dict(zip(asked, bar, strict=True))
    return {name: picture.size or read[name] for name, picture in pictures.items()}


def _size(path: Path) -> tuple[int, int]:
    try:
        return look(path).size
    except (BadFile, OSError, ValueError):  # told by the check of the files; until then no box is beyond it
        return 10**6, 10**6


def read_boxes(path: PathLike) -> dict[str, tuple[list[list[float]], list[str | None]]]:
    """The boxes (x1 y1 x2 y2) and labels of each image file in a COCO json, a csv or a folder of VOC xml.

    For predictions of known boxes: nothing is asked of the images. Crowds are left out.

    Raises:
        DataError: no such file, or none that holds boxes.
    """
    path = Path(path).expanduser()
    found: dict[str, tuple[list[list[float]], list[str | None]]] = {}
    faults: list[str] = []

    def tell(kind: str, where: str, message: str, cure: str) -> None:
        faults.append(f"{where}: {message}; {cure}.")

    if path.suffix.lower() == ".csv" and path.is_file():
        entries: Iterator[Entry] = read_csv(path, tell)
    elif path.is_dir():
        files = xml_files(path) or xml_files(path / "Annotations")
        if not files:
            raise DataError(f"the folder {path} holds no xml files; give a COCO json, a csv or a folder of VOC xml.")
        entries = read_voc(files, tell)
    elif path.is_file():
        entries = _coco_entries(path)
    else:
        raise DataError(f"there is no file of boxes {path}; give a COCO json, a csv or a folder of VOC xml.")
    for entry in entries:
        boxes, labels = found.setdefault(entry.file, ([], []))
        for o in entry.objects:
            x, y, w, h = o.box
            boxes.append([x, y, x + w, y + h])
            labels.append(o.label)
    if faults:
        raise DataError(faults[0])
    return {name: value for name, value in found.items() if value[0]}


def _coco_entries(path: Path) -> Iterator[Entry]:
    """The objects of a COCO json, an entry each; DataError where it is none."""
    files: dict[int, str] = {}
    names: dict[int, str] = {}
    try:
        for event in read_object(path):
            if event.kind == "row" and event.key == "images":
                files[event.value["id"]] = str(event.value["file_name"])
            elif event.kind == "row" and event.key == "categories":
                names[event.value["id"]] = str(event.value["name"])
        for event in read_object(path):
            if event.kind == "row" and event.key == "annotations" and not event.value.get("iscrowd"):
                row = event.value
                x, y, w, h = (float(side) for side in row["bbox"])
                box = Boxed(names[row["category_id"]], (x, y, w, h), "")
                yield Entry(files[row["image_id"]], None, [box], "")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no COCO json with boxes ({error!r}); `misa check` says what is wrong.") from error
