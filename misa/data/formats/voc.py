"""Convert PASCAL VOC 2012 and SBD to COCO annotations: one instance per number in SegmentationObject or SBD's inst.

Images of VOC's train and val lists have VOC's masks, whose void border (255) belongs to no object; the other images of
train_aug have SBD's (Hariharan et al. 2011), without such a border. Masks are RLE, areas and tight boxes are those of
the masks, nothing is a crowd. The PNGs do not mark difficult objects, so none is left out.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as rle
from scipy.io import loadmat
from tqdm.auto import tqdm

from misa.data.label_maps import VOC_CLASSES, VOID
from misa.errors import UserError
from misa.files import write_json

COUNTS = {"train": 1464, "val": 1449, "trainval": 2913, "train_aug": 10582}
"""Number of images in VOC 2012's lists, and in train_aug (train with SBD's images outside val)."""
_THREADS = 8
_UNPACK = "unpack the whole of VOCtrainval_11-May-2012.tar"


class Objects(NamedTuple):
    """An image's instances: `numbers` (h w) is the instance id, 0 for background; `classes` their classes, 1 to 20."""

    numbers: NDArray[np.uint8]
    classes: dict[int, int]


@dataclass(frozen=True)
class Summary:
    """Counts of a split."""

    name: str
    path: Path
    images: int
    objects: int

    def __str__(self) -> str:
        official = COUNTS.get(self.name)
        other = (
            "" if official in (None, self.images) else f" (VOC 2012 has {official:,}: the lists are not the official)"
        )
        return f"{self.name}: {self.images:,} images{other}, {self.objects:,} objects in {self.path}"


def write_voc(
    devkit: str | Path, out: str | Path, *, sbd: str | Path | None = None, train: str = "", val: str = "val"
) -> list[Summary]:
    """Write a COCO layout in the new folder `out` from a VOC 2012 devkit and, for train_aug, SBD's folder.

    Every existing list becomes annotations/voc2012_<list>.json; instances_train2017.json and instances_val2017.json,
    which training reads, are links to two of them, train2017 and val2017 to the images, SegmentationClass to VOC's
    label maps, which have the void borders of objects; SBD's images have none.

    devkit: VOC2012, or a folder that holds it (VOCdevkit). out: must not hold annotations yet, and links of these names
    only to this devkit. sbd: the folder with
    inst/ (benchmark_RELEASE/dataset), or one above it. train: the list to train on; by default train_aug with `sbd`,
    train without. val: the list to evaluate on.
    Raises UserError: something is missing, unreadable or inconsistent.
    """
    root, out = voc_root(devkit), Path(out).expanduser().resolve()
    extra = None if sbd is None else sbd_root(sbd)
    paths = {name: root / f"ImageSets/Segmentation/{name}.txt" for name in ("train", "val", "trainval")}
    lists = {name: path.read_text().split() for name, path in paths.items() if path.is_file()}
    train = train or ("train" if extra is None else "train_aug")
    if extra is not None:
        lists["train_aug"] = augmented(_need(lists, "train", root), _need(lists, "val", root), _sbd_names(extra))
    chosen = {"train": train, "val": val}
    for name in chosen.values():
        _need(lists, name, root)
    links = {f"{split}2017": root / "JPEGImages" for split in chosen}
    links["SegmentationClass"] = root / "SegmentationClass"  # for mean IoU and the teacher, with VOC's void borders
    _require_free(out, links)
    own = {name for split in ("train", "val", "trainval") for name in lists.get(split, [])}
    read = _reader(root, extra, own)
    wanted = sorted({name for names in lists.values() for name in names})
    with ThreadPoolExecutor(_THREADS) as pool:
        rows = list(tqdm(pool.map(lambda n: _rows(n, *read(n)), wanted), total=len(wanted), desc="VOC", unit="image"))
    found = dict(zip(wanted, rows, strict=True))
    made = out / ".annotations.unfinished"  # a kill leaves no data that looks whole
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    summaries = [_write(made / f"voc2012_{split}.json", split, names, found) for split, names in lists.items()]
    for split, name in chosen.items():
        os.symlink(f"voc2012_{name}.json", made / f"instances_{split}2017.json")
    for name, target in links.items():
        if not (out / name).is_symlink():
            os.symlink(os.path.relpath(target, out), out / name)
    made.rename(out / "annotations")
    return [replace(one, path=out / "annotations" / one.path.name) for one in summaries]


