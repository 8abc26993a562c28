"""Convert any format to what all other code reads: COCO annotation files and folders of images.

COCO's own layout is read in place unless it has to be normalized (`misa.data.formats.plain`). Everything else is
converted to annotation files in a cache (`misa.data.formats.cache`), never among the data; image names are then
relative to the root. Faults are stored in these files, from which `check_coco` reports them.
"""

import hashlib
import inspect
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from misa.data.formats.cache import OURS, Made, made_once
from misa.data.formats.coco import DataError, Layout, PathLike, Split, find_layout
from misa.data.formats.coco_file import TABLES, CocoFile, read_sizes
from misa.data.formats.coco_json import COCO
from misa.data.formats.json_rows import write_coco
from misa.data.formats.names import Images, plain_name
from misa.data.formats.parts import IMAGES, Boxed, Entry, Format, Part, files_of, without_suffix
from misa.data.formats.plain import plain_annotation
from misa.data.formats.splits import OVERLAP, Named, assign, overlap, require_one
from misa.data.formats.table import FORMATS
from misa.errors import counted
from misa.files import missing

# Size of an unreadable image, so that no box exceeds it; the check of the files reports the image.
_UNKNOWN = (10**6, 10**6)
_said: set[tuple[Path, str]] = set()


SPLITS = ("train", "val", "test")


def open_layout(root: PathLike, *, need_train: bool = True, settled: bool = True) -> Layout:
    """Returns the annotation files and image folders of a data set in any of `FORMATS`.

    settled: normalize COCO's own layout and print a warning about images in both splits; False returns the original
    files, for readers that normalize themselves, and the warning only in the layout.
    Raises DataError: there is no data of any format, or it is ambiguous.
    """
    root = Path(root).expanduser().resolve()
    if _is_published(root):
        layout = _with_overlap(find_layout(root, need_train=need_train))
        if not settled:
            return layout
        _say(root, layout.overlap)
        train, val, test = (
            _settled(root, split) if split is not None and split.annotations.is_file() else split
            for split in (layout.train, layout.val, layout.test)
        )
        assert train is not None, "every layout has one"
        assert val is not None, "every layout has one"
        return Layout(root, train, val, test, layout.overlap)
    found = find_format(root)
    if found is None:
        return find_layout(root, need_train=need_train)  # raises, naming what is missing
    state = hashlib.sha256(repr(found[1]).encode("utf-8", "backslashreplace")).hexdigest()  # all files found now
    made = made_once(root, lambda folder, made: _convert(root, *found, folder, made), state=state)
    shared = next((sentence for sentence in made.says if sentence.endswith(OVERLAP)), "")
    for sentence in made.says:
        if settled or sentence != shared:
            _say(root, sentence)
    found_splits = {name: Split(made.files[name], _base(root)) for name in SPLITS if name in made.files}
    return Layout(root, **found_splits, overlap=shared)


def _say(root: Path, sentence: str) -> None:
    """Print a sentence about a data set once per process."""
    if sentence and (root, sentence) not in _said:
        _said.add((root, sentence))
        print(f"data: {sentence}", flush=True)


def _with_overlap(layout: Layout) -> Layout:
    """Compare the images of COCO's own layout if both splits are in one folder, by a link."""
    train, val = layout.train, layout.val
    if train.images.resolve() != val.images.resolve():
        return layout
    try:
        files = [CocoFile(split.annotations, keep=("file_name",)) for split in (train, val)]
    except (DataError, OSError):
        return layout  # reported by the check
    mine, theirs = ({str(_name(row)) for row in file.images} for file in files)
    shared = overlap(len(mine & theirs), len(theirs)) if mine & theirs else ""
    return replace(layout, val=val._replace(images=train.images), overlap=shared)


def find_format(root: Path) -> tuple[Format, list[Part]] | None:
    """Returns the first format that is found, with its parts; DataError for two files or folders of one split."""
    if not root.exists():
        return None
    found = next(((row, parts) for row in FORMATS.values() if (parts := row.find(root))), None)
    places: dict[str, Path] = {}
    for part in found[1] if found is not None else ():
        file = part.files[0]
        place = part.home if part.home != root else file if file.parent == root else file.parent
        if part.split and (other := places.setdefault(part.split, place)) != place:
            require_one(root, [str(path.relative_to(root)) for path in (other, place)], part.split)
    return found


