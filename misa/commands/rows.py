"""List the rows that can be trained: their table, their data, and what each of them is.

Words narrow the list down to the rows whose line, or whose table's title, has all of them.

example: misa rows demo sepa
"""

from misa.experiment import Affinity, Comparison, Distillation, Experiment
from misa.parameters import Parameters, argument
from misa.rows import table_module, table_names

_LABELS = {
    "objectives": "the student's box objectives",
    "grabcut": "GrabCut in the boxes",
    "student": "a student's masks",
    "rectangles": "filled boxes",
}


class Rows(Parameters):
    """What `misa rows` takes."""

    words: tuple[str, ...] = argument("show the rows with all of these words only", default=(), optional=True)


def run(options: Rows) -> int:
    """Returns 2 where no row has the words."""
    found = listing(options.words)
    print("\n\n".join(found) if found else f"no row has {' and '.join(options.words)}; misa rows lists them all.")
    return 0 if found else 2


def listing(words: tuple[str, ...] = ()) -> list[str]:
    """A block for each table with rows that have all of the words: its title, and a line for each row."""
    tables = {}
    for table in table_names():
        module = table_module(table)
        comparison = getattr(module, "TABLE", None)
        title = (module.__doc__ or table).strip().partition("\n")[0]
        lines = [(f"{table}:{name}", row.data, described(name, row, comparison)) for name, row in module.ROWS.items()]
        kept = [line for line in lines if all(word.lower() in " ".join((*line, title)).lower() for word in words)]
        if kept:
            tables[title] = kept
    width = max((len(name) for lines in tables.values() for name, _, _ in lines), default=0)
    return [
        "\n".join([title, *(f"  {name:<{width}}  {data:<5}  {text}" for name, data, text in lines)])
        for title, lines in tables.items()
    ]


def described(name: str, row: Experiment, comparison: Comparison | None = None) -> str:
    """One line on a row: its name in the paper's table, where it has one, and what is trained from what."""
    label = next((text for end, text in comparison.rows.items() if name.endswith(f"_{end}")), "") if comparison else ""
    backbone = f"{row.network.backbone}, {row.schedule.epochs} epochs"
    if row.semantic is not None:
        source = "true masks" if row.supervision == "mask" else _LABELS[row.semantic.labels]
        text = f"semantic teacher ({backbone}) from {source}"
    else:
        parts = [f"{row.student} ({backbone}) from {'masks' if row.supervision == 'mask' else 'boxes'}"]
        if row.objective is not None:
            parts.append(f"objective {type(row.objective).__name__}")
        if row.supervision == "box" and row.affinity is not None:
            parts.append(f"{row.affinity.mode} with affinity of {_affinities(row.affinity)}")
        if row.distillation is not None:
            parts.append(f"distillation{_split(row.distillation)}")
        parts += [f"taught by {row.teacher}"] if row.teacher else []
        text = ", ".join(parts)
    return f"{label}: {text}" if label else text


def _affinities(affinity: Affinity) -> str:
    if affinity.kernels is not None:
        return " + ".join(affinity.kernels)
    return "color + saliency" if affinity.saliency else "color + feature" if affinity.feature else "color"


def _split(distillation: Distillation) -> str:
    """How the feature is split; by frequency and space is FSD."""
    if distillation.frequency and distillation.space:
        return " by frequency and space (FSD)"
    return " by frequency" if distillation.frequency else " by space" if distillation.space else ""
