"""Assign images to splits: by lists or folders, else a tenth for validation by a hash of the names.

The tenth is all images whose hash is below a threshold, so adding images to the data moves no image from one split to
the other. Standard library only.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from misa.data.formats.coco import DataError
from misa.data.formats.names import in_common, plain_name
from misa.data.formats.parts import SPLITS, ReportFault, child, files_of, without_suffix
from misa.errors import counted

_LIMIT = (2**256 // 10).to_bytes(32, "big")  # of the hashes of images for validation, if no split is given
_TENTH = 0.02, 0.3  # shares that still are about a tenth
_LISTS = {**SPLITS, "trainval": "trainval"}
OVERLAP = ": scores on them are not of held-out images"
"""The end of the warning about images that are both for training and for validation."""


class Named(NamedTuple):
    """An image by its path and by the name of its own annotation file ("": none), and its given splits."""

    path: str
    own: str = ""
    splits: Collection[str] = ()


def assign(
    images: Sequence[Named], homes: Sequence[Path], report: ReportFault, say: Callable[[str], None]
) -> tuple[list[set[str]], list[Path]]:
    """Returns the splits of each image (none, one, or all that name it), and the files and folders they depend on.

    homes: the folders that may hold ImageSets/Main. report: reports faults of a list; say: reports the decision, and
    images that are both for training and for validation.
    Raises DataError: a list names none of the images.
    """
    splits, lists = _assign(images, homes, report, say)
    train, val = ({i.path for i, own in zip(images, splits, strict=True) if split in own} for split in ("train", "val"))
    if train & val:
        say(overlap(len(train & val), len(val)))
    return splits, [*lists, *(folder for home in homes for folder in _places(home))]


def overlap(count: int, total: int) -> str:
    """Returns the warning that `count` of `total` validation images are training images."""
    shared = "are also training images" if count > 1 else "is also a training image"
    return f"{count} of the {counted(total, 'validation image')} {shared}{OVERLAP}"


def require_one(root: Path, names: Sequence[str], split: str) -> None:
    """Raise DataError if two files, folders or keys in `root` are one split by name."""
    if len(names) > 1:
        raise DataError(f"{root} holds {names[0]} and {names[1]}, both the {split} split by name; keep one of the two.")


def _assign(
    images: Sequence[Named], homes: Sequence[Path], report: ReportFault, say: Callable[[str], None]
) -> tuple[list[set[str]], list[Path]]:
    found = [lists for home in dict.fromkeys(homes) if (lists := _lists(home))]
    if found:
        every = [(split, path) for lists in found for split, path in lists.items()]
        index = _Index(images)
        lines = {path: [(line, index.find(line)) for line in _lines(path)] for _, path in every}
        in_place = any(answer.whole > 1 for own in lines.values() for _, answer in own)
        members: dict[str, set[int]] = {}
        for split, path in every:
            members.setdefault(split, set()).update(_members(path, lines[path], in_place, images, report))
        return _by_lists(members, images, say), [path for _, path in every]
    given = {split for image in images for split in image.splits}
    if "val" not in given and "test" in given:
        say("there is no validation split: the images of the test split are scored on")
        return [{"val" if split == "test" else split for split in image.splits} or {"train"} for image in images], []
    if "val" in given:
        return [set(image.splits) or {"train"} for image in images], []
    return [{split} for split in by_hash([image.path for image in images], say)], []


def by_hash(paths: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Split off about a tenth for validation by a threshold on a hash of the names; at least one of two or more.

    The names are those without folders, so that moved images stay in their split; but with folders where equal names,
    such as one in each folder, would make it far from a tenth.
    """
    last = [_last(path) for path in paths]
    value = [_hash(name) for name in last]
    few, many = (share * len(paths) for share in _TENTH)
    if len(set(last)) < len(last) and not few <= sum(v < _LIMIT for v in value) <= many:
        value = [_hash(plain_name(path)) for path in paths]
    split = ["val" if v < _LIMIT else "train" for v in value]
    if len(paths) > 1 and len(set(split)) == 1:  # so few images that none or all are below the threshold
        odd = value.index(min(value)) if split[0] == "train" else value.index(max(value))
        split[odd] = "val" if split[0] == "train" else "train"
    if paths:
        found = f"of {counted(len(split), 'image')} {split.count('val')} for validation, chosen by name"
        say(f"no validation split is given: {found}")
    return split


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "replace")).digest()


