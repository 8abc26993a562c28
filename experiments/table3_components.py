"""Table 3: effects of the two semantic priors, FSD (§3.2), SEPA (§3.3) and both, in addition to boxes and color.

misa tables 3 --data demo --seeds 5 --run
misa train experiments/table3_components.py:voc_misa --data-root path/to/voc

The paper's results are on VOC 2012 val with ResNet-50. `demo` is the embedded data, evaluated on 400 scenes instead of
100, `coco_mini` any small folder in COCO layout, from scratch, `photos` a folder of photographs, pretrained. `misa` and
`literal` are two interpretations of one row of the paper: ours, and Eq. 6, 13 and 14 as printed (see
`misa.experiment.Affinity` and `Distillation`). `mask` is the reference: the same student trained from masks.
"""

import dataclasses

from misa.experiment import Affinity, Comparison, Distillation, Experiment

from . import coco_mini, demo, photos

TABLE = Comparison(
    title="Table 3: effects of the two semantic priors",
    rows={
        "baseline": "baseline (APro)",
        "fsd": "+ FSD",
        "sepa": "+ SEPA",
        "misa": "+ FSD + SEPA",
        "literal": "+ FSD + SEPA, literal",
        "mask": "mask supervision",
    },
    baseline="baseline",
    data="voc",
)

BASES = {
    "demo": demo.ROWS["box"].but(scenes=demo.MANY),
    "voc": Experiment(data="voc", affinity=Affinity()),
    "coco_mini": coco_mini.ROWS["box"],
    "photos": photos.ROWS["box"],
}
TEACHERS = {
    "demo": "teacher:demo_tables",
    "voc": "teacher:voc_r50",
    "coco_mini": "teacher:coco_mini",
    "photos": "photos:teacher",
}
SEPA = {data: photos.SEPA if data == "photos" else demo.SEPA for data in BASES}  # fields of `Affinity` for A + A^c
# The radius of Eq. 4 is the paper's on VOC, and the same fraction of the height on smaller maps.
FSD = {
    "demo": demo.FSD,
    "voc": dataclasses.replace(demo.FSD, radius=10.0),
    "coco_mini": dataclasses.replace(demo.FSD, radius=3.0),
    "photos": photos.FSD,
}


def student(data: str, *, fsd: Distillation | None = None, **affinity: object) -> Experiment:
    """The baseline of a dataset with FSD or another affinity, and with a teacher if one of them needs it."""
    taught = fsd is not None or "saliency" in affinity or "feature" in affinity
    return BASES[data].but(affinity=affinity, distillation=fsd, teacher=TEACHERS[data] if taught else "")


ROWS = {
    f"{data}_{name}": row
    for data in BASES
    for name, row in {
        "baseline": BASES[data],
        "fsd": student(data, fsd=FSD[data]),
        "sepa": student(data, **SEPA[data]),
        "misa": student(data, fsd=FSD[data], **SEPA[data]),
        "literal": student(data, fsd=Distillation(), saliency=True),
        "mask": BASES[data].but(supervision="mask"),
    }.items()
}
PAPER = {
    "baseline": (38.3, 65.1, 39.4),
    "fsd": (39.5, 67.0, 40.4),
    "sepa": (39.3, 66.5, 40.1),
    "misa": (39.9, 67.4, 40.6),
    "literal": (39.9, 67.4, 40.6),
}
ROWS |= {f"voc_{name}": ROWS[f"voc_{name}"].expecting(*figures) for name, figures in PAPER.items()}