def _require_free(out: Path, links: Mapping[str, Path]) -> None:
    """Raise UserError if the folder has annotations, or anything but a link of an earlier call in a link's place."""
    if os.path.lexists(out / "annotations"):
        raise UserError(f"{out} has an annotations folder already; give a new folder as out, or delete that one.")
    for name, target in links.items():
        if os.path.lexists(out / name) and not (
            (out / name).is_symlink() and (out / name).resolve() == target.resolve()
        ):
            raise UserError(f"{out / name} exists already, and is no link to {target}; give a new folder as out.")


def augmented(train: Sequence[str], val: Sequence[str], sbd: Sequence[str]) -> list[str]:
    """Returns train_aug: VOC's train list and all images of SBD outside VOC's val list."""
    return sorted((set(train) | set(sbd)) - set(val))


def voc_root(folder: str | Path) -> Path:
    """Returns the folder with JPEGImages: `folder` or one below it."""
    folder = Path(folder).expanduser().resolve()
    for root in (folder, folder / "VOC2012", folder / "VOCdevkit" / "VOC2012"):
        if (root / "JPEGImages").is_dir():
            for part in ("SegmentationObject", "SegmentationClass", "ImageSets/Segmentation"):
                if not (root / part).is_dir():
                    raise UserError(f"{root} has no {part}; {_UNPACK}.")
            return root
    raise UserError(f"there is no VOC devkit in {folder}: no JPEGImages in it or in VOC2012 below; {_UNPACK}.")


def sbd_root(folder: str | Path) -> Path:
    """Returns the folder with inst: `folder` or one below it."""
    folder = Path(folder).expanduser().resolve()
    for root in (folder, folder / "dataset", folder / "benchmark_RELEASE" / "dataset"):
        if (root / "inst").is_dir():
            return root
    raise UserError(f"there is no SBD in {folder}: no inst folder in it or below; unpack the whole of benchmark.tgz.")


def download_voc(folder: str | Path, *, sbd: bool = True) -> tuple[Path, Path | None]:
    """Download VOC 2012 (2 GB) and SBD (1.4 GB) with torchvision; returns the folders for `write_voc`."""
    from torchvision.datasets import SBDataset, VOCSegmentation

    folder = Path(folder).expanduser()
    try:
        VOCSegmentation(folder, year="2012", image_set="trainval", download=True)
        if sbd and not (folder / "sbd" / "inst").is_dir():
            SBDataset(folder / "sbd", mode="segmentation", download=True)
    except (OSError, RuntimeError) as error:  # no network, a wrong checksum, no space
        raise UserError(
            f"the data could not be fetched into {folder} ({error}); fetch VOCtrainval_11-May-2012.tar and "
            "benchmark.tgz by hand and give their folders."
        ) from error
    return folder / "VOCdevkit" / "VOC2012", folder / "sbd" if sbd else None


def _need(lists: dict[str, list[str]], name: str, root: Path) -> list[str]:
    if name not in lists:
        hint = "; train_aug needs --sbd" if name == "train_aug" else f"; {_UNPACK}"
        raise UserError(f"there is no list {name}: {root / 'ImageSets' / 'Segmentation'} has {', '.join(lists)}{hint}.")
    return lists[name]


def _sbd_names(root: Path) -> list[str]:
    lists = [root / f"{name}.txt" for name in ("train", "val")]
    for path in lists:
        if not path.is_file():
            raise UserError(f"{path} is missing; unpack the whole of benchmark.tgz.")
    return [name for path in lists for name in path.read_text().split()]


def _reader(root: Path, sbd: Path | None, own: set[str]) -> Callable[[str], tuple[tuple[int, int], Objects]]:
    """Returns a reader of an image's (width, height) and objects, from VOC if possible, else from SBD."""

    def read(name: str) -> tuple[tuple[int, int], Objects]:
        picture = root / "JPEGImages" / f"{name}.jpg"
        with _open(picture, f"it is in a list and not on the disk; {_UNPACK}") as image:
            size = image.size
        objects = read_voc_objects(root, name) if name in own or sbd is None else read_sbd_objects(sbd, name)
        if objects.numbers.shape != size[::-1]:
            h, w = objects.numbers.shape
            raise UserError(f"{picture} has {size[0]} x {size[1]} pixels and its masks {w} x {h}; {_UNPACK} again.")
        return size, objects

    return read


