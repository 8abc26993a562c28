"""Match image names in annotations to image files.

The exact path comes first; then a file of the same name below the folder of images, if it is unique (of several the
one with the same parent folders); then one with another suffix or case. Names are compared in Unicode's composed form,
with / for \\. An ambiguous name matches no file, so that no image gets the boxes of another. Nor does a name whose file
would be elsewhere than the names of the other images say: there it is another image, such as a depth map or a mask of
the missing one. Standard library only.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from misa.data.formats.parts import IMAGES, walk, without_suffix


def plain_name(name: str) -> str:
    """Normalize a name or path for comparison: composed Unicode and / between folders."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


class Images:
    """The image files below some folders; names are relative to the first.

    suffixes: whether another suffix or case may match. looked: the folders that the answers depend on. names: all names
    that will be asked for; if one of them is where it should be, in the first folder and in the folders of the name,
    the others have to be, too.
    """

    names: Sequence[str] = ()

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
        if self._in_place:
            return self._there(name)
        for folder in self.folders:
            if found := self._tree(folder).find(plain_name(name), self.suffixes):
                return found
        return []

    @cached_property
    def _in_place(self) -> bool:
        """Whether the file of one of `names` is where its name says."""
        return any(self.exact(name) for name in self.names) or any(self._there(name) for name in self.names)

    def _there(self, name: str) -> list[Path]:
        """The files of a name in the first folder, in folders that are called as those of the name."""
        return self._tree(self.folders[0]).find(plain_name(name), self.suffixes, in_place=True)

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

    def find(self, name: str, suffixes: bool, *, in_place: bool = False) -> list[Path]:
        """Returns the files of a name, of several those with most of its folders; in_place: only those with all."""
        *folders, last = name.split("/")
        named = [folder.casefold() for folder in folders if folder not in ("", ".", "..")]
        for key in self._keys(last)[: None if suffixes else 1]:
            found = self.names.get(key, [])
            if in_place:
                found = [p for p in found if _alike(Path(str(p).casefold()), named) == len(named)]
            if found:
                alike = [_alike(path, folders) for path in found]
                return [path for path, count in zip(found, alike, strict=True) if count == max(alike)]
        return []


def _alike(path: Path, folders: Sequence[str]) -> int:
    """Returns the number of innermost folders in common."""
    return in_common([plain_name(folder) for folder in path.parts[:-1]], folders)


def in_common(parts: Sequence[str], others: Sequence[str]) -> int:
    """Returns the number of equal last parts."""
    same = [a == b for a, b in zip(reversed(parts), reversed(others), strict=False)]
    return [*same, False].index(False)
