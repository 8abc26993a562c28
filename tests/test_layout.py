"""Imports point one way: each room may use only what the table allows."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "misa"
# room: the misa modules that it may import besides its own.
MAY_IMPORT = {
    "ops": set(),
    "losses": {"ops"},
    "data": {"ops", "errors", "experiment"},
    "evaluation": {"ops"},
    "figures": {"ops"},
    "models": {"ops", "losses", "data", "errors"},
    "mmcv_ext": set(),
    "engine": {"ops", "losses", "data", "evaluation", "models", "errors", "experiment", "parameters"},
    "bench": {"ops", "losses", "data", "errors"},
    "experiment": set(),
    "parameters": {"errors"},
    "errors": set(),
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_stay_in_their_room(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own not in MAY_IMPORT:
        return
    allowed = MAY_IMPORT[own] | {own}
    used = {room(name) for name in imported(path) if name.split(".")[0] == "misa"} - {None}
    assert used <= allowed, f"{path.name} is in {own} and may import {sorted(allowed)}, not {sorted(used - allowed)}"


@pytest.mark.parametrize("path", sorted((ROOT / "ops").glob("*.py")), ids=lambda p: p.name)
def test_ops_need_no_framework(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"mmdet", "mmengine", "mmcv", "matplotlib"}


def test_experiments_are_values():
    for path in (ROOT.parent / "experiments").glob("*.py"):
        assert set(imported(path)) <= {"misa.experiment", "dataclasses", "typing"}
