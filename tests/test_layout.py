"""Imports point one way: each room may use only what the table allows."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "misa"
# room: the misa modules that it may import besides its own.
MAY_IMPORT = {
    "ops": {"errors"},
    "losses": {"ops", "errors"},
    "data": {"ops", "errors", "experiment"},
    "evaluation": {"ops"},
    "figures": {"ops", "data", "errors"},
    "models": {"ops", "losses", "data", "errors"},
    "mmcv_ext": set(),
    "engine": {"ops", "losses", "data", "evaluation", "models", "figures", "errors", "experiment", "parameters"},
    "bench": {"ops", "losses", "data", "models", "engine", "figures", "errors", "experiment", "parameters"},
    "experiment": set(),
    "parameters": {"errors"},
    "errors": set(),
    "doctor": {"mmcv_ext"},
    "gallery": {"errors"},
    "cli": {"data", "engine", "figures", "bench", "doctor", "gallery", "errors", "parameters"},
    "__init__": {"mmcv_ext"},
    "__main__": {"cli"},
}
PATHS = sorted(ROOT.rglob("*.py"))


def imported(path):
    """Every module that a file imports, wherever in the file; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def rooms(path):
    """The rooms of misa that a file uses; a name of misa itself, as its version, is none."""
    parts = [name.split(".") for name in imported(path)]
    return {name[1] for name in parts if name[0] == "misa" and len(name) > 1 and not name[1].startswith("__")}


def own_room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_room_is_in_the_table():
    assert {own_room(path) for path in PATHS} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_stay_in_their_room(path):
    own = own_room(path)
    allowed, used = MAY_IMPORT[own] | {own}, rooms(path)
    assert used <= allowed, f"{path.name} is in {own} and may import {sorted(allowed)}, not {sorted(used - allowed)}"


@pytest.mark.parametrize(
    "line", ["from misa import engine", "import misa.engine.train", "from misa.engine.train import train"]
)
def test_every_form_of_import_is_seen(tmp_path, line):
    (tmp_path / "module.py").write_text(f"def late():\n    {line}\n")
    assert rooms(tmp_path / "module.py") == {"engine"}


@pytest.mark.parametrize("path", sorted((ROOT / "ops").glob("*.py")), ids=lambda p: p.name)
def test_ops_need_no_framework(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"mmdet", "mmengine", "mmcv", "matplotlib"}


def test_experiments_are_values():
    """They import each other relatively, since the folder is `misa.experiments` once installed."""
    for path in (ROOT.parent / "experiments").glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text()))
        nodes = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
        assert all(isinstance(node, ast.ImportFrom) for node in nodes if ast.unparse(node) != "import dataclasses")
        others = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
        assert others <= {"misa.experiment", "dataclasses", "typing"}
