"""Read a normalized COCO annotation file of any size: images in memory, annotations streamed from disk."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sys import intern
from typing import Any

from tqdm.auto import tqdm

from misa.data.check.image_files import size_of
from misa.data.formats.json_stream import stream_json
from misa.data.formats.names import Images, plain_name
from misa.data.formats.plain import (
    TextIds,
    is_empty,
    plain_annotation,
    plain_id,
    plain_image,
    plain_references,
    reference_numbers,
)
from misa.errors import whole

TABLES = ("images", "annotations", "categories")


class CocoFile:
    """The content of a file, normalized by `misa.data.formats.plain`.

    content: everything but the rows of its tables, or the whole value if it is not an object. images, categories: rows.
    count, masks: the number of annotations, and whether any has a mask. changed: whether normalization changed
    anything, including annotations only after `each_annotation`. texts: whether ids or references were no integers.
    numbers: by table, the numbers in place of ids that were strings.

    path: the JSON file. keep: the keys of images to keep; empty for all. see: called with each annotation as read from
    the file.
    Raises BadJson: it is not valid JSON, or has a table twice.
    """

    def __init__(self, path: Path, *, keep: Sequence[str] = (), see: Callable[[Any], object] | None = None) -> None:
        self.path = path
        self.images: list[Any] = []
        self.categories: list[Any] = []
        self.count, self.masks, self.texts = 0, False, False
        self._first: dict[str, Any] = {}
        self._ids = {key: TextIds() for key in TABLES}
        self._keep, self._see = frozenset(keep), see
        take = {"images": self._image, "annotations": self._annotation, "categories": self._category}
        self.content: Any = stream_json(path, take, once=TABLES)
        self.numbers = {key: ids.numbers() for key, ids in self._ids.items()}
        self._references = [reference_numbers(self.numbers[key]) for key in ("images", "categories")]
        self.texts |= any(self.numbers.values())
        self.changed = self.texts
        for row in self.images:
            self.changed |= plain_id(row, self.numbers["images"]) | plain_image(row)
        for row in self.categories:
            self.changed |= plain_id(row, self.numbers["categories"])

    def _image(self, row: Any) -> None:
        self._ids["images"].see(row)
        if isinstance(row, dict):  # share equal key strings between rows, to save memory
            row = {intern(key): value for key, value in row.items() if not self._keep or key in self._keep}
        self.images.append(row)

    def _category(self, row: Any) -> None:
        self._ids["categories"].see(row)
        self.categories.append(row)

    def _annotation(self, row: Any) -> None:
        self._ids["annotations"].see(row)
        self.count += 1
        if isinstance(row, dict):
            self._first = self._first or dict.fromkeys(row)
            self.masks = self.masks or not is_empty(row.get("segmentation"))
            forms = [type(row.get(key)) for key in ("id", "image_id", "category_id")]
            self.texts = self.texts or str in forms or float in forms
        if self._see is not None:
            self._see(row)

    @property
    def kind(self) -> str:
        """The kind of a COCO file without instances, "panoptic" or "captions"; else ""."""
        if "segments_info" in self._first:
            return "panoptic"
        return "captions" if "caption" in self._first and "bbox" not in self._first else ""

    def has(self, key: str) -> bool:
        """Whether the file has a table of this name."""
        return isinstance(self.content, dict) and isinstance(self.content.get(key), list)

    def settle_images(self, images: Images, folder: Path, base: Path) -> list[Path]:
        """Make names relative to `base`, and read missing sizes from the files; returns the files read.

        A name without a file, or whose file is that of another name, is one in `folder`, where the check misses it.
        """
        rows = [row for row in self.images if isinstance(row, dict) and isinstance(row.get("file_name"), str)]
        images.names = [row["file_name"] for row in rows]
        exact = {name: images.exact(name) for name in images.names}
        claims = {path: plain_name(name) for name, path in exact.items() if path is not None}
        for row in rows:
            name = row["file_name"]
            path = exact[name]
            if path is not None and base == folder and path == folder / name:
                continue
            if path is None and len(found := images.find(name)) == 1:
                path = found[0] if claims.setdefault(found[0], plain_name(name)) == plain_name(name) else None
            settled = os.path.relpath(path or folder / name.replace("\\", "/"), base)
            if settled != name:
                row["file_name"], self.changed = settled, True
        rows = [row for row in rows if any(row.get(side) in (None, "") for side in ("width", "height"))]
        paths = [base / row["file_name"] for row in rows]
        for row, size in zip(rows, read_sizes(paths), strict=True):
            if size is not None:
                (row["width"], row["height"]), self.changed = size, True
        return paths

    def each_annotation(self, take: Callable[[Any], object], *, areas: bool) -> None:
        """Call `take` with each annotation, normalized; areas: also replace wrong areas."""
        sizes: dict[Any, tuple[Any, Any]] = {}
        if areas:
            rows = (row for row in self.images if isinstance(row, dict) and isinstance(row.get("id"), int))
            sizes = {row["id"]: (row.get("width"), row.get("height")) for row in rows}

        def plain(row: Any) -> None:
            if isinstance(row, dict):
                changed = plain_id(row, self.numbers["annotations"]) | plain_references(row, *self._references)
                key = row.get("image_id")
                changed |= plain_annotation(row, sizes.get(key) if whole(key) else None, areas)
                self.changed |= changed
            take(row)

        def skip(_: Any) -> None:
            """Ignore tables that are already in memory."""

        stream_json(self.path, {"images": skip, "categories": skip, "annotations": plain})

    def whole(self) -> Any:
        """Returns the content with all tables, normalized except for areas; any other JSON value unchanged."""
        if isinstance(self.content, dict):
            for key, rows in (("images", self.images), ("categories", self.categories)):
                if self.has(key):
                    self.content[key] = rows
            if self.has("annotations"):
                self.each_annotation(self.content["annotations"].append, areas=False)
        return self.content


def read_coco(path: Path) -> Any:
    """Read a COCO file completely, normalized except for areas; any other JSON value is returned unchanged.

    Raises BadJson: it is not valid JSON, or has a table twice.
    """
    return CocoFile(path).whole()


def read_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Returns (width, height) of image files, None for unusable ones; uses eight threads and a progress bar."""
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(size_of, paths)
        return list(tqdm(found, total=len(paths), desc="read sizes", unit="image", leave=False, delay=2, disable=None))
