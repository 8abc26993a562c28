"""Print the provenance of a figure, or of all in a folder, and the command that draws it again.

example: misa provenance runs/figures/demo-long-seed0/figure4.pdf
"""

from pathlib import Path

from misa.parameters import Parameters, argument


class Provenance(Parameters):
    """Options of `misa provenance`."""

    file: str = argument("a PDF or PNG made by misa figures, or a folder of them")


def run(options: Provenance) -> int:
    """Print one line per value."""
    from misa.figures.provenance import as_text, provenance_in, provenance_of

    path = Path(options.file).expanduser()
    print(as_text(provenance_in(path) if path.is_dir() else provenance_of(path)))
    return 0
