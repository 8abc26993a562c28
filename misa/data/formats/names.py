"""Match image names in annotations to image files.

The exact path comes first; then a file of the same name below the folder of images, if it is unique (of several the
one with the same parent folders); then one with another suffix or case. Names are compared in Unicode's composed form,
with / for \\. An ambiguous name matches no file, so that no image gets the boxes of another. Standard library only.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from misa.data.formats.parts import IMAGES, walk, without_suffix


def plain_name(name: str) -> str:
    """Normalize a name or path for comparison: composed Unicode and / between folders."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


class Images:
    """The image files below some folders; names are relative to the first.

    suffixes: whether another suffix or case may match. looked: the folders that the answers depend on.
    """

    def __init__(self, *folders: Path, suffixes: bool = True, literal: Sequence[Path] = ()) -> None:
        self.folders = tuple(dict.fromkeys(folders))
        self.literal = tuple(dict.fromkeys((*self.folders, *literal)))
        self.suffixes = suffixes
        self.looked: set[Path] = set(self.literal)
        self._trees: dict[Path, _Tree] = {}

    def find(self, name: str) -> list[Path]:
        """Returns the files that a name may refer to: one, none, or several if it is ambiguous."""
        if exact := self.exact(name):
            return [exact]
        for folder in self.folders:
            if found := self._tree(folder).find(plain_name(name), self.suffixes):
                return found
        return []

    def exact(self, name: str) -> Path | None:
        """Returns the file at exactly this path, or None."""
        for folder in self.literal:
            for written in dict.fromkeys((name, name.replace("\\", "/"))):
                path = folder / written
                if ".." in path.parts:
                    path = Path(os.path.normpath(path))
                if os.path.isfile(path):
                    return path
        return None

    def _tree(self, folder: Path) -> "_Tree":
        if folder not in self._trees:
            self._trees[folder] = tree = _Tree(folder)
            self.looked |= tree.folders
        return self._trees[folder]


class _Tree:
    """Image files indexed by name and by name without suffix, each also case-insensitively."""

    def __init__(self, folder: Path) -> None:
        self.folders: set[Path] = set()
        self.names: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)
        for inner, files in walk(folder):
            self.folders.add(inner)
            for file in files:
                if file.lower().endswith(IMAGES):
                    for key in self._keys(plain_name(file)):
                        self.names[key].append(inner / file)

    @staticmethod
    def _keys(name: str) -> list[tuple[str, str]]:
        bare = without_suffix(name)
        return [("name", name), ("bare", bare), ("Name", name.casefold()), ("Bare", bare.casefold())]

    def find(self, name: str, suffixes: bool) -> list[Path]:
        *folders, last = name.split("/")
        for key in self._keys(last)[: None if suffixes else 1]:
            if found := self.names.get(key):
                alike = [_alike(path, folders) for path in found]
                return [path for path, count in zip(found, alike, strict=True) if count == max(alike)]
        return []


def _alike(path: Path, folders: Sequence[str]) -> int:
    """Returns the number of innermost folders in common."""
    count = 0
    for ours, theirs in zip(reversed(path.parts[:-1]), reversed(folders), strict=False):
        if plain_name(ours) != theirs:
            break
        count += 1
    return count
