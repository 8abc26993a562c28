"""Ultralytics YOLO: data.yaml names the classes and the folders of images; each image has a text file of objects.

    data.yaml            path: ., train: images/train, val: images/val, names: [cat, dog]; also lists of images (.txt)
    images/train/1.jpg   labels/train/1.txt with lines `class x y w h` (center and sides as shares of the image) or
                         `class x1 y1 x2 y2 x3 y3 ...` (a polygon: a mask)

An image without a text file has no objects. Source: docs.ultralytics.com/datasets/detect and /segment.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from misa.data.check.image_files import size_of
from misa.data.formats.coco import DataError
from misa.data.formats.names import plain_name
from misa.data.formats.parts import (
    IMAGES,
    Boxed,
    Entry,
    Format,
    NotText,
    Part,
    ReportFault,
    child,
    files_of,
    number,
    read_text,
    walk,
    without_suffix,
)
from misa.data.formats.splits import require_one
from misa.errors import counted
from misa.files import listing

# Shares are rounded when written, so boxes at the border may exceed the image slightly.
_SLACK = 0.01
_MANY = 10  # polygons, of which a few may well have four corners each
_MOST_CLASSES = 100_000  # numbers without a name get one, so that a number mistyped would fill the memory


def find(root: Path) -> list[Part]:
    """Find the folders of images named in data.yaml, one part per split."""
    sheet = _sheet(root)
    if sheet is None:
        labels = child(root, "labels") if root.is_dir() else None
        if labels is not None and any(name.lower().endswith(".txt") for _, files in walk(labels) for name in files):
            if (unread := child(root, "data.yaml", "data.yml", "dataset.yaml", "dataset.yml")) is not None:
                _content(unread)  # raises, if it is unreadable
            raise DataError(
                f"{root} has YOLO labels and no data.yaml; add one with `names: [...]`, train and val (folders of "
                "images)."
            )
        return []
    content = _content(sheet)
    require_one(sheet, [key for key in ("val", "valid") if content.get(key)], "val")
    parts = []
    for key, split in (("train", "train"), ("val", "val"), ("valid", "val"), ("test", "test")):
        given = content.get(key)
        for value in given if isinstance(given, list) else [given] if given else []:
            parts.append(Part((sheet,), _images(sheet, content, key, str(value)), split, sheet.parent))
    if not parts:
        raise DataError(f"{sheet} names no train and no val; add the folders of their images.")
    # A missing test folder is ignored: it is not needed and often not downloaded.
    return [part for part in parts if part.split != "test" or part.images.exists()]


def _sheet(root: Path) -> Path | None:
    """Returns the YAML file with names and train or val, in a folder or given directly."""
    if root.is_file():
        return root if root.suffix.lower() in (".yaml", ".yml") else None
    files = files_of(root, ".yaml", ".yml")
    found = [
        path
        for path in files
        if not {"names", "nc"}.isdisjoint(content := _content(path, quiet=True))
        and (not {"train", "val", "valid"}.isdisjoint(content))
    ]
    if len(found) > 1:
        named = [path for path in found if path.stem.lower() in ("data", "dataset")]
        if len(named) != 1:
            names = ", ".join(path.name for path in found)
            raise DataError(f"{root} holds several data sets ({names}); give one of these files.")
        return named[0]
    return found[0] if found else None


def _content(path: Path, *, quiet: bool = False, written: bool = False) -> dict[str, Any]:
    """Returns the mapping in a YAML file, {} if it holds none; written: with all values as texts.

    Raises DataError, unless `quiet`: the file cannot be read.
    """
    import yaml

    class Written(yaml.SafeLoader):
        yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012 - merges only

    try:
        content = yaml.load(path.read_bytes(), Loader=Written if written else yaml.SafeLoader)
    except (OSError, yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # such as a 13th month
        if quiet:
            return {}
        raise DataError(f"{path} cannot be read as yaml ({str(error).splitlines()[0]}); correct it.") from error
    return content if isinstance(content, dict) else {}


def _images(sheet: Path, content: dict[str, Any], key: str, value: str) -> Path:
    """Returns a folder (or list) of images: relative to `path`, or to the YAML; exporters write a ../ too many."""
    home, value = sheet.parent, value.replace("\\", "/")
    bases = [home / str(content["path"]).replace("\\", "/"), home] if content.get("path") else [home]
    inner = Path(*[part for part in Path(value).parts if part not in ("..", "/")])
    tried = [base / value for base in bases] + [home / inner, home / inner.name]
    found = next((path for path in tried if path.exists()), None)
    if found is None and key != "test":
        raise DataError(f"{sheet} says {key}: {value}, and there is no {tried[-2]}; correct it.")
    return Path(os.path.normpath(found or tried[0]))


def _class_names(part: Part) -> list[str]:
    """Returns the names as they are written: to YAML `yes`, `no` and `010` are other values than texts."""
    names = _content(part.files[0], written=True).get("names")
    if isinstance(names, dict) and names and all(str(key).isascii() and str(key).isdecimal() for key in names):
        names = {int(key): name for key, name in names.items()}
        if max(names) >= _MOST_CLASSES:
            message = f"{part.files[0]} names class {max(names)}; classes are numbered from 0"
            raise DataError(f"{message}: number them without gaps, in the text files as well.")
        names = [names.get(i, f"class {i}") for i in range(max(names) + 1)]
    if not isinstance(names, list) or not names:
        raise DataError(f"{part.files[0]} has no names: add `names: [...]`, the classes in the order of their numbers.")
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if name in ("", "~"):  # YAML's empty value
            raise DataError(f"{part.files[0]} has an empty name for class {i}; add its name.")
        if not isinstance(name, str):
            kind = "mapping" if isinstance(name, dict) else "list"
            raise DataError(f"{part.files[0]} has a {kind} as the name of class {i}: {str(name)[:60]}; give a text.")
        if first.setdefault(name, i) != i:
            message = f"{part.files[0]} names both class {first[name]} and class {i} {name!r}"
            raise DataError(f"{message}; give each a name of its own.")
    return list(first)


def _files(part: Part) -> list[Path]:
    """Returns the images of a split."""
    if part.images.is_file():
        try:
            lines = read_text(part.images).splitlines()
        except (OSError, NotText) as error:
            raise DataError(f"the list {part.images} cannot be read ({error}); save it as UTF-8.") from error
        return list(dict.fromkeys(_listed(part.images.parent, line.strip()) for line in lines if line.strip()))
    return [inner / name for inner, names in walk(part.images) for name in names if name.lower().endswith(IMAGES)]


def _listed(home: Path, line: str) -> Path:
    """Returns an image of a list: relative to the list; some exporters also prefix the name of a folder above it."""
    parts = Path(line.replace("\\", "/")).parts
    tried = [Path(os.path.normpath(home.joinpath(*parts[i:]))) for i in range(len(parts))]
    return next((path for path in tried if path.exists()), tried[0])


def labels_folder(images: Path) -> Path:
    """Returns the folder of text files of a folder of images: labels/ for the last images/ in its path, or itself.

    Itself also where there is no such folder: the path above the data may have an images/, too.
    """
    replaced = _labels_of(images)
    return replaced if replaced.is_dir() else images


def _labels_of(images: Path) -> Path:
    parts = list(images.parts)
    for i in range(len(parts) - 1, -1, -1):
        if parts[i].lower() == "images":
            found = child(Path(*parts[:i]), "labels")
            parts[i] = "labels" if found is None else found.name
            break
    return Path(*parts)


def looked(part: Part) -> set[Path]:
    """Returns the folders that hold images and text files, or may hold them later."""
    images = {inner for inner, _ in walk(part.images)} or {path.parent for path in _files(part)}
    found = set(images)
    for folder in images:
        labels = _labels_of(folder)  # which may not be there yet
        shared = os.path.commonpath([folder, labels])
        found |= {labels, *(above for above in labels.parents if above.is_relative_to(shared))}
    return found


def entries(part: Part, report: ReportFault) -> Iterator[Entry]:
    """Yield an entry per image; lines that are not objects are reported and dropped."""
    names, files = _class_names(part), _files(part)
    if "kpt_shape" in _content(part.files[0]):
        raise DataError(f"{part.files[0]} is of key points (kpt_shape), not of boxes or masks; give another data set.")
    texts, corners = _texts(part, files, report), Counter[int]()
    with ThreadPoolExecutor(8) as pool:
        for path, size in zip(files, pool.map(size_of, files), strict=True):
            objects = [] if size is None or path not in texts else list(_objects(texts[path], names, size, report))
            corners.update(len(one.mask[0]) // 2 for one in objects if isinstance(one.mask, list))
            yield Entry(str(path), size, objects, str(texts.get(path, path)), part.split)
    if corners[4] >= _MANY and len(corners) == 1:
        message = f"all {corners[4]} polygons have four corners, as rotated boxes (OBB) do, and are read as masks"
        report("yolo-obb", str(part.images), message, "if they are boxes, do not score masks on them", fatal=False)


def _texts(part: Part, files: list[Path], report: ReportFault) -> dict[Path, Path]:
    """Returns the text file of each image that has one; ambiguous ones and those without an image are reported."""
    images: dict[Path, list[Path]] = {}
    for path in files:
        images.setdefault(path.parent, []).append(path)
    if (top := labels_folder(part.images)) != part.images and part.images.is_dir():
        for inner, _ in walk(top):  # a folder of text files may have no images
            images.setdefault(part.images / inner.relative_to(top), [])
    result: dict[Path, Path] = {}
    for folder, own in images.items():
        texts = files_of(labels_folder(folder), ".txt")
        result |= _matched(own, texts, report)
        there = [name for name in (*listing(folder), *(path.name for path in own)) if name.lower().endswith(IMAGES)]
        bare = {_keys(without_suffix(name))[-1] for name in there}
        left = [path for path in texts if _keys(path.name[:-4])[-1] not in bare and _is_of_objects(path)]
        if left:
            message = (
                f"{counted(len(left), 'text file of objects has', 'text files of objects have')} no image in {folder}"
            )
            advice = "give their images the same names, as .jpg or .png, or remove them"
            report("yolo-no-image", str(left[0]), message, advice, fatal=False)
    return result


def _matched(images: list[Path], texts: list[Path], report: ReportFault) -> dict[Path, Path]:
    """Match the images and text files of a folder: by the exact name first, then in another Unicode form or case."""
    named: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)
    for text in texts:
        for key in _keys(text.name[:-4]):
            named[key].append(text)
    takers: defaultdict[Path, list[tuple[int, Path]]] = defaultdict(list)
    for image in images:
        keys = enumerate(_keys(without_suffix(image.name)))
        rank, found = next(((rank, named[key]) for rank, key in keys if key in named), (0, []))
        for text in found[:1]:
            takers[text].append((rank, image))
        if len(found) > 1:
            message = f"{found[0].name} and {found[1].name} in {found[0].parent} may both be of it"
            report("image-ambiguous", str(image), message, "keep one of the two")
    result = {}
    for text, taken in takers.items():
        owners = [image for rank, image in taken if rank == min(taken)[0]]
        result[owners[0]] = text
        if len(owners) > 1:
            message = f"it may be of {owners[0]} or {owners[1]}"
            report("image-ambiguous", str(text), message, "rename one of the images, or remove it")
    return result


def _keys(bare: str) -> list[tuple[str, str]]:
    """Returns a name without suffix as it is, in Unicode's composed form, and in lower case."""
    plain = plain_name(bare)
    return [("name", bare), ("plain", plain), ("lower", plain.casefold())]


