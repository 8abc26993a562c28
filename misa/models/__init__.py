"""Networks: the only room that subclasses mmdet."""

import contextlib
import io

# mmdet greets on standard output when it is first imported; a library's import should be silent.
with contextlib.redirect_stdout(io.StringIO()):
    import mmdet.datasets
    import mmdet.models  # noqa: F401
