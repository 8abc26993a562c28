"""The objectives of other papers beside MISA's: one student, SOLOv2, one geometry and one schedule for all.

misa tables comparators --data demo --seeds 3 --run
misa tables comparators --data photos --seeds 2 --run --data-root path/to/photos
misa train experiments/comparators.py:demo_boxteacher --smoke

They are published with several students, sizes and lengths, and tuned for these: the table compares objectives, not
papers. Ramps are parts of the run (experiments/demo.py); what an objective leaves out of its published form is said in
its file of misa/objectives. The rows that learn from masks are the upper end of the scale. They take any masks of a
COCO json, those that people drew or those that a promptable model made of the same boxes (docs/sam.md).
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
    data="",
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
