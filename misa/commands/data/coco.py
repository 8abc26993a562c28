"""List which files of COCO 2017 are in a folder, and whether they are complete.

example: misa data coco datasets/coco
"""

from misa.parameters import Parameters, argument


class Coco(Parameters):
    """Options of `misa data coco`."""

    root: str = argument("folder with annotations/ and the image folders")


def run(options: Coco) -> int:
    """Print the list; returns 2 if a required file is missing."""
    from misa.data.formats.coco2017 import look_at_coco

    splits = look_at_coco(options.root)
    print(*splits, sep="\n")
    return 0 if all(split.whole for split in splits if split.needed) else 2