def is_there(root: Path) -> bool:
    """Whether there is a data set in any of `FORMATS`, readable or not."""
    return _is_published(root) or find_format(root) is not None


def _is_published(root: Path) -> bool:
    """Whether the layout is that of the published COCO 2017."""
    return any((root / "annotations" / f"instances_{split}2017.json").is_file() for split in ("train", "val"))


def _base(root: Path) -> Path:
    """Returns the folder that image names are relative to; the splits may be in different folders."""
    return root if root.is_dir() else root.parent


def _settled(root: Path, split: Split) -> Split:
    """Returns a split of COCO's layout, with a normalized copy of its annotations unless they are so already."""

    def make(folder: Path, made: Made) -> None:
        made.depends |= {split.annotations, split.images}
        try:
            file = CocoFile(split.annotations)
        except DataError:
            return  # reported by the check
        if not isinstance(file.content, dict):
            return
        images = Images(split.images, suffixes=False, literal=[root])
        made.depends |= set(file.settle_images(images, split.images, split.images))
        with split.annotations.open("rb") as start:
            head = start.read(4)
        unmarked = head[:1] == b"{" and 0 not in head  # no byte order mark, not UTF-16 or UTF-32
        if unmarked and not file.changed:
            file.each_annotation(lambda _: None, areas=True)
        if unmarked and not file.changed:
            return
        made.depends |= images.looked
        path = folder / "annotations" / split.annotations.name
        path.parent.mkdir()
        content = {"plain_of": str(split.annotations), **_own_keys(file.content)}
        tables = {"images": file.images, "categories": file.categories}
        content |= {key: rows for key, rows in tables.items() if file.has(key)}
        write_coco(path, content, partial(file.each_annotation, areas=True))
        if (maps := root / "SegmentationClass").is_dir():  # ground-truth label maps are expected beside the annotations
            (folder / "SegmentationClass").symlink_to(maps)
        made.files["annotations"] = path

    made = made_once(split.annotations, make, kind=str(split.images))
    return Split(made.files.get("annotations", split.annotations), split.images)


@dataclass
class _Faults:
    """Collects faults, each once, as rows of an annotation file."""

    rows: list[list[Any]] = field(default_factory=list)
    known: set[tuple[Any, ...]] = field(default_factory=set)

    def __call__(self, kind: str, where: str, message: str, advice: str, *, fatal: bool = True) -> None:
        row = (kind, where, message, advice, fatal)
        if row not in self.known:
            self.known.add(row)
            self.rows.append(list(row))


def _convert(root: Path, row: Format, parts: list[Part], folder: Path, made: Made) -> None:
    """Write instances_train.json and instances_val.json into `folder`."""
    report = _Faults()
    for other in FORMATS.values():
        if other is not row and (also := _found_too(other, root)):
            message = f"it holds {also.files[0].name} as well, which is not read"
            report(
                "formats", str(root), message, "give the file or folder that is meant, if it is not this", fatal=False
            )
    made.depends.add(Path(inspect.getfile(row.entries)))  # the code of a format that is being written
    made.depends |= {path for part in parts for path in (*part.files, *row.looked(part))}
    made.depends |= {path.parent for part in parts for path in part.files} | {part.images for part in parts}
    contents = _coco_tables(root, parts, report, made) if row is COCO else _entry_tables(root, row, parts, report, made)
    _report_left(root, row, parts, contents, report, made)
    for split, tables in contents.items():
        path = folder / f"instances_{split}.json"
        faults = {"faults": report.rows} if split == "train" else {}
        origin = "plain_of" if row is COCO else "converted_from"
        source = str(parts[0].files[0]) if row is COCO and len(parts) == 1 else f"{root} ({split} split)"
        content = {origin: tables.content.get("plain_of", source), **faults, **_own_keys(tables.content)}
        write_coco(path, content, tables.annotations)
        made.files[split] = path


