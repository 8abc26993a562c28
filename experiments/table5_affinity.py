"""Table 5: which affinity is propagated (color, with the teacher's feature, reweighted by its saliency) and how far.

misa tables 5 --data demo --seeds 5 --run
misa train experiments/table5_affinity.py:demo_pamr_saliency --smoke

Both modes join color and saliency by our reading of SEPA (`experiments/demo.py`): they differ by the mode alone.
"""

from typing import Any

from misa.experiment import Comparison

from .table3_components import BASES, SEPA, student

TABLE = Comparison(
    title="Table 5: effects of pairwise affinities",
    rows={
        "pamr_color": "PAMR: color",
        "pamr_feature": "PAMR: color + feature",
        "pamr_saliency": "PAMR: color + feature + saliency",
        "apro_color": "APro: color",
        "apro_feature": "APro: color + feature",
        "apro_saliency": "APro: color + feature + saliency",
    },
    baseline="apro_color",
)


def affinities(data: str) -> dict[str, dict[str, Any]]:
    """What joins `Affinity` in a mode's three rows."""
    same = {name: value for name, value in SEPA[data].items() if name != "saliency"}
    return {"color": {}, "feature": {"feature": True, **same}, "saliency": SEPA[data]}


# PAMR looks 24 cells far: on the embedded data's 32 x 32 cells that is nearly everything. Masks leak, 9 AP for 25.
NEAR = {"pamr_dilations": (1,), "pamr_steps": 3}
MODES: dict[str, dict[str, dict[str, Any]]] = {
    data: {"pamr": NEAR if data == "demo" else {}, "apro": {}} for data in BASES
}
ROWS = {
    f"{data}_{mode}_{name}": student(data, mode=mode, **reach, **affinity)
    for data in BASES
    for mode, reach in MODES[data].items()
    for name, affinity in affinities(data).items()
}
PAPER = {
    "pamr_color": (37.7, 65.1, 38.7),
    "pamr_feature": (37.9, 65.4, 39.1),
    "pamr_saliency": (38.3, 65.9, 39.3),
    "apro_color": (38.3, 65.1, 39.4),
    "apro_feature": (38.7, 65.9, 39.9),
    "apro_saliency": (39.3, 66.5, 40.1),
}
ROWS |= {f"voc_{name}": ROWS[f"voc_{name}"].expecting(*figures) for name, figures in PAPER.items()}