def _is_of_objects(path: Path) -> bool:
    """Whether a text file begins with an object; others, such as classes.txt, may lie among the labels."""
    try:
        with path.open("rb") as file:
            cells = next((line.split() for line in file.read(4096).splitlines() if line.strip()), [])
    except OSError:
        return False
    return len(cells) >= 5 and all(number(cell.decode("utf-8", "replace")) is not None for cell in cells)


def _objects(path: Path, names: list[str], size: tuple[int, int], report: ReportFault) -> Iterator[Boxed]:
    try:
        lines = read_text(path).splitlines()
    except (OSError, NotText) as error:
        report("yolo", str(path), f"it cannot be read ({error})", "copy or export it again")
        return
    for i, line in enumerate(lines, 1):
        if not (cells := line.split()):
            continue
        values = [number(cell) for cell in cells]
        where, count = f"{path}, line {i}", len(cells) - 1
        if None not in values and count == 5:
            message = f"it has a sixth number, as predictions have for their confidence: {line[:60]!r}"
            report("yolo", where, message, "remove that number")
            continue
        if any(value is None for value in values) or (count != 4 and (count < 6 or count % 2)):
            report(
                "yolo", where, f"it is not `class x y w h` or `class x1 y1 x2 y2 ...` but {line[:60]!r}", "correct it"
            )
            continue
        label, *shares = [float(value) for value in values if value is not None]
        if label != int(label) or not 0 <= label < len(names):
            there = counted(len(names), "class", "classes")
            report("yolo", where, f"class {label:g} has no name in data.yaml ({there})", "add its name")
        elif count == 4 and min(shares[2:]) < 0:
            side = "width" if shares[2] < 0 else "height"
            report("yolo", where, f"its {side} is negative: {line[:60]!r}", "give center, width and height")
        elif min(shares) < -_SLACK or max(shares) > 1 + _SLACK:
            message = f"its numbers are not shares of the image from 0 to 1: {line[:60]!r}"
            report("yolo-pixels", where, message, "divide them by the image's width and height")
        else:
            yield _boxed(names[int(label)], shares, size, where)


def _inside(share: float) -> float:
    """Clip a share that exceeds the image by a fraction, as rounded ones do; boxes farther out are for the check."""
    return min(max(share, 0.0), 1.0) if -_SLACK <= share <= 1 + _SLACK else share


def _boxed(label: str, shares: list[float], size: tuple[int, int], where: str) -> Boxed:
    width, height = size
    if len(shares) == 4:
        x, y, w, h = shares
        left, top, right, bottom = map(_inside, (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
        return Boxed(label, (left * width, top * height, (right - left) * width, (bottom - top) * height), where)
    pixels = [min(max(share, 0.0), 1.0) * (height if i % 2 else width) for i, share in enumerate(shares)]
    xs, ys = pixels[::2], pixels[1::2]
    return Boxed(label, (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)), where, mask=[pixels])


YOLO = Format(
    find, entries, "data.yaml, images/train/1.jpg, labels/train/1.txt: `class x y w h` or a polygon, 0 to 1", looked
)
