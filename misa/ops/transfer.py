"""Copies from the host to a device without synchronization, and copies kept on the host."""

import torch
from torch import Tensor

STAGED = 2**16  # bytes that CUDA copies from pageable memory asynchronously; larger copies must be pinned not to block


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return the values on the device; the copy is asynchronous for any size."""
    if device.type == "cuda" and values.device.type == "cpu" and values.nbytes > STAGED:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def with_host_copy(there: Tensor, host: Tensor) -> Tensor:
    """Return the device tensor `there` with its copy on the host attached for `on_host`."""
    if there is not host:  # they are one tensor on the CPU
        there.host = host, there._version  # type: ignore[attr-defined]
    return there


def on_host(values: Tensor) -> Tensor:
    """Return the values on the host; synchronizes unless `with_host_copy` gave it one that is up to date."""
    kept: Tensor | None
    kept, version = getattr(values, "host", (None, None))
    return values.cpu() if kept is None or version != values._version else kept
