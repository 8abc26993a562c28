"""Convert PASCAL VOC 2012, with SBD for train_aug, to COCO annotations.

example: misa data voc VOCdevkit/VOC2012 --sbd benchmark_RELEASE/dataset --out datasets/voc
"""

from misa.parameters import Parameters, argument, option


class Voc(Parameters):
    """Options of `misa data voc`."""

    devkit: str = argument("VOC2012 or a folder that holds it; with --download, where to fetch it to")
    out: str = option(..., "the new data folder")
    sbd: str = option("", "SBD's folder with inst/ and the lists, for train_aug")
    train: str = option("", "training list (default: train_aug with SBD, train without)")
    val: str = option("val", "validation list")
    download: bool = option(False, "download VOC and SBD first, about 3.4 GB")


def run(options: Voc) -> int:
    """Print a summary, and the command that trains on the data."""
    from misa.data.formats.voc import download_voc, write_voc

    devkit, sbd = options.devkit, options.sbd or None
    if options.download:
        devkit, sbd = map(str, download_voc(devkit))
    print(*write_voc(devkit, options.out, sbd=sbd, train=options.train, val=options.val), sep="\n")
    print(f"now: misa train table2_voc:misa_r50 --data-root {options.out}")
    return 0