def _report_left(
    root: Path, row: Format, parts: list[Part], contents: dict[str, "_Tables"], report: _Faults, made: Made
) -> None:
    """Report files of annotations that are not read, and images in the folders of others that are in no split."""
    read = {path for part in parts for path in part.files}
    files = {os.path.realpath(path) for path in read}  # a split may be a folder of links
    left = [path for path in row.left(root, read) if os.path.realpath(path) not in files] if root.is_dir() else []
    made.depends |= {path.parent for path in left}
    if left:
        count = counted(len(left), "file of annotations is", "files of annotations are")
        advice = "name files or folders like the splits, give one of them, or move away those that are not meant"
        report("files-unread", str(root), f"{count} not read, such as {_inside(root, left[0])}", advice, fatal=False)
    rows = [image for tables in contents.values() for image in tables.content["images"]]
    listed = {_base(root) / str(_name(image)) for image in rows}
    folders = sorted({path.parent for path in listed})
    if others := [path for folder in folders for path in files_of(folder, *IMAGES) if path not in listed]:
        count = counted(len(others), "image has", "images have")
        message = f"{count} no annotations or no split, such as {_inside(root, others[0])}"
        report("unlisted", str(root), message, "nothing to do, if they are not meant", fatal=False)


def _inside(root: Path, path: Path) -> str:
    return os.path.relpath(path, root) if path.is_relative_to(root) else str(path)


def _own_keys(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in OURS}


class _Tables(NamedTuple):
    """A split: the content of its file without annotations, and a function that calls back with each of these."""

    content: dict[str, Any]
    annotations: Callable[[Callable[[Any], None]], object]


def _found_too(row: Format, root: Path) -> Part | None:
    try:
        return next(iter(row.find(root)), None)
    except DataError:  # unreadable: it has a message of its own, which is not wanted here
        return None


def _coco_tables(root: Path, parts: list[Part], report: _Faults, made: Made) -> dict[str, _Tables]:
    """Returns the tables of each split from COCO JSON files: whole files if each is a split, else split by image."""
    base, files = _base(root), []
    for part in parts:
        file = CocoFile(part.files[0])
        if not all(file.has(key) for key in TABLES):
            raise DataError(f"{part.files[0]} has no {', '.join(TABLES)}; give a COCO annotation file.")
        images = Images(part.images, part.home, base, suffixes=False)
        made.depends |= {*file.settle_images(images, part.images, base), *images.looked}
        files.append(file)
    of_files = [({part.split} - {""}, file.images) for part, file in zip(parts, files, strict=True)]
    named = [Named(str(_name(image)), "", given) for given, images in of_files for image in images]
    homes = [part.home for part in parts if not part.split]
    splits, lists = assign(named, homes, report, made.says.append)
    made.depends |= set(lists)
    result: dict[str, _Tables] = {}
    for file in files:
        mine, splits = splits[: len(file.images)], splits[len(file.images) :]
        for split in SPLITS:
            here = [split in own for own in mine]
            if any(here):
                result[split] = _of_split(file, here, split)
    for split in ("train", "val"):
        empty = {"images": [], "categories": files[0].categories}
        result.setdefault(split, _Tables(empty, lambda add: None))
    return {split: result[split] for split in SPLITS if split in result}


def _name(image: Any) -> Any:
    return image.get("file_name", "") if isinstance(image, dict) else ""


def _of_split(file: CocoFile, here: Sequence[bool], split: str) -> _Tables:
    """Returns the images that are `here` and their annotations; a row without image goes to train, which reports it."""
    content = {**file.content, "plain_of": str(file.path), "categories": file.categories}
    everything = partial(file.each_annotation, areas=True)
    if all(here):
        return _Tables({**content, "images": file.images}, everything)
    images = list(itertools.compress(file.images, here))
    ids, known = _ids(images), _ids(file.images)

    def each(add: Callable[[Any], None]) -> None:
        def choose(row: Any) -> None:
            key = row.get("image_id") if isinstance(row, dict) else None
            key = key if isinstance(key, int) else None
            if key in ids or (split == "train" and key not in known):
                add(row)

        everything(choose)

    return _Tables({**content, "images": images}, each)


