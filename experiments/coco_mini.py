"""A few epochs on a small COCO-layout folder, from scratch: does it run on real images? (No score to expect.)

misa train experiments/coco_mini.py:box --data-root path/to/coco_mini
misa train experiments/coco_mini.py:box --data-root path/to/coco_mini --smoke
"""

from misa.experiment import Augmentation, Experiment, Inference, Network, Schedule

BASE = Experiment(
    data="coco",
    network=Network(pretrained=False, frozen_stages=-1, norm_eval=False),
    schedule=Schedule(epochs=2, batch=4, decay="cosine", warmup=10, clip=10.0),
    augmentation=Augmentation(short_sides=(256, 288), long_side=384, test_short_side=256),
    inference=Inference(mask=0.45),
)

ROWS = {
    "box": BASE,
    "mask": BASE.but(supervision="mask"),
}