def _last(path: str) -> str:
    return plain_name(path).rpartition("/")[2]


def _lists(home: Path) -> dict[str, Path]:
    """Returns the lists of splits of a folder: in ImageSets/Main, in ImageSets or beside the annotations."""
    for folder in _places(home):
        found: dict[str, Path] = {}
        for path in files_of(folder, ".txt"):
            if split := _LISTS.get(path.stem.lower()):
                require_one(folder, [found[split].name, path.name] if split in found else [], split)
                found[split] = path
        if found:
            return found
    return {}


def _places(home: Path) -> list[Path]:
    """Returns the folders that may hold the lists of a folder, the first first."""
    sets = child(home, "ImageSets")
    return [folder for folder in (None if sets is None else child(sets, "Main"), sets, home) if folder is not None]


class _Found(NamedTuple):
    """The images that a line of a list may name. whole: number of its parts if an image's path ends with it, or 0."""

    images: list[int]
    whole: int


class _Index:
    """Images by the last part of their name and of that of their annotation file, without suffix."""

    def __init__(self, images: Sequence[Named]) -> None:
        self.by_name: defaultdict[str, list[tuple[int, Sequence[str]]]] = defaultdict(list)
        for i, image in enumerate(images):
            for name in dict.fromkeys((image.own, without_suffix(image.path))):
                if name:
                    parts = plain_name(name).split("/")
                    self.by_name[parts[-1]].append((i, parts))

    def find(self, line: str) -> _Found:
        """Returns the images of a line: of equal names those with most of its folders."""
        # VOC's lists of one class have a flag after each name for the presence of the class.
        for name in dict.fromkeys((line, re.sub(r"\s+-?[01]$", "", line))):
            parts = [part for part in without_suffix(plain_name(name)).split("/") if part not in ("", ".")]
            if parts and (alike := self.by_name.get(parts[-1])):
                counts = [(i, in_common(parts, own), len(own)) for i, own in alike]
                most = max(count for _, count, _ in counts)
                best = [(i, length) for i, count, length in counts if count == most]
                whole = most == len(parts) or any(most == length for _, length in best)
                return _Found(list(dict.fromkeys(i for i, _ in best)), most if whole else 0)
        return _Found([], 0)


def _members(
    path: Path, lines: Sequence[tuple[str, _Found]], in_place: bool, images: Sequence[Named], report: ReportFault
) -> set[int]:
    """Returns the images in a list, given by name or path, with or without suffix.

    Folders of a line may be those of another computer; but if any line's are those of its image (`in_place`), all are
    meant, and in any case one of several images of one name is not guessed.
    """
    members: set[int] = set()
    missing: list[str] = []
    for line, found in lines:
        if found.whole or (len(found.images) == 1 and not in_place):
            members.update(found.images)
        else:
            missing.append(line)
    if missing and not members:
        raise DataError(
            f"{path} names none of the annotated images: its first line is {missing[0]!r}, and an image is "
            f"{images[0].path if images else 'nowhere'}; correct the list, or remove it."
        )
    if missing:
        message = f"{counted(len(missing), 'line names', 'lines name')} no annotated image, such as {missing[0]!r}"
        report("split-list", str(path), message, "nothing to do, if they are not meant", fatal=False)
    return members


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"the list {path} cannot be read ({error.strerror}).") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _by_lists(members: Mapping[str, set[int]], images: Sequence[Named], say: Callable[[str], None]) -> list[set[str]]:
    everything = set(range(len(images)))
    train, val = members.get("train"), members.get("val")
    both, test = members.get("trainval"), members.get("test", set())
    if val is None and both is not None and train is not None and both - train:
        val = both - train
    if val is None and test:
        val, test = test, set()
        say("there is no list of validation images: those of the test list are scored on")
    if train is None:
        train = (both if both is not None else everything - test) - (val or set())
    if val is None and (rest := everything - train) and both is None:
        val = rest
        say(
            f"there is no list of validation images: the {len(rest)} that the training list does not name are scored on"
        )
    if val is None:
        order = sorted(train)
        drawn = by_hash([images[i].path for i in order], say)
        val = {i for i, split in zip(order, drawn, strict=True) if split == "val"}
        train = train - val
    named = {"train": train, "val": val, "test": test}
    return [{split for split, own in named.items() if i in own} for i in range(len(images))]
