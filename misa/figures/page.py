"""A page of results as one HTML file that needs nothing else: its pictures are in it.

Values are escaped: a class name is text, whatever it holds.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #888; --bar: #3f90da; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note, td.note, figcaption { color: var(--faint); } p.note { max-width: 48rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.note { text-align: left; white-space: normal; }
.bar { display: inline-block; height: .7em; background: var(--bar); vertical-align: baseline; }
.grid { display: flex; flex-wrap: wrap; gap: 1rem; } figcaption { font-size: .85rem; }
figure { margin: 0; max-width: 17.5rem; } figure.three { max-width: none; }
img { display: block; max-width: 100%; } .three img { display: inline-block; margin-right: .3rem; }
img.chart { background: white; }
"""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def page(title: str, subtitle: str, parts: Sequence[Markup]) -> str:
    """The whole file."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1><p class=note>{escape(subtitle)}</p>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def section(title: str, note: str, *parts: Markup) -> Markup:
    """A heading, a sentence that says what is seen, and the content."""
    return Markup(f"<h2>{escape(title)}</h2><p class=note>{escape(note)}</p>" + "".join(parts))


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """Rows of text and markup; the last column is left-aligned where the head says "note"."""
    names = "".join(f"<th>{escape(name) if name != 'note' else ''}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=note' if name == 'note' else ''}>{_shown(cell)}</td>"
            for name, cell in zip(head, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return Markup(f"<div class=scroll><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>")


def bar(share: float, *, width: float = 9) -> Markup:
    """A bar of a share of 0 to 1; the whole is `width` em."""
    return Markup(f'<span class=bar style="width:{width * min(max(share, 0), 1):.2f}em"></span>')


def gallery(figures: Sequence[tuple[Sequence[NDArray[np.uint8]], str]], *, wide: bool = False) -> Markup:
    """Pictures (RGB) with a caption each; several pictures of one figure stand side by side."""
    cells = "".join(
        f"<figure{' class=three' if wide else ''}>{''.join(map(_picture, pictures))}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for pictures, caption in figures
    )
    return Markup(f"<div class=grid>{cells}</div>")


def chart(figure: Figure, caption: str) -> Markup:
    """A drawn figure with its caption, sharp on fine screens."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=200)
    width = round(100 * figure.get_figwidth())
    text = base64.b64encode(data.getvalue()).decode()
    picture = f'<img class=chart width={width} alt="{escape(caption)}" src="data:image/png;base64,{text}">'
    return Markup(f"<figure class=three>{picture}<figcaption>{escape(caption)}</figcaption></figure>")


def _picture(pixels: NDArray[np.uint8]) -> str:
    done, data = cv2.imencode(".jpg", np.ascontiguousarray(pixels[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 85])
    if not done:
        raise ValueError(f"a picture of shape {pixels.shape} cannot be written as JPEG.")
    h, w = pixels.shape[:2]
    text = base64.b64encode(data.tobytes()).decode()
    return f'<img width={w} height={h} alt="" src="data:image/jpeg;base64,{text}">'


def _shown(cell: Any) -> str:
    if isinstance(cell, Markup):
        return cell
    if cell is None:
        return "–"
    return escape(f"{cell:.1f}" if isinstance(cell, float) else str(cell))
