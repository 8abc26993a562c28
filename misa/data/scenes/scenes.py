"""Embedded data: synthetic scenes drawn from a seed, written as an ordinary COCO-layout folder. No download.

The scenes are hard in the two ways of Figure 4: objects in the color of the adjoining background (`camouflage`) and
objects of strongly contrasting parts (`contrast`). Classes differ by outline and texture, never by color. The masks
are for evaluation only; training reads boxes and labels.

Axes: n instance, h row, w column.

    scenes = Scenes(size=128, train=400, val=100, seed=0)
    root = write_scenes("data/scenes", scenes)
"""

import errno
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from tqdm.auto import tqdm

from misa.data.formats.coco import DataError
from misa.data.scenes.arrange import Piece, arrange, paste, visible
from misa.data.scenes.paint import MODES, background, grain, paint
from misa.data.scenes.shapes import KINDS, stamp
from misa.errors import number, whole

__all__ = ["EDITION", "MODES", "NAMED_SCENES", "Scene", "Scenes", "draw_scene", "named_scene", "write_scenes"]

Split = Literal["train", "val"]
# Part of the seed, so that no validation scene is a training scene.
_SPLITS = {"train": 0, "val": 1}
# Increased when the same parameters draw other images, so that an old folder is not reused.
EDITION = 1
_CARD = "scenes.json"


@dataclass(frozen=True)
class Scenes:
    """The parameters of the embedded data; equal parameters draw equal images.

    size: side of the square images in pixels, or (h, w); at least 32.
    train, val: number of images in each split.
    classes: 1 to 8, see `names`.
    camouflage, contrast: share of the objects that are hard in that way; the others are plain.
    objects: minimum and maximum number of objects in an image (fewer if there is no room).
    clutter: untextured strokes and patches in the background of an image.
    touching: share of the objects (after the first) that touch another of the same class.
    occlusion: share of the objects (after the first) that cover a part of an earlier one.
    truncation: share of the objects that may be cut by the image border.
    least_visible: minimum visible share of an object.
    scale: minimum and maximum diameter, as a share of the shorter side.
    wavelength: minimum and maximum period of the textures, in pixels.
    """

    size: int | tuple[int, int] = 128
    train: int = 400
    val: int = 100
    classes: int = 4
    camouflage: float = 0.3
    contrast: float = 0.3
    objects: tuple[int, int] = (1, 4)
    clutter: int = 6
    touching: float = 0.2
    occlusion: float = 0.2
    truncation: float = 0.1
    least_visible: float = 0.4
    scale: tuple[float, float] = (0.22, 0.65)
    wavelength: tuple[float, float] = (4.0, 7.0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "objects", "scale", "wavelength"):
            if isinstance(getattr(self, name), list):  # read from JSON
                object.__setattr__(self, name, tuple(getattr(self, name)))
        size = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        if len(size) != 2 or any(not whole(side) or side < 32 for side in size):
            raise ValueError(f"size must be a whole number or (h, w), at least 32 pixels a side; got {self.size!r}.")
        for name, low, high in (
            ("train", 1, None),
            ("val", 1, None),
            ("classes", 1, len(KINDS)),
            ("clutter", 0, 1000),
            ("seed", 0, None),
        ):
            value = getattr(self, name)
            if not whole(value) or value < low or (high is not None and value > high):
                span = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{name} must be a whole number, {span}; got {value!r}.")
        for name in ("camouflage", "contrast", "touching", "occlusion", "truncation", "least_visible"):
            if not number(getattr(self, name)) or not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share from 0 to 1; got {getattr(self, name)!r}.")
        if self.camouflage + self.contrast > 1 + 1e-9:
            raise ValueError(
                f"camouflage + contrast are shares of the objects and may not exceed 1; "
                f"got {self.camouflage} + {self.contrast}."
            )
        if not _pair(self.objects) or not all(map(whole, self.objects)) or not 0 <= self.objects[0] <= self.objects[1]:
            raise ValueError(f"objects must be (least, most), whole numbers from 0 up; got {self.objects!r}.")
        if not _pair(self.scale) or not 0.02 <= self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be (least, greatest) share of the side, 0.02 to 1; got {self.scale!r}.")
        if not _pair(self.wavelength) or not 2 <= self.wavelength[0] <= self.wavelength[1] <= 64:
            raise ValueError(f"wavelength must be (least, greatest) in pixels, 2 to 64; got {self.wavelength!r}.")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    @property
    def names(self) -> tuple[str, ...]:
        """The class names, in the order of the labels."""
        return tuple(kind.name for kind in KINDS[: self.classes])


def _pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(number, value))


