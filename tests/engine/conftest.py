"""A student trained for seconds, for what needs a checkpoint but no good one."""

import pytest

from misa.engine.training.train import train
from misa.experiment import TINY, Augmentation, Experiment, Inference, Schedule

SMALL = Experiment(
    data="demo",
    network=TINY,
    schedule=Schedule(epochs=8, batch=2, lr=1e-3, decay="cosine", warmup=2, clip=10.0),
    augmentation=Augmentation(short_sides=(64,), long_side=96, test_short_side=64),
    inference=Inference(score=0.001, keep=0.0, mask=0.2, candidates=30, per_image=10),
    # Not the network's size, so that masks are really enlarged, and not square.
    scenes=(("size", (52, 70)), ("train", 6), ("val", 4), ("objects", (1, 2))),
)


@pytest.fixture(scope="session")
def small_row():
    """The row of `small_run`, to make others from."""
    return SMALL


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A finished run of `SMALL`."""
    place = tmp_path_factory.mktemp("small")
    return train(SMALL, data_root=place / "data", work_dir=place / "run", gpus=0)
