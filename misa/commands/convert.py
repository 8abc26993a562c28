"""Write a data set of any format as plain COCO: boxes, masks if there are any, splits and images.

The data is never changed. The same command resumes after an interruption; OUT appears when it is complete.

example: misa convert path/to/yolo path/to/coco
"""

import shlex
import signal
from typing import Literal

from misa.commands import _shared as shared
from misa.errors import Stopped, UserError
from misa.files import IN_USE
from misa.parameters import Parameters, argument, option


class Convert(Parameters):
    """Options of `misa convert`."""

    data: str = argument("data set in any format that misa train reads: a folder, a csv, a json or a data.yaml")
    out: str = argument("the new folder")
    images: Literal["link", "copy"] = option("link", "hard links to the images (no extra space), or copies")


def run(options: Convert) -> int:
    """Print a summary, and the command that checks the result."""
    shared.require_given(options.data, "the path of the data")
    shared.require_given(options.out, "the path of the new folder")
    shared.require_data(options.data)
    from misa.data.formats.plain_coco import convert, unfinished

    beside = unfinished(options.out)
    left = f"what is done is in {beside}: the same command resumes from it, or delete it."
    try:
        print(*convert(options.data, options.out, images=options.images), sep="\n")
    except KeyboardInterrupt:
        if not beside.exists():
            raise
        raise Stopped(f"stopped; {left}", status=128 + signal.SIGINT) from None
    except UserError as error:
        if not beside.exists() or IN_USE in str(error):  # nothing is done, or another process does it
            raise
        raise UserError(f"{error} W{left[1:]}") from None
    print(f"now: misa check {shlex.quote(options.out)}")
    return 0
