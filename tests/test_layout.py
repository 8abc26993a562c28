"""Import rules: a folder ("room") of misa imports only what the table allows, and there are no circular imports."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "misa"
FILES = {"errors", "experiment", "files", "machine", "parameters", "rows"}
# room: the misa modules that it may import besides its own.
MAY_IMPORT = {
    "errors": set(),
    "experiment": set(),
    "files": {"errors"},
    "machine": {"errors"},
    "rows": {"errors", "experiment"},
    "parameters": {"errors", "machine"},
    "ops": {"errors"},
    "losses": {"ops", "errors", "experiment"},
    "data": {"ops", "errors", "experiment", "files"},
    "evaluation": {"ops", "files"},
    "figures": {"ops", "data", "errors", "files"},
    "objectives": {"ops", "losses", "errors", "experiment"},
    "models": {"ops", "losses", "objectives", "data", *FILES},
    "mmcv_ext": set(),
    "engine": {"ops", "losses", "objectives", "data", "evaluation", "models", "figures", *FILES},
    "commands": {"ops", "data", "mmcv_ext", "figures", "engine", *FILES},
    "notebooks": {"commands", "parameters"},
    "cli": {"commands", "errors", "machine", "rows"},
    "api": {"ops", "data", "models", "figures", "engine", *FILES},
    "__init__": {"mmcv_ext"},
    "__main__": {"cli"},
}
# The same inside engine/: neither run folders nor prediction may import training.
ENGINE = {
    "runs": set(),
    "training": {"runs"},
    "sweeps": {"runs"},
    "prediction": {"runs"},
    "labelling": {"runs", "training", "prediction"},
    "reports": {"runs", "training", "prediction", "sweeps"},
    "__init__": set(),
}
PATHS = sorted(ROOT.rglob("*.py"))
LINES, ARGUMENTS = 60, 10  # maximum of a function, see `test_functions_are_small`
# Kernels are one loop each, and the compiler needs their arrays as separate arguments.
KERNELS = {
    *(f"ops/backends/loops/{name}.py" for name in ("products", "sums", "trees", "windows")),
    *(f"ops/backends/cuda/{name}.py" for name in ("features", "merges", "sums", "tour", "trees", "windows")),
}
# Public functions whose keywords must not change, and mmcv's own signatures.
PROMISED = {
    "losses/distillation.py:distillation_loss",
    "mmcv_ext/ops.py:roi_align_backward",
    "mmcv_ext/ops.py:roi_align_forward",
    "ops/propagation.py:propagate_global",
    "ops/propagation.py:propagate_local",
    "ops/propagation.py:propagate_pamr",
}


def imported(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, also inside functions; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def rooms(path: Path, *, below: str = "misa") -> set[str]:
    """Returns the folders of `below` that a file imports from; names of misa itself, such as its version, are none."""
    parts = [name.removeprefix(f"{below}.").split(".") for name in imported(path) if name.startswith(f"{below}.")]
    return {name[0] for name in parts if not name[0].startswith("__")}


def own_room(path: Path, root: Path = ROOT) -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


def module_of(name: str) -> str | None:
    """Returns the module of misa that defines an imported name; None for other packages."""
    parts = name.split(".")
    while parts and parts[0] == "misa":
        path = ROOT.parent.joinpath(*parts)
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts)
        parts.pop()
    return None


def circle(files: dict[str, set[str]]) -> list[str]:
    """Returns modules that import each other in a cycle; empty if there is none."""
    try:
        graphlib.TopologicalSorter(files).prepare()
    except graphlib.CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_every_room_is_in_the_tables():
    assert {own_room(path) for path in PATHS} == set(MAY_IMPORT)
    engine = ROOT / "engine"
    assert {own_room(path, engine) for path in PATHS if engine in path.parents} == set(ENGINE)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_stay_in_their_room(path):
    own = own_room(path)
    allowed, used = MAY_IMPORT[own] | {own}, rooms(path)
    assert used <= allowed, f"{path.name} is in {own} and may import {sorted(allowed)}, not {sorted(used - allowed)}"
    if own == "engine":
        own = own_room(path, ROOT / "engine")
        allowed, used = ENGINE[own] | {own}, rooms(path, below="misa.engine")
        assert used <= allowed, f"{path} is in engine.{own}, may import {sorted(allowed)}, not {sorted(used - allowed)}"


def test_no_files_import_each_other_in_a_circle():
    graph = {}
    for path in PATHS:
        own = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        # A package's __init__ runs before the files in it, which is a cycle only if it imports them.
        graph[own] = {name for name in map(module_of, imported(path)) if name is not None and name != own}
    assert circle(graph) == []


def private(tree: ast.AST) -> Iterator[str]:
    """Yield names of misa with a leading underscore that a file imports, accesses in an imported module, or patches.

    A file of `misa.commands` with a leading underscore is not a command, but its names are public.
    """
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = [*modules.values()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.append(f"{modules.get(node.value.id, '')}.{node.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    names = {name for name in found if re.fullmatch(r"misa(\.\w+)+", name)} - {"misa.commands._shared"}
    yield from sorted(name for name in names if re.match(r"_(?!_)", name.rpartition(".")[2]))


EVERY = [*PATHS, *(path for path in sorted(Path(__file__).parent.rglob("*.py")) if path != Path(__file__))]


@pytest.mark.parametrize("path", EVERY, ids=lambda p: str(p.relative_to(ROOT.parent)))
def test_private_names_stay_in_their_file(path):
    """In tests as well: a function worth its own test is public and has a docstring."""
    assert list(private(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from misa.rows import _table", "misa.rows._table"),
        ("from misa import rows\nrows._table('demo')", "misa.rows._table"),
        ("from misa import rows as r\ndef f():\n    return r._PACKAGE", "misa.rows._PACKAGE"),
        ("patch('misa.rows._table', None)", "misa.rows._table"),
        ("from misa import rows\nrows.__name__, 'misa.rows.table'", None),
    ],
)
def test_a_private_name_is_seen(text, name):
    assert list(private(ast.parse(text))) == ([] if name is None else [name])


def test_a_circle_is_seen():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "line",
    [
        "from misa import engine",
        "import misa.engine.training.train",
        "from misa.engine.training.train import train",
    ],
)
def test_every_form_of_import_is_seen(tmp_path, line):
    (tmp_path / "module.py").write_text(f"def late():\n    {line}\n")
    assert rooms(tmp_path / "module.py") == {"engine"}


def test_rooms_are_small():
    """At most a dozen files per folder of engine/."""
    for room in ROOT.joinpath("engine").iterdir():
        assert len([path for path in room.glob("*.py") if path.stem != "__init__"]) <= 12


def too_large(tree: ast.AST) -> Iterator[str]:
    """Yield the functions with more than LINES lines or ARGUMENTS arguments, not counting self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            wide = len([name for name in names if name not in ("self", "cls")]) > ARGUMENTS
            if wide or (node.end_lineno or 0) - node.lineno >= LINES:
                yield node.name