def _ids(images: Sequence[Any]) -> set[Any]:
    return {image["id"] for image in images if isinstance(image, dict) and isinstance(image.get("id"), int)}


class _Picture(NamedTuple):
    """An image to list: its name relative to the base, and all entries about it."""

    name: str
    path: Path
    entries: list[Entry]

    @property
    def splits(self) -> dict[str, None]:
        """The splits that the entries name, in order."""
        return dict.fromkeys(entry.split for entry in self.entries if entry.split)

    def of_split(self, split: str) -> list[Entry]:
        """Returns the entries that name `split` or none; without any of it those of the first split that is named."""
        named = (split, "test" if split == "val" else "", *self.splits)  # test may serve as val
        own = next((name for name in named if name in self.splits), "")
        return [entry for entry in self.entries if entry.split in ("", own)]

    def numbered(self, splits: Collection[str], before: int) -> dict[str, list[tuple[int, Boxed]]]:
        """Returns the objects of each split with ids from `before` + 1; equal objects of two splits share an id."""
        found = {split: [o for entry in self.of_split(split) for o in entry.objects] for split in splits}
        if len(found) == 1:
            return {split: list(enumerate(objects, before + 1)) for split, objects in found.items()}
        ids: dict[str, int] = {}
        for objects in found.values():
            for key in _keys(objects):
                ids.setdefault(key, before + 1 + len(ids))
        return {split: [(ids[key], o) for key, o in _keys(objects).items()] for split, objects in found.items()}


def _keys(objects: Iterable[Boxed]) -> dict[str, Boxed]:
    """Returns the objects by their content and, of equal ones, their rank: equal keys of two lists are one object."""
    seen: Counter[str] = Counter()
    found = {}
    for o in objects:
        key = repr(o._replace(where=""))
        seen[key] += 1
        found[f"{key} {seen[key]}"] = o
    return found


def _entry_tables(root: Path, row: Format, parts: list[Part], report: _Faults, made: Made) -> dict[str, _Tables]:
    """Returns the tables of each split; test only if it has images."""
    base = _base(root)
    pictures = _pictures(base, row, parts, report, made)
    named = [Named(p.name, p.entries[0].own, p.splits) for p in pictures]
    homes = [part.home for part in parts if not part.split]
    splits, lists = assign(named, homes, report, made.says.append)
    made.depends |= set(lists) | {part.home for part in parts}
    said = [next((entry.size for entry in p.entries if entry.size is not None), None) for p in pictures]
    read = iter(read_sizes([p.path for p, size in zip(pictures, said, strict=True) if size is None]))
    sizes = [size or next(read) or _UNKNOWN for size in said]
    labels = sorted({o.label for p in pictures for entry in p.entries for o in entry.objects})
    category = {label: i for i, label in enumerate(labels, 1)}
    images: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    # Number of earlier objects, splits of the image, image.
    shown: dict[str, list[tuple[int, set[str], _Picture]]] = {"train": [], "val": []}
    count = 0
    for i, (picture, own, (width, height)) in enumerate(zip(pictures, splits, sizes, strict=True), 1):
        for split in own:
            where = picture.of_split(split)[0].where
            image = {"id": i, "file_name": picture.name, "width": width, "height": height, "where": where}
            images.setdefault(split, []).append(image)
            shown.setdefault(split, []).append((count, own, picture))
        count += sum(len(entry.objects) for entry in picture.entries)

    def each(split: str, add: Callable[[Any], None]) -> None:
        for image, (before, own, picture) in zip(images[split], shown[split], strict=True):
            for k, o in picture.numbered(sorted(own), before)[split]:
                found = _annotation(k, image["id"], category[o.label], o)
                plain_annotation(found, (image["width"], image["height"]), areas=True)
                add(found)

    names = [{"id": i, "name": label} for label, i in category.items()]
    contents = {split: {"categories": names, "images": rows} for split, rows in images.items()}
    return {split: _Tables(contents[split], partial(each, split)) for split in SPLITS if split in contents}


