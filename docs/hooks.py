"""What the pages need besides MkDocs: executed notebooks beside them, and equations without a network."""

import html
import re
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
GALLERIES = ("runs/gallery", "runs/gallery-smoke")  # of `make gallery`: the real one before the smoke test
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\(?:\(|\[)(.*?)\\(?:\)|\])</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The executed notebooks as pages of the site; an error where there are none."""
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    for gallery in GALLERIES:
        pages = [ROOT / gallery / f"{name}.html" for name in names]
        if all(page.exists() for page in pages):
            for page in pages:
                files.append(File.generated(config, f"notebooks/{page.name}", abs_src_path=str(page)))
            return files
    raise PluginError("The notebooks are not executed yet: run `make docs`, or first `misa gallery`.")


def on_page_content(output: str, **_: object) -> str:
    """Equations as MathML, which browsers draw themselves."""

    def drawn(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return str(latex2mathml.converter.convert(html.unescape(found[2]), display=display))

    return _EQUATION.sub(drawn, output)
