"""The gallery: pages of executed notebooks, with folded solutions, and failures shown and counted."""

import re
from pathlib import Path

import nbformat
import pytest

from misa.cli import main
from misa.commands.gallery import chosen_notebooks, page, parameters_of, with_mathml

CELLS = {
    "good": ["x: int = 1  # a number\ninteractive: bool = True\n", "'twice', 2 * x if interactive is False else 0"],
    "bad": ["x: int = 1\n", "1 / 0"],
}


@pytest.fixture
def folder(tmp_path):
    for name, (parameters, code) in CELLS.items():
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        notebook.cells = [
            nbformat.v4.new_markdown_cell(f"# The {name} one\n\nIt asks a question. And more."),
            nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(code),
            nbformat.v4.new_code_cell("'the answer'", metadata={"tags": ["solution"]}),
        ]
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    return tmp_path


def test_a_page_for_each_and_one_that_leads_to_them(folder, capsys):
    assert main(["gallery", "--notebooks", str(folder), "--out", str(folder / "out")]) == 1
    printed = capsys.readouterr().out
    assert "bad: ZeroDivisionError: division by zero" in printed
    assert "good: done" in printed
    good, bad, index = ((folder / "out" / f"{name}.html").read_text() for name in ("good", "bad", "index"))
    assert "<pre>(&#39;twice&#39;, 2)" in good or "<pre>('twice', 2)" in good
    assert "<details><summary>Solution</summary>" in good
    assert "<title>The good one</title>" in good
    assert "ZeroDivisionError" in bad
    assert 'href="good.html"' in index
    assert "The bad one" in index
    assert "It asks a question." in index
    assert "And more" not in index


def test_a_notebook_of_ones_own_needs_no_title_and_no_plain_defaults(folder, capsys):
    notebook = nbformat.read(folder / "good.ipynb", as_version=4)
    notebook.cells = notebook.cells[1:]
    notebook.cells[0].source = "x: int = 2 * 3\ninteractive: bool = True\n"
    nbformat.write(notebook, folder / "good.ipynb")
    assert main(["gallery", "good", "--notebooks", str(folder), "--out", str(folder / "out")]) == 0
    assert "12" in (folder / "out" / "good.html").read_text()
    index = (folder / "out" / "index.html").read_text()
    assert "<h2>good</h2>" in index
    assert "<h2>The bad one</h2>" not in index
    assert main(["gallery", "bad", "--notebooks", str(folder), "--out", str(folder / "out")]) == 1
    index = (folder / "out" / "index.html").read_text()
    assert "<h2>good</h2>" in index, "the pages that are there stay in the index"
    assert "<h2>The bad one</h2>" in index


@pytest.mark.parametrize("name", ["index.html", "good.ipynb", "good.html"])
def test_a_folder_of_others_is_left_as_it_is(folder, capsys, name):
    site = folder / "site"
    site.mkdir()
    (site / name).write_text("mine")
    assert main(["gallery", "good", "--notebooks", str(folder), "--out", str(site)]) == 2
    assert f"{name} exists already and is of no gallery" in capsys.readouterr().err
    assert [path.read_text() for path in site.iterdir()] == ["mine"]


def test_a_progress_bar_is_left_out(tmp_path):
    bar = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "predict:   0%"}
    cell = nbformat.v4.new_code_cell("1")
    cell.outputs = [nbformat.v4.new_output("display_data", data) for data in (bar, {"text/plain": "kept"})]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    made = page(tmp_path / "a.ipynb", warning="Smoke runs: two steps each.")
    assert "<strong>Smoke runs: two steps each.</strong>" in made
    assert "Smoke runs" not in page(tmp_path / "a.ipynb")
    assert "kept" in made
    assert "<title>a</title>" in made  # without a heading
    assert "predict:" not in made