@dataclass(frozen=True)
class Scene:
    """One image with its ground truth; instances in drawing order.

    image (h w 3) uint8 RGB; masks (n h w) bool, the visible parts, none empty and no two overlapping;
    labels (n) int64 from 0; modes n of `MODES`.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]
    modes: tuple[str, ...]

    @property
    def boxes(self) -> NDArray[np.float32]:
        """Tight boxes (n, 4) as x0 y0 x1 y1 in pixels; x1 and y1 lie one beyond the last pixel."""
        edges = np.zeros((len(self.masks), 4), np.float32)
        for edge, mask in zip(edges, self.masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            edge[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return edges


def draw_scene(scenes: Scenes, index: int, split: Split = "train") -> Scene:
    """Draw scene `index` of a split; it depends on the parameters alone, not on which scenes were drawn before."""
    if split not in _SPLITS:
        raise ValueError(f"split must be 'train' or 'val'; got {split!r}.")
    if not whole(index) or index < 0:
        raise ValueError(f"index must be a whole number from 0 up; got {index!r}.")
    rng = np.random.default_rng([scenes.seed, _SPLITS[split], index])
    pieces = arrange(
        rng,
        size=scenes.shape,
        objects=scenes.objects,
        classes=scenes.classes,
        scale=scenes.scale,
        touching=scenes.touching,
        occlusion=scenes.occlusion,
        truncation=scenes.truncation,
        least_visible=scenes.least_visible,
    )
    shares = (1 - scenes.camouflage - scenes.contrast, scenes.camouflage, scenes.contrast)
    modes = tuple(MODES[int(np.searchsorted(np.cumsum(shares)[:2], u, side="right"))] for u in rng.random(len(pieces)))
    return _render(pieces, modes, scenes.shape, scenes.clutter, scenes.wavelength, rng)


def _render(
    pieces: list[Piece],
    modes: tuple[str, ...],
    size: tuple[int, int],
    clutter: int,
    wavelength: tuple[float, float],
    rng: np.random.Generator,
) -> Scene:
    masks = visible(pieces, size)
    objects: NDArray[np.bool_] = np.asarray(masks.any(axis=0))
    smooth, canvas = background(size, clutter, rng)
    colours: list[NDArray[np.float32] | None] = []
    for piece, mask, mode in zip(pieces, masks, modes, strict=True):
        # Half of the touching pairs share their color: they differ only in outline and phase of the texture.
        share = piece.twin is not None and rng.random() < 0.5
        colour = colours[piece.twin] if share and piece.twin is not None else None
        colours.append(
            paint(
                canvas,
                smooth,
                alpha=piece.alpha,
                mask=mask,
                objects=objects,
                label=piece.label,
                mode=mode,
                wavelength=rng.uniform(*wavelength),
                colour=colour,
                rng=rng,
            )
        )
    labels = np.array([piece.label for piece in pieces], np.int64)
    return Scene(grain(canvas, rng), masks, labels, modes)


def _placed(label: int, diameter: float, top: int, left: int, size: tuple[int, int], seed: int) -> Piece:
    return Piece(label, paste(stamp(label, diameter, np.random.default_rng(seed)), top, left, size), None)


def _abutting(size: tuple[int, int]) -> list[Piece]:
    """Returns two objects of one class whose boxes share an edge."""
    left = _placed(1, 44, 40, 14, size, 1)
    edge = int(np.flatnonzero(left.mask.any(axis=0))[-1]) + 1
    patch = stamp(1, 44, np.random.default_rng(2))
    first = int(np.flatnonzero((patch >= 0.5).any(axis=0))[0])
    return [left, Piece(1, paste(patch, 42, edge - first, size), 0)]


def _named(name: str) -> tuple[tuple[int, int], list[Piece], tuple[str, ...]]:
    size = (97, 131) if name == "odd_size" else (128, 128)
    if name == "same_color_neighbors":
        pieces = [_placed(0, 56, 34, 8, size, 0), _placed(2, 52, 36, 66, size, 1)]
        return size, pieces, ("camouflage", "camouflage")
    if name == "two_tone_object":
        return size, [_placed(3, 80, 24, 24, size, 3)], ("contrast",)
    if name == "one_pixel_box":
        dot = Piece(0, paste(np.ones((1, 1), np.float32), 100, 97, size), None)
        return size, [_placed(1, 48, 12, 16, size, 0), dot], ("plain", "plain")
    if name == "touching_boxes":
        return size, _abutting(size), ("plain", "plain")
    if name == "odd_size":
        return size, [_placed(2, 50, 10, 8, size, 0), _placed(0, 60, 30, 66, size, 4)], ("plain", "contrast")
    return size, [], ()


NAMED_SCENES = ("same_color_neighbors", "two_tone_object", "one_pixel_box", "no_boxes", "touching_boxes", "odd_size")


def named_scene(name: str) -> Scene:
    """Draw a small, fixed scene that shows one case; see `NAMED_SCENES`.

    same_color_neighbors: two objects in the color of each other and of the background (Figure 4a);
    two_tone_object: an object of a dark and a light part (4b); one_pixel_box; no_boxes;
    touching_boxes: two objects of one class and color whose boxes share an edge; odd_size: 97 x 131 pixels.
    """
    if name not in NAMED_SCENES:
        raise ValueError(f"there is no scene named {name!r}; the names are {', '.join(NAMED_SCENES)}.")
    size, pieces, modes = _named(name)
    clutter = 0 if name == "same_color_neighbors" else 4
    rng = np.random.default_rng([7, NAMED_SCENES.index(name)])
    return _render(pieces, modes, size, clutter, (5.0, 5.0), rng)


def write_scenes(root: str | os.PathLike[str], scenes: Scenes) -> Path:
    """Write the scenes as a COCO-layout folder and return it; an existing folder with equal scenes is reused.

    root/train2017, root/val2017: PNG images; root/annotations/instances_{train,val}2017.json: tight boxes x y w h,
    masks as compressed RLE and the extra key `mode`; root/scenes.json: the parameters. Written to a temporary folder
    and renamed at the end, so an interrupted run leaves no partial data. DataError if root holds anything else (it is
    not touched) or cannot be written.
    """
    root = Path(root)
    try:
        return root if _holds(root, scenes) else _write(root, scenes)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"the embedded data cannot be written to {root} ({reason}); give a folder that you can write to."
        ) from error


def _write(root: Path, scenes: Scenes) -> Path:
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, f"{root.parent} is a file") from None
    beside = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        (beside / "annotations").mkdir()
        total = scenes.train + scenes.val
        with tqdm(total=total, desc=f"draw {root.name}", unit="image", leave=False, delay=2, disable=None) as progress:
            _write_split(beside, scenes, "train", scenes.train, progress)
            _write_split(beside, scenes, "val", scenes.val, progress)
        (beside / _CARD).write_text(json.dumps(_card(scenes), indent=1) + "\n")
        beside.chmod(0o755)  # mkdtemp creates folders with mode 0700
        try:
            beside.rename(root)
        except OSError:
            # Another process may have written the same folder meanwhile; anything else is an error.
            if not _holds(root, scenes):
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return root


def _card(scenes: Scenes) -> dict[str, Any]:
    # Through JSON, because tuples come back as lists.
    settings: dict[str, Any] = json.loads(json.dumps(asdict(scenes)))
    return {"made_by": "misa.data.synthetic", "edition": EDITION, "scenes": settings}


def _holds(root: Path, scenes: Scenes) -> bool:
    """Whether root already holds these scenes; False if it is empty or missing; DataError if it holds anything else."""
    advice = "Name another folder, or remove this one"
    if not root.exists():
        return False
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder for the embedded data. {advice}.")
    if not any(root.iterdir()):
        return False
    try:
        card = json.loads((root / _CARD).read_text())
    except (OSError, ValueError):
        raise DataError(f"{root} holds something else than embedded data (no readable {_CARD}). {advice}.") from None
    wanted = _card(scenes)
    if card != wanted:
        raise DataError(f"{root} holds other embedded data than asked for: {_difference(card, wanted)}. {advice}.")
    for split, count in (("train", scenes.train), ("val", scenes.val)):
        found = sum(1 for _ in (root / f"{split}2017").glob("*.png"))
        if found != count or not (root / "annotations" / f"instances_{split}2017.json").is_file():
            raise DataError(
                f"{root} is incomplete: {split}2017 has {found} of {count} images. Remove it to draw it again."
            )
    return True


def _difference(card: object, wanted: dict[str, Any]) -> str:
    held = card.get("scenes") if isinstance(card, dict) else None
    if not isinstance(card, dict) or not isinstance(held, dict):
        return f"{_CARD} is not one of ours"
    changed = [
        f"{key} {held.get(key)} there, {value} asked"
        for key, value in wanted["scenes"].items()
        if held.get(key) != value
    ]
    return "; ".join(changed) or f"drawn by edition {card.get('edition')}, this is edition {EDITION}"


def _write_split(folder: Path, scenes: Scenes, split: Split, count: int, progress: "tqdm[Any]") -> None:
    h, w = scenes.shape
    (folder / f"{split}2017").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene = draw_scene(scenes, index, split)
        name = f"{index + 1:012d}.png"
        path = folder / f"{split}2017" / name
        if not cv2.imwrite(str(path), np.ascontiguousarray(scene.image[..., ::-1])):
            raise OSError(f"could not write {path}: is the disk full?")
        images.append({"id": index + 1, "file_name": name, "height": h, "width": w})
        boxes = scene.boxes
        for mask, label, mode, (x0, y0, x1, y1) in zip(scene.masks, scene.labels, scene.modes, boxes, strict=True):
            encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": int(label) + 1,
                    "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [h, w], "counts": encoded["counts"].decode("ascii")},
                    "mode": mode,
                }
            )
        progress.update()
    categories = [{"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(scenes.names)]
    info = {"description": "Embedded scenes of misa; masks are for evaluation only", "split": split}
    data = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(data))
