"""Photographs: students with a pretrained backbone on one CPU core, for folders of at least a few hundred images.

misa train experiments/photos.py:box --data-root path/to/photos
misa train experiments/photos.py:misa --data-root path/to/photos     # the box student, a teacher, then FSD and SEPA
misa train experiments/photos.py:mask --data-root path/to/photos     # the reference: the same student, from masks
misa train experiments/photos.py:scratch --data-root path/to/photos  # boxes, without pretraining
misa train experiments/photos.py:torchvision --data-root path/to/photos  # a pretrained teacher of VOC's classes
misa train experiments/photos.py:teacher --data-root path/to/photos
misa train experiments/photos.py:more_near --data-root path/to/photos  # goes on with a trained box student
misa train experiments/photos.py:boxlevelset --data-root path/to/photos  # another paper's objective, same student
misa tables comparators --data photos --seeds 2 --run --data-root path/to/photos
misa tables 3 --data photos --seeds 5 --run --data-root path/to/photos

Use any folder in COCO layout. The ImageNet weights of EfficientNet-Lite0 are in a package (`misa[photos]`): nothing is
downloaded. Schedule and interpretations were chosen on training images only.
"""

from dataclasses import replace
from typing import Any

from misa.experiment import Affinity, Augmentation, Distillation, Experiment, Inference, Network, Schedule, Semantic

from . import demo

# A light head, and SOLOv2's geometry scaled from 800 to about 256 pixels.
LIGHT = Network(
    backbone="efficientnet_lite0",
    frozen_stages=-1,
    norm_eval=True,
    neck_channels=128,
    head_channels=128,
    mask_channels=64,
    feature_channels=128,
    stacked_convs=2,
    grids=(20, 18, 12, 8, 6),
    scale_ranges=((1, 32), (16, 64), (32, 128), (64, 256), (128, 2048)),
)

BASE = Experiment(
    data="coco",
    network=LIGHT,
    affinity=Affinity(),
    schedule=Schedule(epochs=6, batch=4, lr=5e-4, decay="cosine", warmup=50, clip=10.0),
    augmentation=Augmentation(short_sides=(224, 256), long_side=320, test_short_side=256),
    inference=Inference(mask=0.5),
)
# Trained on the box student's masks merged into label maps: still from boxes only, and better than box objectives.
TEACHER = BASE.but(semantic=Semantic(labels="student", student="photos:box"))

# Our interpretations of what the paper leaves open, chosen by `misa guidance` on training images (docs/results.md), but
# with the windows of the baseline: rows differ from it in the affinity only.
PRODUCT: dict[str, Any] = {"local_form": "product", "global_form": "product"}
SEPA: dict[str, Any] = {"saliency": True, "semantic_values": "probability", "semantic_scale": 0.3, **PRODUCT}
# APro's windows, 20 steps of 5 x 5 cells, are meant for maps three times as wide, and `misa guidance` prefers these.
# Trainings do not: rows of that time keep them.
NEAR: dict[str, Any] = {"window": 3, "local_steps": 5}
SEPA_NEAR: dict[str, Any] = {**SEPA, **NEAR}
# Eq. 4: 10 bins on the paper's maps of about 200 x 336 are the same fraction of the height as 3 on 60 x 80.
FSD = Distillation(unit="spread", radius=3.0, weight=0.1)

# Two more epochs of a trained box student: by its own pseudo masks or by others, with a teacher, from true masks. The
# guidance of a teacher was measured on that student's masks; a student from ImageNet weights has none of that quality.
MORE = BASE.but(start="runs/photos-box-seed{seed}", schedule={"epochs": 2, "lr": 2e-4})
NEARER = {**NEAR, "refine_bandwidth": 0.03}

# Objectives of other papers with the geometry and schedule of all rows here, not the published ones.
COMPARATORS = {
    name: BASE.but(affinity=None, objective=objective, inference=demo.COPY if name == "boxteacher" else {})
    for name, objective in demo.OBJECTIVES.items()
}

ROWS = {
    "teacher": TEACHER,
    "teacher_objectives": BASE.but(semantic=Semantic(sure_weight=1.0)),
    "teacher_mask": BASE.but(supervision="mask", semantic=Semantic()),
    "box": BASE,
    "box_near": BASE.but(affinity=NEAR),
    "box_stretched": BASE.but(affinity={**NEAR, "stretch": 0.5}),
    "more": MORE,
    "more_near": MORE.but(affinity=NEARER),
    "more_stretched": MORE.but(affinity={"stretch": 0.5}),
    "more_near_stretched": MORE.but(affinity={**NEARER, "stretch": 0.5}),
    "more_near_stretched_06": MORE.but(affinity={**NEARER, "stretch": 0.6}),
    "more_fsd": MORE.but(teacher="photos:teacher", distillation=FSD),
    "more_sepa": MORE.but(teacher="photos:teacher", affinity=SEPA_NEAR),
    "more_misa": MORE.but(teacher="photos:teacher", distillation=FSD, affinity=SEPA_NEAR),
    "more_mask": MORE.but(supervision="mask"),
    "fsd": BASE.but(teacher="photos:teacher", distillation=FSD),
    "fsd_strong": BASE.but(teacher="photos:teacher", distillation=replace(FSD, weight=1.0)),
    "sepa": BASE.but(teacher="photos:teacher", affinity=SEPA),
    "misa": BASE.but(teacher="photos:teacher", distillation=FSD, affinity=SEPA),
    "sepa_near": BASE.but(teacher="photos:teacher", affinity=SEPA_NEAR),
    "misa_near": BASE.but(teacher="photos:teacher", distillation=FSD, affinity=SEPA_NEAR),
    "misa_strong": BASE.but(teacher="photos:teacher", distillation=replace(FSD, weight=1.0), affinity=SEPA_NEAR),
    "literal": BASE.but(teacher="photos:teacher", distillation=Distillation(), affinity={"saliency": True}),
    # Is the teacher the weak link? One that was trained on true masks: not box-supervised, for comparison only.
    "misa_oracle": BASE.but(teacher="photos:teacher_mask", distillation=FSD, affinity=SEPA_NEAR),
    # In place of a teacher trained on the boxes, one that was trained on masks of VOC's classes elsewhere.
    "torchvision": BASE.but(teacher="torchvision:deeplabv3_resnet50", distillation=FSD, affinity=SEPA),
    "mask": BASE.but(supervision="mask"),
    "polarmask": BASE.but(student="polarmask", supervision="mask", affinity=None),
    **COMPARATORS,
    "scratch": BASE.but(network={"pretrained": False, "norm_eval": False}),
}
