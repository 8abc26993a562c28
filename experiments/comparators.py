"""Objectives of other papers compared with MISA's: the same student, SOLOv2, geometry and schedule for all.

misa tables comparators --data demo --seeds 3 --run
misa tables comparators --data photos --seeds 2 --run --data-root path/to/photos
misa train experiments/comparators.py:demo_boxteacher --smoke

They were published, and tuned, with different students, sizes and lengths: the table compares objectives, not papers.
Ramps are fractions of the run (experiments/demo.py); differences from the published forms are documented in
misa/objectives. Rows trained from masks are the reference. They use any masks of a COCO json, annotated by people or
predicted from the same boxes by a promptable model (docs/sam.md).
"""

from misa.experiment import Comparison

from . import demo, photos
from .table3_components import ROWS as COMPONENTS

TABLE = Comparison(
    title="Objectives for learning masks from boxes, on one student",
    rows={
        "misa": "MISA",
        "apro": "APro",
        "boxinst": "BoxInst",
        "boxlevelset": "BoxLevelSet",
        "box2mask": "Box2Mask",
        "discobox": "DiscoBox",
        "discobox_bank": "DiscoBox, object bank",
        "sim": "SIM",
        "sim_paste": "SIM, pasting",
        "boxteacher": "BoxTeacher",
        "polarmask": "masks: PolarMask",
        "mask": "masks: the same student",
    },
    baseline="misa",
    details=True,
)

DEMO = demo.BARE.but(scenes=demo.MANY)
ROWS = {
    "demo_misa": COMPONENTS["demo_misa"],
    "demo_apro": COMPONENTS["demo_baseline"],
    **{
        f"demo_{name}": DEMO.but(objective=objective, inference=demo.COPY if name == "boxteacher" else {})
        for name, objective in demo.OBJECTIVES.items()
    },
    "demo_polarmask": demo.ROWS["polarmask"].but(scenes=demo.MANY),
    "demo_mask": COMPONENTS["demo_mask"],
    "photos_misa": COMPONENTS["photos_misa"],
    "photos_apro": COMPONENTS["photos_baseline"],
    **{f"photos_{name}": row for name, row in photos.COMPARATORS.items()},
    "photos_polarmask": photos.ROWS["polarmask"],
    "photos_mask": COMPONENTS["photos_mask"],
}
