"""Pascal VOC XML: one file per image, boxes only. VOC counts pixels from 1, and a box includes its last pixel.

    a devkit     VOC2007/Annotations/*.xml, VOC2007/JPEGImages/, VOC2007/ImageSets/Main/{train,val,trainval,test}.txt;
                 given as VOC2007, VOCdevkit or a folder above, or as Annotations itself
    a folder     *.xml beside the images, or such folders in train/ and val/

Standard library only.
"""

import os
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator
from pathlib import Path

from misa.data.formats.coco import DataError
from misa.data.formats.parts import (
    Boxed,
    Entry,
    Format,
    Part,
    ReportFault,
    child,
    files_of,
    image_folder,
    number,
    size_in,
    split_folders,
    walk,
    with_rest,
)
from misa.data.formats.splits import require_one
from misa.files import listing


def find(root: Path) -> list[Part]:
    """Find the XML files of a folder and of its splits."""
    if root.name.lower() == "annotations" and (
        image_folder(root.parent) != root.parent or root.parent.name[:3] == "VOC"
    ):
        return _devkit(root.parent)
    if parts := _devkit(root):
        return parts
    inner = [root / name for name in listing(root) if name.lower().startswith("voc")]
    inner += [folder / name for folder in inner for name in listing(folder) if name.lower().startswith("voc")]
    kits = [folder for folder in inner if os.path.isdir(folder) and _devkit(folder)]
    if len(kits) > 1:
        names = " and ".join(str(kit.relative_to(root)) for kit in kits)
        raise DataError(f"{root} holds {names}; give one of them.")
    if kits:
        return _devkit(kits[0])
    files = files_of(root, ".xml")
    rest = Part(tuple(files), root, "", root) if files else None
    found: list[Part] = []
    for folder, split in split_folders(root):
        if files := files_of(folder, ".xml"):
            found.append(Part(tuple(files), folder, split, folder))
        else:
            found += [part._replace(split=split) for part in _devkit(folder)]
    return with_rest(found, rest)


def left(root: Path, read: Collection[Path]) -> list[Path]:
    """Returns the XML files anywhere in a folder, but for those that are read."""
    found = [inner / name for inner, names in walk(root) for name in names if name.lower().endswith(".xml")]
    return [path for path in found if path not in read]


def _devkit(home: Path) -> list[Part]:
    """Find Annotations beside a folder of images; Annotations may have subfolders, also ones named like splits."""
    folder = child(home, "Annotations")
    if folder is None:
        return []
    files = [inner / name for inner, names in walk(folder) for name in names if name.lower().endswith(".xml")]
    if not files:
        return []
    tops = [folder / file.relative_to(folder).parts[0] for file in files]
    splits = {path: split for path, split in split_folders(folder) if path in tops}
    for split in splits.values():
        require_one(home, [str(path.relative_to(home)) for path, other in splits.items() if other == split], split)
    parts = {
        split: [f for f, top in zip(files, tops, strict=True) if splits.get(top, "") == split]
        for split in ("", *splits.values())
    }
    return [Part(tuple(some), image_folder(home), split, home) for split, some in parts.items() if some]


def entries(part: Part, report: ReportFault) -> Iterator[Entry]:
    """Yield an entry per file; invalid files are reported and dropped."""
    for path in part.files:
        try:
            root = ET.parse(path).getroot()
        except (ET.ParseError, OSError, ValueError, LookupError) as error:
            report("xml", str(path), f"it is not readable as xml ({error})", "copy or export it again")
            continue
        if root.tag != "annotation":
            report("xml", str(path), f"it holds <{root.tag}> and not <annotation>", "give Pascal VOC files")
            continue
        size = size_in(root.findtext("size/width"), root.findtext("size/height"))
        objects = [_object(item, f"{path}, object {i}", report) for i, item in enumerate(root.iter("object"), 1)]
        folder = child(part.home, "Annotations")
        own = path.relative_to(folder) if folder is not None and folder in path.parents else Path(path.name)
        name = (root.findtext("filename") or "").strip()
        yield Entry(name, size, [o for o in objects if o is not None], str(path), part.split, own.as_posix()[:-4])


def _object(item: ET.Element, where: str, report: ReportFault) -> Boxed | None:
    label = (item.findtext("name") or "").strip()
    if not label:
        report("missing-key", where, "it has no <name>", "add the class")
        return None
    x1, y1, x2, y2 = (number(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    if x1 is None or y1 is None or x2 is None or y2 is None:
        report("box-value", where, "its <bndbox> is not four numbers", "give xmin, ymin, xmax and ymax")
        return None
    for axis, low, high in (("x", x1, x2), ("y", y1, y2)):
        if low > high:
            report("box-swapped", where, f"{axis}min {low:g} is greater than {axis}max {high:g}", "exchange them")
            return None
    hard = (item.findtext("difficult") or "0").strip().lower() in ("1", "true")
    return Boxed(label, (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1), where, hard)


VOC = Format(
    find, entries, "Annotations/1.xml, JPEGImages/1.jpg, ImageSets/Main/train.txt; or xml beside the images", left=left
)
