"""mmcv without a compile step: a replacement for `mmcv._ext` when mmcv is installed without its compiled ops.

mmdet's models import `mmcv.ops`, which always imports the compiled module `mmcv._ext`. Compiling it takes a quarter of
an hour and ties the installation to one torch version, so `import misa` puts a finder for this single name at the front
of `sys.meta_path`:

- a compiled extension that loads is used;
- one that does not load (built against another torch: "undefined symbol") is replaced by `ops.py`, with a warning;
- without one, `ops.py` is `mmcv._ext`: PyTorch and torchvision equivalents of the ops that our models use, and a clear
  error for any other.

Standard library only: importing this file loads neither torch nor mmcv.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

NAME = "mmcv._ext"
OPS = Path(__file__).with_name("ops.py")
REBUILD = (
    "pip cache remove onedl_mmcv && "
    "pip install --force-reinstall --no-deps --no-cache-dir -c constraints.txt onedl-mmcv"
)


def _spec_of_ours() -> importlib.machinery.ModuleSpec:
    spec = importlib.util.spec_from_file_location(NAME, OPS)
    assert spec is not None, f"{OPS} ends in .py, so it has a loader"
    return spec


def _execute(spec: importlib.machinery.ModuleSpec) -> ModuleType:
    assert spec.loader is not None, f"{spec.name} was found as a file, so it has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled_spec(path: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    """Return the spec of a compiled extension in the folders `path` (`mmcv.__path__`), whether it loads or not."""
    spec = importlib.machinery.PathFinder.find_spec(NAME, path)
    return spec if spec is not None and spec.loader is not None else None


class _CompiledOrOurs(importlib.abc.Loader):
    """Loads a compiled extension, or `ops.py` if the extension does not load.

    Loading is tried once, when the module is imported: some extensions cannot be initialized twice, and `find_spec`
    should not load anything.
    """

    def __init__(self, compiled: importlib.machinery.ModuleSpec) -> None:
        self.compiled = compiled
        self.loaded = compiled

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        try:
            importlib.import_module("torch")  # the extension links to torch's libraries, which must be loaded first
            return _execute(self.compiled)
        except Exception as error:  # usually ImportError; the warning shows it
            reason = " ".join(str(error).split())
            warnings.warn(
                f"mmcv's compiled ops at {self.compiled.origin} do not load ({type(error).__name__}: {reason}); "
                f"misa's PyTorch equivalents are used. To be rid of this message: {REBUILD}",
                RuntimeWarning,
                stacklevel=2,
            )
            self.loaded = _spec_of_ours()
            return _execute(self.loaded)

    def exec_module(self, module: ModuleType) -> None:
        """Set the module's spec to the one loaded; `create_module` has executed the module already."""
        module.__spec__ = self.loaded


class MmcvExtFinder(importlib.abc.MetaPathFinder):
    """Finds only `mmcv._ext`: the compiled one if it loads, else `ops.py`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of `mmcv._ext`; None for every other name.

        fullname: the imported name. path: `mmcv.__path__`, given by the import system. target: unused, required by the
        protocol.
        """
        if fullname != NAME:
            return None
        compiled = compiled_spec(path)
        if compiled is None:
            return _spec_of_ours()
        return importlib.machinery.ModuleSpec(NAME, _CompiledOrOurs(compiled), origin=compiled.origin)


def install() -> None:
    """Insert the finder at the front of `sys.meta_path`, once. An imported `mmcv._ext` is not replaced."""
    if not any(type(finder).__qualname__ == MmcvExtFinder.__qualname__ for finder in sys.meta_path):
        sys.meta_path.insert(0, MmcvExtFinder())


def is_ours(module: ModuleType) -> bool:
    """Return whether this `mmcv._ext` is `ops.py`, not a compiled extension."""
    return getattr(module, "__file__", None) == str(OPS)
