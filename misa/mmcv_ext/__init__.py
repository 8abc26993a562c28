"""mmcv without a compile step: `mmcv._ext` is found here when mmcv was installed without its compiled ops.

mmdet's models import `mmcv.ops`, and that imports the compiled module `mmcv._ext` at once, used or not. Compiling it
takes a quarter of an hour and ties the installation to one torch, so `import misa` puts a finder for this single name
at the front of `sys.meta_path`:

- a compiled extension beside mmcv that loads is used as it is;
- one that does not load (built against another torch: "undefined symbol") is replaced by `ops.py`, with a warning;
- where there is none, `ops.py` is `mmcv._ext`: PyTorch and torchvision equivalents of the ops that our models reach,
  and a clear error for any other.

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
    """The compiled extension in one of the folders `path` (`mmcv.__path__`), whether it loads or not."""
    spec = importlib.machinery.PathFinder.find_spec(NAME, path)
    return spec if spec is not None and spec.loader is not None else None


class _CompiledOrOurs(importlib.abc.Loader):
    """Loads a compiled extension, or `ops.py` when the extension does not load.

    Only an attempt can tell whether a shared library loads, and it is made once, when the module is imported: some
    extensions refuse to be initialised a second time, and asking `find_spec` should not load anything.
    """

    def __init__(self, compiled: importlib.machinery.ModuleSpec) -> None:
        self.compiled = compiled
        self.loaded = compiled

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        try:
            importlib.import_module("torch")  # the extension links to torch's libraries and cannot find them itself
            return _execute(self.compiled)
        except Exception as error:  # ImportError as a rule; whatever it is, the warning shows it
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
        """The module comes executed from `create_module`; let it say which of the two it is."""
        module.__spec__ = self.loaded


class MmcvExtFinder(importlib.abc.MetaPathFinder):
    """Finds `mmcv._ext`, and nothing else: the compiled one where it loads, `ops.py` otherwise."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of `mmcv._ext`; None for every other name.

        Args:
            fullname: the name that is imported.
            path: `mmcv.__path__`, given by the import system.
            target: unused, part of the protocol.
        """
        if fullname != NAME:
            return None
        compiled = compiled_spec(path)
        if compiled is None:
            return _spec_of_ours()
        return importlib.machinery.ModuleSpec(NAME, _CompiledOrOurs(compiled), origin=compiled.origin)


def install() -> None:
    """Put the finder at the front of `sys.meta_path`, once. A `mmcv._ext` that is already imported stays."""
    if not any(type(finder).__qualname__ == MmcvExtFinder.__qualname__ for finder in sys.meta_path):
        sys.meta_path.insert(0, MmcvExtFinder())


def is_ours(module: ModuleType) -> bool:
    """Whether this `mmcv._ext` is `ops.py` (True) or something else, as a rule a compiled extension (False)."""
    return getattr(module, "__file__", None) == str(OPS)
