"""The launches of a batch on CUDA, counted without a GPU, and every kernel as machine code."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks import launches
from benchmarks.launches import counted, distinct, stages, total
from benchmarks.stages import OBJECTIVES, READERS
from misa.ops.backends.choice import use


def kernels(masks: int, categories: int, h: int = 200, w: int = 304, **options) -> launches.Count:
    with use("triton"):
        return total(list(stages(masks, categories, 256, h, w, **options).values()))


def test_a_batch_is_at_most_200_launches():
    """Two images of 200 x 304 with 64 masks each and 8 categories, 20 window iterations; a sort counts as ten."""
    found = kernels(64, 8)
    assert 80 < len(found.kernels) < found.launches <= 200
    assert found.launches - kernels(8, 8).launches == 0, "launches grow with the masks"
    assert found.launches - kernels(64, 2).launches <= 2, "launches grow with the categories"


@pytest.mark.parametrize("form", ["sum", "product"])
def test_the_features_are_read_once(form):
    """One launch for an image's edges, spread and window of all categories; the others read only its three colors."""
    with use("triton"):
        narrow, wide = (stages(4, 8, d, 40, 60, form=form) for d in (64, 128))
    measured = {
        name: [k.constants["MOMENTS"] for k in stage.kernels if k.name == "_distances"] for name, stage in wide.items()
    }
    assert [found for found in measured.values() if found] == [[True, True], [False, False]]
    more = {name: stage.bytes - narrow[name].bytes for name, stage in wide.items()}
    once = 2 * 64 * 40 * 60 * 4
    assert once < more.pop("distances and spread of S") < 1.6 * once  # and the sums of every channel
    assert max(more.values()) < 0.01 * once


def test_torch_operations_take_many_times_as_many():
    with use("torch"):
        before = stages(8, 3, 16, 40, 60)
    with use("triton"):
        after = stages(8, 3, 16, 40, 60)
    assert list(before) == list(after)
    for stage, count in before.items():
        assert count.launches > 2 * after[stage].launches, stage
        assert count.bytes > after[stage].bytes, stage


def test_every_term_and_objective_that_reads_no_value_is_counted():
    with use("triton"):
        found = launches.every(8, 3, 16, 40, 60)
        more = launches.every(16, 3, 16, 40, 60)
    assert list(found) == [*launches.PULL, "projection", "FSD", *(x for x in OBJECTIVES if x not in READERS)]
    assert all(count.launches > 0 and more[name].bytes >= count.bytes for name, count in found.items())
    same = [name for name, count in found.items() if more[name].bytes == count.bytes]
    assert same == ["distances and spread of S", "trees"]  # are the images'
    assert {name for name, count in found.items() if not count.kernels} == {"projection", "FSD", "BoxInst", "DiscoBox"}


def test_what_is_counted(rng):
    """Operations on a device, once each; views, empty tensors and host values do not count."""
    with torch._subclasses.FakeTensorMode(), counted() as count:
        x = torch.empty(3, 5, device="cuda")
        y = x[1:].view(2, 5) + 1
        torch.ones(4)
    assert (count.launches, count.bytes) == (1, 2 * 2 * 5 * 4)
    assert y.shape == (2, 5)
    with torch._subclasses.FakeTensorMode(), counted() as count:
        torch.empty(3, 5, device="cuda").sort(dim=1)
    assert count.launches == launches.SEVERAL["aten::sort"]


COMPILES = """
from benchmarks.launches import compiled, distinct, stages
from misa.ops.backends.choice import use
with use("triton"):
    found = [*stages(3, 2, 8, 40, 48).values(), *stages(2, 2, 3, 5, 6, form="product").values()]
for launch in distinct(found):
    for architecture in (80, 90):
        for ones in (False, True):
            code = compiled(launch, architecture, ones=ones)
            assert code[:4] == b"\\x7fELF", launch
    print(launch.name)
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_80_and_90(tmp_path):
    """With general integer arguments, and with arguments of 1, which Triton specialises to constants."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILES],
        env=environment,
        capture_output=True,
        text=True,
        cwd=launches.__file__.rsplit("/", 2)[0],
    )
    assert done.returncode == 0, done.stderr
    assert {launch.name for launch in distinct([kernels(2, 2, 40, 48)])} <= set(done.stdout.split())
