"""A student trained for seconds, for tests that need some checkpoint."""

import pytest

from misa.engine.training.train import train
from tests.helpers import CPU, tiny_experiment

SMALL = tiny_experiment(
    schedule={"epochs": 8},
    augmentation={"long_side": 96},
    inference={"mask": 0.2},
    # Not square and not the network's size, so that masks are really resized.
    scenes=(("size", (52, 70)), ("train", 6), ("val", 4), ("objects", (1, 2))),
)


@pytest.fixture(scope="session")
def small_row():
    """The row of `small_run`, to derive others from."""
    return SMALL


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A finished run of `SMALL`."""
    place = tmp_path_factory.mktemp("small")
    return train(SMALL, data_root=place / "data", work_dir=place / "run", machine=CPU)
