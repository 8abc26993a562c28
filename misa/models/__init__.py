"""Networks: the only room that subclasses mmdet."""

import contextlib
import io

# mmdet prints to standard output when it is first imported; importing a library should be silent.
with contextlib.redirect_stdout(io.StringIO()):
    import mmdet.datasets
    import mmdet.models  # noqa: F401
