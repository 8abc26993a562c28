"""Committed notebooks: no outputs, no logic, parameters declared in the package."""

import ast
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import mmcv
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from papermill.inspection import inspect_notebook
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from misa.commands.evaluate import Evaluate
from misa.commands.figures import Figures
from misa.commands.tables import Tables
from misa.commands.train import Train
from misa.data.scenes.boxfolder import write_box_folder
from misa.engine.runs.folder import opened
from misa.errors import UserError
from misa.notebooks import AffinityParameters, FrequencyParameters, OwnDataParameters

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PARAMETERS = {
    "affinity": AffinityParameters,
    "evaluate": Evaluate,
    "figures": Figures,
    "frequency": FrequencyParameters,
    "own_data": OwnDataParameters,
    "tables": Tables,
    "train": Train,
}


# For every declared parameter a value other than its default, with which the tests below run. Paths are in PATHS, and
# each test that runs the notebook sets them.
VALUES = {
    "affinity": {
        "boxes": "20 30 80 70 dotted cross", "threads": 2, "smoke": True, "interactive": False, "local_bandwidth": 0.3,
        "tree_bandwidth": 0.2, "semantic_scale": 3.0, "balance": 1.5, "form": "product", "steps": 4,
    },
    "evaluate": {"checkpoint": "none", "boundary": True, "gpus": 0, "workers": 1, "threads": 2},
    "figures": {
        "only": "3,4,5", "images": "2", "random": 2, "worst": 1, "seed": 1, "channel": 3, "semantic_scale": 2.0,
        "form": "product", "smoke": True,
    },
    "frequency": {
        "boxes": "20 30 80 70 dotted cross", "threads": 2, "smoke": True, "interactive": False, "place": 1,
        "channel": 2, "radius": 2.5, "scale": 0.3,
    },
    "own_data": {"row": "own:medium", "score": 0.1, "epochs": 1, "seed": 1, "threads": 2, "smoke": True},
    "tables": {
        "table": 5, "data": "voc", "seeds": 1, "train": True, "slots": 2, "cluster": "slurm",
        "cluster_options": "timeout_min=60", "details": True, "gpus": 0, "workers": 1, "threads": 2, "smoke": True,
    },
    "train": {
        "row": "demo:box", "seed": 1, "epochs": 1, "batch": 4, "gpus": 0, "per_gpu": 2, "scale_lr": False,
        "precision": "bfloat16", "loggers": "mlflow", "workers": 1, "threads": 2, "resume": False, "smoke": True,
        "interactive": False,
    },
}  # fmt: skip
PATHS = {
    "affinity": {"run", "data_root", "image", "teacher"},
    "evaluate": {"run", "data_root", "test_dev"},
    "figures": {"runs", "out", "data_root"},
    "frequency": {"run", "data_root", "image", "teacher"},
    "own_data": {"data", "out", "photos"},
    "tables": {"data_root", "root"},
    "train": {"data_root", "work_dir", "start"},
}


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[-1].cell_type == "markdown"
    for cell in cells(path):
        assert not cell.outputs
        assert cell.execution_count is None
        assert all(len(line) <= 100 for line in cell.source.splitlines()), "JupyterLab cuts it off at 1280 pixels"
        assert "parameters" in cell.metadata.get("tags", []) or len(cell.source.splitlines()) <= 12
        definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not any(isinstance(node, definitions) for node in ast.walk(ast.parse(cell.source)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_reads_every_parameter(path):
    """Its `--help-notebook` lists them; lines that it cannot parse, as with "=" in a comment, are left out."""
    (cell,) = (cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", []))
    declared = [node.target.id for node in ast.parse(cell.source).body if isinstance(node, ast.AnnAssign)]
    assert list(inspect_notebook(path)) == declared


PAGES = [FOLDER.parent / "README.md", *sorted(FOLDER.parent.glob("docs/**/*.md"))]


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda p: p.name)
def test_papermill_is_told_to_write_where_a_folder_is(path):
    """It creates none: the output is in the project's folder, in a run's, or in one created by the line before."""
    texts = [cell.source for cell in cells(path, "markdown")] if path.suffix == ".ipynb" else [path.read_text()]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    for before, line in itertools.pairwise(["", *lines]):
        if line.startswith("papermill "):
            out = Path(line.split()[2]).parent
            known = out == Path() or f"mkdir -p {out}" == before.partition("#")[0].rstrip() or f"-p run {out}" in line
            assert known, line


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_declares_its_classs_parameters_and_defaults(path):
    """The cell equals the one generated by the class: names, defaults, and the help of the command line."""
    (cell,) = [c for c in cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert cell.source == PARAMETERS[path.stem].cell()
    declared = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    assert PARAMETERS[path.stem].read(declared) == PARAMETERS[path.stem]()
    assert any(f"{PARAMETERS[path.stem].__name__}.read(globals())" in cell.source for cell in cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_parameter_has_another_value(path):
    """So that a new parameter is tested too."""
    values, paths = VALUES[path.stem], PATHS[path.stem]
    (cell,) = [c for c in cells(path) if "parameters" in c.metadata.get("tags", [])]
    declared = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    assert values.keys() | paths == declared.keys()
    assert not values.keys() & paths
    read = PARAMETERS[path.stem].read({**declared, **values, **dict.fromkeys(paths, "a/path")})
    assert not [name for name in (*values, *paths) if getattr(read, name) == getattr(PARAMETERS[path.stem](), name)]


@pytest.mark.parametrize(
    ("made", "place"),
    [
        (FrequencyParameters, lambda p: p.folder),
        (AffinityParameters, lambda p: p.folder),
        (Figures, lambda p: Path(p.folders[0])),
        (OwnDataParameters, lambda p: p.folder),
    ],
)
def test_a_smoke_run_leaves_a_real_runs_folder_free(made, place, tmp_path, monkeypatch):
    """It gets the name that `misa train --smoke` gives; a finished run is read where it is."""
    monkeypatch.chdir(tmp_path)
    real, smoke = place(made()), place(made(smoke=True))
    assert str(smoke) == f"{real}-smoke"
    real.mkdir(parents=True)
    (real / "metrics.json").write_text("{}")
    assert place(made()) == real
    if made is not OwnDataParameters:
        assert place(made(smoke=True)) == real


def stopped(path, **parameters):
    """Returns the message with which a notebook refuses parameters injected by papermill."""
    notebook = parameterize_notebook(load_notebook_node(str(path)), parameters)
    namespace = {}
    for cell in (c for c in notebook.cells if c.cell_type == "code"):
        if "read(globals())" in cell.source:
            with pytest.raises(UserError) as caught:
                exec(cell.source, namespace)
            return str(caught.value)
        exec(cell.source, namespace)
    raise AssertionError(f"{path} reads no parameters")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_misspelt_name_and_a_wrong_type_stop_it_with_a_sentence_before_any_work(path, tmp_path, monkeypatch):
    """In the cell that reads them, before any other work; nothing is written."""
    monkeypatch.chdir(tmp_path)
    for name, value in VALUES[path.stem].items():
        wrong = f"{name[:-1]}{name[-2]}{name[-1]}"
        printed = stopped(path, **{wrong: value})
        assert f"there is no parameter {wrong}; did you mean '{name}'?" in printed
        assert "\n" not in printed
        printed = stopped(path, **{name: [value]})
        assert printed.startswith(f"parameter {name} ")
        assert "\n" not in printed
    assert not list(tmp_path.iterdir())


def papermill(tmp_path, name="train", **parameters):
    output = tmp_path / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", str(FOLDER / f"{name}.ipynb"), str(output), "--no-progress-bar"]
    command += ["--execution-timeout", "300"]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    return output, subprocess.run(command, capture_output=True, text=True, timeout=500)


def quick(name):
    """The values of a long notebook, with one thread: two on two busy cores take many times as long."""
    return {**VALUES[name], "threads": 1}


def pictures(path):
    outputs = [output for cell in cells(path) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_train_runs_headless_and_leaves_its_figures(tmp_path):
    values = {**quick("train"), "row": "demo:misa"}  # the row that has all figures
    output, done = papermill(tmp_path, work_dir=tmp_path / "run", data_root=tmp_path / "data", **values)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("ap", "health", "losses", "masks"):
        assert (tmp_path / "run" / "figures" / f"{name}.pdf").stat().st_size > 1000
    outputs = [o for cell in cells(output) for o in cell.outputs]
    assert pictures(output) == 6  # these, the samples and Figure 4
    assert any("masks" in o.get("text", "") and "AP50" in o.get("text", "") for o in outputs)
    assert "segm" in json.loads((tmp_path / "run" / "metrics.json").read_text())


@pytest.mark.slow
def test_train_stops_on_a_misspelt_parameter(tmp_path):
    _, done = papermill(tmp_path, epoch=3, work_dir=tmp_path / "run")
    assert done.returncode != 0
    assert "there is no parameter epoch; did you mean 'epochs'?" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_tables_runs_headless(tmp_path):
    """Two rows with two steps per training, one of them that of Table 4, of which a second call trains no more."""
    common = {"smoke": True, "root": tmp_path / "runs", "data_root": tmp_path / "data", "gpus": 0, "slots": 2}
    output, done = papermill(tmp_path, "tables", table="demo:box,demo:mask", seeds=1, train=True, **common)
    assert done.returncode == 0, done.stderr[-2000:]
    text = "".join(o.get("text", "") for cell in cells(output) for o in cell.outputs)
    assert "0 finished, 0 started, 2 not run" in text
    assert "2 finished, 0 started, 0 not run" in text
    for suffix in ("html", "tex", "csv"):
        assert (tmp_path / "runs" / f"table_demo_box_demo_mask_smoke.{suffix}").stat().st_size > 100
    assert (tmp_path / "runs" / "table_demo_box_demo_mask_smoke_groups.pdf").stat().st_size > 1000
    output, done = papermill(tmp_path, "tables", table=4, seeds=1, **common)
    assert done.returncode == 0, done.stderr[-2000:]
    text = "".join(o.get("text", "") for c in cells(output) for o in c.outputs)
    assert "1 finished, 0 started, 4 not run" in text
    assert "5 trainings are missing: 1 x teacher:demo_table" in text
    assert "here with slots=2, at" in text


@pytest.mark.slow
def test_train_runs_a_teacher(tmp_path):
    own = {"smoke": True, "work_dir": tmp_path / "run", "data_root": tmp_path / "data", "gpus": 0}
    _, done = papermill(tmp_path, row="teacher:demo", **own)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("ap", "losses", "masks"):
        assert (tmp_path / "run" / "figures" / f"{name}.pdf").stat().st_size > 1000
    assert "miou" in json.loads((tmp_path / "run" / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "drawn"), [("affinity", 9), ("frequency", 4)])
def test_explorers_run_headless(tmp_path, smoke_run, moved_data, name, drawn):
    """The notebook itself asserts that every loop equals the package; solutions run as well."""
    mmcv.imwrite(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8), str(tmp_path / "own.png"))
    own = {"image": tmp_path / "own.png", "teacher": smoke_run, "data_root": moved_data}
    output, done = papermill(tmp_path, name, run=smoke_run, **own, **VALUES[name])
    assert done.returncode == 0, done.stderr[-2000:]
    assert pictures(output) == drawn
    assert "widget-view" not in output.read_text()


@pytest.mark.slow
def test_figures_run_headless(tmp_path, smoke_run, moved_data):
    values = {**VALUES["figures"], "only": "1,3,4,5", "data_root": moved_data}
    output, done = papermill(tmp_path, "figures", runs=smoke_run, out=tmp_path / "out", **values)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pictures(output) == 4
    assert len(list((tmp_path / "out").iterdir())) == 8
    assert "command: misa figures" in output.read_text()


@pytest.mark.slow
def test_own_data_runs_from_a_table_of_boxes_to_an_exported_student(tmp_path):
    output, done = papermill(tmp_path, "own_data", out=os.path.relpath(tmp_path / "out"), **quick("own_data"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert pictures(output) == 4
    made = tmp_path / "out-smoke"
    assert not (tmp_path / "out").exists(), "a real run's place stays free"
    assert (made / "exported.pth").is_file()
    assert "the exported student has the same weights and finds the same" in output.read_text()
    (predictions,) = made.glob("predictions-*")
    assert (predictions / "instances.csv").is_file()
    _, source, _, _ = opened(made / "run")
    held_out = {Path(image["file_name"]).stem for image in json.loads(source.val.annotations.read_text())["images"]}
    assert {path.stem for path in (predictions / "overlay").iterdir()} == held_out


@pytest.mark.slow
def test_evaluate_runs_headless_and_leaves_its_figures(tmp_path, smoke_run):
    data_root = opened(smoke_run)[1].root  # other data would need the same classes
    values = quick("evaluate") | {"checkpoint": ""}  # with another one the guidance, of the last, is left out
    output, done = papermill(tmp_path, "evaluate", run=smoke_run, data_root=data_root, **values)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pictures(output) == 4
    for name in ("evaluation", "precision_recall", "classes", "guidance"):
        assert (Path(smoke_run) / "figures" / f"{name}.pdf").stat().st_size > 1000


RERUN = {
    "affinity": {"run": "run", "interactive": False},
    "evaluate": {"run": "run", "gpus": 0},
    "figures": {"runs": "run", "random": 1, "worst": 1, "only": "5"},
    "frequency": {"run": "run", "interactive": False},
    "own_data": {"out": "own", "data": "mine", "photos": "mine"},
    "tables": {"root": "tables", "data_root": "data", **VALUES["tables"], "train": False},
    "train": {"row": "demo:box", "work_dir": "train", "gpus": 0, "data_root": "data"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RERUN))
def test_run_all_works_twice_in_one_kernel(tmp_path, smoke_run, name):
    """As after a user has changed a parameter in the cell at the top."""
    assert set(RERUN) == set(PARAMETERS)
    values = {
        key: str(smoke_run) if value == "run" else str(tmp_path / value) if key in PATHS[name] else value
        for key, value in RERUN[name].items()
    }
    if name in ("affinity", "figures", "frequency", "own_data", "tables", "train"):
        values["smoke"] = True
    if name == "figures":
        values["out"] = str(tmp_path / "figures")
    if name == "own_data":
        write_box_folder(tmp_path / "mine", images=24)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in values.items())
    once = list(notebook.cells)
    notebook.cells += [nbformat.from_dict(json.loads(json.dumps(one))) for one in once]
    for i, one in enumerate(notebook.cells):
        one["id"] = f"cell-{i}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(c.get("execution_count") for c in notebook.cells if c.cell_type == "code")
