"""A few epochs on a small folder in COCO layout, from scratch: a test on real images, without expected scores.

misa train experiments/coco_mini.py:box --data-root path/to/coco_mini
misa train experiments/coco_mini.py:box --data-root path/to/coco_mini --smoke
"""

import dataclasses

from misa.experiment import Augmentation, Experiment, Inference, Schedule

from .photos import LIGHT

# ResNet-50 instead of a small backbone: minutes on a CPU core.
NETWORK = dataclasses.replace(LIGHT, backbone="resnet50", pretrained=False, norm_eval=False)

BASE = Experiment(
    data="coco",
    network=NETWORK,
    schedule=Schedule(epochs=3, batch=4, lr=5e-4, decay="cosine", warmup=10, clip=10.0),
    augmentation=Augmentation(short_sides=(192, 224), long_side=320, test_short_side=224),
    inference=Inference(mask=0.5),
)

ROWS = {
    "box": BASE,
    "mask": BASE.but(supervision="mask"),
}
