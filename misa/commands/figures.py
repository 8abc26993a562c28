"""Draw Figures 1, 3, 4 and 5 from run folders, as PDF and PNG with their provenance inside.

example: misa figures runs/demo-long-seed0 --out figures --images 3,17
"""

import sys
from typing import TYPE_CHECKING, Literal

from misa.commands import _shared as shared
from misa.errors import UserError, option_name
from misa.parameters import Parameters, argument, option

if TYPE_CHECKING:
    from misa.engine.reports.figures import Factory


class Figures(Parameters):
    """Options of `misa figures`, parameters of `notebooks/figures.ipynb`."""

    runs: tuple[str, ...] = argument(
        "run folders; the teachers beside students are found", default=("runs/demo-long-seed0",)
    )
    out: str = option("", "folder to write the figures into (default: runs/figures/<run>)")
    only: str = option("1,3,4,5", "the figures to draw")
    images: str = option("", "ids of validation images to show first, with commas between")
    random: int = option(5, "number of randomly drawn images besides", low=1, high=100)
    worst: int = option(10, "number of the student's worst images in Figure 5", low=0, high=100)
    seed: int = option(0, "random seed of the drawn images", low=0, high=2**32 - 1)
    channel: int = shared.channel()
    semantic_scale: float = option(0.0, "bandwidth of Figure 4 in σ of S, 0 for that of the training", low=0, high=100)
    form: Literal["", "sum", "product"] = option("", "form of SEPA in Figure 4: sum or product (default: as trained)")
    data_root: str = shared.moved_data()
    smoke: bool = option(False, "smoke test: networks of two training steps", only="notebook")

    @property
    def folders(self) -> tuple[str, ...]:
        """The run folders, of which the notebook trains the first if it is missing (see `run_place`)."""
        return tuple(str(shared.run_place(run, self.smoke)) for run in self.runs)


def factory_from(options: Figures) -> "Factory":
    """Returns the factory for these options; UserError: `images` are not ids, `only` is empty, `out` is a file."""
    shared.require_folder(options.out, "out")
    shared.require_data(options.data_root)
    for folder in options.folders:
        shared.require_run(folder)
    from misa.engine.reports.figures import Choice, Factory

    try:
        given = tuple(int(part) for part in options.images.replace(",", " ").split())
    except ValueError as error:
        raise UserError(f"images must be whole numbers with commas between, not {options.images!r}.") from error
    wanted = options.only.replace(",", " ").split()
    if not wanted:
        raise UserError(f"{option_name('only')} names no figure; give some of 1, 3, 4, 5, or leave it out.")
    changes = {"semantic_scale": options.semantic_scale, "form": options.form}
    factory = Factory(
        options.folders,
        choice=Choice(given, options.random, options.worst, options.seed),
        changes={name: value for name, value in changes.items() if value},
        channel=options.channel,
        wanted=wanted,
        data_root=options.data_root or None,
    )
    for line in factory.warnings():
        print(f"warning: {line}", file=sys.stderr)
    return factory


def run(options: Figures) -> int:
    """Print the written files; returns 2 if there are none."""
    written = factory_from(options).make(options.out)
    print(*written, sep="\n")
    return 0 if written else 2
