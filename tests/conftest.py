"""Fixtures shared by all tests: seeded generators, the device and the reference data."""

import gc
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import misa  # noqa: F401  (makes mmcv importable before any test imports mmdet)

# Two busy threads on two cores become very slow as soon as anything else runs; see "Threads" in docs/training.md.
torch.set_num_threads(1)
# Read by Triton at its first import: without a GPU its kernels run on CPU tensors in the interpreter.
if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "something imports Triton before its interpreter is chosen"
    os.environ["TRITON_INTERPRET"] = "1"
# CPU-only builds of torch come without Triton.
NEED_TRITON = ["ops/test_cuda_kernels.py", "ops/test_triton_works.py", "benchmarks/test_launches.py"]
collect_ignore = [] if importlib.util.find_spec("triton") else NEED_TRITON


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that need a CUDA device if there is none."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_collection_finish() -> None:
    """Leave what the imports made out of all later garbage collections: mmengine runs a full one for every data set."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By default each process takes half of the tests, and from the other's when done: files stay in one process."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator on the CPU, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the tests of one file, removed afterwards: the checkpoints of all files together fill a disk."""
    folder = tmp_path_factory.mktemp("module")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data folder (MISA_SHARED, default ../shared beside the project)."""
    root = Path(os.environ.get("MISA_SHARED", Path(__file__).parents[2] / "shared"))
    if not (root / "data").is_dir():
        pytest.skip(f"no reference data at {root}: set MISA_SHARED to the folder that holds data/coco_mini")
    return root


@pytest.fixture(params=["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and CUDA if there is a device."""
    return torch.device(request.param)
