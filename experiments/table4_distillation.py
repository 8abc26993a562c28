"""Table 4: distillation of the teacher's dense feature: without a split, split by frequency, by space, and by both.

misa tables 4 --data demo --seeds 5 --run
misa train experiments/table4_distillation.py:demo_space --smoke

The paper does not specify the rows without a split; `distillation_loss` documents our interpretation.
"""

import dataclasses

from misa.experiment import Comparison

from .table3_components import BASES, FSD, student

TABLE = Comparison(
    title="Table 4: effects of distillation schemes",
    rows={
        "baseline": "baseline (APro)",
        "plain": "+ distillation",
        "frequency": "+ frequency",
        "space": "+ space",
        "both": "+ frequency + space (FSD)",
    },
    baseline="baseline",
    data="voc",
)

PARTS = {"plain": (False, False), "frequency": (True, False), "space": (False, True), "both": (True, True)}
ROWS = {f"{data}_baseline": BASES[data] for data in BASES} | {
    f"{data}_{name}": student(data, fsd=dataclasses.replace(FSD[data], frequency=frequency, space=space))
    for data in BASES
    for name, (frequency, space) in PARTS.items()
}
PAPER = {
    "baseline": (38.3, 65.1, 39.4),
    "plain": (38.7, 66.0, 39.3),
    "frequency": (38.8, 66.4, 39.5),
    "space": (39.0, 66.5, 39.9),
    "both": (39.5, 67.0, 40.4),
}
ROWS |= {f"voc_{name}": ROWS[f"voc_{name}"].expecting(*figures) for name, figures in PAPER.items()}
