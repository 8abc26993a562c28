"""The documentation: links lead somewhere, the site builds without warnings, and the code on its pages runs."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import misa.objectives
from misa.cli import main
from misa.engine.runs.places import default_folder
from misa.ops.affinity import KERNELS
from misa.rows import table_module
from tests.helpers import page_code

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_demo_has_one_folder_everywhere():
    """What `make demo` writes is what `misa train` writes and what every example reads."""
    made = re.findall(r"call train_notebook,(\S+),(\S+)\)", (ROOT / "Makefile").read_text())
    assert dict(made) == {row: str(default_folder(row, 0)) for row in ("demo:long", "demo:box")}
    rows = "|".join(re.escape(name) for name in table_module("demo").ROWS)
    named = 0
    for page in (*PAGES, ROOT / "Makefile", *ROOT.glob("misa/**/*.py"), *ROOT.glob("notebooks/*.ipynb")):
        for folder in re.findall(r"runs/(?:figures/)?(demo[\w-]*)", page.read_text(encoding="utf-8")):
            assert re.fullmatch(rf"demo-({rows})-seed\d", folder), f"{page.name} names runs/{folder}"
            named += 1
    assert named > 20


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub generates them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    """Checks links within the project, except to executed notebooks, which exist only once the site is built."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", link) or re.fullmatch(r"notebooks/\w+\.html", link):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


def test_the_site_builds_offline_without_a_warning(tmp_path):
    """Like `make docs`, with empty pages instead of executed notebooks."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    for name in ("docs", "notebooks", "misa"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    gallery = tmp_path / "runs/gallery-smoke"
    gallery.mkdir(parents=True)
    for notebook in ROOT.glob("notebooks/*.ipynb"):
        (gallery / f"{notebook.stem}.html").write_text("<p>executed</p>")
    config = load_config(str(tmp_path / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    build(config)
    made = tmp_path / "site"
    assert "<p>executed</p>" in (made / "notebooks/affinity.html").read_text()
    method = (made / "method.html").read_text()
    assert method.count("<math") > 10
    assert "arithmatex" not in method
    assert "propagate_local" in (made / "api.html").read_text()
    for page in made.rglob("*.html"):
        loaded = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', page.read_text())
        assert not loaded, f"{page.name} loads {loaded}"


def trained(row, *, run="run"):
    """Returns the losses of a smoke run, one entry per step."""
    assert main(["train", row, "--smoke", "--gpus", "0", "--work-dir", run, "--data-root", "data"]) == 0
    return [json.loads(line) for line in Path(run, "losses.jsonl").read_text().splitlines()]


def test_the_affinity_of_the_page_trains(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(page_code("affinity.md", "mine.py"))
    monkeypatch.chdir(tmp_path)
    try:
        texture, color = trained("mine.py:texture"), trained("mine.py:color", run="color")
    finally:
        KERNELS.pop("texture", None)
    same, other = "loss_projection", "loss_global"
    assert texture[0][same] == color[0][same]
    assert texture[0][other] != color[0][other]


def test_the_objective_of_the_page_trains(tmp_path, monkeypatch):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "fill.py").write_text(page_code("objective.md", "misa/objectives/fill.py"))
    (tmp_path / "mine.py").write_text(page_code("objective.md", "mine.py"))
    monkeypatch.setattr(misa.objectives, "__path__", [*misa.objectives.__path__, str(tmp_path / "room")])
    importlib.invalidate_caches()
    monkeypatch.chdir(tmp_path)
    try:
        losses = trained("mine.py:fill")
    finally:
        sys.modules.pop("misa.objectives.fill", None)
        vars(misa.objectives).pop("fill", None)
    assert losses[0]["loss_fill"] == 0  # before its ramp
    assert losses[-1]["loss_fill"] > 0
