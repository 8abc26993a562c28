"""A first training on your own folder: small images and network, from scratch, in minutes on one CPU core.

misa train experiments/own.py:small --data-root path/to/folder
misa train experiments/own.py:medium --data-root path/to/folder

With ImageNet weights, start with photos:box on a CPU, or with a recipe of table1_coco.py on a GPU.
"""

from misa.experiment import TINY, Affinity, Augmentation, Experiment, Inference, Schedule

from .coco_mini import BASE as LIGHT

SMALL = Experiment(
    data="coco",
    network=TINY,
    affinity=Affinity(),
    schedule=Schedule(epochs=30, batch=8, lr=1e-3, decay="cosine", warmup=20, clip=10.0),
    augmentation=Augmentation(short_sides=(128,), long_side=192, test_short_side=128),
    inference=Inference(score=0.05, keep=0.05, mask=0.5),
)

ROWS = {
    "small": SMALL,
    "medium": LIGHT.but(affinity=Affinity(), schedule={"epochs": 24}),
}
"""small: images of 128 pixels; medium: images of about 224 pixels, ResNet-50."""
