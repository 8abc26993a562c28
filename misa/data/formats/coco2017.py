"""COCO 2017 as published: which annotation files and images are present in a folder."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from misa.errors import UserError

TEST_DEV = "annotations/image_info_test-dev2017.json"
# For each split the annotation file, the image folder, and the number of images in the published list.
_SPLITS = {
    "train2017": ("annotations/instances_train2017.json", "train2017", 118_287),
    "val2017": ("annotations/instances_val2017.json", "val2017", 5_000),
    "test-dev2017": (TEST_DEV, "test2017", 20_288),
}


@dataclass(frozen=True)
class SplitState:
    """State of a split: numbers of images listed (None if the list is missing) and found."""

    name: str
    listed: int | None
    found: int
    published: int
    annotations: Path
    images: Path

    @property
    def whole(self) -> bool:
        """Whether the published list and all of its images are present."""
        return self.listed == self.published == self.found

    @property
    def needed(self) -> bool:
        """Training and evaluation need train and val; the ground truth of test-dev is not public."""
        return self.name != "test-dev2017"

    def __str__(self) -> str:
        if self.listed is None:
            return f"{self.name}: no {self.annotations}; fetch the annotations from cocodataset.org"
        other = "" if self.listed == self.published else f" (COCO 2017 has {self.published:,})"
        missing = self.listed - self.found
        absent = f"; {missing:,} of them are not in {self.images}" if missing else f", all in {self.images}"
        return f"{self.name}: {self.listed:,} images listed{other}{absent}"


def look_at_coco(root: str | Path) -> list[SplitState]:
    """Returns the state of train2017, val2017 and test-dev2017 below `root`; image folders may also be in images/."""
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give the one with annotations/ and the image folders.")
    states = []
    for name, (annotations, folder, published) in _SPLITS.items():
        images = next((p for p in (root / folder, root / "images" / folder) if p.is_dir()), root / folder)
        names = list_images(root / annotations) if (root / annotations).is_file() else None
        there = set(os.listdir(images)) if images.is_dir() else set()
        found = 0 if names is None else len(there.intersection(names))
        states.append(
            SplitState(name, None if names is None else len(names), found, published, root / annotations, images)
        )
    return states


def list_images(annotations: Path) -> dict[str, int]:
    """Returns the image id of every file name in a COCO list."""
    try:
        rows = json.loads(annotations.read_text())["images"]
        return {row["file_name"]: row["id"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{annotations} is not a COCO list of images ({error}); fetch it again.") from error
