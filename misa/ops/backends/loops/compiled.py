"""Compilation of the loops: each is compiled when its module is imported, or loaded from numba's cache.

Each file of loops is self-contained: numba recompiles a cached loop if its own file changed, but not if the file of a
helper did. Computed indices are unsigned: numba would otherwise test each for negative indexing, which prevents
vectorization.
"""

import pickle
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import numba
import numpy as np
from numba.core import event
from numpy.typing import NDArray

F4: TypeAlias = NDArray[np.float32]
F8: TypeAlias = NDArray[np.float64]
U4: TypeAlias = NDArray[np.uint32]
I4: TypeAlias = NDArray[np.int32]
I8: TypeAlias = NDArray[np.int64]
U1: TypeAlias = NDArray[np.uint8]

njit: Any = numba.njit  # Any, as its overloads accept no options from a dict
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "nsz", "contract"}, "error_model": "numpy"}


class CompilationNotice(event.Listener):
    """Prints one line on standard error when kernels are compiled, which takes seconds; silent when they are cached."""

    said = False

    def on_start(self, event: Any) -> None:
        """Print the line for the first function that the process compiles."""
        if not CompilationNotice.said:
            CompilationNotice.said = True
            print("misa: compiling the loops of the CPU, about ten seconds, kept for later runs", file=sys.stderr)

    def on_end(self, event: Any) -> None:
        """No-op, required by the interface."""


def kernel(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function when the module is imported, or load it from numba's cache.

    If no cache folder is writable, or the cached code is damaged, the function is compiled in memory.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        with event.install_listener("numba:compile", CompilationNotice()):
            try:
                return njit(signature, cache=True, **OPTIONS)(function)
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):
                return njit(signature, **OPTIONS)(function)

    return compiled


helper = njit(inline="always", **OPTIONS)  # compiled only as part of kernels: a seventh less to compile
