"""Print the provenance of a figure, and the command that draws it again.

example: misa provenance runs/figures/figure4.pdf
"""

from misa.parameters import Parameters, argument


class Provenance(Parameters):
    """Options of `misa provenance`."""

    file: str = argument("a PDF or PNG made by misa figures")


def run(options: Provenance) -> int:
    """Print one line per value."""
    from misa.figures.provenance import as_text, provenance_of

    print(as_text(provenance_of(options.file)))
    return 0
