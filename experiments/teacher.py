"""The semantic teacher (§3.1; §4.3: SeMask, the student's backbone): kinds of supervision, and the paper's recipes.

misa train experiments/teacher.py:demo            # from boxes by the student's objectives, the default
misa train experiments/teacher.py:demo_unsure     # without the self-training term
misa train experiments/teacher.py:demo_boxes      # the baseline: boxes filled with their class
misa train experiments/teacher.py:demo_grabcut    # GrabCut in each box
misa train experiments/teacher.py:demo_student    # a student's masks; first misa train experiments/demo.py of that seed
misa train experiments/teacher.py:demo_mask       # the upper bound: ground-truth masks
misa train experiments/teacher.py:voc_r50 --data-root path/to/voc
misa train experiments/teacher.py:demo --smoke

The paper gives neither losses nor schedule of its teacher: the demo's are ours; the recipes use AdamW, learning rate,
weight decay, warm-up and batch of SeMask (Jain et al. 2023), whose learning rate falls linearly, in ours along a
cosine, and length and image sizes of the student.
"""

from misa.experiment import TINY, Affinity, Augmentation, Experiment, Network, Schedule, Semantic

from . import coco_mini, demo

# The student's box objectives, and self-training on the network's confident predictions that the boxes allow.
OBJECTIVES = Semantic(sure_weight=1.0)

DEMO = Experiment(
    data="demo",
    network=TINY,
    affinity=Affinity(),
    schedule=Schedule(epochs=12, batch=8, lr=1e-3, decay="cosine", warmup=50, clip=10.0),
    augmentation=Augmentation(short_sides=(128,), long_side=128, test_short_side=128),
    scenes=(("train", 500), ("val", 100)),
    semantic=OBJECTIVES,
)

# A few epochs on a small folder, from scratch: the teacher of experiments/coco_mini.py's students.
COCO_MINI = coco_mini.BASE.but(semantic=OBJECTIVES)

VOC = Experiment(
    data="voc",
    affinity=Affinity(),
    schedule=Schedule(epochs=36, batch=16, lr=1e-4, weight_decay=1e-4, decay="cosine", warmup=1500, clip=1.0),
    semantic=OBJECTIVES,
)
COCO = VOC.but(data="coco", affinity={"window": 3})

ROWS = {
    "demo": DEMO,
    "demo_unsure": DEMO.but(semantic={"sure_weight": 0.0}),
    "demo_boxes": DEMO.but(semantic={"labels": "rectangles"}),
    "demo_grabcut": DEMO.but(semantic={"labels": "grabcut"}),
    "demo_student": DEMO.but(semantic={"labels": "student", "student": "demo:box"}),
    "demo_mask": DEMO.but(supervision="mask"),
    "demo_tables": DEMO.but(scenes=demo.MANY),  # for the students of Tables 3-5
    "coco_mini": COCO_MINI,
    "voc_r50": VOC,
    "voc_r101": VOC.but(network=Network(backbone="resnet101")),
    "coco_r50": COCO,
    "coco_r101": COCO.but(network=Network(backbone="resnet101")),
    "coco_swin_b": COCO.but(
        network=Network(backbone="swin_b", frozen_stages=-1, norm_eval=False), semantic={"residual": "norm"}
    ),
}
