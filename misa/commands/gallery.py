"""Execute the notebooks and write each as a self-contained page, which needs no network.

Solutions of exercises are folded. The page of a notebook that fails shows the error, and the others still run.

example: misa gallery affinity frequency --out runs/gallery
"""

import ast
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from misa.engine.runs.places import SMOKE_SUFFIX
from misa.errors import UserError, did_you_mean, option_name
from misa.parameters import Parameters, argument, option

# Parameters that name a folder; a smoke run redirects them, so that it never mixes with real runs.
_FOLDERS = ("run", "runs", "work_dir", "out", "root", "data_root")
_TITLE = "misa: the notebooks, executed"  # of the index; it marks a folder as a gallery
# Stored widgets are removed: without a kernel a progress bar would stay at 0 %.
_WIDGET = "application/vnd.jupyter.widget-view+json"
_SMOKE = "Smoke runs: two training steps each, to see that everything runs; the numbers and figures mean nothing."
# Formulas are MathML, drawn by browsers; scripts that nbconvert would load for them and for widgets are left out.
_FOLDED = """{% extends 'lab/index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock html_head_js_requirejs %}
{% block html_head_js_mathjax %}{% endblock html_head_js_mathjax %}
{% block html_head_js_mermaidjs %}{% endblock html_head_js_mermaidjs %}
{% block jupyter_widgets %}{% endblock jupyter_widgets %}
{% block codecell %}
{% if 'solution' in cell.metadata.get('tags', []) %}<details><summary>Solution</summary>{{ super() }}</details>
{% else %}{{ super() }}{% endif %}
{% endblock codecell %}"""


class Gallery(Parameters):
    """Options of `misa gallery`."""

    names: tuple[str, ...] = argument("notebooks, such as affinity frequency (default: all)", default=(), optional=True)
    notebooks: str = option("notebooks", "folder of the notebooks")
    out: str = option("", "folder to write the pages into (default: runs/gallery, with --smoke runs/gallery-smoke)")
    smoke: bool = option(False, "smoke test: two training steps wherever something is trained")
    timeout: int = option(4 * 3600, "time limit of a cell, in seconds", low=1)


def run(options: Gallery) -> int:
    """Execute and convert; returns 1 if a notebook failed."""
    folder = Path(options.notebooks).expanduser()
    out = Path(options.out or f"runs/gallery{SMOKE_SUFFIX * options.smoke}").expanduser()
    paths = chosen_notebooks(folder, options.names)
    if out.resolve() == folder.resolve():
        raise UserError(
            f"{option_name('out')} {out} is the folder of the notebooks, which would be replaced; give another."
        )
    _require_gallery(out, [path.name for path in paths])
    warning = _SMOKE if options.smoke else ""
    _write_index(folder, out, warning)  # from now on the folder is a gallery, also after a kill
    failed: dict[str, str] = {}
    for path in paths:
        start = time.monotonic()
        error = execute(path, out, smoke=options.smoke, timeout=options.timeout)
        if error:
            failed[path.stem] = error
        print(f"{path.stem}: {error or 'done'}, {time.monotonic() - start:.0f} s", flush=True)
    _write_index(folder, out, warning)
    print(f"open {out / 'index.html'}")
    return 1 if failed else 0


def _require_gallery(out: Path, names: Sequence[str]) -> None:
    """Raise UserError if a folder that is no gallery has files that the pages would replace; create it."""
    front = out / "index.html"
    if front.is_file() and _TITLE in front.read_text(encoding="utf-8", errors="replace"):
        return
    pages = [name for notebook in names for name in (notebook, f"{Path(notebook).stem}.html")]
    for name in ("index.html", *pages):
        if (out / name).exists():
            raise UserError(f"{out / name} exists already and is of no gallery; give another {option_name('out')}.")
    out.mkdir(parents=True, exist_ok=True)


def _write_index(folder: Path, out: Path, warning: str) -> None:
    """Write the index of all pages in `out` of the notebooks in `folder`, earlier ones among them."""
    pages = [out / path.with_suffix(".html").name for path in chosen_notebooks(folder, ())]
    there = [page for page in pages if page.is_file() and page.with_suffix(".ipynb").is_file()]
    (out / "index.html").write_text(index(there, warning=warning), encoding="utf-8")


def chosen_notebooks(folder: Path, names: Sequence[str]) -> list[Path]:
    """Returns the named notebooks, or all; those that train nothing come last and reuse the runs of the others."""
    paths = sorted(folder.glob("*.ipynb"), key=lambda path: ("smoke" not in _declared(path), path))
    there = {path.stem: path for path in paths}
    if not there:
        raise UserError(f"{folder} holds no notebooks; give the project's folder with --notebooks.")
    for name in names:
        if name not in there:
            hint = did_you_mean(name, there) or f"; there are {', '.join(there)}."
            raise UserError(f"{folder} has no notebook {name}{hint}")
    return [path for name, path in there.items() if not names or name in names]


