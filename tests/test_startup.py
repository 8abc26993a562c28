"""What only looks at files or words starts in tenths of a second: no framework is loaded for it."""

import subprocess
import sys

import pytest

from misa import commands
from misa.cli import names

HEAVY = {"torch", "torchvision", "mmdet", "mmcv", "mmengine", "cv2", "matplotlib"}
RUN = """
import sys, time
start = time.monotonic()
{code}
seconds = time.monotonic() - start
print("|", sorted(set(sys.modules) & set({heavy})), seconds)
"""


def started(code):
    """The heavy packages that some code loads in a process of its own, and the seconds that it takes."""
    command = [sys.executable, "-c", RUN.format(code=code, heavy=sorted(HEAVY))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded, _, seconds = done.stdout.rpartition("|")[2].strip().rpartition(" ")
    return loaded, float(seconds)


COMMANDS = [
    ["--help"],
    ["--version"],
    ["rows"],
    ["tables", "3", "--root", "/nowhere"],
    *([name, "--help"] for name in names(commands)),
    ["data", "voc", "--help"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_that_trains_nothing_loads_no_framework(words):
    code = f"import contextlib, misa.cli\nwith contextlib.suppress(SystemExit): misa.cli.main({words})"
    loaded, seconds = started(code)
    assert loaded == "[]"
    assert seconds < 5, "tenths of a second; more on a machine that is busy"


@pytest.mark.parametrize(
    "module", ["misa", "misa.cli", "misa.rows", "misa.engine.runs.places", "misa.engine.reports.tables"]
)
def test_importing_loads_no_framework(module):
    loaded, seconds = started(f"import {module}")
    assert loaded == "[]"
    assert seconds < 5, "tenths of a second; more on a machine that is busy"


def test_a_heavy_package_is_seen():
    assert started("import torch")[0] == "['torch']"


@pytest.mark.parametrize("module", ["misa.engine.training.train", "misa.engine.prediction.predict"])
def test_importing_is_silent(module):
    """mmdet prints two lines when it is imported first."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
