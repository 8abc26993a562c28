"""Table 5: affinities (color, the teacher's feature, the feature reweighted by saliency) and their propagation.

misa tables 5 --data demo --seeds 5 --run
misa train experiments/table5_affinity.py:demo_pamr_saliency --smoke

Both modes combine color and saliency by our interpretation of SEPA (`experiments/demo.py`), to differ only in the mode.
"""

from typing import Any

from misa.experiment import Comparison

from . import demo
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
    data="voc",
)


# On photographs A^c is of class probabilities; A^f, which has no class, is combined as in the demo.
FEATURE = {"feature": True} | {name: value for name, value in demo.SEPA.items() if name != "saliency"}
# PAMR's default reaches 24 cells, nearly all of the embedded data's 32 x 32: masks leak, with 9 AP instead of 25. On
# photographs' 60 x 80 it reduces the masks' IoU from 63 to 17 (`misa guidance`).
REACH: dict[str, dict[str, Any]] = {
    "demo": {"pamr_dilations": (1,), "pamr_steps": 3},
    "photos": {"pamr_dilations": (1, 2), "pamr_steps": 5},
}
ROWS = {
    f"{data}_{mode}_{name}": student(data, mode=mode, **reach, **affinity)
    for data in BASES
    for mode, reach in (("pamr", REACH.get(data, {})), ("apro", {}))
    for name, affinity in {"color": {}, "feature": FEATURE, "saliency": SEPA[data]}.items()
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