def _declared(path: Path) -> dict[str, Any]:
    """Returns the parameters of a notebook with their defaults, True for one that is an expression."""
    import papermill

    declared: dict[str, Any] = {}
    for name, parameter in papermill.inspect_notebook(str(path)).items():
        try:
            declared[name] = ast.literal_eval(parameter["default"])
        except (ValueError, SyntaxError, TypeError):  # such as 2 * 3: it cannot be empty
            declared[name] = True
    return declared


def parameters_of(path: Path, out: Path, *, smoke: bool) -> dict[str, Any]:
    """Returns a notebook's parameters: the demo's row, no live panels, and separate folders for a smoke run."""
    declared = _declared(path)
    found: dict[str, Any] = {"interactive": False} if "interactive" in declared else {}
    found |= {"row": "demo:long"} if path.stem == "train" else {}  # the run that the other notebooks read
    if smoke:
        found |= {name: value for name, value in {"smoke": True, "seeds": 2}.items() if name in declared}
        # A notebook with `smoke` trains into RUN-smoke; the others read it there.
        run = f"demo-long{SMOKE_SUFFIX * ('smoke' not in declared)}"
        shared = {"run": run, "runs": run, "data_root": "data"}
        for name in _FOLDERS:
            # Empty ones are unused, except those to write into, as is the data's where a notebook trains.
            written = name in ("out", "work_dir") or (name == "data_root" and "smoke" in declared)
            if name in declared and (declared[name] or written):
                found[name] = str((out / "smoke" / shared.get(name, path.stem)).resolve())
    return found


def execute(path: Path, out: Path, *, smoke: bool = False, timeout: int = 4 * 3600) -> str:
    """Execute one notebook into `out` and write its page; returns the last line of an error, "" for success."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    executed = out / path.name
    error = ""
    try:
        papermill.execute_notebook(
            str(path),
            str(executed),
            parameters_of(path, out, smoke=smoke),
            progress_bar=False,
            execution_timeout=timeout,
            extra_arguments=["--IPKernelApp.log_level=40"],
        )
    except papermill.PapermillExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue}".splitlines()[0]
    except CellTimeoutError:
        error = f"a cell took more than {timeout} seconds ({option_name('timeout')})"
    except DeadKernelError:
        error = "its kernel died, as for want of memory"
    executed.with_suffix(".html").write_text(page(executed, warning=_SMOKE if smoke else ""), encoding="utf-8")
    return error


def page(executed: Path, *, warning: str = "") -> str:
    """Convert an executed notebook to one self-contained page, with a warning on top if there is one."""
    import nbformat
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    exporter: Any = HTMLExporter(
        extra_loaders=[DictLoader({"folded.html.j2": _FOLDED})], template_file="folded.html.j2"
    )
    exporter.register_filter("markdown2html", with_mathml)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _WIDGET not in output.get("data", {})]
    # The title; nbconvert's default is "Notebook".
    headings = (cell.source for cell in notebook.cells if cell.source.startswith("# ") and cell.cell_type == "markdown")
    notebook.metadata["title"] = next(headings, f"# {executed.stem}").partition("\n")[0].removeprefix("# ")
    if warning:
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(f"**{warning}**"))
    body, _ = exporter.from_notebook_node(notebook)
    return str(body)


def with_mathml(markdown: str) -> str:
    """Convert Markdown to HTML, with formulas between $ or $$ as MathML."""
    from latex2mathml.converter import convert
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        """nbconvert's, which leaves formulas to a script of the page."""

        def block_math(self, body: str) -> str:
            return str(convert(body, display="block"))

        def inline_math(self, body: str) -> str:
            return str(convert(body))

    return str(MarkdownWithMath(renderer=Renderer(escape=False)).render(markdown))


def index(pages: Sequence[Path], *, warning: str = "") -> str:
    """Returns the index page: title, first sentence and last picture of each page, below an optional warning."""
    import nbformat

    from misa.figures.page import render

    cards = []
    for path in pages:
        try:
            notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
        except ValueError:  # cut off by a kill
            continue
        texts = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        # An error report may precede the title.
        first = next((text for text in texts if text.startswith("# ")), f"# {path.stem}")
        title, _, text = first.partition("\n")
        sentence = re.split(r"(?<=[.?!])\s", text.strip().replace("\n", " "), maxsplit=1)[0]
        pictures = [
            output["data"]["image/png"]
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        cards.append(
            {
                "href": path.name,
                "title": title.lstrip("# "),
                "text": re.sub(r"[*`]", "", sentence),
                "picture": pictures[-1] if pictures else "",
            }
        )
    return render("gallery.html.j2", title=_TITLE, warning=warning, cards=cards)
