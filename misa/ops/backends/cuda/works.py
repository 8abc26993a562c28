"""Whether Triton kernels run here, and helpers for their launches."""

import os
import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_said: set[str] = set()


def say_once(sentence: str) -> None:
    """Warn about a slower fallback, once per process and sentence."""
    if sentence not in _said:
        _said.add(sentence)
        warnings.warn(sentence, stacklevel=3)


# Runs while torch.compile traces, without a graph break. torch.compiler.assume_constant_result does the same but
# imports the compiler, and scipy with it, when called.
say_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on CPU tensors; Triton reads TRITON_INTERPRET on import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def triton_works() -> bool:
    """Return whether Triton compiles and launches a kernel; tried once per process, with a warning on failure.

    Triton may be missing, or the C compiler and Python headers with which it builds its launcher at the first launch.
    False without a CUDA device, unless kernels are interpreted.
    """
    if not interpreted() and not torch.cuda.is_available():
        return False
    try:
        from misa.ops.backends.cuda.probe import doubles

        right = doubles("cpu" if interpreted() else "cuda")
        reason = "" if right else "its first kernel computed a wrong result"
    except Exception as error:  # anything that Triton's compilers raise: warn and fall back to torch operations
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if reason:
        say_once(
            f"Triton's kernels do not run here ({reason}): propagation on CUDA falls back to torch operations, which "
            "give the same results several times slower; install triton, a C compiler (gcc) and Python's headers."
        )
    return not reason


def block(usual: int, needed: int) -> int:
    """Return the elements per program of a kernel: `usual`, or in the interpreter all that are `needed`, up to 1024."""
    return min(1024, 1 << (needed - 1).bit_length()) if interpreted() else usual


def table(numbers: Sequence[int] | Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """Copy integers from the host as int32, asynchronously."""
    return torch.tensor(list(numbers), dtype=torch.int32).to(like.device, non_blocking=True)
