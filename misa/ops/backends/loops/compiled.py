"""How a loop is compiled: when its module is imported, or loaded from numba's cache.

Each file of loops is complete in itself: numba compiles a cached loop anew where its own file has changed, not where a
helper's has. Numbers that serve as an index after a sum are unsigned: numba would otherwise ask of each whether it
counts from the end, which keeps loops from running several numbers at a time.
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

njit: Any = numba.njit  # its overloads know no options in a dict
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "nsz", "contract"}, "error_model": "numpy"}


class Announcement(event.Listener):
    """One line on standard error when a kernel is compiled and not loaded: it takes seconds, and is silent else."""

    said = False

    def on_start(self, event: Any) -> None:
        """The first function of a process to be compiled."""
        if not Announcement.said:
            Announcement.said = True
            print("misa: compiling the loops of the CPU, about ten seconds, kept for later runs", file=sys.stderr)

    def on_end(self, event: Any) -> None:
        """Nothing to say."""


def kernel(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function when the module is imported, or load it from numba's cache.

    Where no folder can keep the machine code, or what it kept is damaged, the function is compiled in memory.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        with event.install_listener("numba:compile", Announcement()):
            try:
                return njit(signature, cache=True, **OPTIONS)(function)
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):
                return njit(signature, **OPTIONS)(function)

    return compiled


helper = njit(inline="always", **OPTIONS)  # compiled within each kernel alone: a seventh less to compile
