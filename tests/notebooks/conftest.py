"""A student and its teacher after two training steps each, shared by the tests that execute notebooks."""

import pytest

from misa.engine.reports.explore import trained


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """A run folder of demo:misa with its teacher's beside it, and the data folder."""
    root = tmp_path_factory.mktemp("smoke")
    trained(root / "run", data_root=root / "data", smoke=True)
    return root / "run"


@pytest.fixture
def moved_data(smoke_run):
    """The folder that the data of `smoke_run` has been moved to, for one test."""
    place, elsewhere = smoke_run.parent / "data", smoke_run.parent / "elsewhere"
    place.rename(elsewhere)
    yield elsewhere
    elsewhere.rename(place)
