"""Triton is tried once; if it does not run, one warning says so and torch operations are used."""

import os
import subprocess
import sys

import pytest

TRIED = """
import sys, warnings
{before}
from misa.ops.backends.cuda.works import triton_works
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert triton_works() is triton_works() is {expected}
print(*(str(warning.message) for warning in said), sep="\\n", end="")
"""
NO_COMPILER = """
import misa.ops.backends.cuda.probe as probe
def fails(device):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\\nand a second line")
probe.doubles = fails
"""
WRONG = "import misa.ops.backends.cuda.probe as probe; probe.doubles = lambda device: False"


def said(before: str, expected: bool, interpret: str = "1") -> str:
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    text = TRIED.format(before=before, expected=expected)
    return subprocess.run(
        [sys.executable, "-c", text], check=True, env=environment, capture_output=True, text=True
    ).stdout


def test_it_works_in_the_interpreter_and_says_nothing():
    assert said("", True) == ""


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("sys.modules['triton'] = None", "import of triton halted"),
        (NO_COMPILER, "(Failed to find C compiler. Please specify via CC environment variable.)"),
        (WRONG, "computed a wrong result"),
    ],
    ids=["missing", "no compiler", "wrong"],
)
def test_what_fails_is_said_once_in_one_line(before, reason):
    found = said(before, False)
    assert reason in found
    assert "falls back to torch operations" in found
    assert "\n" not in found


def test_without_a_device_nothing_is_tried():
    no_device = "import torch; torch.cuda.is_available = lambda: False; sys.modules['triton'] = None"
    assert said(no_device, False, interpret="0") == ""