def _annotation(key: int, image: int, category: int, o: Boxed) -> dict[str, Any]:
    row = {"id": key, "image_id": image, "category_id": category, "bbox": list(o.box)}
    row |= {"segmentation": o.mask} if o.mask is not None else {}
    return row | {"area": o.box[2] * o.box[3], "iscrowd": int(o.hard), "where": o.where}


def _pictures(base: Path, row: Format, parts: list[Part], report: _Faults, made: Made) -> list[_Picture]:
    """Returns the images of all entries in order, without ambiguous ones and those that two names claim."""
    pictures: dict[Path, _Picture] = {}
    claims: dict[Path, str] = {}
    files: dict[tuple[Path, str], Path] = {}  # of an image's boxes in a split
    for part in parts:
        images = Images(part.images, *([base] if part.images != base else []), literal=[part.home, base])
        entries = list(tqdm(row.entries(part, report), desc="read", unit="file", leave=False, delay=2, disable=None))
        images.names = [name for entry in entries if (name := entry.own or entry.file)]
        # Exact paths first, so that an inexact match cannot take the file of another entry.
        found = {i: images.exact(entry.file) for i, entry in enumerate(entries) if entry.file and not entry.own}
        claims |= {path: plain_name(entries[i].file) for i, path in found.items() if path is not None}
        for i, entry in enumerate(entries):
            path = found.get(i) or (_own_file if entry.own else _file_of)(entry, images, part, claims, report)
            if path is None:
                continue
            made.depends |= {path, Path(entry.where) if os.path.isfile(entry.where) else part.files[0]}
            name = _inside(base, path)
            known = pictures.setdefault(path, _Picture(name, path, []))
            if entry in known.entries:  # a split names the image twice
                continue
            other = files.setdefault((path, entry.split), part.files[0])
            if not entry.own and other != part.files[0]:
                raise DataError(f"{other} and {part.files[0]} both have boxes of {name}; use one file.")
            also = [e for e in known.entries if e.split == entry.split or not (e.split and entry.split)]
            if entry.own and also:
                message = f"its image {path} has annotations already, in {also[0].where}"
                report("image-claimed", entry.where, message, "remove one of the two", fatal=True)
                continue
            known.entries.append(entry)
        made.depends |= images.looked
    return list(pictures.values())


def _file_of(entry: Entry, images: Images, part: Part, claims: dict[Path, str], report: _Faults) -> Path | None:
    """Returns the file of an entry whose exact path does not exist."""
    found = images.find(entry.file)
    name = plain_name(entry.file)
    if len(found) > 1:
        _report_several(entry.where, entry.file, found, report)
        return None
    if not found:
        return part.images / name
    if claims.setdefault(found[0], name) != name:
        message = f"{entry.file} is not there, and {found[0]} is the image of {claims[found[0]]}"
        report("image-claimed", entry.where, message, "correct the name, or remove it")
        return None
    return found[0]


def _own_file(entry: Entry, images: Images, part: Part, claims: dict[Path, str], report: _Faults) -> Path | None:
    """Returns the image of an annotation file: that of the same name, before the name inside, which may be stale."""
    own = images.find(entry.own)
    # The folders of a name inside may be those of another computer.
    named = (images.find(entry.file) or images.find(Path(plain_name(entry.file)).name)) if entry.file else []
    if len(own) > 1 and len(named) != 1:
        _report_several(entry.where, entry.own, own, report)
        return None
    if len(own) != 1:
        if len(named) > 1:
            _report_several(entry.where, entry.file, named, report)
            return None
        return named[0] if named else part.images / plain_name(entry.file or entry.own)
    if entry.file and own[0] not in named:
        last = plain_name(entry.file).rpartition("/")[2]
        if named or without_suffix(last) != without_suffix(plain_name(own[0].name)):
            message = f"it names {last} inside and is called as {own[0].name}, whose boxes these are taken for"
            report("image-name", entry.where, message, "correct one of the two names", fatal=False)
    return own[0]


def _report_several(where: str, name: str, found: Iterable[Path], report: _Faults) -> None:
    some = " or ".join(str(path) for path in list(found)[:3])
    report("image-ambiguous", where, f"{name} may be {some}", "give the path of the image")


