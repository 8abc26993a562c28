"""Pages of results as self-contained HTML files with embedded images.

Templates are in `templates/`; values are escaped, so that a class name cannot inject markup.
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
    """Render a template of `templates/`, such as "inspection.html.j2".

    Raises:
        jinja2.UndefinedError: the template uses a value that is not given.
    """
    # Defaults for all pages; a warning is shown in a frame above the content.
    return _environment().get_template(template).render({"subtitle": "", "warning": "", **values})


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("misa.figures"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"shown": shown, "jpeg": jpeg, "png": png}
    return environment


def shown(cell: Any) -> str:
    """Format a table value: a dash for a missing one, one decimal for a float."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def jpeg(pixels: NDArray[np.uint8]) -> str:
    """Encode an RGB image (h w 3) as a data URL."""
    done, data = cv2.imencode(".jpg", np.ascontiguousarray(pixels[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 85])
    if not done:
        raise ValueError(f"a picture of shape {pixels.shape} cannot be written as JPEG.")
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


def png(figure: Figure) -> str:
    """Encode a figure as a data URL, at a resolution for high-density screens."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=200)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
