"""Provenance of figures: stored in the file's metadata and read back from it.

save_figure(figure, "figures", "figure4", {"command": "misa figures runs/demo-long-seed0", ...})
misa provenance figures/figure4.pdf     # prints it
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image
from pypdf import PdfReader
from pypdf.errors import PyPdfError

from misa.errors import UserError, option_name
from misa.figures.style import PRINT

_KEY = "misa"


def save_figure(figure: Figure, folder: str | Path, name: str, provenance: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write a figure as PDF (vectors, embedded TrueType) and PNG (300 dpi), with `provenance` in the file's metadata.

    Deterministic: the same figure and provenance give the same bytes, as no date is written.
    """
    text = json.dumps(dict(provenance), sort_keys=True)
    title = f"{name} ({provenance.get('what', 'misa')})"
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(PRINT):
            pdf, png = folder / f"{name}.pdf", folder / f"{name}.png"
            figure.savefig(pdf, metadata={"Title": title, "Keywords": text, "Creator": "misa", "CreationDate": None})
            figure.savefig(png, dpi=300, metadata={"Title": title, _KEY: text, "Software": "misa"})
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"figures cannot be written to {folder} ({reason}); choose another folder.") from error
    return pdf, png


def provenance_of(path: str | Path) -> dict[str, Any]:
    """Read the provenance of a figure of `save_figure`.

    Raises UserError: no such file, not a PDF or PNG, or without provenance.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a PDF or PNG made by misa figures, or their folder.")
    try:
        if path.suffix.lower() == ".pdf":
            about = PdfReader(path).metadata
            text = "" if about is None else str(about.get("/Keywords", ""))
        else:
            with Image.open(path) as image:
                text = image.info.get(_KEY, "")
    except (PyPdfError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a PDF or PNG ({error}); give one made by misa figures.") from error
    try:
        values = json.loads(text)
    except (ValueError, TypeError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} has no provenance; only figures made by misa figures do.")
    return values


def provenance_in(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The provenance of the figures in a folder and in its subfolders, by path; those of equal provenance together.

    Raises UserError: there are none.
    """
    folder = Path(folder)
    found: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if path.suffix.lower() in (".pdf", ".png") and path.is_file():
            try:
                values = provenance_of(path)
            except UserError:  # another's file, such as a mask
                continue
            names, _ = found.setdefault(json.dumps([str(path.with_suffix("")), values]), ([], values))
            names.append(str(path.relative_to(folder)))
    if not found:
        run = (
            "; what a run was made from is in its params.json and env.json" if (folder / "params.json").exists() else ""
        )
        raise UserError(
            f"{folder} has no figures made by misa figures; give a PDF or PNG of these, or their folder{run}."
        )
    return {", ".join(names): values for names, values in found.values()}


def require_own(folder: Path, ours: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError if a file figure[0-9].* of a folder was not made by misa figures, or from runs other than `ours`.

    ours: by name what identifies a run, as in the provenance's `runs`.
    """
    for path in sorted(folder.glob("figure[0-9].*")):
        try:
            theirs = provenance_of(path).get("runs", {})
        except UserError as error:
            advice = f"choose another {option_name('out')}."
            raise UserError(f"{path} exists and was not made by misa figures; {advice}") from error
        strange = [name for name, card in theirs.items() if ours.get(name) != card]
        if strange:
            raise UserError(
                f"{path} was made from another run, {strange[0]} ({theirs[strange[0]].get('row')}); give an empty "
                "folder, or delete the figures there."
            )


def as_text(provenance: Mapping[str, Any]) -> str:
    """Format the provenance, one line per value, nested ones indented; the command that redraws it comes first."""
    first = {"command": provenance["command"]} if "command" in provenance else {}
    return "\n".join(_lines({**first, **{k: v for k, v in provenance.items() if k != "command"}}, ""))


def _lines(values: Mapping[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and name == "beware":  # whole sentences
            lines += [f"{indent}{name}:", *(f"{indent}  {sentence}" for sentence in value)]
        elif isinstance(value, list):
            lines.append(f"{indent}{name}: {', '.join(map(str, value)) or 'none'}")
        else:
            lines.append(f"{indent}{name}: {value}")
    return lines
