"""A page of results as one HTML file that needs nothing else: its pictures are in it.

Templates are in `templates/`; values are escaped, so that a class name is text, whatever it holds.
"""

import base64
import io
import math
from functools import cache
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from numpy.typing import NDArray


def render(template: str, **values: Any) -> str:
    """A template of `templates/`, such as "inspection.html.j2", filled with values.

    Raises:
        jinja2.UndefinedError: the template uses a value that is not given.
    """
    # Of all pages: a line above the content, in a frame, where there is something to beware of.
    return _environment().get_template(template).render({"subtitle": "", "warning": "", **values})


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("misa.figures"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"shown": shown, "jpeg": jpeg, "png": png}
    return environment


def shown(cell: Any) -> str:
    """A value of a table as text: a dash where there is none, one decimal of a number that is not whole by type."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def jpeg(pixels: NDArray[np.uint8]) -> str:
    """An RGB picture (h w 3) as the address of an image in the page."""
    done, data = cv2.imencode(".jpg", np.ascontiguousarray(pixels[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 85])
    if not done:
        raise ValueError(f"a picture of shape {pixels.shape} cannot be written as JPEG.")
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


def png(figure: Figure) -> str:
    """A drawn figure as the address of an image in the page, sharp on fine screens."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=200)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
