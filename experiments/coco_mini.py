"""A few epochs on a small COCO-layout folder, from scratch: does it run on real images? (No score to expect.)

misa train experiments/coco_mini.py:box --data-root path/to/coco_mini
misa train experiments/coco_mini.py:box --data-root path/to/coco_mini --smoke
"""

from misa.experiment import Augmentation, Experiment, Inference, Network, Schedule

# ResNet-50 with a light head and SOLOv2's geometry scaled from 800 to about 256 pixels: minutes on a CPU core.
LIGHT = Network(
    pretrained=False,
    frozen_stages=-1,
    norm_eval=False,
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
    schedule=Schedule(epochs=3, batch=4, lr=5e-4, decay="cosine", warmup=10, clip=10.0),
    augmentation=Augmentation(short_sides=(192, 224), long_side=320, test_short_side=224),
    inference=Inference(mask=0.5),
)

ROWS = {
    "box": BASE,
    "mask": BASE.but(supervision="mask"),
}