def read_voc_objects(root: Path, name: str) -> Objects:
    """Read the instances of VOC's PNGs; the void border belongs to none of them."""
    index, classes = (_png(root / part / f"{name}.png") for part in ("SegmentationObject", "SegmentationClass"))
    if index.shape != classes.shape:
        raise UserError(
            f"the PNGs of {name} in SegmentationObject and SegmentationClass differ in size; {_UNPACK} again."
        )
    found = {}
    for number in np.unique(index).tolist():
        if number in (0, VOID):
            continue
        under = np.bincount(classes[index == number], minlength=256)
        under[[0, VOID]] = 0
        label = int(under.argmax())
        if not (under[label] and label <= len(VOC_CLASSES)):
            raise UserError(
                f"object {number} of {root / 'SegmentationObject' / name}.png has no class in SegmentationClass."
            )
        found[number] = label
    return Objects(np.where(index == VOID, 0, index).astype(np.uint8), found)


def read_sbd_objects(root: Path, name: str) -> Objects:
    """Read the instances of SBD's inst/<name>.mat: a map of ids and the class of each."""
    path = root / "inst" / f"{name}.mat"
    if not path.is_file():
        raise UserError(f"{path} is missing; unpack the whole of benchmark.tgz.")
    try:
        truth = loadmat(path, variable_names=["GTinst"])["GTinst"][0, 0]
        index = np.asarray(truth["Segmentation"], dtype=np.uint8)
        labels = [int(label) for label in np.ravel(truth["Categories"])]
    except Exception as error:  # scipy raises many kinds for a truncated file or one that is not MATLAB's
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}); unpack benchmark.tgz again.") from error
    numbers = [number for number in np.unique(index).tolist() if number not in (0, VOID)]
    if index.ndim != 2 or not set(numbers) <= set(range(1, len(labels) + 1)) or not set(labels) <= set(range(1, 21)):
        raise UserError(f"{path} contradicts itself: objects {numbers}, classes {labels}; unpack benchmark.tgz again.")
    return Objects(np.where(index == VOID, 0, index).astype(np.uint8), {n: labels[n - 1] for n in numbers})


def _png(path: Path) -> NDArray[np.uint8]:
    with _open(path, _UNPACK) as image:
        if image.mode not in ("P", "L"):
            raise UserError(f"{path} is a {image.mode} image and no palette image; {_UNPACK} again.")
        try:
            return np.asarray(image, dtype=np.uint8)
        except (OSError, SyntaxError) as error:
            raise UserError(f"{path} is damaged ({error}); {_UNPACK} again.") from error


def _open(path: Path, advice: str) -> Image.Image:
    if not path.is_file():
        raise UserError(f"{path} is missing; {advice}.")
    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); {_UNPACK} again.") from error


def _rows(name: str, size: tuple[int, int], objects: Objects) -> dict[str, Any]:
    """Returns an image and its annotations, without ids."""
    annotations = []
    for number, label in objects.classes.items():
        mask = rle.encode(np.asfortranarray(objects.numbers == number, dtype=np.uint8))
        annotations.append(
            {
                "category_id": label,
                "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
                "area": int(rle.area(mask)),
                "bbox": rle.toBbox(mask).tolist(),
                "iscrowd": 0,
            }
        )
    return {"file_name": f"{name}.jpg", "width": size[0], "height": size[1], "annotations": annotations}


def _write(path: Path, split: str, names: Sequence[str], found: dict[str, dict[str, Any]]) -> Summary:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for place, name in enumerate(names, 1):
        row = dict(found[name])
        # 2007_000032 has id 2007000032 in every list.
        image = int(name.replace("_", "")) if re.fullmatch(r"\d{4}_\d{6}", name) else place
        for annotation in row.pop("annotations"):
            annotations.append({"id": len(annotations) + 1, "image_id": image, **annotation})
        images.append({"id": image, **row})
    categories = [{"id": number, "name": name} for number, name in enumerate(VOC_CLASSES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(path, content, indent=None)
    return Summary(split, path, len(images), len(annotations))