def read_boxes(path: PathLike) -> dict[str, tuple[list[list[float]], list[str | None]]]:
    """Returns the boxes (x1 y1 x2 y2) and labels of each image in a file or folder of any format; of some, none.

    For prediction with given boxes: the images need not exist. Crowds are left out. In a csv the labels may be absent
    (None). Images are called as in the annotations; those of one name in several folders by their paths.
    Raises DataError: there is no such file, or it holds no boxes.
    """
    path = Path(path).expanduser()
    report = _Faults()
    forms = "a COCO json, a csv, or a folder of VOC xml, YOLO or LabelMe files"
    if not path.exists():
        raise DataError(missing(path, "file of boxes", f"give {forms}"))
    if path.is_file() and path.suffix.lower() == ".json":
        found = COCO, [Part((path,), path.parent, "", path.parent)]
    elif path.is_dir() and _is_published(path):
        files = {name: path / "annotations" / f"instances_{name}.json" for name in ("train2017", "val2017")}
        found = COCO, [Part((file,), path / name, "", path) for name, file in files.items() if file.is_file()]
    elif (known := find_format(path)) is not None:
        found = known
    else:
        raise DataError(f"{path} holds no boxes; give {forms}.")
    row, parts = found
    read = [(part, list(row.entries(part._replace(classes=False), report))) for part in parts]
    _require_own_names([entry for _, entries in read for entry in entries])
    names = iter(_box_names(_base(path), read, report))
    objects: defaultdict[str, dict[str, Boxed]] = defaultdict(dict)  # an object of several splits is one
    for _, entries in read:
        mine: defaultdict[tuple[str, str], list[Boxed]] = defaultdict(list)
        for entry in entries:
            mine[next(names), entry.split] += [o for o in entry.objects if not (o.hard and row is COCO)]
        for (name, _), own in mine.items():
            objects[name] |= _keys(own)
    if fatal := [fault for fault in report.rows if fault[4]]:
        _, where, message, advice, _ = fatal[0]
        raise DataError(f"{where}: {message}; {advice}.")
    return {
        name: (
            [[x, y, x + w, y + h] for x, y, w, h in (o.box for o in own.values())],
            [o.label or None for o in own.values()],
        )
        for name, own in objects.items()
    }


def _box_names(base: Path, read: Sequence[tuple[Part, Sequence[Entry]]], report: _Faults) -> list[str]:
    """Returns the names of the entries' images, in order: a name of several images becomes the path of each.

    It is relative to the base, if the image is there.
    """
    named = [(plain_name(entry.file or entry.own), part, entry) for part, entries in read for entry in entries]
    places: defaultdict[str, set[tuple[Path, str]]] = defaultdict(set)
    for name, part, entry in named:
        places[name].add((part.images, entry.own))
    folders = {part.images: Images(part.images, base, literal=[part.home, base]) for part, _ in read}
    paths: dict[tuple[str, Path, str], str] = {}
    files: defaultdict[str, set[str]] = defaultdict(set)
    for name, part, entry in named:
        key = name, part.images, entry.own
        if len(places[name]) > 1 and key not in paths:
            find = _own_file if entry.own else _file_of
            file = find(entry, folders[part.images], part, {}, report) or part.images / name
            if entry.own and not os.path.isfile(file):
                file = part.images / Path(plain_name(entry.own)).with_name(Path(name).name)
            paths[key] = _inside(base, file)
            files[name].add(os.path.realpath(file))
    keys = [(name, part.images, entry.own) for name, part, entry in named]
    return [paths[key] if len(files[key[0]]) > 1 else key[0] for key in keys]


def _require_own_names(entries: Iterable[Entry]) -> None:
    """Raise DataError if annotation files name each other's images: the names inside are then stale."""
    own = {without_suffix(plain_name(entry.own)).rpartition("/")[2] for entry in entries if entry.own and entry.file}
    for entry in entries:
        name = without_suffix(plain_name(entry.file)).rpartition("/")[2]
        if entry.own and name in own - {without_suffix(plain_name(entry.own)).rpartition("/")[2]}:
            raise DataError(
                f"{entry.where} names {entry.file} inside, which is another file's image; correct the name."
            )
