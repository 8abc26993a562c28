"""Commands that need no framework load none and start within tenths of a second."""

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
    """Run code in a separate process; returns the heavy packages that it loads and its seconds."""
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
    [],
    ["train", "demo:boxx"],
    ["train", "photos:box", "--data-root", "/nowhere"],
    ["estimate", "demo:boxx"],
    ["profile", "demo:boxx"],
    ["label", "/", "--out", "masks.json", "--row", "demo:boxx"],
    ["label", "/", "--out", "masks.json", "--run", "/nowhere"],
    ["label", "/nowhere", "--out", "masks.json"],
    ["evaluate", "/nowhere"],
    ["inspect", "/nowhere"],
    ["guidance", "/nowhere"],
    ["figures", "/nowhere"],
    ["export", "/nowhere", "student.pth"],
    ["predict", "/nowhere", "/", "--out", "found"],
    ["predict", "/", "/nowhere", "--out", "found"],
    ["check", "/nowhere"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_that_does_nothing_long_loads_no_framework(words):
    """Listing commands, and invalid ones: a misspelt row or path is refused immediately."""
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


def test_importing_is_silent():
    """mmdet prints two lines at its first import; `test_export.py` reads all that prediction prints."""
    command = [sys.executable, "-c", "import misa.engine.training.train"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