def test_a_page_needs_no_network_and_shows_formulas(tmp_path):
    text = "# A\n\n$$\\alpha(i,j) = \\frac{1}{2N} \\sum (S - I)^2$$\n\nwith $t < 3$ and `cost $5 or $6`, $\\hat{A}^c$."
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("price = '$7$'")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    made = page(tmp_path / "a.ipynb")
    assert made.count("<math ") == 3
    assert "<mfrac>" in made
    assert "$$" not in made
    assert "cost $5 or $6" in made
    assert "$7$" in made
    assert not re.findall(r"""(?:src|href|from|import)\s*[=(]?\s*["']https?:""", made)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_no_formula_of_a_notebook_is_left_as_it_was_written(path):
    """Neither a command nor a sign that formulas have and words do not."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            made = with_mathml(cell.source)
            left = re.sub(r"<code.*?</code>|<annotation.*?</annotation>", "", made, flags=re.DOTALL)
            assert not re.search(r"\$|\\[a-zA-Z]", left), left
            assert "merror" not in made


def test_smoke_pages_have_a_folder_of_their_own(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["gallery", "good", "--notebooks", ".", "--smoke"]) == 0
    assert (folder / "runs" / "gallery-smoke" / "good.html").is_file()
    assert not (folder / "runs" / "gallery").exists()


def test_what_trains_nothing_comes_last_and_empty_folders_stay_empty(tmp_path):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for name, text in (("a", "run: str = 'r'\ndata_root: str = ''\n"), ("b", "run: str = 'r'\nsmoke: bool = False\n")):
        cell = nbformat.v4.new_code_cell(text, metadata={"tags": ["parameters"]})
        nbformat.write(
            nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), tmp_path / f"{name}.ipynb"
        )
    assert [path.stem for path in chosen_notebooks(tmp_path, [])] == ["b", "a"]
    assert [path.stem for path in chosen_notebooks(tmp_path, ["a", "b"])] == ["b", "a"]
    assert set(parameters_of(tmp_path / "a.ipynb", tmp_path, smoke=True)) == {"run"}


@pytest.mark.slow
def test_what_one_notebook_trains_another_evaluates(tmp_path, capsys):
    """In a folder without any runs, as for `make gallery` in a clean clone."""
    assert main(["gallery", "evaluate", "frequency", "--smoke", "--out", str(tmp_path / "gallery")]) == 0
    printed = capsys.readouterr().out
    assert "frequency: done" in printed
    assert "evaluate: done" in printed


def test_only_what_is_asked_for_and_a_tilde_is_the_home_folder(folder, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert main(["gallery", "good", "--notebooks", "~", "--out", "~/out"]) == 0
    assert (folder / "out" / "good.html").is_file()
    assert not (folder / "out" / "bad.html").exists()
    assert main(["gallery", "goof", "--notebooks", str(folder)]) == 2
    assert "has no notebook goof; did you mean 'good'?" in capsys.readouterr().err


def test_a_smoke_run_has_folders_of_its_own(tmp_path):
    cell = nbformat.v4.new_code_cell(
        "run: str = 'runs/a'\ndata_root: str = 'datasets'\nsmoke: bool = False\nseed: int = 0\n",
        metadata={"tags": ["parameters"]},
    )
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), tmp_path / "a.ipynb")
    assert parameters_of(tmp_path / "a.ipynb", tmp_path, smoke=False) == {}
    chosen = parameters_of(tmp_path / "a.ipynb", tmp_path, smoke=True)
    assert chosen.pop("smoke") is True
    assert set(chosen) == {"run", "data_root"}
    assert all(value.startswith(str(tmp_path / "smoke")) for value in chosen.values())


@pytest.mark.parametrize(("name", "folder"), [("figures", "out"), ("train", "work_dir")])
def test_no_smoke_run_is_written_among_real_ones(name, folder, tmp_path):
    """These folders are empty by default, which means runs/figures/<run> and runs/<row>-seed<seed>."""
    notebook = Path(__file__).parents[2] / "notebooks" / f"{name}.ipynb"
    assert parameters_of(notebook, tmp_path, smoke=True)[folder].startswith(str(tmp_path / "smoke"))
    assert folder not in parameters_of(notebook, tmp_path, smoke=False)


def test_a_notebook_that_takes_too_long_or_dies_does_not_stop_the_others(folder, capsys):
    for name, code in (("along", "import time; time.sleep(60)"), ("adead", "import os; os._exit(1)")):
        notebook = nbformat.read(folder / "good.ipynb", as_version=4)
        notebook.cells[2].source = code
        nbformat.write(notebook, folder / f"{name}.ipynb")
    words = ["gallery", "along", "adead", "good", "--notebooks", str(folder), "--out", str(folder / "out")]
    assert main([*words, "--timeout", "6"]) == 1
    printed = capsys.readouterr().out
    assert "along: a cell took more than 6 seconds" in printed
    assert "adead: its kernel died" in printed
    assert "good: done" in printed
    assert (folder / "out" / "along.html").is_file()
    assert "The good one" in (folder / "out" / "index.html").read_text()


def test_the_notebooks_are_not_replaced(folder, capsys):
    before = (folder / "good.ipynb").read_bytes()
    assert main(["gallery", "good", "--notebooks", str(folder), "--out", f"{folder}/../{folder.name}"]) == 2
    assert "is the folder of the notebooks" in capsys.readouterr().err
    assert (folder / "good.ipynb").read_bytes() == before