def test_functions_are_small():
    found = {
        f"{file}:{name}"
        for path in PATHS
        if (file := path.relative_to(ROOT).as_posix()) not in KERNELS
        for name in too_large(ast.parse(path.read_text()))
    }
    new, gone = found - PROMISED, PROMISED - found
    assert not new, f"at most {LINES} lines and {ARGUMENTS} arguments: split {sorted(new)}"
    assert not gone, f"no longer too large, or moved: take {sorted(gone)} from the list in this file"


@pytest.mark.parametrize(
    ("text", "large"),
    [
        ("def f():\n" + "    x = 1\n" * 59, []),
        ("def f():\n" + "    x = 1\n" * 60, ["f"]),
        ("class A:\n    def f(self, a, b, c, d, e, f, g, h, i, *, j): ...", []),
        ("class A:\n    def f(self, a, b, c, d, e, f, g, h, i, *, j, k): ...", ["f"]),
    ],
)
def test_a_large_function_is_seen(text, large):
    assert list(too_large(ast.parse(text))) == large


@pytest.mark.parametrize("path", sorted((ROOT / "ops").rglob("*.py")), ids=lambda p: p.name)
def test_ops_need_no_framework(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"mmdet", "mmengine", "mmcv", "matplotlib"}


def test_experiments_are_values():
    """Their imports of each other are relative, since the folder is `misa.experiments` once installed."""
    for path in (ROOT.parent / "experiments").glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text()))
        nodes = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
        assert all(isinstance(node, ast.ImportFrom) for node in nodes if ast.unparse(node) != "import dataclasses")
        others = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
        assert {name for name in others if not str(name).startswith("misa.objectives.")} <= {
            "misa.experiment",
            "dataclasses",
            "typing",
        }
